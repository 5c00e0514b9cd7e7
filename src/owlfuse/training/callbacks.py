"""What stands beside the steps of a training: progress, signals, the evaluation before the first
step."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning import Callback, LightningModule, Trainer

from owlfuse.artifacts.runs import checkpoints_of
from owlfuse.core.files import write_json
from owlfuse.core.progress import Clock, Progress, duration, tell
from owlfuse.core.signals import ending_signals, leave_closed_terminal
from owlfuse.evaluation.reports import write_answers
from owlfuse.evaluation.results import BEFORE_FILE
from owlfuse.parallel.collectives import SharedFlag
from owlfuse.parallel.ranks import evaluation_ranks
from owlfuse.parallel.sharding import evaluation_precision

if TYPE_CHECKING:
    from owlfuse.evaluation.validation import Evaluation

Kind = TypeVar("Kind", bound=Callback)


class BeforeTraining(Callback):
    """Evaluates the model before the first step, and leaves `before.json` and
    `answers_before.jsonl` in the run's folder. The random numbers of the training stay what they
    are without it."""

    def __init__(self, evaluation: Evaluation, folder: Path) -> None:
        self.evaluation = evaluation
        self.folder = folder

    def on_train_start(self, trainer: Any, module: LightningModule) -> None:
        """The weights are there by now; a run that goes on has its metrics of before already."""
        if trainer.global_step:
            return
        with (
            # the CPU's state alone: by default torch copies that of every GPU, and warns of several
            torch.random.fork_rng(devices=[]),
            evaluation_precision(trainer),
            evaluation_ranks(trainer) as ranks,
        ):
            metrics, answers = self.evaluation(module.model, trainer.datamodule, ranks=ranks)
        if trainer.is_global_zero:
            write_answers(self.folder / "answers_before.jsonl", answers)
            write_json(self.folder / BEFORE_FILE, metrics)


def raise_if_stopped(trainer: Any, folder: Path) -> None:
    """Raises KeyboardInterrupt after a fit that Ctrl-C ended, which says how to go on."""
    if is_stopped(trainer):
        raise KeyboardInterrupt(resume_hint(trainer.global_step, folder))


def is_stopped(trainer: Any) -> bool:
    """Whether a signal ended the training."""
    return any(callback.stopped for callback in callbacks_of(trainer, StopOnSignal))


def callbacks_of(trainer: Any, kind: type[Kind]) -> list[Kind]:
    """The trainer's callbacks of a class."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


def resume_hint(steps: int, folder: Path) -> str:
    """The last line of a run that was stopped.

    One that was stopped at once goes on from the checkpoint before.
    """
    how = f"go on with: owlfuse train resume={folder}"
    if not checkpoints_of(folder / "checkpoints"):
        how = "there is no checkpoint yet, so begin it again by the same command"
    return f"stopped at step {steps}; {how}"


class TrainingProgress(Callback):
    """Says how far the training is, in optimizer steps as `max_steps` counts them, however many
    micro batches each takes.

    The time that is left is that of the steps, by their pace of late, and that of the validations
    to come, by the mean of those until now; what is not known yet is named. A checkpoint is written
    after a validation, and counts with it.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.bar: Progress | None = None
        self.validated_at: int | None = None
        self.pauses: list[float] = []
        """How much longer the steps took that a validation stood before."""

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins with the first batch: what is said before, such as a learning rate that jumps,
        has lines of its own."""
        if self.bar is None:
            shown = trainer.is_global_zero
            self.first_step = trainer.global_step
            self.bar = Progress("steps", trainer.max_steps, trainer.global_step, shown, self.clock)
            self.bar.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves when a step is whole."""
        bar = self.bar
        if bar is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = self.clock()
        pace = bar.pace.seconds()
        if self.validated_at is None:
            bar.pace.add(now - bar.last)
        # This step's time holds the validation before it, which is what exceeds the pace.
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
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        losses = [
            f"{name} {float(value):.4g}"
            for name, value in sorted(trainer.callback_metrics.items())
            if name.partition("/")[0] in data.validation and name.endswith("/loss")
        ]
        if self.bar is not None:
            shown = ", ".join(losses) or "no validation loss"
            self.bar.say(f"step {trainer.global_step:,} of {trainer.max_steps:,}: {shown}")

    def described(self, trainer: Trainer) -> str:
        """Loss, learning rate, samples per second, and the time that is left."""
        assert self.bar is not None
        parts = []
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            parts.append(f"loss {float(loss):.4g}")
        if pace := self.bar.pace.seconds():
            parts.append(self.time_left(trainer))  # before what a narrow terminal cuts off
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            parts.append(f"{data.global_batch_size / pace:.3g} samples/s")
        rates = [
            group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups
        ]
        parts.append(f"learning rate {max(rates):.2g}")
        return ", ".join(parts)

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
        # not through the bar, which a quiet run does not show
        if trainer.is_global_zero:
            steps = trainer.global_step - self.first_step
            seconds = duration(self.clock() - self.bar.began)
            loss = trainer.callback_metrics.get("train/loss")
            more = f", {trainer.global_step:,} in all" if self.first_step else ""
            last = "" if loss is None else f", loss {float(loss):.4g}"
            tell(f"trained {steps:,} steps in {seconds}{more}{last}")
            if skipped := int(getattr(module, "skipped_updates", 0)):
                tell(
                    f"{skipped:,} of these steps changed no weight: their gradients were too large "
                    "for float16 (train/skipped_updates); bf16-mixed has no such limit"
                )

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


class LoggedStep(Callback):
    """Logs metrics under the optimizer's step, whose count in Lightning may be one more after a
    resume."""

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the count before anything of the batch is logged."""
        # Private, and set in each batch: with accumulation the loop counts on after it is loaded.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class StopOnSignal(Callback):
    """The first Ctrl-C (or SIGTERM, or SIGHUP of a closed terminal) ends the run after the step it
    is in, a second Ctrl-C at once. Further ones of the others change nothing: `timeout`, SLURM and
    shells send more than one.

    Of several ranks any may get it, and all stop after the same step: the one that follows, while
    which they tell each other.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether this rank was sent a signal."""
        self.stopped = False
        """Whether the run has ended by one, the same on all ranks."""
        self.flag: SharedFlag | None = None
        self.workers_watched = False
        self.handlers: dict[int, Any] = {}
        self.last_step = "this step"

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Listens to Ctrl-C in the place of Python's own handler."""
        # Before this there are no processes that could tell each other.
        self.flag = SharedFlag(trainer)
        if trainer.world_size > 1:
            self.last_step = "the next step of all ranks"
        for number in (signal.SIGINT, *ending_signals()):
            self.handlers[number] = signal.signal(number, self.stop_after_step)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes SIGTERM back from Lightning, which would end the run without a checkpoint."""
        signal.signal(signal.SIGTERM, self.stop_after_step)

    def stop_after_step(self, number: int, frame: Any) -> None:
        """The signals' handler."""
        leave_closed_terminal()
        if self.requested and number != signal.SIGINT:
            return
        if self.requested:
            self.restore_handlers()
            raise KeyboardInterrupt
        # No more than a flag: the signal may come in the middle of an update.
        self.requested = True
        tell(f"stopping after {self.last_step}; once more stops at once")

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Has a worker that dies noticed where the next batch is fetched: torch's handler for
        SIGCHLD raises wherever the training is, in the middle of an update of the weights too."""
        if not self.workers_watched:
            self.handlers.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
            self.workers_watched = True

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run between two optimizer steps, never inside one, and after the same step on
        all ranks."""
        assert self.flag is not None
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # In every step, whether or not there was a signal: the exchange is a collective.
        if self.flag.exchange(self.requested):
            self.stopped = trainer.should_stop = True
            if (batch_idx + 1) % int(trainer.val_check_interval):
                # Lightning validates when it stops, where a run never stopped would not
                trainer.limit_val_batches = 0

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A signal after the last step, while the last checkpoint is written, ends all ranks,
        too."""
        assert self.flag is not None
        self.stopped = self.flag.settle(self.requested or self.stopped)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self.restore_handlers()
        if self.flag is not None:
            self.flag.close()

    def restore_handlers(self) -> None:
        """Puts the handlers back that stood before."""
        # each once, though teardown comes after a second Ctrl-C too
        while self.handlers:
            signal.signal(*self.handlers.popitem())
