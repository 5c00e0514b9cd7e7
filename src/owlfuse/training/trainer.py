"""Lightning's Trainer for a run, and what happens beside its steps: metrics kept over a resume,
and Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig

from owlfuse.artifacts.resume import Past
from owlfuse.artifacts.weights import HALVES
from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import origin_of
from owlfuse.core.errors import ConfigError, hint
from owlfuse.core.terminal import visible
from owlfuse.data.datamodule import ChatData
from owlfuse.parallel.collectives import data_ranks
from owlfuse.parallel.strategies import Sharded
from owlfuse.training.averages import AveragesFollow
from owlfuse.training.callbacks import BeforeTraining, LoggedStep, StopOnSignal, TrainingProgress
from owlfuse.training.checkpoints import Best, Checkpoints, LastCheckpoint
from owlfuse.training.cost import Cost
from owlfuse.training.first_steps import FirstStepsCheck
from owlfuse.training.loggers import make_loggers
from owlfuse.training.machine_checks import REFUSALS, check_launcher


def make_trainer(
    config: DictConfig, data: ChatData, folder: Path, past: Past | None = None
) -> Trainer:
    """The Trainer, its accumulation made of batch sizes and ranks, its validation interval in
    optimizer steps.

    Args:
        past: what the run goes on from; metrics logged after it are dropped, since they come again.
    """
    loggers = make_loggers(config, folder, past)
    watched = watched_metric(data)
    precision = config.trainer.precision
    if precision is None:
        precision = precision_for(config.trainer.accelerator)
    # Where nothing is validated, there is a checkpoint where a validation would be.
    every = None if validates(config, data) else config.trainer.get("val_check_interval")
    callbacks = make_callbacks(config.get("checkpoint"), watched, every)
    # An evaluation before the first step, where one is asked for.
    if config.evaluation and config.evaluation.get("before"):
        callbacks.append(BeforeTraining(build(config.evaluation), folder))
    for node in (config.get("callbacks") or {}).values():
        if node:
            callbacks.append(build(node))
    if not loggers:  # Lightning refuses a LearningRateMonitor beside no logger
        callbacks = [
            callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)
        ]
    configured_steps = config.trainer.get("max_steps")
    if configured_steps is None:
        raise ConfigError(
            f"{origin_of(config, 'trainer')}: trainer has no max_steps, expected a whole number of "
            "optimizer steps"
        )
    steps = data.steps(configured_steps)
    data_end = steps < configured_steps
    if past and is_ended(past, config):
        steps = min(steps, past.step)
    plugins = {}
    try:
        if SLURMEnvironment.detect() and not config.trainer.get("plugins"):
            # Lightning would write a checkpoint of its own, in the middle of an update too
            plugins["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        trainer = build(
            config.trainer,
            max_steps=steps,
            precision=precision,
            logger=loggers,
            enable_progress_bar=False,  # Lightning's: see TrainingProgress
            callbacks=callbacks,
            default_root_dir=str(folder),
            # The interval of validations counts over the whole run, not within an epoch.
            check_val_every_n_epoch=None,
            max_epochs=-1,  # the whole run is one epoch of max_steps
            num_sanity_val_steps=0,
            # The data share out their batches themselves; Lightning would replace their sampler.
            use_distributed_sampler=False,
            **plugins,
        )
    except REFUSALS as error:
        raise ConfigError(f"{origin_of(config, 'trainer')}: trainer: {error}") from error
    check_launcher(trainer, config)
    check_callbacks(trainer, config)
    check_monitors(trainer, config, data)
    if data_end and trainer.is_global_zero:
        line = f"the data end (at_end) after {steps} whole steps of {configured_steps}"
        print(visible(f"{line}, so the run does"))
    # Only the built trainer knows how many ranks have rows of their own.
    trainer.accumulate_grad_batches = data.accumulation(data_ranks(trainer))
    # Lightning counts the interval in micro batches, the configuration in optimizer steps. Without
    # one there is a look at the end of the run's one epoch, as by Lightning's default.
    interval = min(config.trainer.get("val_check_interval", steps), trainer.max_steps)
    trainer.val_check_interval = interval * trainer.accumulate_grad_batches
    return trainer


def is_ended(past: Past, config: DictConfig) -> bool:
    """Whether a callback has ended the training, and neither the callbacks nor the steps are others
    now."""
    plain = to_dict(config)
    same_callbacks = (plain.get("callbacks") or {}) == (past.config.get("callbacks") or {})
    same_steps = plain["trainer"].get("max_steps") == past.config["trainer"].get("max_steps")
    return past.ended and same_callbacks and same_steps


def watched_metric(data: ChatData) -> str | None:
    """The metric by which the best checkpoint is chosen: the loss of the first validation
    source."""
    return f"{next(iter(data.validation))}/loss" if data.validation else None


def precision_for(accelerator: str) -> str:
    """bf16-mixed on GPUs, else 32-true."""
    gpus = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return "bf16-mixed" if gpus else "32-true"


def validates(config: DictConfig, data: ChatData) -> bool:
    """Whether there is a validation during training."""
    has_samples = getattr(data, "validation_samples", 1) > 0
    return bool(data.validation) and has_samples and config.trainer.get("limit_val_batches") != 0


def make_callbacks(
    checkpoint: DictConfig | None, watched: str | None, every: int | None = None
) -> list[Callback]:
    """Progress, learning rates, signals, a look at the first steps, checkpoints, and the best by
    the metric `watched`.

    Args:
        every: optimizer steps between two checkpoints, where the configuration does not say.
    """
    callbacks: list[Callback] = [
        # first, since other callbacks log at a batch's start too
        LoggedStep(),
        LastCheckpoint(),
        # behind the last checkpoint and before the user's callbacks, whose averages it looks after
        AveragesFollow(),
        TrainingProgress(),
        LearningRateMonitor("step"),
        StopOnSignal(),
    ]
    if checkpoint is None:
        checkpoints = Checkpoints(every=every)
    elif every is None or checkpoint.get("every"):
        checkpoints = build(checkpoint)
    else:
        checkpoints = build(checkpoint, every=every)
    callbacks += [FirstStepsCheck(), Cost(), checkpoints]
    return [*callbacks, Best(watched, checkpoints.background)] if watched else callbacks


def run_cost(trainer: Any, evaluation: Any) -> dict[str, Any]:
    """What `results.json` holds as `cost`: that of training, and milliseconds per token of an
    answer."""
    mine = next((callback.cost for callback in trainer.callbacks if isinstance(callback, Cost)), {})
    return {**mine, "ms_per_generated_token": getattr(evaluation, "milliseconds", None)}


def check_callbacks(trainer: Trainer, config: DictConfig) -> None:
    """Raises ConfigError for a user's callback of Lightning that would train other samples, or
    average weights that cannot be averaged."""
    halves = trainer.precision in HALVES
    quantized = config.model.llm.get("quantization") is not None
    for key, node in (config.get("callbacks") or {}).items():
        kind = get_class(node["_target_"]) if node else object
        where = f"{origin_of(config, f'callbacks.{key}')}: callbacks.{key}: {kind.__name__}"
        if issubclass(kind, GradientAccumulationScheduler):
            raise ConfigError(
                f"{where} would train the first samples again and again; "
                "data.micro_batch_size decides the accumulation"
            )
        if issubclass(kind, Timer):
            raise ConfigError(
                f"{where} would break off a step, and the run would count as finished; have "
                "SIGTERM sent, by `timeout` or SLURM's --signal"
            )
        if issubclass(kind, StochasticWeightAveraging):
            raise ConfigError(
                f"{where} counts epochs, and a run is one: it would average nothing; take "
                "callbacks=ema"
            )
        if not issubclass(kind, WeightAveraging):
            continue
        if halves or quantized:
            reason = f"of {trainer.precision}" if halves else "in 4 bits"
            raise ConfigError(
                f"{where} averages weights in their own type, and those {reason} lose it by "
                "rounding; take bf16-mixed and no quantization"
            )
        if isinstance(trainer.strategy, Sharded):
            raise ConfigError(f"{where} cannot average a sharded model; take trainer=ddp")


def check_monitors(trainer: Trainer, config: DictConfig, data: ChatData) -> None:
    """Raises ConfigError for a callback of Lightning that waits for a metric which no step and no
    validation gives, or for validations where there are none."""
    nodes = [(key, node) for key, node in (config.get("callbacks") or {}).items() if node]
    # callbacks from elsewhere may log metrics of their own
    if not all(node["_target_"].startswith(("lightning.", "owlfuse.")) for _, node in nodes):
        return
    validation_losses = [f"{name}/loss" for name in data.validation]
    for key, node in nodes:
        kind = get_class(node["_target_"])
        if not issubclass(kind, EarlyStopping | ModelCheckpoint):
            continue
        where = f"{origin_of(config, f'callbacks.{key}')}: callbacks.{key}: {kind.__name__}"
        if issubclass(kind, EarlyStopping) and not validates(config, data):
            raise ConfigError(
                f"{where} looks after each validation, and this run has none; name validation "
                "sources, or leave it out"
            )
        monitor = node.get("monitor")
        if (
            monitor
            and monitor not in validation_losses
            and not monitor.startswith(("train/", "data/"))
        ):
            guess = hint(monitor, [*validation_losses, "train/loss"])
            raise ConfigError(f"{where}: monitor={monitor} is no metric of this run{guess}")
