"""config -> data -> module -> trainer.fit -> evaluation."""

import logging
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import DictConfig

from owlfuse.artifacts.identity import weights_identity
from owlfuse.artifacts.init_from import adopt_parts
from owlfuse.artifacts.resume import (
    VALIDATED_BY,
    changed_keys,
    check_identity,
    read_past,
    recorded,
    samples_changed,
)
from owlfuse.artifacts.run_data import (
    build_data,
    check_tokenizer,
    save_tokenizer,
    tokenizer_hash,
)
from owlfuse.artifacts.runs import (
    BEST,
    in_use,
    is_first_rank,
    last_checkpoint,
    run_folder,
    step_of,
    write_config,
    write_mixture,
)
from owlfuse.artifacts.weights import check_trained_precision, needs_base
from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import naming_part
from owlfuse.config.identity import code_hash, data_hash
from owlfuse.core.errors import ConfigError, DataError, disk_errors_as_data_errors
from owlfuse.core.progress import progress_hidden, quiet_libraries
from owlfuse.core.signals import signals_end_the_run
from owlfuse.core.terminal import visible
from owlfuse.data.datamodule import ChatData
from owlfuse.data.identity import data_identity
from owlfuse.evaluation.reports import ANSWERS, write_answers
from owlfuse.evaluation.results import comparable_with_before, write_results
from owlfuse.model.llm import check_length
from owlfuse.model.llm_probe import check_packing
from owlfuse.model.multimodal import on_meta
from owlfuse.model.new_tokens import tokens_to_train
from owlfuse.parallel.ranks import evaluation_ranks
from owlfuse.parallel.sharding import check_norms, evaluation_precision
from owlfuse.parallel.strategies import (
    Sharded,
    check_strategy,
    rank_timeouts_as_data_errors,
)
from owlfuse.training.averages import take_averages
from owlfuse.training.callbacks import callbacks_of, raise_if_stopped, resume_hint
from owlfuse.training.checkpoints import Best
from owlfuse.training.loggers import begin_logging, finish_loggers, log_results
from owlfuse.training.machine_checks import check_machine
from owlfuse.training.module import MultimodalModule
from owlfuse.training.sample_counts import SampleTotals, over_ranks
from owlfuse.training.trainer import make_trainer, run_cost, validates, watched_metric

log = logging.getLogger(__name__)


@quiet_libraries()
def run(config: DictConfig, data_digest: str | None = None) -> Path:
    """Trains what the configuration says, evaluates it, and returns the run's folder.

    Args:
        data_digest: what the data and the weights that it starts from must be known by
            (`identity.data_hash`), where the run is one of several that are to have the same.

    Raises:
        ConfigError, DataError: parts that do not fit together, before a weight is made; what is
            wrong with the data.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint left in the run.
    """
    if config.get("init_from") and not config.resume:
        adopt_parts(config)
    if config.get("dry_run"):
        raise ConfigError(
            "dry_run: true trains nothing; print the plan by owlfuse.planning.tables.dry_run"
        )
    if notice := check_machine(config):
        print(notice)
    with signals_end_the_run():
        folder = run_folder(config)
        hidden = config.trainer.get("enable_progress_bar") is False
        with (
            in_use(folder, bool(config.resume)),
            disk_errors_as_data_errors(folder),
            progress_hidden(hidden),
            ExitStack() as at_exit,
        ):
            train(config, folder, data_digest, at_exit)
    return folder


def train(config: DictConfig, folder: Path, data_digest: str | None, at_exit: ExitStack) -> None:
    """Trains and evaluates in a folder that this process holds. Raises as `run`."""
    began = time.monotonic()
    checkpoint = last_checkpoint(folder) if config.resume else None
    past = read_past(checkpoint) if checkpoint else None
    changes = changed_keys(past, config) if past else {}
    rates_changed = any(key.startswith("optim.") for key in changes)
    plain = to_dict(config)
    with naming_part(config):
        # Without memory: parts that do not fit together end the run before weights are loaded.
        plan, _ = on_meta(plain["model"], vocab_size=1024)
        optim, evaluation = build(config.optim), build(config.evaluation)
        optim.groups(plan)  # which refuses a rate of 0 for what is to train
        data = build_data(config)
        if data.pack_to is not None:
            check_packing(plan.llm, data.pack_to)
        check_length(plan.llm, data.max_length)
        if past:
            data.go_on(past.step, past.positions)
        data.bind(plan.vision.preprocessing, plan.fusion.tokens_per_image)
        trainer = make_trainer(config, data, folder, past)
        optim.check_precision(trainer.precision)
        # By what all ranks know: they write best.ckpt together.
        if samples_changed(changes, VALIDATED_BY) or config.get("accept_changed_data"):
            begin_best_anew(trainer)
        check_strategy(trainer, plan, checkpoint)
        check_norms(plan, trainer)
        plan.check_training(isinstance(trainer.strategy, Sharded))
        if not past and not config.get("init_from"):
            plan.check_start()
        if past:
            new_tokens = past.new_tokens
        else:
            new_tokens = tokens_to_train(
                data.tokenizer,
                config.data.tokenizer,
                config.get("init_from"),
                plain["model"]["llm"],
                getattr(plan.llm, "trained_rows", None),
                plan.fusion.splices,
            )
        check_trained_precision(plan, trainer.precision, new_tokens)
    identity: dict[str, str] = {}
    code = None
    # by the first rank alone: all would read the same files, and it writes the record
    if is_first_rank():
        code = code_hash(plain)
        identity = {**data_identity(data.sources, data.validation), **weights_identity(plain)}
    if past and identity:
        check_tokenizer(folder, past)
        changes |= check_identity(past, identity, config)
        # of what is no longer there, as a base whose weights are all trained
        identity = {**past.identity, **identity}
    # Ranks without the hashes leave this to the first.
    checks_data = data_digest and identity and not config.get("accept_changed_data")
    if checks_data and data_hash(identity) != data_digest:
        raise DataError(
            "the data have changed since the ablation began; give the same back, or go on with "
            "these by accept_changed_data=true"
        )
    if past and past.precision not in (None, trainer.precision):
        # of `precision: null`, which the machine decides; that of the configuration is compared
        changes.setdefault("trainer.precision", [past.precision, trainer.precision])
        log.warning(
            "the run had %s until step %d, and has %s on this machine",
            past.precision,
            past.step,
            trainer.precision,
        )
    if past and code and past.code not in (None, code):
        changes["code"] = [past.code, code]
        log.warning(
            "the code is another than until step %d: owlfuse's, your parts', or a library's of "
            "another version",
            past.step,
        )
    history = recorded(past, changes)
    print_start(config, data, trainer, folder, checkpoint)
    # After the data: whether their lengths are cached must not change the weights that are drawn.
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    # A checkpoint may lack frozen weights, which then come from the start of the run again.
    init_from = config.get("init_from") if checkpoint is None or needs_base(checkpoint) else None
    module = MultimodalModule(plain["model"], optim, data.vocab_size, init_from, new_tokens)
    module.rates_changed = rates_changed
    write_config(config, folder, history)
    save_tokenizer(data.tokenizer, folder)
    module.record = {
        "config": plain,
        "changes": history,
        "identity": identity,
        "code": code,
        "precision": trainer.precision,
        "tokenizer": tokenizer_hash(folder) if is_first_rank() else None,
    }
    begin_logging(trainer, config, plain)
    at_exit.push(partial(finish_loggers, trainer))
    fit(trainer, module, data, checkpoint, folder)
    if past and trainer.global_step == past.step:
        take_averages(trainer, module)
    # outside of the branch below, since all ranks take part
    totals = over_ranks(trainer, module.samples.totals())
    if trainer.is_global_zero:
        report = mixture_report(data, trainer.global_step, totals, module)
        write_mixture(folder, report)
    # only now, so that a stopped run has its mixture.json too
    raise_if_stopped(trainer, folder)
    metrics, answers = {}, []
    if evaluation is not None:
        # Lightning moves the model to the CPU when its training has ended.
        module.to(trainer.strategy.root_device)
        try:
            with (
                rank_timeouts_as_data_errors(trainer),
                evaluation_precision(trainer),
                evaluation_ranks(trainer) as ranks,
            ):
                metrics, answers = evaluation(module.model, data, folder, ranks)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "stopped while evaluating; the training is done, so go on with: owlfuse eval "
                f"{folder}"
            ) from None
    if trainer.is_global_zero:
        # once more, since the evaluation has met samples of the validation sources
        write_mixture(folder, report | {"validation": data.validation_report()})
        metrics = comparable_with_before(metrics, history)
        cost, seconds = run_cost(trainer, evaluation), time.monotonic() - began
        counts = {} if evaluation is None else evaluation.counts
        if evaluation is not None:
            # first, since results.json says that all is there
            write_answers(folder / ANSWERS, answers)
        write_results(
            folder, config, trainer.global_step, metrics, cost, seconds, module.record, counts
        )
        log_results(trainer, metrics)
        if evaluation is None:
            advice = "evaluation is null, so results.json has no metrics; for them: owlfuse eval"
            print(visible(f"{advice} {folder}"))
        else:
            evaluation.write(
                folder, metrics, answers, f"{config.experiment}, {trainer.global_step} steps"
            )
        print(visible(f"everything of this run is in {folder}"))


def begin_best_anew(trainer: Any) -> None:
    """Has the next validation write best.ckpt: what it has been compared with is of other
    samples."""
    for callback in callbacks_of(trainer, Best):
        callback.begins_anew = True
        if trainer.is_global_zero:
            log.warning(
                "what is validated has changed, so the next validation writes %s whatever the "
                "losses until now were",
                BEST,
            )


def print_start(
    config: DictConfig, data: Any, trainer: Any, folder: Path, checkpoint: Path | None
) -> None:
    """Says what run this is, what it learns from, and how it is stopped and gone on with. The parts
    of the model follow when they are built (see `adapters.print_summary`)."""
    if not trainer.is_global_zero:
        return
    device = trainer.strategy.root_device.type
    processes = f"{trainer.world_size} processes on " if trainer.world_size > 1 else ""
    every = trainer.val_check_interval // trainer.accumulate_grad_batches
    lines = [f"run: {folder}, experiment {config.experiment}, seed {config.seed}"]
    if checkpoint is not None:
        lines.append(f"going on from {checkpoint} at step {step_of(checkpoint)}")
    is_validated = validates(config, data)
    lines += [
        f"  {trainer.max_steps:,} steps of {data.global_batch_size:,} samples, "
        f"{processes}{device}, {trainer.precision}",
        f"  {'looks at the validation sources' if is_validated else 'writes a checkpoint'} "
        f"every {every:,} steps",
        f"  Ctrl-C stops it after a step, and `owlfuse train resume={folder}` goes on",
        "data, drawn by weight:",
    ]
    shares = data.mixture.phases[0][1]
    for name, source in data.sources.items():
        share = float(shares.get(name, 0)) / (float(sum(shares.values())) or 1)
        lines.append(
            f"  {name}: {share:.1%} of the {data.weights_by}, {len(source):,} samples of "
            f"{source.file}"
        )
    best = watched_metric(data) if is_validated else None
    if best:
        lines.append(f"validation (best.ckpt is by {best}):")
    else:
        lines.append("evaluated at the end alone:" if data.validation else "validation: none")
    for name, source in data.validation.items():
        lines.append(f"  {name}: {len(source):,} samples of {source.file}")
    print(visible("\n".join(lines)))


def fit(
    trainer: Any, module: MultimodalModule, data: Any, checkpoint: Path | None, folder: Path
) -> None:
    """Trains, and leaves mixture.json behind an error too.

    Raises:
        DataError: what is wrong with the data; a data worker that was ended.
        KeyboardInterrupt: in the place of the exit that Lightning makes of it.
    """
    try:
        with rank_timeouts_as_data_errors(trainer):
            # weights_only: a run may come from elsewhere, and its pickles must run no code
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        raise KeyboardInterrupt(resume_hint(trainer.global_step, folder)) from None
    except Exception as error:
        leave_mixture(trainer, module, data, folder, error)
        if isinstance(error, torch.OutOfMemoryError):
            work = "a validation" if trainer.validating else "the training"
            raise DataError(
                f"{work} is more than the GPU's memory holds, after step "
                f"{trainer.global_step}; set data.micro_batch_size or data.max_length to less"
            ) from error
        failure = data.data_workers.failure()
        if failure and not isinstance(error, DataError):
            raise DataError(
                f"{failure}, after step {trainer.global_step}; go on with resume={folder}"
            ) from error
        raise


def mixture_report(
    data: ChatData, step: int, totals: SampleTotals, module: MultimodalModule
) -> dict[str, Any]:
    """Returns what mixture.json holds of a training until a step."""
    padding = module.samples.total_padding
    return data.report(step, totals.skipped, totals.truncated, totals.notes, padding)


def leave_mixture(
    trainer: Any, module: MultimodalModule, data: Any, folder: Path, error: Exception
) -> None:
    """mixture.json of the whole steps of a run that an error ends; of several processes, with
    the first one's skips alone."""
    if not trainer.is_global_zero:
        return
    try:
        report = mixture_report(data, trainer.global_step, module.samples.of_last_step, module)
    except DataError as missing:  # its files may be what is wrong
        log.error("mixture.json is not written: %s", missing)
        return
    ended = {"ended_by": " ".join(str(error).split())[:600]}
    write_mixture(
        folder, report | ended | ({"skips_of_ranks": 1} if trainer.world_size > 1 else {})
    )
