"""`owlfuse recipe`: the stages of a recipe in order, each started from the weights of the one before.

runs/<recipe>/<name>/ holds stages.yaml (the resolved configuration of each stage) and a folder for each stage: an ordinary run,
and in export/ its weights, which stand there once the stage is finished.
"""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse import train
from owlfuse.adapters import PartSummary
from owlfuse.build import build
from owlfuse.config import ConfigError, compose
from owlfuse.config_errors import naming
from owlfuse.config_plain import to_dict
from owlfuse.hub.export import export, load_run
from owlfuse.identity import flat
from owlfuse.model import MultimodalLM, on_meta
from owlfuse.quiet import quiet_libraries
from owlfuse.recipe_stages import compose_stages, split_dry_run
from owlfuse.recipe_tables import print_plans, print_results, print_stages
from owlfuse.runs import NAME, in_use, last_checkpoint, place
from owlfuse.terminal import visible
from owlfuse.trainer_checks import check_machine
from owlfuse.types import DataError

MOVABLE = ("trainer.devices", "trainer.num_nodes", "trainer.log_every_n_steps", "data.workers", "data.micro_batch_size")
"""Keys that may change when a recipe goes on: they do not change what is learned."""


@dataclass
class Stage:
    """One run of a recipe."""

    name: str
    config: DictConfig
    plan: MultimodalLM
    """The stage's model on the meta device."""
    parts: list[PartSummary]
    """What of each part is trained, and how."""

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.runs).expanduser() / self.config.experiment / self.config.name

    @property
    def weights(self) -> Path:
        """What the next stage starts from. It appears whole, at the stage's end."""
        return self.folder / "export"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.weights / "config.json").exists()


@quiet_libraries()
def recipe_command(recipe: str, words: list[str]) -> None:
    """Composes and checks all stages, prints their table, and runs what is not finished. Every rank runs this; rank 0 writes.

    Args:
        words: overrides for every stage, `stages.<stage>.<override>` for one, and `dry_run=true`: only the
            table, and what a step of each stage needs.

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


def make_stages(recipe: str, words: list[str]) -> list[Stage]:
    """All stages, composed and checked on the meta device; no weight is made or loaded. Raises ConfigError."""
    return [make_stage(name, config) for name, config in compose_stages(recipe, words).items()]


def make_stage(name: str, config: DictConfig) -> Stage:
    """One stage, its parts checked by themselves."""
    try:
        plan, parts = on_meta(to_dict(config.model), vocab_size=1024)
        build(config.optim), build(config.evaluation)
    except ValueError as error:
        raise ConfigError(f"stage {name}: {place(config, str(error))}") from error
    return Stage(name, config, plan, parts)


def check_data(stage: Stage) -> None:
    """Opens the data of a stage, so that a file that is missing is told before an earlier stage has trained for days."""
    try:
        data = build(stage.config.data)
        data.bind(stage.plan.vision.preprocessing, stage.plan.fusion.tokens_per_image)
        data.steps(stage.config.trainer.max_steps)
    except DataError as error:
        raise DataError(f"stage {stage.name}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"stage {stage.name}: {place(stage.config, str(error))}") from error


def write_record(stages: list[Stage]) -> None:
    """stages.yaml, or a comparison with the one that is there. Raises ConfigError where a stage was begun otherwise."""
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
                        f"{path}: stage {name} was begun with {key} {old.get(key)}, and it is {new.get(key)} now; "
                        "choose another name=, or go on as it was begun"
                    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    OmegaConf.save(OmegaConf.create(ours), beside)
    beside.replace(path)


def run_stage(stage: Stage, start: Path | None, words: list[str]) -> None:
    """Trains a stage from the weights in `start`, or goes on with it from its last checkpoint, and exports its weights."""
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
        raise KeyboardInterrupt(f"{stop}; the whole recipe goes on by the same command as before") from None
    if first:
        export(load_run(stage.folder), stage.weights, merge=True, source=f"{config.experiment}, stage {stage.name}")
    while not stage.finished:  # a barrier would time out while rank 0 writes a large model
        time.sleep(0.1)
    gc.collect()  # the next stage needs the memory of this one
    torch.cuda.empty_cache()


def start_from(config: DictConfig, start: Path | None) -> None:
    """Puts the weights of the stage before in the place of those that the parts would load by themselves."""
    if start is None:
        return
    with open_dict(config):
        config.init_from = str(start)
        for key in ("vision.pretrained", "vision.weights", "llm.pretrained", "llm.gguf_file"):
            if OmegaConf.select(config.model, key) is not None:
                OmegaConf.update(config.model, key, False if key == "vision.pretrained" else None)
