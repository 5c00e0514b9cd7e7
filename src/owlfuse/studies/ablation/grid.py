"""The cells of an ablation: composed, checked on the meta device, and hashed before the first
one trains."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import check, compose, naming_part
from owlfuse.config.identity import code_hash, config_hash, data_hash
from owlfuse.config.messages import naming
from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint
from owlfuse.studies.ablation.file import Ablation, Levels

ABSENT = "-"
"""The level of a factor that a cell has no use for."""
Identity = dict[str, str]
"""What data are known by, see `owlfuse.data.identity`."""


@dataclass
class Cell:
    """One combination of levels under one seed: a run in the ablation's folder."""

    name: str
    levels: Levels
    seed: int
    words: list[str]
    """Overrides of `compose`."""
    config: DictConfig
    hash: dict[str, str]
    trained: int = 0
    """Parameters."""

    @property
    def key(self) -> str:
        """The name of its folder."""
        return f"{self.name}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.config.trainer.max_steps)

    def to_record(self) -> dict[str, Any]:
        """Return the entry of ablation.json from which the cell is trained and reported."""
        return {
            "key": self.key,
            "cell": self.name,
            "levels": self.levels,
            "seed": self.seed,
            "words": self.words,
            "hash": self.hash,
            "steps": self.steps,
            "config": to_dict(self.config),
        }


def make_cells(
    ablation: Ablation, words: list[str], runs_name: str, open_data: bool = True
) -> list[Cell]:
    """Return the cells in order, the seeds of each together; the baseline's stands first.

    A factor that is a configuration key is not set in a cell whose configuration has no such key,
    where `leave_out` leaves one level of it: its level is ABSENT.

    Args:
        words: overrides of every cell, from the command line.
        runs_name: of the folder in `runs`.
        open_data: whether the data are opened too, which writes those that are made on the spot.

    Raises:
        ConfigError: a cell that does not compose, or whose parts do not fit; it names the cell. Two
            cells that are the same.
        DataError: data that are wrong.
    """
    check_words(words)
    check_file_words(ablation)
    combinations = all_combinations(ablation)
    combinations.sort(key=lambda levels: levels != ablation.baseline)  # stable: the file's order
    cells: list[Cell] = []
    names_by_hash: dict[str, str] = {}
    for combination in combinations:
        levels = mark_absent(ablation, combination, combinations, words)
        name = cell_name(levels)
        for seed in ablation.seeds:
            cell = make_cell(ablation, levels, seed, words, runs_name)
            if cell.config.evaluation is None:
                metrics = ", ".join(ablation.metrics)
                raise ConfigError(
                    f"cell {name}: evaluation is null, and the ablation reports {metrics}; leave "
                    "it as it is"
                )
            # The seed is part of the hash: cells are compared under the same seed.
            same_name = names_by_hash.setdefault(cell.hash["config"], name)
            if same_name != name:
                raise ConfigError(
                    f"cell {name}: its configuration is that of cell {same_name}; a factor "
                    "changes nothing there"
                )
            cells.append(cell)
    # Signs that a folder's name cannot have are dropped, and levels may differ in them alone.
    if len({cell.key for cell in cells}) < len(cells):
        raise ConfigError(
            "factors: two cells would have the same name; give their levels names of letters and "
            "digits"
        )
    check_parts(cells, open_data)
    return cells


def check_words(words: list[str]) -> None:
    """Raises ConfigError for overrides that a cell cannot have."""
    for word in words:
        key = word.partition("=")[0]
        if key in ("experiment", "resume", "seed"):
            instead = "write seeds=[0,1]" if key == "seed" else "its cells are runs of their own"
            raise ConfigError(f"{COMMAND_LINE}: {word}: an ablation has no {key}=; {instead}")


def check_file_words(ablation: Ablation) -> None:
    """Raises ConfigError for an override of the file that every cell would replace by its own."""
    file_words = [*ablation.overrides]
    for factor in ablation.factors:
        for level_words in factor.levels.values():
            file_words += level_words
    for word in file_words:
        if word.startswith(("seed=", "resume=")):
            raise ConfigError(
                f"{ablation.name}: {word}: the ablation decides it for each cell; write seeds: [0, "
                "1], and leave resume out"
            )


def all_combinations(ablation: Ablation) -> list[Levels]:
    """Return the combinations that are not left out. Raises ConfigError where the baseline is."""
    names = [factor.name for factor in ablation.factors]
    combinations = []
    for product in itertools.product(*(factor.levels for factor in ablation.factors)):
        levels = dict(zip(names, product))
        # An entry of `leave_out` names some factors, and leaves out all that have those levels.
        if not any(entry.items() <= levels.items() for entry in ablation.leave_out):
            combinations.append(levels)
    if ablation.baseline not in combinations:
        raise ConfigError(
            f"baseline: {cell_name(ablation.baseline)} is left out by leave_out; name another "
            "baseline"
        )
    return combinations


def mark_absent(
    ablation: Ablation, levels: Levels, combinations: list[Levels], words: list[str]
) -> Levels:
    """Return the levels of a cell, ABSENT for factors that `make_cells` does not set in it."""
    result = dict(levels)
    for factor in ablation.factors:
        # The combinations that differ from this one in the factor alone.
        fixed = {name: level for name, level in levels.items() if name != factor.name}
        alternatives = [entry for entry in combinations if fixed.items() <= entry.items()]
        if factor.key is None or len(alternatives) > 1 or len(factor.levels) == 1:
            continue
        without = {**result, factor.name: ABSENT}
        # Composed without it: does the configuration have the key by itself?
        overrides = cell_overrides(ablation, without, ablation.seeds[0], words)
        config = compose_cell(cell_name(without), overrides)
        # Of a group with @ the key is where its option stands: model/adapter@model.adapter.llm.
        key = factor.key.rpartition("@")[2].replace("/", ".")
        if OmegaConf.select(config, key, default=ABSENT) == ABSENT:
            result = without
    return result


def make_cell(
    ablation: Ablation,
    levels: Levels,
    seed: int,
    words: list[str],
    runs_name: str,
) -> Cell:
    """Return one cell, composed by itself."""
    name = cell_name(levels)
    overrides = cell_overrides(ablation, levels, seed, words)
    config = compose_cell(name, overrides)
    with open_dict(config):
        # All cells lie in the folder of the ablation, whatever experiment they start from.
        config.experiment, config.name = runs_name, f"{name}-seed{seed}"
    # The parts come from that model: hashes must be of them.
    if config.get("init_from"):
        from owlfuse.artifacts.init_from import adopt_parts

        adopt_parts(config)
    plain = to_dict(config)
    hashes = {"code": code_hash(plain), "config": config_hash(plain)}
    return Cell(name, levels, seed, overrides, config, hashes)


def cell_overrides(ablation: Ablation, levels: Levels, seed: int, words: list[str]) -> list[str]:
    """Return the base, then the file's overrides, then the levels', then the command line's."""
    overrides = [f"experiment={ablation.base}", *ablation.overrides]
    for factor in ablation.factors:
        level = levels[factor.name]
        if level != ABSENT:
            overrides += factor.levels[level]
    return [*overrides, *words, f"seed={seed}"]  # the last override of a key counts


def compose_cell(name: str, overrides: list[str]) -> DictConfig:
    """Return the configuration of a cell, whose name is in the errors.

    Of its parts it knows what can be known without importing them, so that a mistake in the last
    cell is told at once, too; `check_parts` checks the rest.
    """
    with naming(f"cell {name}"):
        return compose(overrides, importing=False)


def cell_name(levels: Levels) -> str:
    """Return the levels as one name for folders: `owl3-adaptive`."""
    names = []
    for level in levels.values():
        if level != ABSENT:
            name = re.sub(r"[^A-Za-z0-9_.+]+", "_", level).strip("_")
            # Nothing is left of a level that is made of signs alone.
            names.append(name or "none")
    return "-".join(names) or "all"


def check_parts(cells: list[Cell], open_data: bool) -> None:
    """Builds every cell's model without weights, and opens its data, once for all cells that
    have the same."""
    from owlfuse.artifacts.identity import weights_identity

    data_identities: dict[str, Identity] = {}
    # The seeds of a cell stand together.
    for name, group in itertools.groupby(cells, key=lambda cell: cell.name):
        same_cells = list(group)
        with naming(f"cell {name}"):
            # Seeds of a cell differ in random numbers alone.
            trained, identity = check_cell(same_cells[0], data_identities, open_data)
        for cell in same_cells:
            cell.trained = trained
            if identity is not None:
                weights = weights_identity(to_dict(cell.config))
                cell.hash["data"] = data_hash({**identity, **weights})


def check_cell(
    cell: Cell, data_identities: dict[str, Identity], open_data: bool
) -> tuple[int, Identity | None]:
    """Return the parameters that a cell trains and, where its data are opened, their identity.

    Args:
        data_identities: of data that are opened already, by configuration; gets this cell's.
    """
    from owlfuse.data.identity import data_identity
    from owlfuse.model.multimodal import on_meta

    check(cell.config)
    with naming_part(cell.config):
        model, parts = on_meta(to_dict(cell.config.model), vocab_size=1024)
        build(cell.config.optim)
        build(cell.config.evaluation)
        trained = sum(part.trained for part in parts)
        if not open_data:
            return trained, None
        # Lengths, and with them the steps, depend on the positions that an image takes.
        key = json.dumps([to_dict(cell.config.data), model.fusion.tokens_per_image])
        if key not in data_identities:
            data = build(cell.config.data)
            data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
            data.steps(cell.steps)
            data_identities[key] = data_identity(data.sources, data.validation)
        return trained, data_identities[key]


OWN_EVALUATION = "owlfuse.evaluation.validation.Evaluation"
METRICS = ("loss", "perplexity", "exact_match", "contains")
"""Of each validation source, by owlfuse's own evaluation; with `_blank` those of blank pictures."""


def full_metrics(
    metrics: list[str], sources: list[str], evaluation: str = OWN_EVALUATION
) -> dict[str, tuple[str, str]]:
    """Return metrics by the names of results.json, each with its validation source and its name
    there: `val_held_out/exact_match` and `val/exact_match_held_out` are one.

    Args:
        evaluation: the class of the cells' evaluation; a user's own may have other metrics.

    Raises ConfigError for a source or a metric that does not exist.
    """
    from owlfuse.evaluation.metrics import metric_names

    result = {}
    for metric in metrics:
        source, local_name = split_metric(metric, sources)
        if source not in sources or not local_name:
            raise ConfigError(
                f"metrics: {metric}: no such validation source{hint(source, sources)}"
            )
        kind = local_name.partition("/")[0]
        if evaluation == OWN_EVALUATION and kind.removesuffix("_blank") not in METRICS:
            raise ConfigError(
                f"metrics: {metric}: no such metric{hint(kind, METRICS)}; there are "
                f"{', '.join(METRICS)}, and with _blank those of blank pictures"
            )
        (name,) = metric_names(source, sources, {local_name: 0.0})
        result[name] = source, local_name
    return result


def split_metric(metric: str, sources: list[str]) -> tuple[str, str]:
    """Return the validation source and the metric's name in it, of `val/exact_match_held_out` as
    of `val_held_out/exact_match`."""
    source, _, local_name = metric.partition("/")
    kind = local_name.partition("/")[0]
    if kind == "exact_match":
        # whole, though a source may be called `val_match`
        return source, local_name
    # results.json folds `val_held_out` into `val` with a suffix, see `metric_names`.
    for longer in sources:
        suffix = longer.removeprefix(source)  # `_held_out`
        if longer.startswith(f"{source}_") and suffix != "_" and kind.endswith(suffix):
            return longer, local_name.replace(suffix, "", 1)
    return source, local_name


def validation_sources(cells: list[Cell]) -> list[str]:
    """Return the validation sources of the first cell."""
    return list(cells[0].config.data.get("validation") or {})


def make_record(
    cells: list[Cell], ablation: Ablation, metrics: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """Return the content of `runs/<name>/ablation.json`, from which the report is made."""
    return {
        "name": ablation.name,
        "question": ablation.question,
        "base": ablation.base,
        "factors": {factor.name: list(factor.levels) for factor in ablation.factors},
        "baseline": cells[0].name,
        "seeds": ablation.seeds,
        "metrics": metrics,
        "paper": ablation.paper,
        "cells": [cell.to_record() for cell in cells],
    }
