"""config -> data -> module -> trainer.fit -> evaluation."""

import time
from pathlib import Path

import lightning
from omegaconf import DictConfig, OmegaConf

from owlfuse.build import build
from owlfuse.config import ConfigError
from owlfuse.evaluation import write_results
from owlfuse.hub.start import adopt_parts
from owlfuse.model import on_meta
from owlfuse.module import MultimodalModule
from owlfuse.runs import last_checkpoint, place, run_folder, write_config, write_mixture
from owlfuse.trainer import make_trainer, raise_if_stopped
from owlfuse.types import DataError


def run(config: DictConfig) -> Path:
    """Trains what the configuration says, evaluates it, and returns the run's folder.

    Raises:
        ConfigError: parts that do not fit together, before a weight is made.
        DataError: what is wrong with the data.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint left in the run.
    """
    began = time.monotonic()
    if config.get("init_from") and not config.resume:
        adopt_parts(config)
    plain = OmegaConf.to_container(config, resolve=True)
    try:
        plan, _ = on_meta(plain["model"], vocab_size=1024)
        optim, evaluation = build(config.optim), build(config.evaluation)
        folder = run_folder(config)
        data = build(config.data)
        data.bind(plan.vision.preprocessing, plan.fusion.tokens_per_image)
        trainer = make_trainer(config, data, folder)
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(place(config, str(error))) from error
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    init_from = None if config.resume else config.get("init_from")
    module = MultimodalModule(plain["model"], optim, data.vocab_size, init_from)
    if trainer.is_global_zero:
        write_config(config, folder)
    trainer.fit(module, data, ckpt_path=last_checkpoint(folder) if config.resume else None, weights_only=True)

    if trainer.is_global_zero:
        mixture = data.report(trainer.global_step, module.skipped, module.truncated, module.padded)
        write_mixture(folder, mixture)
    raise_if_stopped(trainer, folder)
    if trainer.is_global_zero:
        metrics, answers = evaluation(module.model, data)
        write_mixture(folder, mixture | {"validation": data.validation_report()})
        write_results(folder, config.experiment, config.seed, trainer.global_step, metrics, time.monotonic() - began)
        evaluation.write(folder, metrics, answers, f"{config.experiment}, {trainer.global_step} steps")
        print(f"everything of this run is in {folder}")
    return folder
