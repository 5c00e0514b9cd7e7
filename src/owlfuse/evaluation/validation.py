"""Evaluation on validation sources: answers, metrics, results.json, the contact sheet."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from owlfuse.artifacts.load import load_run_model
from owlfuse.artifacts.resume import check_evaluation_keys, read_past
from owlfuse.artifacts.run_data import build_data
from owlfuse.artifacts.runs import chosen_checkpoint, split_which
from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import compose
from owlfuse.core.files import write_json
from owlfuse.core.progress import Progress, quiet_libraries
from owlfuse.core.types import Sample
from owlfuse.data.identity import data_identity
from owlfuse.evaluation.explain.contact_sheet import maps_of_answers
from owlfuse.evaluation.metrics import (
    Answer,
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
from owlfuse.evaluation.reports import picked, print_metrics, write_answers, write_contact_sheet
from owlfuse.evaluation.results import metrics_before, read_results, write_results

log = logging.getLogger(__name__)


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
        explain: draw beside each picture of the sheet where the answer looked (see
            `explain.attention_to_pictures`).
        history: what was said before a question in its chat stands before it, as few-shot examples
            want it; else only the pictures that were shown do, so that no answer gives another
            away.
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
    maps: dict[str, Tensor] = field(default_factory=dict, init=False)
    """With `explain`: of the answers on the sheet by their ids, where they looked in their
    pictures."""

    def __post_init__(self) -> None:
        if self.max_questions is not None and self.max_questions < 1:
            raise ValueError(
                f"evaluation.max_questions is {self.max_questions}, expected at least 1, or null "
                "for all"
            )

    def __call__(
        self, model: Any, data: Any, folder: Path | None = None
    ) -> tuple[dict[str, float], list[Answer]]:
        """Metrics by their full names and all answers, progress shown; with a run's folder, its
        metrics of before too."""
        training = model.training
        model.eval()
        metrics: dict[str, float] = metrics_before(folder) if folder else {}
        everything: list[Answer] = []
        asked: dict[tuple[str, str], Sample] = {}
        shown = getattr(rank_zero_only, "rank", 0) == 0
        for source in data.validation:
            all_questions = questions_of(data, source, self.history)
            questions = sample_questions(all_questions, self.max_questions)
            self.counts[source] = counts_of(all_questions, questions)
            # the three take times of their own, so that each says what is left of it alone
            with Progress(
                f"evaluating {source}, loss", len(data.validation[source]), shown=shown
            ) as progress:
                loss = mean_loss(model, data, source, self.batch_size, progress.advance)
            settings = (self.batch_size, self.max_new_tokens)
            with Progress(f"evaluating {source}, answers", len(questions), shown=shown) as progress:
                answers = answer_questions(
                    model, data, source, questions, *settings, progress.advance
                )
            blank = None
            if self.blank and any(sample.images or sample.videos for sample, _, _ in questions):
                title = f"evaluating {source}, answers to blank pictures"
                with Progress(title, len(questions), shown=shown) as progress:
                    blank = answer_questions(
                        model, data, source, questions, *settings, progress.advance, blank=True
                    )
            metrics |= metric_names(source, list(data.validation), score(answers, blank, loss))
            everything += answers
            asked |= {(source, sample.id): sample for sample, _, _ in questions}
        self.milliseconds = time_answer(model, data, self.decode_tokens, self.history)
        if self.explain and folder and shown:
            drawn = [
                (answer, asked[answer.source, answer.id])
                for answer in picked(on_sheet(everything), self.contact_sheet)
            ]
            self.maps = maps_of_answers(model, data, drawn, self.max_new_tokens)
        model.train(training)
        return dict(sorted(metrics.items())), everything

    def write(
        self, folder: Path, metrics: dict[str, float], answers: list[Answer], title: str
    ) -> None:
        """The table on the terminal; `answers.jsonl` and `contact_sheet.png` in the folder."""
        print_metrics(metrics, title)
        write_answers(folder / "answers.jsonl", answers)
        if self.contact_sheet:
            mine = on_sheet(answers)
            if mine:
                right = share_right(
                    [answer for answer in answers if answer.source == mine[0].source]
                )
                title = f"{title}: {right:.0%} right"
            write_contact_sheet(
                folder / "contact_sheet.png", mine, self.contact_sheet, title, self.maps
            )


def on_sheet(answers: list[Answer]) -> list[Answer]:
    """Those with a picture, of the first source that has any."""
    pictured = [answer for answer in answers if answer.image]
    return [answer for answer in pictured if answer.source == pictured[0].source]


@quiet_libraries()
def evaluate_run(folder: str, overrides: list[str]) -> None:
    """`owlfuse eval`: evaluates a run's last checkpoint again, or its best with `which=best`, and
    writes its results anew. Other overrides are those of `train` that say how it is evaluated, and
    on what.

    Raises:
        ConfigError: a key that changes nothing of an evaluation, or the model.
    """
    began = time.monotonic()
    which, overrides = split_which(overrides)
    config = compose([f"resume={folder}", *overrides])
    checkpoint = chosen_checkpoint(Path(folder), which)
    past = read_past(checkpoint)
    check_evaluation_keys(past, config)
    plain = to_dict(config)
    data = build_data(config)
    model, _ = load_run_model(Path(folder), plain, data.vocab_size, which)
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    identity = {**past.identity, **data_identity({}, data.validation)}
    if other := [name for name, found in past.identity.items() if identity[name] != found]:
        log.warning(
            "%s: the contents are not those that were evaluated in training", ", ".join(other)
        )
    evaluation = build(config.evaluation) or Evaluation()  # of a run that trained without one
    metrics, answers = evaluation(model, data, Path(folder))
    before = read_results(Path(folder))
    cost = {**before.get("cost", {}), "ms_per_generated_token": evaluation.milliseconds}
    record = {"changes": past.changes, "identity": identity}
    write_results(
        Path(folder),
        config,
        past.step,
        metrics,
        cost,
        time.monotonic() - began,
        record,
        evaluation.counts,
        checkpoint.name,
    )
    results = read_results(Path(folder))
    trained = before.get("hash", {}).get("code", "unknown")
    if trained != results["hash"]["code"]:
        results["hash"]["code"] = f"{trained}, evaluated by {results['hash']['code']}"
        write_json(Path(folder) / "results.json", results)
    evaluation.write(
        Path(folder),
        metrics,
        answers,
        f"{config.experiment}, {past.step} steps ({which} checkpoint)",
    )
