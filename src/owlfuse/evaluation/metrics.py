"""Answers, scores and losses on validation sources."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, Media, Sample, Skipped, without_keys
from owlfuse.data.chat.truncation import answer_turns, first_turns, policy_of
from owlfuse.data.datamodule import ChatData
from owlfuse.data.loading import load_or_skip
from owlfuse.data.notes import BatchRemarks
from owlfuse.data.subset import stratified_sample
from owlfuse.evaluation.generation import answer_limit, generate_greedy, milliseconds_per_token
from owlfuse.evaluation.matching import holds_answer
from owlfuse.evaluation.questions import normalize, question_samples
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.parallel.ranks import Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")
Progress = Callable[[int], None]
Question: TypeAlias = tuple[Sample, str, str]
"""A question by itself, the expected answer, and its kind, "" where the data name none."""

# By default this process has all of the work.
ALONE = Ranks()
# Samples that a rank loads before it tells the others which of them are wrong.
SAMPLES_LOADED = 64


@dataclass
class Answer:
    """One question with the expected answer and the model's."""

    source: str
    id: str
    image: str | bytes | None
    """The last picture that was shown: of a chat with several pictures, or with examples before the
    question, most likely the one that is asked about."""
    question: str
    expected: str
    answer: str
    kind: str
    accepted: tuple[str, ...] = ()
    """Texts of which a right answer holds one, where the data list them; else it must equal the
    expected one."""
    thought_unfinished: bool = False
    """Whether the model was still thinking after `max_new_tokens`, so that there is no answer."""
    cut: bool = False
    """Whether the answer did not end within `max_new_tokens`."""
    video: str | bytes | None = None

    @property
    def right(self) -> bool:
        """Whether the answer matches, but for case and white space; with `accepted`, whether it
        holds one of these."""
        if self.accepted:
            return holds_answer(self.answer, self.accepted)
        return normalize(self.answer) == normalize(self.expected)


def questions_of(
    data: ChatData, source: str, history: bool = False, ranks: Ranks = ALONE
) -> list[Question]:
    """Returns the questions of a validation source, each by itself, with answer and kind. Of a chat
    that is cut to the length, those of the remaining turns.

    Args:
        history: earlier turns stand before a question (see `question_samples`).
        ranks: those that share the work, all of which get all questions; by default this process
            has all of it.

    Raises:
        DataError: a wrong sample of a source that does not skip them, or more than its `max_skips`
            of one that does.
    """
    samples = data.validation[source]
    never_skips = samples.on_error == "error" and policy_of(data.on_length, source) == "error"
    if never_skips:  # no sample need be encoded to know that it counts
        turns_removed = dict.fromkeys(range(len(samples)), 0)
    else:
        turns_removed = usable_samples(data, source, ranks)
    questions = []
    for index, removed in turns_removed.items():
        questions += question_samples(without_last_turns(samples[index], removed), history)
    # one metric has one rule: where some questions list their answers, the others' are lists of one
    if any("accepted" in sample.metadata for sample, _, _ in questions):
        for sample, expected, _ in questions:
            sample.metadata.setdefault("accepted", [expected])
    return questions


def without_last_turns(sample: Sample, removed: int) -> Sample:
    """Returns a chat without its last questions and their answers, as `truncate` cuts it."""
    if not removed:
        return sample
    cut = first_turns(sample, len(answer_turns(sample)) - removed)
    # they belong to the last question
    return replace(cut, metadata=without_keys(cut.metadata, ["accepted"]))


def sample_questions(questions: list[Question], limit: int | None) -> list[Question]:
    """Returns at most `limit` questions, the same for every run: each kind in proportion, spread
    over the pictures. Where the data name no kinds, a question's number in its chat stands for
    one."""
    if limit is None:
        return questions
    kinds, pictures = [], []
    for sample, _, kind in questions:
        # `question_samples` puts the number behind the id of the chat
        chat_id, _, number = sample.id.rpartition("#")
        kinds.append(kind or f"question {number}")
        # questions about one picture tend to be right or wrong together
        visuals = sample.images or sample.videos
        pictures.append(visuals[-1] if visuals else chat_id)
    return [questions[index] for index in stratified_sample(kinds, pictures, limit)]


def counts_of(questions: list[Question], sampled: list[Question]) -> dict[str, Any]:
    """Returns how many questions there are and were asked, also of each kind that the data name."""
    totals = Counter(kind for _, _, kind in questions if kind)
    sampled_counts = Counter(kind for _, _, kind in sampled if kind)
    kinds = {}
    for kind in sorted(totals):
        kinds[kind] = {"asked": sampled_counts[kind], "of": totals[kind]}
    return {"asked": len(sampled), "of": len(questions), "kinds": kinds}


def usable_samples(data: ChatData, source: str, ranks: Ranks) -> dict[int, int]:
    """Returns the indices of the samples that can be loaded, and how many turns each is cut by; the
    others are logged.

    Raises:
        DataError: a wrong sample of a source that does not skip them, more than its `max_skips` of
            one that does, or nothing but wrong samples.
    """
    samples = data.validation[source]

    def load_block(block: range) -> list[Skipped | int]:
        outcomes: list[Skipped | int] = []
        for index in block:
            item = load_or_skip(data.load, samples, index)
            outcomes.append(item if isinstance(item, Skipped) else item.turns_removed)
        return outcomes

    turns_removed, skips = {}, 0
    blocks = chunks_of(range(len(samples)), SAMPLES_LOADED)
    of_blocks: Iterator[list[Skipped | int]] = ranks.deal(blocks, load_block)
    for block, outcomes in zip(blocks, of_blocks, strict=True):
        for index, outcome in zip(block, outcomes, strict=True):
            if not isinstance(outcome, Skipped):
                turns_removed[index] = outcome
                continue
            skips += 1
            reason = outcome.reason
            if ranks.first:
                log.warning(
                    "skipped %s of validation source %s: %s", outcome.sample, source, reason
                )
            # a source without any sample left has no loss
            if skips > samples.max_skips or skips == len(samples):
                raise DataError(
                    f"validation source {source} has {skips} wrong samples of {len(samples)}, and "
                    f"its max_skips is {samples.max_skips}; the last: {reason}"
                )
    return turns_removed


def chunks_of(items: Sequence[T], size: int) -> list[Any]:
    """Returns the items in parts of `size`, of which the last may have fewer; a part of a range is
    a range."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def answer_questions(
    model: MultimodalLM,
    data: ChatData,
    source: str,
    questions: list[Question],
    batch_size: int,
    max_new_tokens: int,
    progress: Progress = lambda n: None,
    blank: bool = False,
    ranks: Ranks = ALONE,
) -> list[Answer]:
    """Returns the model's answers.

    Args:
        blank: each picture is replaced by one of the mean color.
        ranks: those that share the batches, all of which get all answers; by default this process
            has all of them.
    """
    device = next(model.parameters()).device
    samples = data.validation[source]

    def prompts(chunk: list[Question]) -> Batch:
        batch = data.prompts([(sample, samples) for sample, _, _ in chunk]).to(device)
        if blank:
            # normalised pixels: zero is the mean color
            batch = replace(batch, pixel_values=torch.zeros_like(batch.pixel_values))
        return batch

    def generate(batch: Batch) -> list[tuple[str, bool, bool]]:
        ids = generate_greedy(
            model, batch, max_new_tokens, data.encoder, synced=ranks.synced_generation
        )
        rows = list(ids)
        unfinished = data.encoder.unfinished_thoughts(rows)
        cut = data.encoder.cut_answers(rows, model.llm)
        return list(zip(data.encoder.answers(rows), unfinished, cut, strict=True))

    answers = []
    chunks = chunks_of(questions, batch_size)
    for chunk, outputs in zip(chunks, ranks.deal(chunks, prompts, generate), strict=True):
        for (sample, expected, kind), (text, unfinished, cut) in zip(chunk, outputs, strict=True):
            content = sample.messages[-1]["content"]
            question = "".join(part.get("text", "") for part in content).strip()
            image, video = last_media(sample.images, samples.root), None
            if image is None:
                video = last_media(sample.videos, samples.root)
            accepted = tuple(sample.metadata.get("accepted", ()))
            answers.append(
                Answer(
                    source,
                    sample.id,
                    image,
                    question,
                    expected,
                    text,
                    kind,
                    accepted,
                    unfinished,
                    cut,
                    video,
                )
            )
        progress(len(chunk))
    return answers


def last_media(media: Sequence[Media], root: Path) -> Media | None:
    """Returns the last of a question's pictures or videos, paths with the source's root, without
    which reports could not open them."""
    if not media:
        return None
    last = media[-1]
    return str(root / last) if isinstance(last, str) else last


def time_answer(
    model: MultimodalLM,
    data: ChatData,
    source: str,
    question: Sample,
    tokens: int,
) -> float | None:
    """Returns the milliseconds per token of an answer of `tokens` tokens to a question of a
    validation source, by itself: the less of two. All ranks of a sharded model take
    part. None where the LLM has no positions for two tokens more."""
    batch = data.prompts([(question, data.validation[source])])
    batch = batch.to(next(model.parameters()).device)
    # the first token is not timed
    tokens = answer_limit(model, batch.input_ids.shape[1], tokens + 1) - 1
    if tokens < 1:
        return None
    end = data.encoder.answer_format.generation(data.tokenizer, model.llm)
    end.pop("stop_strings", None)  # an answer of a set number of tokens is timed
    wrapped = OwlfuseForConditionalGeneration.wrap(model, None, end)
    prompt = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    times = []
    # the first time includes the allocation of memory
    for _ in range(2):
        with torch.no_grad():
            visual = model.encode(batch)
        times.append(milliseconds_per_token(wrapped, tokens, **prompt, visual=visual))
    return round(min(times), 3)


class BatchLoss(NamedTuple):
    """The cross-entropy of a batch summed over its supervised tokens, in nats, and what there was
    to say of its samples."""

    loss_sum: float
    tokens: int
    samples: int
    remarks: BatchRemarks


def mean_loss(
    model: MultimodalLM,
    data: ChatData,
    source: str,
    batch_size: int,
    progress: Progress = lambda n: None,
    ranks: Ranks = ALONE,
) -> float | None:
    """Returns the cross-entropy per supervised token over the whole chats of a source, in nats;
    None where nothing is supervised.

    Args:
        ranks: those that share the batches; by default this process has all of them.
    """
    device = next(model.parameters()).device

    # no inference_mode: FSDP keeps what its first forward makes, and training goes on with it
    @torch.no_grad()
    def sum_loss(batch: Batch) -> BatchLoss:
        loss, count = batch_loss(model, batch.to(device))
        remarks = BatchRemarks.of(batch)
        # plain numbers: ranks pass results to each other as objects on the CPU
        return BatchLoss(float(loss), int(count), len(batch.ids), remarks)

    # a sum over millions of tokens, in Python's numbers of 64 bits
    total, tokens = 0.0, 0
    chunks = chunks_of(range(len(data.validation[source])), batch_size)
    for result in ranks.deal(chunks, partial(data.validation_batch, source), sum_loss):
        # what was skipped or cut is reported by source
        data.note_validation(result.remarks, logs=ranks.first)
        total += result.loss_sum
        tokens += result.tokens
        progress(result.samples)
    return total / tokens if tokens else None


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
