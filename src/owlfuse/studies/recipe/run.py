"""`owlfuse recipe`: the stages of a recipe in order, each started from the weights of the one
before.

runs/<recipe>/<name>/ holds stages.yaml (the resolved configuration of each stage) and a folder for
each stage: an ordinary run, and in export/ its weights, which stand there once the stage is
finished.
"""

from __future__ import annotations

import gc
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import load_run
from owlfuse.artifacts.runs import NAME, in_use, last_checkpoint
from owlfuse.config.build import to_dict
from owlfuse.config.compose import compose
from owlfuse.config.identity import flat
from owlfuse.config.messages import naming
from owlfuse.core.errors import ConfigError
from owlfuse.core.files import atomic_write
from owlfuse.core.progress import quiet_libraries
from owlfuse.core.terminal import visible
from owlfuse.studies.recipe.compose import split_dry_run
from owlfuse.studies.recipe.stages import MOVABLE, Stage, check_data, make_stages
from owlfuse.studies.recipe.tables import print_plans, print_results, print_stages
from owlfuse.training import train
from owlfuse.training.machine_checks import check_machine


@quiet_libraries()
def recipe_command(recipe: str, words: list[str]) -> None:
    """Composes and checks all stages, prints their table, and runs what is not finished. Every rank
    runs this; rank 0 writes.

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
    if getattr(rank_zero_only, "rank", 0) == 0:
        print_stages(recipe, stages)
    if dry_run:
        return print_plans(recipe, stages)
    for stage in stages:
        with naming(f"stage {stage.name}"):
            check_machine(stage.config)
    for stage in stages:
        check_data(stage)
    if getattr(rank_zero_only, "rank", 0) == 0:
        write_record(stages)
    start: Path | None = None
    for stage in stages:
        run_stage(stage, start, [word for word in words if word.partition("=")[0] in MOVABLE])
        start = stage.weights
    if getattr(rank_zero_only, "rank", 0) == 0:
        print_results(recipe, stages)
        print(visible(f"the model is in {start}; talk to it by: owlfuse chat {start}"))


def write_record(stages: list[Stage]) -> None:
    """stages.yaml, or a comparison with the one that is there.

    Raises ConfigError where a stage was begun otherwise.
    """
    path = stages[0].folder.parent / "stages.yaml"
    ours = {stage.name: to_dict(stage.config) for stage in stages}
    if path.exists():
        theirs: Any = OmegaConf.to_container(OmegaConf.load(path))
        begun = [stage.name for stage in stages if (stage.folder / "config.yaml").exists()]
        for name in begun:
            old, new = (flat(one.get(name) or {}) for one in (theirs, ours))
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key) and key not in MOVABLE:
                    raise ConfigError(
                        f"{path}: stage {name} was begun with {key} {old.get(key)}, and it is "
                        f"{new.get(key)} now; "
                        "choose another name=, or go on as it was begun"
                    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        OmegaConf.save(OmegaConf.create(ours), file)


def run_stage(stage: Stage, start: Path | None, words: list[str]) -> None:
    """Trains a stage from the weights in `start`, or goes on with it from its last checkpoint,
    and exports its weights."""
    first = getattr(rank_zero_only, "rank", 0) == 0
    if stage.finished:
        if first:
            print(visible(f"stage {stage.name} is finished: {stage.folder}"))
        return
    os.environ.pop(NAME, None)  # the name of the stage before, which ranks inherit
    if any((stage.folder / "checkpoints").glob("*")):
        last_checkpoint(stage.folder)
        config = compose([f"resume={stage.folder}", *words])
    else:
        if first and stage.folder.exists():  # it was stopped before its first checkpoint
            with in_use(stage.folder, resume=True):  # and no other process is at it
                pass
            aside = stage.folder.with_name(f"{stage.name}.{datetime.now():%Y-%m-%d_%H-%M-%S}")
            if stage.folder.exists():
                stage.folder.rename(aside)
        config = stage.config
        start_from(config, start)
    if first:
        print(visible(f"stage {stage.name}{f', from the weights in {start}' if start else ''}"))
    try:
        train.run(config)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"{stop}; the whole recipe goes on by the same command as before"
        ) from None
    if first:
        export(
            load_run(stage.folder),
            stage.weights,
            merge=True,
            source=f"{config.experiment}, stage {stage.name}",
        )
    while not stage.finished:  # a barrier would time out while rank 0 writes a large model
        time.sleep(0.1)
    gc.collect()  # the next stage needs the memory of this one
    torch.cuda.empty_cache()


def start_from(config: DictConfig, start: Path | None) -> None:
    """Puts the weights of the stage before in the place of those that the parts would load by
    themselves."""
    if start is None:
        return
    with open_dict(config):
        config.init_from = str(start)
        for key in ("vision.pretrained", "vision.weights", "llm.pretrained", "llm.gguf_file"):
            if OmegaConf.select(config.model, key) is not None:
                OmegaConf.update(config.model, key, False if key == "vision.pretrained" else None)
