"""Answers, scores and losses on validation sources."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, Sample, Skipped
from owlfuse.data.chat.truncation import policy_of
from owlfuse.data.datamodule import ChatData
from owlfuse.data.loading import load_or_skip
from owlfuse.data.subset import stratified_sample
from owlfuse.evaluation.generation import generate_greedy, milliseconds_per_token
from owlfuse.evaluation.questions import normalize, question_samples
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM

log = logging.getLogger(__name__)

Progress = Callable[[int], None]
Question: TypeAlias = tuple[Sample, str, str]
"""A question by itself, the expected answer, and its kind, "" where the data name none."""


@dataclass
class Answer:
    """One question with what was expected and what came."""

    source: str
    id: str
    image: str | bytes | None
    question: str
    expected: str
    answer: str
    kind: str
    accepted: tuple[str, ...] = ()
    """What a right answer may hold, where the data say so; else it is to be the expected one."""

    @property
    def right(self) -> bool:
        """Exact match, but for case and white space; with `accepted`, whether one of these
        stands in the answer."""
        if self.accepted:
            return holds_answer(self.answer, self.accepted)
        return normalize(self.answer) == normalize(self.expected)


def holds_answer(text: str, accepted: Sequence[str]) -> bool:
    """Whether one of the accepted answers stands in the text as whole words, but for case and
    white space."""
    whole = (rf"(?<!\w){re.escape(normalize(answer))}(?!\w)" for answer in accepted)
    return any(re.search(words, normalize(text)) for words in whole)


def questions_of(data: ChatData, source: str, history: bool = False) -> list[Question]:
    """The questions of a validation source, each by itself, with answer and kind. Of a chat that is
    cut to the length, those of the turns that are left.

    Args:
        history: what was said before a question stands before it (see `question_samples`).

    Raises:
        DataError: a wrong sample of a source that does not skip them, or more than its `max_skips`
            of one that does.
    """
    samples = data.validation[source]
    as_it_is = samples.on_error == "error" and policy_of(data.on_length, source) == "error"
    removed = dict.fromkeys(range(len(samples)), 0) if as_it_is else right_samples(data, source)
    asked = {index: question_samples(samples[index], history) for index in removed}
    return [
        question for index, mine in asked.items() for question in mine[: len(mine) - removed[index]]
    ]


def sample_questions(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` of them, the same for every run: each kind in proportion, spread over the
    pictures. Where the data name no kinds, the place of a question in its chat stands for one."""
    if limit is None:
        return questions
    kinds = [kind or f"question {sample.id.rpartition('#')[2]}" for sample, _, kind in questions]
    pictures = [
        sample.images[0] if sample.images else sample.id.rpartition("#")[0]
        for sample, _, _ in questions
    ]
    return [questions[index] for index in stratified_sample(kinds, pictures, limit)]


def counts_of(questions: list[Question], asked: list[Question]) -> dict[str, Any]:
    """How many questions there are and were asked, of each kind that the data name too."""
    there, here = (Counter(kind for _, _, kind in some if kind) for some in (questions, asked))
    kinds = {kind: {"asked": here[kind], "of": there[kind]} for kind in sorted(there)}
    return {"asked": len(asked), "of": len(questions), "kinds": kinds}


def right_samples(data: ChatData, source: str) -> dict[int, int]:
    """The indices of the samples that can be loaded, and how many turns each is cut by; the others
    are told in the log.

    Raises:
        DataError: a wrong sample of a source that does not skip them, more than its `max_skips` of
            one that does, or nothing but wrong samples.
    """
    samples = data.validation[source]
    removed, skips = {}, 0
    for index in range(len(samples)):
        item = load_or_skip(data.load, samples, index)
        if not isinstance(item, Skipped):
            removed[index] = item.turns_removed
            continue
        skips += 1
        log.warning("skipped %s of validation source %s: %s", item.sample, source, item.reason)
        if skips > samples.max_skips or skips == len(samples):
            raise DataError(
                f"validation source {source} has {skips} wrong samples of {len(samples)}, and its "
                "max_skips is "
                f"{samples.max_skips}; the last: {item.reason}"
            )
    return removed


def answer_questions(
    model: MultimodalLM,
    data: ChatData,
    source: str,
    questions: list[tuple[Sample, str, str]],
    batch_size: int,
    max_new_tokens: int,
    progress: Progress = lambda n: None,
    blank: bool = False,
) -> list[Answer]:
    """The model's answers; `blank`: with each picture replaced by one of the mean color."""
    device = next(model.parameters()).device
    answers = []
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        batch = data.prompts([(sample, data.validation[source]) for sample, _, _ in chunk]).to(
            device
        )
        if blank:
            batch = replace(batch, pixel_values=torch.zeros_like(batch.pixel_values))
        ids = generate_greedy(model, batch, max_new_tokens, data.encoder)
        texts = data.encoder.answers(list(ids))
        for (sample, expected, kind), text in zip(chunk, texts, strict=True):
            question = "".join(
                part.get("text", "") for part in sample.messages[-1]["content"]
            ).strip()
            image = sample.images[0] if sample.images else None
            image = str(data.validation[source].root / image) if isinstance(image, str) else image
            accepted = tuple(sample.metadata.get("accepted", ()))
            answers.append(
                Answer(source, sample.id, image, question, expected, text, kind, accepted)
            )
        progress(len(chunk))
    return answers


def time_answer(
    model: MultimodalLM, data: ChatData, tokens: int, history: bool = False, repeats: int = 2
) -> float | None:
    """Milliseconds per token of an answer to the first question that there is, by itself: the least
    of the repeats. None for 0 tokens, and without a question. All ranks of a model that is shared
    out take part."""
    for source, samples in data.validation.items():
        questions = questions_of(data, source, history) if tokens else []
        for sample, _, _ in questions[:1]:
            batch = data.prompts([(sample, samples)]).to(next(model.parameters()).device)
            end = data.encoder.answer_format.generation(data.tokenizer, model.llm)
            end.pop("stop_strings", None)  # an answer of a set number of tokens is timed
            wrapped = OwlfuseForConditionalGeneration.wrap(model, None, end)
            prompt = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            times = []
            for _ in range(repeats):
                with torch.no_grad():
                    visual = model.encode(batch)
                times.append(milliseconds_per_token(wrapped, tokens, **prompt, visual=visual))
            return round(min(times), 3)
    return None


# no inference_mode: FSDP keeps what its first forward makes, and training goes on with it
@torch.no_grad()
def mean_loss(
    model: MultimodalLM,
    data: ChatData,
    source: str,
    batch_size: int,
    progress: Progress = lambda n: None,
) -> float | None:
    """Cross-entropy per supervised token over the whole chats of a source, in nats; None where
    nothing is supervised."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    tokens = torch.zeros((), dtype=torch.int64)
    batch: Batch
    for batch in data.validation_loader(source, batch_size=batch_size):
        data.note_validation(batch)
        loss, count = batch_loss(model, batch.to(device))
        total += loss.double().cpu()
        tokens += count.cpu()
        progress(len(batch.ids))
    return float(total / tokens) if tokens else None


def score(
    answers: list[Answer], blank: list[Answer] | None = None, loss: float | None = None
) -> dict[str, float]:
    """Metrics of one source by the names they have behind `<source>/`: `contains` for a source that
    lists accepted answers, `exact_match` for others. What was not measured, since no question was
    asked, is not among them."""
    metrics: dict[str, float] = {}
    if loss is not None:
        metrics |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if not answers:
        return metrics
    rule = "contains" if any(answer.accepted for answer in answers) else "exact_match"
    metrics[rule] = share_right(answers)
    for kind in sorted({answer.kind for answer in answers} - {""}):
        metrics[f"{rule}/{kind}"] = share_right(
            [answer for answer in answers if answer.kind == kind]
        )
    if blank:
        metrics[f"{rule}_blank"] = share_right(blank)
    return metrics


def share_right(answers: list[Answer]) -> float:
    """The share of right answers of at least one."""
    return sum(answer.right for answer in answers) / len(answers)


def metric_names(source: str, sources: list[str], metrics: dict[str, float]) -> dict[str, float]:
    """Metrics under their full names: `<source>/<metric>`, and for a source `a_b` beside a source
    `a`, `a/<metric>_b`, so that `val_held_out` gives `val/exact_match_held_out`."""
    base = next((name for name in sources if source.startswith(f"{name}_")), None)
    if base is None:
        return {f"{source}/{name}": value for name, value in metrics.items()}
    suffix = source.removeprefix(f"{base}_")
    named = {}
    for name, value in metrics.items():
        metric, _, kind = name.partition("/")
        named[f"{base}/{metric}_{suffix}" + (f"/{kind}" if kind else "")] = value
    return named
