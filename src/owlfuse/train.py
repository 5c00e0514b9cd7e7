"""config -> data -> module -> trainer.fit -> evaluation."""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning
from omegaconf import DictConfig, OmegaConf

from owlfuse.build import build
from owlfuse.callbacks import LastCheckpoint, make_callbacks
from owlfuse.config import ConfigError, origin_of
from owlfuse.data.datamodule import ChatData
from owlfuse.evaluation import write_results
from owlfuse.model import on_meta
from owlfuse.module import MultimodalModule
from owlfuse.runs import last_checkpoint, run_folder, write_config
from owlfuse.types import DataError


def run(config: DictConfig) -> Path:
    """Trains what the configuration says, evaluates it, and returns the run's folder.

    Raises:
        ConfigError: parts that do not fit together, before a weight is made.
        DataError: what is wrong with the data.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint left in the run.
    """
    began = time.monotonic()
    plain = OmegaConf.to_container(config, resolve=True)
    try:
        plan, _ = on_meta(plain["model"], vocab_size=1024)
        optim = build(config.optim)
        evaluation = build(config.evaluation)
        folder = run_folder(config)
        data = build(config.data)
        trainer = make_trainer(config, data, folder)
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(place(config, str(error))) from error
    write_config(config, folder)
    data.bind(plan.vision.preprocessing, plan.fusion.tokens_per_image)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    module = MultimodalModule(plain["model"], optim, data.vocab_size)
    trainer.fit(module, data, ckpt_path=last_checkpoint(folder) if config.resume else None, weights_only=True)

    if trainer.is_global_zero:
        mixture = data.report(trainer.global_step, module.skipped)
        (folder / "mixture.json").write_text(json.dumps(mixture, indent=2) + "\n", encoding="utf-8")
    if any(isinstance(callback, LastCheckpoint) and callback.stopped for callback in trainer.callbacks):
        print(f"stopped at step {trainer.global_step}; go on with: owlfuse train resume={folder}")
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        metrics, answers = evaluation(module.model, data)
        write_results(folder, config.experiment, config.seed, trainer.global_step, metrics, time.monotonic() - began)
        evaluation.write(folder, metrics, answers, f"{config.experiment}, {trainer.global_step} steps")
        print(f"everything of this run is in {folder}")
    return folder


def place(config: DictConfig, message: str) -> str:
    """A message that begins with a part of the model, with the file that configures the part before it."""
    part = message.partition(":")[0]
    if part.partition(".")[0] not in config.model:
        return f"experiment {config.experiment}: {message}"
    return f"{origin_of(config, f'model.{part}')}: model.{message}"


def make_trainer(config: DictConfig, data: ChatData, folder: Path) -> lightning.Trainer:
    """Lightning's Trainer for a run's folder, its accumulation and validation interval in optimizer steps."""
    loggers = [build(logger, save_dir=folder, name="", version="") for logger in (config.logger or {}).values()]
    watched = f"{next(iter(data.validation))}/loss" if data.validation else None
    trainer = build(
        config.trainer,
        logger=loggers,
        callbacks=make_callbacks(folder, watched),
        default_root_dir=str(folder),
        check_val_every_n_epoch=None,
        max_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    steps = config.trainer.val_check_interval
    trainer.val_check_interval = min(steps, trainer.max_steps) * trainer.accumulate_grad_batches
    return trainer
