"""What a run's model answers before its first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, LightningModule

from owlfuse.evaluation.reports import write_answers
from owlfuse.model_parallel import as_trained
from owlfuse.parallel import evaluates

if TYPE_CHECKING:
    from owlfuse.evaluation import Evaluation

FILE = "before.json"


class BeforeTraining(Callback):
    """Evaluates the model before the first step, and leaves `before.json` and `answers_before.jsonl` in the run's folder. The
    random numbers of the training stay what they are without it."""

    def __init__(self, evaluation: Evaluation, folder: Path) -> None:
        self.evaluation = evaluation
        self.folder = folder

    def on_train_start(self, trainer: Any, module: LightningModule) -> None:
        """The weights are there by now; a run that goes on has its metrics of before already."""
        if trainer.global_step or not evaluates(trainer):
            return
        with torch.random.fork_rng(devices=[]), as_trained(trainer):
            metrics, answers = self.evaluation(module.model, trainer.datamodule)
        if trainer.is_global_zero:
            write_answers(self.folder / "answers_before.jsonl", answers)
            (self.folder / FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def metrics_before(folder: Path) -> dict[str, float]:
    """The metrics of a run before its first step, as `before/<name>`; none where it was not evaluated then."""
    try:
        metrics = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {f"before/{name}": value for name, value in metrics.items()}
