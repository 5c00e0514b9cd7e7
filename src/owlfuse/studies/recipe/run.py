"""`owlfuse recipe`: the stages of a recipe in order, each started from the weights of the one
before.

runs/<recipe>/<name>/ holds stages.yaml (the resolved configuration of each stage) and a folder for
each stage: an ordinary run, and in export/ its weights, which stand there once the stage is
finished.
"""

from __future__ import annotations

import gc
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.artifacts.export import export
from owlfuse.artifacts.identity import model_files
from owlfuse.artifacts.load import load_run
from owlfuse.artifacts.resume import read_past
from owlfuse.artifacts.runs import checkpoints_of, in_use, is_first_rank, last_checkpoint
from owlfuse.config.build import to_dict
from owlfuse.config.check import is_within
from owlfuse.config.compose import compose, take_keys
from owlfuse.config.identity import flat
from owlfuse.config.messages import naming
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.files import atomic_write, fingerprint
from owlfuse.core.progress import quiet_libraries
from owlfuse.core.signals import signals_end_the_run
from owlfuse.core.terminal import visible
from owlfuse.parallel.first_rank import run_on_first_rank
from owlfuse.studies.recipe.compose import split_dry_run
from owlfuse.studies.recipe.stages import MOVABLE_KEYS, Stage, check_data, make_stages
from owlfuse.studies.recipe.tables import print_plans, print_results, print_stages
from owlfuse.training import train
from owlfuse.training.machine_checks import check_machine


@quiet_libraries()
def recipe_command(recipe: str, words: list[str]) -> None:
    """Composes and checks all stages, prints their table, and runs those that are not finished.

    Every rank runs this; rank 0 writes.

    Args:
        words: overrides for every stage, `stages.<stage>.<override>` for one, and `dry_run=true`:
            only the table, and what a step of each stage needs.

    Raises:
        ConfigError: a mistake in any stage, before the first one trains.
        DataError: what is wrong with the data, of any stage.
        KeyboardInterrupt: after Ctrl-C; the same command goes on.
    """
    dry_run, words = split_dry_run(words)
    stages = make_stages(recipe, words)
    if is_first_rank():
        print_stages(recipe, stages)
    if dry_run:
        return print_plans(recipe, stages)
    for stage in stages:
        with naming(f"stage {stage.name}"):
            check_machine(stage.config)
    # Before the first one trains, which may take days.
    for stage in stages:
        check_data(stage)
    if is_first_rank():
        write_record(stages)
    weights: Path | None = None
    with signals_end_the_run():
        for stage in stages:
            try:
                run_stage(stage, weights)
            except KeyboardInterrupt as stop:
                said = str(stop) or f"stopped in stage {stage.name}"
                raise KeyboardInterrupt(
                    f"{said}; the whole recipe goes on by the same command as before"
                ) from None
            weights = stage.weights
    if is_first_rank():
        print_results(recipe, stages)
    print_once(f"the model is in {weights}; talk to it by: owlfuse chat {weights}")


def write_record(stages: list[Stage]) -> None:
    """Writes stages.yaml. Raises ConfigError where a stage was begun with other values of it."""
    path = stages[0].folder.parent / "stages.yaml"
    configs = {stage.name: to_dict(stage.config) for stage in stages}
    if path.exists():
        recorded: Any = OmegaConf.to_container(OmegaConf.load(path))
        for stage in stages:
            # A stage that has not begun may still be changed.
            if (stage.folder / "config.yaml").exists():
                check_same(path, stage.name, recorded.get(stage.name) or {}, configs[stage.name])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        OmegaConf.save(OmegaConf.create(configs), file)


def check_same(path: Path, stage: str, recorded: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises ConfigError where a key that changes what is learned is not as it was recorded."""
    before, now = flat(recorded), flat(config)
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not is_within(key, *MOVABLE_KEYS):
            raise ConfigError(
                f"{path}: stage {stage} was begun with {key} {before.get(key)}, and it is "
                f"{now.get(key)} now; choose another name=, or go on as it was begun"
            )


def run_stage(stage: Stage, weights: Path | None) -> None:
    """Trains a stage from exported weights, or goes on with it from its last checkpoint, and
    exports its own."""
    if stage.finished:
        check_origin(stage, weights)
        print_once(f"stage {stage.name} is finished: {stage.folder}")
        return
    config: DictConfig
    # Not any file there: a kill leaves parts of checkpoints, and the best alone cannot go on.
    if checkpoints_of(stage.folder / "checkpoints"):
        last_checkpoint(stage.folder)  # raises for a folder without a usable one
        config = compose([f"resume={stage.folder}"])
        # A checkpoint has its configuration; the recipe's file and the command may have others now.
        take_keys(config, stage.config, MOVABLE_KEYS)
    else:
        if is_first_rank() and stage.folder.exists():  # it was stopped before its first checkpoint
            archive_stage(stage)
        config = stage.config
        start_from(config, weights)
    origin = f", from the weights in {weights}" if weights else ""
    print_once(f"stage {stage.name}{origin}")
    train.run(config)
    # LoRA is merged: the next stage may train other parts, or with other ranks.
    source = f"{config.experiment}, stage {stage.name}"
    run_on_first_rank(
        lambda: export(load_run(stage.folder), stage.weights, merge=True, source=source),
        f"the export of stage {stage.name}",
    )
    if not stage.finished:
        raise DataError(
            f"{stage.weights} is not there on this rank, and rank 0 has written it; let all nodes "
            "share the disk of runs="
        )
    gc.collect()  # the next stage needs the memory of this one
    torch.cuda.empty_cache()


def check_origin(stage: Stage, weights: Path | None) -> None:
    """Raises DataError for a finished stage that was trained from other weights than those that the
    stage before has now."""
    checkpoints = checkpoints_of(stage.folder / "checkpoints")
    if weights is None or not checkpoints:
        return
    began_with = read_past(checkpoints[0]).identity.get("init_from")
    if began_with not in (None, fingerprint(model_files(weights))):
        raise DataError(
            f"stage {stage.name} is finished, and was trained from other weights than {weights} "
            f"has now; move {stage.folder} away to train it anew"
        )


def archive_stage(stage: Stage) -> None:
    """Moves a stage's folder out of the way. Raises DataError while another process uses it."""
    with in_use(stage.folder, resume=True):  # raises while another process has the lock
        pass
    if stage.folder.exists():
        name = f"{stage.name}.{datetime.now():%Y-%m-%d_%H-%M-%S}"
        stage.folder.rename(stage.folder.with_name(name))


def start_from(config: DictConfig, weights: Path | None) -> None:
    """Puts exported weights in the place of those that the parts would load by themselves."""
    if weights is None:
        return
    with open_dict(config):
        config.init_from = str(weights)
        backbones = ["vision"]
        # those that a backbone may be made of
        for name in config.model.vision.get("backbones") or {}:
            backbones.append(f"vision.backbones.{name}")
        keys = ["llm.pretrained", "llm.gguf_file"]
        for backbone in backbones:
            keys += [f"{backbone}.pretrained", f"{backbone}.weights"]
        for key in keys:
            if OmegaConf.select(config.model, key) is not None:
                # `pretrained` is true or false for a backbone, and a name for an LLM.
                is_flag = key.startswith("vision") and key.endswith("pretrained")
                OmegaConf.update(config.model, key, False if is_flag else None)


def print_once(line: str) -> None:
    """Prints a line on the first rank."""
    if is_first_rank():
        print(visible(line))
