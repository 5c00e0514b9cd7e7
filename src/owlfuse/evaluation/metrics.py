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
    """One question with the expected answer and the model's."""

    source: str
    id: str
    image: str | bytes | None
    question: str
    expected: str
    answer: str
    kind: str
    accepted: tuple[str, ...] = ()
    """Texts of which a right answer holds one, where the data list them; else it must equal the
    expected one."""

    @property
    def right(self) -> bool:
        """Whether the answer matches, but for case and white space; with `accepted`, whether it
        holds one of these."""
        if self.accepted:
            return holds_answer(self.answer, self.accepted)
        return normalize(self.answer) == normalize(self.expected)


def holds_answer(text: str, accepted: Sequence[str]) -> bool:
    """Returns whether one of the accepted answers stands in the text as whole words, but for case
    and white space."""
    normalized = normalize(text)
    for answer in accepted:
        # not \b, which an answer that begins or ends with a sign has none of
        if re.search(rf"(?<!\w){re.escape(normalize(answer))}(?!\w)", normalized):
            return True
    return False


def questions_of(data: ChatData, source: str, history: bool = False) -> list[Question]:
    """Returns the questions of a validation source, each by itself, with answer and kind. Of a chat
    that is cut to the length, those of the remaining turns.

    Args:
        history: earlier turns stand before a question (see `question_samples`).

    Raises:
        DataError: a wrong sample of a source that does not skip them, or more than its `max_skips`
            of one that does.
    """
    samples = data.validation[source]
    never_skips = samples.on_error == "error" and policy_of(data.on_length, source) == "error"
    if never_skips:  # no sample need be encoded to know that it counts
        turns_removed = dict.fromkeys(range(len(samples)), 0)
    else:
        turns_removed = usable_samples(data, source)
    questions = []
    for index, removed in turns_removed.items():
        of_sample = question_samples(samples[index], history)
        questions += of_sample[: len(of_sample) - removed]
    return questions


def sample_questions(questions: list[Question], limit: int | None) -> list[Question]:
    """Returns at most `limit` questions, the same for every run: each kind in proportion, spread
    over the pictures. Where the data name no kinds, a question's number in its chat stands for
    one."""
    if limit is None:
        return questions
    kinds, pictures = [], []
    for sample, _, kind in questions:
        chat_id, _, number = sample.id.rpartition("#")
        kinds.append(kind or f"question {number}")
        pictures.append(sample.images[0] if sample.images else chat_id)
    return [questions[index] for index in stratified_sample(kinds, pictures, limit)]


def counts_of(questions: list[Question], sampled: list[Question]) -> dict[str, Any]:
    """Returns how many questions there are and were asked, also of each kind that the data name."""
    totals = Counter(kind for _, _, kind in questions if kind)
    sampled_counts = Counter(kind for _, _, kind in sampled if kind)
    kinds = {}
    for kind in sorted(totals):
        kinds[kind] = {"asked": sampled_counts[kind], "of": totals[kind]}
    return {"asked": len(sampled), "of": len(questions), "kinds": kinds}


def usable_samples(data: ChatData, source: str) -> dict[int, int]:
    """Returns the indices of the samples that can be loaded, and how many turns each is cut by; the
    others are logged.

    Raises:
        DataError: a wrong sample of a source that does not skip them, more than its `max_skips` of
            one that does, or nothing but wrong samples.
    """
    samples = data.validation[source]
    turns_removed, skips = {}, 0
    for index in range(len(samples)):
        item = load_or_skip(data.load, samples, index)
        if not isinstance(item, Skipped):
            turns_removed[index] = item.turns_removed
            continue
        skips += 1
        log.warning("skipped %s of validation source %s: %s", item.sample, source, item.reason)
        # a source without any sample left has no loss
        if skips > samples.max_skips or skips == len(samples):
            raise DataError(
                f"validation source {source} has {skips} wrong samples of {len(samples)}, and its "
                f"max_skips is {samples.max_skips}; the last: {item.reason}"
            )
    return turns_removed


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
    """Returns the model's answers; `blank`: with each picture replaced by one of the mean color."""
    device = next(model.parameters()).device
    samples = data.validation[source]
    answers = []
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        batch = data.prompts([(sample, samples) for sample, _, _ in chunk]).to(device)
        if blank:
            # normalised pixels: zero is the mean color
            batch = replace(batch, pixel_values=torch.zeros_like(batch.pixel_values))
        ids = generate_greedy(model, batch, max_new_tokens, data.encoder)
        texts = data.encoder.answers(list(ids))
        for (sample, expected, kind), text in zip(chunk, texts, strict=True):
            content = sample.messages[-1]["content"]
            question = "".join(part.get("text", "") for part in content).strip()
            image = sample.images[0] if sample.images else None
            if isinstance(image, str):
                image = str(samples.root / image)
            accepted = tuple(sample.metadata.get("accepted", ()))
            answers.append(
                Answer(source, sample.id, image, question, expected, text, kind, accepted)
            )
        progress(len(chunk))
    return answers


def time_answer(
    model: MultimodalLM,
    data: ChatData,
    tokens: int,
    history: bool = False,
    repeats: int = 2,
) -> float | None:
    """Returns the milliseconds per token of an answer to the first question that there is, by
    itself: the least of the repeats. None for 0 tokens, and without a question. All ranks of a
    sharded model take part."""
    # the first source may have no question
    for source, samples in data.validation.items():
        questions = questions_of(data, source, history) if tokens else []
        for sample, _, _ in questions[:1]:
            batch = data.prompts([(sample, samples)]).to(next(model.parameters()).device)
            end = data.encoder.answer_format.generation(data.tokenizer, model.llm)
            end.pop("stop_strings", None)  # an answer of a set number of tokens is timed
            wrapped = OwlfuseForConditionalGeneration.wrap(model, None, end)
            prompt = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            times = []
            # the first repeat includes the allocation of memory
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
    """Returns the cross-entropy per supervised token over the whole chats of a source, in nats;
    None where nothing is supervised."""
    device = next(model.parameters()).device
    # float64: a sum over millions of tokens
    total = torch.zeros((), dtype=torch.float64)
    tokens = torch.zeros((), dtype=torch.int64)
    batch: Batch
    for batch in data.validation_loader(source, batch_size=batch_size):
        # what was skipped or cut is reported by source
        data.note_validation(batch)
        loss, count = batch_loss(model, batch.to(device))
        total += loss.double().cpu()
        tokens += count.cpu()
        progress(len(batch.ids))
    return float(total / tokens) if tokens else None


def score(
    answers: list[Answer], blank: list[Answer] | None = None, loss: float | None = None
) -> dict[str, float]:
    """Returns the metrics of one source by their names behind `<source>/`: `contains` for a source
    that lists accepted answers, `exact_match` for others; none of the two without a question."""
    metrics: dict[str, float] = {}
    if loss is not None:
        # exp of more than 709 is no float
        metrics |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if not answers:
        return metrics
    rule = "contains" if any(answer.accepted for answer in answers) else "exact_match"
    metrics[rule] = share_right(answers)
    for kind in sorted({answer.kind for answer in answers} - {""}):
        of_kind = [answer for answer in answers if answer.kind == kind]
        metrics[f"{rule}/{kind}"] = share_right(of_kind)
    if blank:
        metrics[f"{rule}_blank"] = share_right(blank)
    return metrics


def share_right(answers: list[Answer]) -> float:
    """Returns the share of right answers, of which there is at least one."""
    return sum(answer.right for answer in answers) / len(answers)


def metric_names(source: str, sources: list[str], metrics: dict[str, float]) -> dict[str, float]:
    """Returns metrics under their full names: `<source>/<metric>`, and for a source `a_b` beside a
    source `a`, `a/<metric>_b`, so that `val_held_out` gives `val/exact_match_held_out`."""
    # the first source whose name this one extends
    base = next((name for name in sources if source.startswith(f"{name}_")), None)
    if base is None:
        return {f"{source}/{name}": value for name, value in metrics.items()}
    suffix = source.removeprefix(f"{base}_")
    named = {}
    for name, value in metrics.items():
        metric, _, kind = name.partition("/")
        named[f"{base}/{metric}_{suffix}" + (f"/{kind}" if kind else "")] = value
    return named
