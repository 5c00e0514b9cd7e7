"""config -> data -> module -> trainer.fit -> evaluation."""

import time
from pathlib import Path

import lightning
from omegaconf import DictConfig

from owlfuse.build import build
from owlfuse.config import ConfigError
from owlfuse.config_plain import to_dict
from owlfuse.evaluation import write_results
from owlfuse.hub.start import adopt_parts
from owlfuse.llm_probe import check_packing
from owlfuse.model import on_meta
from owlfuse.model_parallel import as_trained
from owlfuse.module import MultimodalModule
from owlfuse.new_tokens import tokens_to_train
from owlfuse.parallel import check_strategy, evaluates, naming_step
from owlfuse.plan import dry_run
from owlfuse.runs import last_checkpoint, place, run_folder, write_config, write_mixture
from owlfuse.trainer import cost_of, make_trainer, raise_if_stopped, signals_given_back
from owlfuse.types import DataError
from owlfuse.weights import needs_base


def run(config: DictConfig) -> Path | None:
    """Trains what the configuration says, evaluates it, and returns the run's folder; with `dry_run` it prints a plan instead.

    Raises:
        ConfigError, DataError: parts that do not fit together, before a weight is made; what is wrong with the data.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint left in the run.
    """
    began = time.monotonic()
    checkpoint = last_checkpoint(Path(config.resume)) if config.resume else None
    if config.get("init_from") and not config.resume:
        adopt_parts(config)
    if config.get("dry_run"):
        dry_run(config)
        return None
    plain = to_dict(config)
    try:
        plan, _ = on_meta(plain["model"], vocab_size=1024)
        optim, evaluation, folder = build(config.optim), build(config.evaluation), run_folder(config)
        data = build(config.data)
        if data.pack_to is not None:
            check_packing(plan.llm)
        data.bind(plan.vision.preprocessing, plan.fusion.tokens_per_image)
        trainer = make_trainer(config, data, folder, checkpoint)
        check_strategy(trainer, plan.llm, checkpoint)
        start = (config.get("init_from"), plain["model"]["llm"], getattr(plan.llm, "trained_rows", None))
        new_tokens = tokens_to_train(data.tokenizer, config.data.tokenizer, *start)
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(place(config, str(error))) from error
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    init_from = config.get("init_from") if checkpoint is None or needs_base(checkpoint) else None
    module = MultimodalModule(plain["model"], optim, data.vocab_size, init_from, new_tokens)
    write_config(config, folder)
    with naming_step(trainer), signals_given_back():
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    left_out = module.over_ranks(module.skipped, module.truncated)
    if trainer.is_global_zero:
        report = data.report(trainer.global_step, *left_out, module.padded)
        write_mixture(folder, report)
    raise_if_stopped(trainer, folder)
    if evaluates(trainer):
        with as_trained(trainer):
            metrics, answers = evaluation(module.model, data, folder)
    if trainer.is_global_zero:
        write_mixture(folder, report | {"validation": data.validation_report()})
        write_results(folder, config, trainer.global_step, metrics, cost_of(trainer, evaluation), time.monotonic() - began)
        evaluation.write(folder, metrics, answers, f"{config.experiment}, {trainer.global_step} steps")
        print(f"everything of this run is in {folder}")
    return folder
