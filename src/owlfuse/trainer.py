"""Lightning's Trainer for a run, and what happens beside its steps: metrics kept over a resume, and Ctrl-C."""

from __future__ import annotations

import csv
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from owlfuse.build import build
from owlfuse.checkpoints import Best, Checkpoints
from owlfuse.config import ConfigError, origin_of
from owlfuse.cost import Cost
from owlfuse.data.datamodule import ChatData
from owlfuse.evaluation.before import BeforeTraining
from owlfuse.first_steps import FirstStepsCheck
from owlfuse.parallel import any_rank, data_ranks
from owlfuse.progress import Clock, Progress, duration
from owlfuse.runs import checkpoints_of, step_of
from owlfuse.terminal import visible
from owlfuse.trainer_checks import REFUSALS, check_launcher


def make_trainer(config: DictConfig, data: ChatData, folder: Path, checkpoint: Path | None = None) -> Trainer:
    """The Trainer, its accumulation made of batch sizes and ranks, its validation interval in optimizer steps.

    Args:
        checkpoint: what the run goes on from; metrics logged after it are dropped, since they come again.
    """
    # what CSVLogger deletes of a resumed run has been read before
    before = read_metrics(folder, checkpoint) if checkpoint else []
    loggers = [make_logger(logger, folder, checkpoint) for logger in (config.logger or {}).values() if logger]
    for logger in loggers:
        if isinstance(logger, CSVLogger) and before:  # Lightning would begin the file anew
            logger.experiment.metrics = before
            logger.save()
    watched = f"{next(iter(data.validation))}/loss" if data.validation else None
    precision = {"precision": precision_for(config.trainer.accelerator)} if config.trainer.precision is None else {}
    callbacks = [*make_callbacks(config.get("checkpoint"), watched), *evaluating_first(config, folder)]
    if not loggers:  # Lightning refuses a LearningRateMonitor beside no logger
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    try:
        trainer = build(
            config.trainer,
            **precision,
            logger=loggers,
            enable_progress_bar=False,  # Lightning's: see TrainingProgress
            callbacks=callbacks,
            default_root_dir=str(folder),
            check_val_every_n_epoch=None,
            max_epochs=-1,  # the whole run is one epoch of max_steps
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except REFUSALS as error:
        raise ConfigError(f"{origin_of(config, 'trainer')}: trainer: {error}") from error
    check_launcher(trainer, config)
    asked, steps = trainer.max_steps, data.steps(trainer.max_steps)
    if steps < asked and trainer.is_global_zero:
        print(visible(f"the data end (at_end) after {steps} whole steps of {asked}, so the run does"))
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.accumulate_grad_batches = data.accumulation(data_ranks(trainer))
    trainer.val_check_interval = min(config.trainer.val_check_interval, trainer.max_steps) * trainer.accumulate_grad_batches
    return trainer


def precision_for(accelerator: str) -> str:
    """bf16-mixed on GPUs, else 32-true."""
    gpus = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return "bf16-mixed" if gpus else "32-true"


def make_logger(node: DictConfig, folder: Path, checkpoint: Path | None) -> Any:
    """A logger into the run's folder. TensorBoard drops what it showed after the checkpoint."""
    purge = {"purge_step": step_of(checkpoint)} if checkpoint and node._target_.endswith("TensorBoardLogger") else {}
    return build(node, save_dir=folder, name="", version="", **purge)


def read_metrics(folder: Path, checkpoint: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv until a checkpoint, as they were when it was written; none where there is no such file."""
    kept, step = checkpoint.with_suffix(".csv"), step_of(checkpoint)
    try:
        with (kept if kept.exists() else folder / "metrics.csv").open(newline="") as file:
            return [row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and int(row["step"]) < step]
    except FileNotFoundError:
        return []


def raise_if_stopped(trainer: Any, folder: Path) -> None:
    """Raises KeyboardInterrupt after a fit that Ctrl-C ended, which says how to go on."""
    if any(isinstance(callback, StopOnSignal) and callback.stopped for callback in trainer.callbacks):
        raise KeyboardInterrupt(how_to_go_on(trainer.global_step, folder))


def how_to_go_on(steps: int, folder: Path) -> str:
    """The last line of a run that was stopped. One that was stopped at once goes on from the checkpoint before."""
    how = f"go on with: owlfuse train resume={folder}"
    if not checkpoints_of(folder / "checkpoints"):
        how = "there is no checkpoint yet, so begin it again by the same command"
    return f"stopped at step {steps}; {how}"


def make_callbacks(checkpoint: DictConfig | None, watched: str | None) -> list[Callback]:
    """Progress, learning rates, signals, a look at the first steps, checkpoints, and the best by the metric `watched`."""
    callbacks: list[Callback] = [LoggedStep(), TrainingProgress(), LearningRateMonitor("step"), StopOnSignal()]
    checkpoints = build(checkpoint) if checkpoint else Checkpoints()
    callbacks += [FirstStepsCheck(), Cost(), checkpoints]
    return [*callbacks, Best(watched, checkpoints.writes)] if watched else callbacks


def cost_of(trainer: Any, evaluation: Any) -> dict[str, Any]:
    """What `results.json` holds as `cost`: that of training, and milliseconds per token of an answer."""
    mine = next((callback.cost for callback in trainer.callbacks if isinstance(callback, Cost)), {})
    return {**mine, "ms_per_generated_token": getattr(evaluation, "milliseconds", None)}


def evaluating_first(config: DictConfig, folder: Path) -> list[Callback]:
    """An evaluation before the first step, where `evaluation.before` asks for one."""
    asked = config.evaluation and config.evaluation.get("before")
    return [BeforeTraining(build(config.evaluation), folder)] if asked else []


class TrainingProgress(Callback):
    """Says how far the training is, in optimizer steps as `max_steps` counts them, however many micro batches each takes.

    The time that is left is that of the steps, by their pace of late, and that of the validations to come, by the mean of those
    until now; what is not known yet is named. A checkpoint is written after a validation, and counts with it.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.bar: Progress | None = None
        self.validated_at: int | None = None
        self.pauses: list[float] = []
        """How much longer the steps took that a validation stood before."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins with the first batch: what is said before, such as a learning rate that jumps, has lines of its own."""
        if self.bar is None:
            shown = trainer.is_global_zero
            self.first_step = trainer.global_step
            self.bar = Progress("steps", trainer.max_steps, trainer.global_step, shown, self.clock)
            self.bar.__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves when a step is whole."""
        bar = self.bar
        if bar is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = self.clock()
        pace = bar.pace.seconds()
        if self.validated_at is None:
            bar.pace.add(now - bar.last)
        elif pace is not None:
            self.pauses.append(max(0.0, now - bar.last - pace))
        self.validated_at, bar.last, bar.done = None, now, trainer.global_step
        if bar.due():
            bar.show(self.described(trainer))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The step after it is no measure of the pace."""
        self.validated_at = trainer.global_step
        if self.bar is not None and self.bar.live is not None:
            self.bar.show("validating")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A line of its own, on a terminal too: the losses of the validation sources."""
        losses = [
            f"{name} {float(value):.4g}"
            for name, value in sorted(trainer.callback_metrics.items())
            if name.partition("/")[0] in trainer.datamodule.validation and name.endswith("/loss")  # type: ignore[attr-defined]
        ]
        if self.bar is not None:
            self.bar.say(f"step {trainer.global_step:,} of {trainer.max_steps:,}: {', '.join(losses)}")

    def described(self, trainer: Trainer) -> str:
        """Loss, learning rate, samples per second, and the time that is left."""
        assert self.bar is not None
        said = []
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            said.append(f"loss {float(loss):.4g}")
        if pace := self.bar.pace.seconds():
            said.append(self.time_left(trainer))  # before what a narrow terminal cuts off
            said.append(f"{trainer.datamodule.global_batch_size / pace:.3g} samples/s")  # type: ignore[attr-defined]
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        said.append(f"learning rate {max(rates):.2g}")
        return ", ".join(said)

    def time_left(self, trainer: Trainer) -> str:
        """Of the training, and what is not in it."""
        assert self.bar is not None
        every = max(1, int(trainer.val_check_interval) // trainer.accumulate_grad_batches)
        to_come = trainer.max_steps // every - trainer.global_step // every
        seconds = self.bar.seconds_left() or 0.0
        if self.pauses:
            seconds += to_come * sum(self.pauses) / len(self.pauses)
        without = "evaluation" if self.pauses or not to_come else "validations and evaluation"
        return f"about {duration(seconds)} left without {without}"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A last line, with `enable_progress_bar=false` too."""
        if self.bar is None:
            return
        self.bar.stop()
        if trainer.is_global_zero:
            steps = trainer.global_step - self.first_step
            seconds = duration(self.clock() - self.bar.began)
            loss = trainer.callback_metrics.get("train/loss")
            more = f", {trainer.global_step:,} in all" if self.first_step else ""
            last = "" if loss is None else f", loss {float(loss):.4g}"
            print(f"trained {steps:,} steps in {seconds}{more}{last}", file=sys.stderr, flush=True)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


class LoggedStep(Callback):
    """Metrics are logged under the optimizer's step: after a resume Lightning may count one more."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before anything of the batch is logged."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class StopOnSignal(Callback):
    """The first Ctrl-C (or SIGTERM), to any rank, ends the run after the step it is in, a second Ctrl-C at once. Further
    SIGTERMs change nothing: `timeout` and SLURM send more than one."""

    def __init__(self) -> None:
        self.stopped = False
        self.workers_watched = False
        self.handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Listens to Ctrl-C in the place of Python's own handler."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.stop_after_step)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes SIGTERM back from Lightning, which would end the run without a checkpoint."""
        signal.signal(signal.SIGTERM, self.stop_after_step)

    def stop_after_step(self, number: int, frame: Any) -> None:
        """The signals' handler."""
        if self.stopped and number == signal.SIGTERM:
            return
        if self.stopped:
            self.restore_handlers()
            raise KeyboardInterrupt
        self.stopped = True
        print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Has a worker that dies noticed where the next batch is fetched: torch's handler for SIGCHLD raises wherever the
        training is, in the middle of an update of the weights too."""
        if not self.workers_watched:
            self.handlers.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
            self.workers_watched = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends the run between two optimizer steps, never inside one, and after the same step on all ranks."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and any_rank(trainer, self.stopped):
            self.stopped = trainer.should_stop = True
            if (batch_idx + 1) % int(trainer.val_check_interval):
                trainer.limit_val_batches = 0  # Lightning validates when it stops, where a run never stopped would not

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Puts the handlers back that stood before."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())
