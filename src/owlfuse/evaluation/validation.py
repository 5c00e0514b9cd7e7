"""Evaluation on validation sources: answers, metrics, results.json, the contact sheet."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from owlfuse.artifacts.load import load_run_model
from owlfuse.artifacts.resume import Past, changed_evaluation_keys, config_at, read_past
from owlfuse.artifacts.run_data import build_data, check_tokenizer
from owlfuse.artifacts.runs import chosen_checkpoint, in_use, read_results, split_which
from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import compose, naming_part
from owlfuse.config.identity import code_hash
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.progress import Progress, quiet_libraries
from owlfuse.core.types import Sample
from owlfuse.data.identity import data_identity
from owlfuse.evaluation.explain.contact_sheet import maps_of_answers
from owlfuse.evaluation.metrics import (
    ALONE,
    Answer,
    Question,
    answer_questions,
    counts_of,
    mean_loss,
    metric_names,
    questions_of,
    sample_questions,
    score,
    share_right,
    time_answer,
)
from owlfuse.evaluation.reports import (
    ANSWERS,
    print_metrics,
    sample_for_sheet,
    write_answers,
    write_contact_sheet,
)
from owlfuse.evaluation.results import comparable_with_before, metrics_before, write_results
from owlfuse.parallel.ranks import Ranks
from owlfuse.parallel.torchrun import TorchrunRanks

log = logging.getLogger(__name__)


LEAST = {"batch_size": 1, "max_new_tokens": 1, "contact_sheet": 0, "decode_tokens": 0}
"""The least that numbers of an evaluation may be."""


@dataclass
class Evaluation:
    """How a model is evaluated.

    Args:
        batch_size: questions answered at a time; it does not change the answers.
        max_new_tokens: of an answer.
        max_questions: of each validation source, a seeded sample over its kinds of questions and
            its pictures; None: all.
        blank: ask the questions about pictures again with blank pictures.
        contact_sheet: pictures on the sheet.
        decode_tokens: of one answer, timed after the others (`milliseconds`); 0: none.
        before: evaluate a run before its first step too; those metrics are named `before/...`.
        explain: draw beside each picture of the sheet the answer's attention to it (see
            `explain.attention_to_pictures`).
        history: earlier turns of its chat stand before a question, as few-shot examples need them;
            else only earlier pictures do, so that no answer gives another away.
    """

    batch_size: int = 64
    max_new_tokens: int = 24
    max_questions: int | None = None
    blank: bool = True
    contact_sheet: int = 24
    decode_tokens: int = 16
    milliseconds: float | None = field(default=None, init=False)
    """Per token of an answer to one question, the first token apart, which reads the prompt."""
    before: bool = False
    explain: bool = False
    history: bool = False
    counts: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    """Of each validation source how many questions were asked, of how many, and of each kind."""
    maps: dict[int, Tensor] = field(default_factory=dict, init=False)
    """With `explain`: the attention maps of the answers on the sheet, by their places there."""

    def __post_init__(self) -> None:
        if self.max_questions is not None and self.max_questions < 1:
            raise ValueError(
                f"evaluation.max_questions is {self.max_questions}, expected at least 1, or null "
                "for all"
            )
        for name, least in LEAST.items():
            number = getattr(self, name)
            if number < least:
                raise ValueError(f"evaluation.{name} is {number}, expected at least {least}")

    def __call__(
        self, model: Any, data: Any, folder: Path | None = None, ranks: Ranks = ALONE
    ) -> tuple[dict[str, float], list[Answer]]:
        """Returns metrics by their full names and all answers, and shows progress; with a run's
        folder, its metrics before the first step too.

        Args:
            ranks: those that share the work, all of which call it and get the same; by default this
                process has all of it.
        """
        try:
            return self.evaluate(model, data, folder, ranks)
        except torch.OutOfMemoryError as error:
            smaller = f"evaluation.batch_size={max(1, self.batch_size // 4)}"
            advice = f"go on with: owlfuse eval {folder} {smaller}" if folder else f"set {smaller}"
            raise DataError(
                f"the evaluation is more than the GPU's memory holds; {advice}"
            ) from error

    def evaluate(
        self, model: Any, data: Any, folder: Path | None, ranks: Ranks
    ) -> tuple[dict[str, float], list[Answer]]:
        """Returns what calling it does. Raises torch.OutOfMemoryError."""
        training = model.training
        # no dropout, and batch norms use their running statistics
        model.eval()
        metrics: dict[str, float] = metrics_before(folder) if folder else {}
        all_answers: list[Answer] = []
        samples: list[Sample] = []  # of each answer its question
        to_time: tuple[str, Sample] | None = None
        for source in data.validation:
            with ranks.failing_together():
                all_questions = questions_of(data, source, self.history, ranks)
            questions = sample_questions(all_questions, self.max_questions)
            # of the questions, not of the samples, of which one may have several
            self.counts[source] = counts_of(all_questions, questions)
            if to_time is None and all_questions:
                to_time = source, all_questions[0][0]
            # the three take different times, so that each has its own estimate
            with Progress(
                f"evaluating {source}, loss", len(data.validation[source]), shown=ranks.first
            ) as progress:
                loss = mean_loss(model, data, source, self.batch_size, progress.advance, ranks)
            answers = self.answer(model, data, source, questions, ranks)
            if unfinished := sum(answer.thought_unfinished for answer in answers):
                self.counts[source]["thoughts that did not end"] = unfinished
                if ranks.first:
                    log.warning(
                        "validation source %s: %d of %d thoughts did not end, and their answers "
                        "count as empty; raise evaluation.max_new_tokens, which is %d",
                        source,
                        unfinished,
                        len(answers),
                        self.max_new_tokens,
                    )
            if cut := sum(answer.cut and not answer.thought_unfinished for answer in answers):
                self.counts[source]["answers that did not end"] = cut
                # before the first step there is no folder, and no model has learned to end
                if ranks.first and folder:
                    log.warning(
                        "validation source %s: %d of %d answers did not end within "
                        "evaluation.max_new_tokens=%d, and are scored as far as they came",
                        source,
                        cut,
                        len(answers),
                        self.max_new_tokens,
                    )
            # asked again without information from the pictures: the difference is what they add
            blank = None
            if self.blank and any(sample.images or sample.videos for sample, _, _ in questions):
                blank = self.answer(model, data, source, questions, ranks, blank=True)
            metrics |= metric_names(source, list(data.validation), score(answers, blank, loss))
            all_answers += answers
            samples += [sample for sample, _, _ in questions]
        # after the answers, when kernels are compiled and memory is allocated
        # one object may evaluate a run twice: before the first step and at the end
        self.milliseconds = None
        if to_time is not None and self.decode_tokens:
            self.milliseconds = time_answer(model, data, *to_time, self.decode_tokens)
        if self.explain and folder:
            # chosen as the sheet chooses, so that no map is made of an answer that is not shown
            on_sheet = sample_for_sheet(pictured_answers(all_answers), self.contact_sheet)
            # by identity, since chats of a file may have one id
            sample_of = {id(a): sample for a, sample in zip(all_answers, samples, strict=True)}
            pairs = [(answer, sample_of[id(answer)]) for answer in on_sheet]
            self.maps = maps_of_answers(model, data, pairs, self.max_new_tokens, ranks)
        model.train(training)
        return dict(sorted(metrics.items())), all_answers

    def answer(
        self,
        model: Any,
        data: Any,
        source: str,
        questions: list[Question],
        ranks: Ranks,
        blank: bool = False,
    ) -> list[Answer]:
        """Returns the answers to questions of a source (see `answer_questions`), and shows
        progress."""
        title = f"evaluating {source}, answers" + (" to blank pictures" if blank else "")
        with Progress(title, len(questions), shown=ranks.first) as progress:
            return answer_questions(
                model,
                data,
                source,
                questions,
                self.batch_size,
                self.max_new_tokens,
                progress.advance,
                blank,
                ranks,
            )

    def write(
        self,
        folder: Path,
        metrics: dict[str, float],
        answers: list[Answer],
        title: str,
    ) -> None:
        """Prints the table, and writes `contact_sheet.png` into the folder."""
        print_metrics(metrics, title)
        pictured = pictured_answers(answers)
        if self.contact_sheet and pictured:
            # of the whole source, whose answers without a picture are not on the sheet
            of_source = [answer for answer in answers if answer.source == pictured[0].source]
            title = f"{title}: {share_right(of_source):.0%} right"
            path = folder / "contact_sheet.png"
            write_contact_sheet(path, pictured, self.contact_sheet, title, self.maps)


def pictured_answers(answers: list[Answer]) -> list[Answer]:
    """Returns the answers with a picture, of the first source that has any."""
    pictured = [answer for answer in answers if answer.image]
    return [answer for answer in pictured if answer.source == pictured[0].source]


@quiet_libraries()
def evaluate_run(folder: str, overrides: list[str]) -> None:
    """Evaluates a run's last checkpoint again, or its best with `which=best`, and rewrites its
    results. Other overrides are those of `train` that say how it is evaluated, and on which data.
    The processes of torchrun share the work.

    Raises:
        ConfigError: a key that changes nothing of an evaluation, or the model; another process
            holds the run's folder.
    """
    run_dir = Path(folder)
    which, overrides = split_which(overrides)
    config = compose([f"resume={folder}", *overrides])
    of_run = compose([f"resume={folder}"]) if overrides else config
    checkpoint = chosen_checkpoint(run_dir, which)
    # of two commands, or of one beside the training, one's answers would stand beside the other's
    # results
    with in_use(run_dir, resume=True):
        evaluate_checkpoint(run_dir, checkpoint, which, config, of_run)


def evaluate_checkpoint(
    run_dir: Path, checkpoint: Path, which: str, config: DictConfig, of_run: DictConfig
) -> None:
    """Evaluates a checkpoint of a run, and rewrites its results.

    Args:
        config: of the run, with what the command line changes.
        of_run: without that.

    Raises:
        ConfigError: a key of `config` that changes nothing of an evaluation, or the model.
    """
    if config.get("dry_run"):
        raise ConfigError("command line: dry_run: an evaluation has no plan; leave it out")
    start = time.monotonic()
    past = read_past(checkpoint)
    config = config_at(past, config, of_run)
    changed_keys = changed_evaluation_keys(past, config)
    plain = to_dict(config)
    evaluation = build(config.evaluation) or Evaluation()  # of a run that trained without one
    ranks = TorchrunRanks()
    # before the model, whose embeddings must have a row for each token
    with naming_part(config):
        data = build_data(config)
    check_tokenizer(run_dir, past)
    earlier = read_results(run_dir)
    model, _ = load_run_model(run_dir, plain, data.vocab_size, checkpoint)
    model.to(ranks.device)
    # pictures are prepared as the model's backbone needs them
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    # of the training data as recorded, of validation data as they are now
    identity = {**past.identity, **data_identity({}, data.validation)}
    changed = [name for name, digest in past.identity.items() if identity[name] != digest]
    if changed and ranks.first:
        log.warning(
            "%s: the contents are not those that were evaluated in training", ", ".join(changed)
        )
    metrics, answers = evaluation(model, data, run_dir, ranks)
    # every rank has all answers by now, and one of them writes
    if not ranks.first:
        return
    since = {"changes": {**changed_keys, **dict.fromkeys(changed)}}
    metrics = comparable_with_before(metrics, [*past.changes, since])
    # the training's own costs and time stay
    cost = {**earlier.get("cost", {}), "ms_per_generated_token": evaluation.milliseconds}
    seconds = earlier.get("wall_s", time.monotonic() - start)
    code = results_code(past, earlier, code_hash(plain))
    record = {
        "changes": past.changes,
        "identity": identity,
        "code": code,
        "precision": past.precision,
    }
    # first, since results.json says that all is there
    write_answers(run_dir / ANSWERS, answers)
    write_results(
        run_dir,
        config,
        past.step,
        metrics,
        cost,
        seconds,
        record,
        evaluation.counts,
        checkpoint.name,
    )
    title = f"{config.experiment}, {past.step} steps ({which} checkpoint)"
    evaluation.write(run_dir, metrics, answers, title)


EVALUATED_BY = ", evaluated by "


def results_code(past: Past, earlier: dict[str, Any], code: str) -> str:
    """Returns the hash of the code that trained a run and, where it is another, `code`, which
    evaluates it.

    Args:
        earlier: the run's results so far, which may be of an evaluation by a third code; empty for
            a run that has none yet.
    """
    recorded = str(earlier.get("hash", {}).get("code", "unknown"))
    trained_by = past.code or recorded.partition(EVALUATED_BY)[0]
    return code if trained_by == code else f"{trained_by}{EVALUATED_BY}{code}"
