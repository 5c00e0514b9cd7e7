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
from owlfuse.config.compose import check, compose, place
from owlfuse.config.identity import code_hash, config_hash, data_hash
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError, hint
from owlfuse.studies.ablation.file import Ablation

ABSENT = "-"
"""The level of a factor that a cell has no use for."""


@dataclass
class Cell:
    """One combination of levels under one seed: a run in `folder`."""

    name: str
    levels: dict[str, str]
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


def make_cells(
    ablation: Ablation, words: list[str], runs_name: str, open_data: bool = True
) -> list[Cell]:
    """Cell by cell, and the seeds within a cell; the baseline's stands first.

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
    reject(words)
    combinations = all_combinations(ablation)
    combinations.sort(key=lambda levels: levels != ablation.baseline)
    cells: list[Cell] = []
    names: dict[str, str] = {}
    for levels in combinations:
        levels = without_absent(ablation, levels, combinations, words)
        name = cell_name(levels)
        for seed in ablation.seeds:
            cell = make_cell(ablation, name, levels, seed, words, runs_name)
            if cell.config.evaluation is None:
                reported = ", ".join(ablation.metrics)
                raise ConfigError(
                    f"cell {name}: evaluation is null, and the ablation reports {reported}; leave "
                    "it as it is"
                )
            same = names.setdefault(f"{cell.hash['config']}", name)
            if same != name:
                raise ConfigError(
                    f"cell {name}: its configuration is that of cell {same}; a factor changes "
                    "nothing there"
                )
            cells.append(cell)
    if len({cell.key for cell in cells}) < len(cells):
        raise ConfigError(
            "factors: two cells would have the same name; give their levels names of letters and "
            "digits"
        )
    check_parts(cells, open_data)
    return cells


def reject(words: list[str]) -> None:
    """Raises ConfigError for overrides that a cell cannot have."""
    for word in words:
        if word.partition("=")[0] in ("experiment", "resume", "seed"):
            key = word.partition("=")[0]
            instead = "write seeds=[0,1]" if key == "seed" else "its cells are runs of their own"
            raise ConfigError(f"{COMMAND_LINE}: {word}: an ablation has no {key}=; {instead}")


def all_combinations(ablation: Ablation) -> list[dict[str, str]]:
    """Those that are not left out. Raises ConfigError where the baseline is."""
    names = [factor.name for factor in ablation.factors]
    product = [
        dict(zip(names, levels))
        for levels in itertools.product(*(factor.levels for factor in ablation.factors))
    ]
    kept = [
        levels
        for levels in product
        if not any(out.items() <= levels.items() for out in ablation.leave_out)
    ]
    if ablation.baseline not in kept:
        raise ConfigError(
            f"baseline: {cell_name(ablation.baseline)} is left out by leave_out; name another "
            "baseline"
        )
    return kept


def without_absent(
    ablation: Ablation, levels: dict[str, str], combinations: list[dict[str, str]], words: list[str]
) -> dict[str, str]:
    """See `make_cells`."""
    result = dict(levels)
    for factor in ablation.factors:
        others = {name: level for name, level in levels.items() if name != factor.name}
        left = [other for other in combinations if others.items() <= other.items()]
        if factor.key is None or len(left) > 1 or len(factor.levels) == 1:
            continue
        without = {**result, factor.name: ABSENT}
        config = composed(
            ablation, cell_name(without), overrides_of(ablation, without, ablation.seeds[0], words)
        )
        if OmegaConf.select(config, factor.key.replace("/", "."), default=ABSENT) == ABSENT:
            result = without
    return result


def make_cell(
    ablation: Ablation,
    name: str,
    levels: dict[str, str],
    seed: int,
    words: list[str],
    runs_name: str,
) -> Cell:
    """One cell, composed by itself."""
    overrides = overrides_of(ablation, levels, seed, words)
    config = composed(ablation, name, overrides)
    with open_dict(config):
        config.experiment, config.name = runs_name, f"{name}-seed{seed}"
    if config.get("init_from"):
        from owlfuse.artifacts.init_from import adopt_parts

        adopt_parts(config)
    plain = to_dict(config)
    return Cell(
        name,
        levels,
        seed,
        overrides,
        config,
        {"code": code_hash(plain), "config": config_hash(plain)},
    )


def overrides_of(
    ablation: Ablation, levels: dict[str, str], seed: int, words: list[str]
) -> list[str]:
    """The base, then the file's, then the levels', then the command line's."""
    own = [
        word
        for f in ablation.factors
        if levels[f.name] != ABSENT
        for word in f.levels[levels[f.name]]
    ]
    return [f"experiment={ablation.base}", *ablation.overrides, *own, *words, f"seed={seed}"]


def composed(ablation: Ablation, name: str, overrides: list[str]) -> DictConfig:
    """`compose`, with the cell's name in its errors. Of its parts it knows what can be known
    without importing them, so that a mistake in the last cell is told at once, too; see
    `check_parts` for the rest."""
    try:
        return compose(overrides, importing=False)
    except ConfigError as error:
        raise ConfigError(f"cell {name}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}") from error


def cell_name(levels: dict[str, str]) -> str:
    """Levels as one name for folders: `owl3-adaptive`."""
    words = [
        re.sub(r"[^A-Za-z0-9_.+]+", "_", level).strip("_")
        for level in levels.values()
        if level != ABSENT
    ]
    return "-".join(word or "none" for word in words) or "all"


def check_parts(cells: list[Cell], open_data: bool) -> None:
    """Builds every cell's model without weights, and opens its data, once for all cells that
    have the same."""
    from owlfuse.artifacts.identity import weights_identity
    from owlfuse.data.identity import data_identity
    from owlfuse.model.multimodal import on_meta

    opened: dict[str, dict[str, str]] = {}
    for cells_of_name in (
        [cell for cell in cells if cell.name == name]
        for name in dict.fromkeys(cell.name for cell in cells)
    ):
        cell = cells_of_name[0]
        try:
            check(cell.config)
            plan, parts = on_meta(to_dict(cell.config.model), vocab_size=1024)
            build(cell.config.optim), build(cell.config.evaluation)
            data_key = json.dumps([to_dict(cell.config.data), plan.fusion.tokens_per_image])
            if open_data and data_key not in opened:
                data = build(cell.config.data)
                data.bind(plan.vision.preprocessing, plan.fusion.tokens_per_image)
                data.steps(cell.steps)
                opened[data_key] = data_identity(data.sources, data.validation)
        except DataError as error:
            raise DataError(f"cell {cell.name}: {error}") from error
        except ConfigError as error:
            raise ConfigError(
                f"cell {cell.name}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}"
            ) from error
        except ValueError as error:
            raise ConfigError(f"cell {cell.name}: {place(cell.config, str(error))}") from error
        for one in cells_of_name:
            one.trained = sum(part.trained for part in parts)
            if open_data:
                one.hash["data"] = data_hash(
                    {**opened[data_key], **weights_identity(to_dict(one.config))}
                )


def full_metrics(metrics: list[str], sources: list[str]) -> dict[str, tuple[str, str]]:
    """Metrics by the names of results.json, each with its validation source and its name there:
    `val_held_out/exact_match` and `val/exact_match_held_out` are one. Raises ConfigError for a
    source that there is not."""
    from owlfuse.evaluation.metrics import metric_names

    found = {}
    for metric in metrics:
        source, _, own = metric.partition("/")
        for other in sources:
            suffix = other.removeprefix(f"{source}_") if other.startswith(f"{source}_") else None
            kind = own.partition("/")[0]
            if suffix and kind.endswith(f"_{suffix}"):
                source, own = other, own.replace(f"_{suffix}", "", 1)
                break
        if source not in sources or not own:
            raise ConfigError(
                f"metrics: {metric}: no such validation source{hint(source, sources)}"
            )
        found[next(iter(metric_names(source, sources, {own: 0.0})))] = (source, own)
    return found


def sources_of(cells: list[Cell]) -> list[str]:
    """The validation sources of the first cell."""
    return list(cells[0].config.data.get("validation") or {})


def record_of(
    cells: list[Cell], ablation: Ablation, metrics: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """What `runs/<name>/ablation.json` holds, from which the report is made."""
    return {
        "name": ablation.name,
        "question": ablation.question,
        "base": ablation.base,
        "factors": {factor.name: list(factor.levels) for factor in ablation.factors},
        "baseline": next(cell.name for cell in cells),
        "seeds": ablation.seeds,
        "metrics": metrics,
        "paper": ablation.paper,
        "cells": [
            {
                "key": cell.key,
                "cell": cell.name,
                "levels": cell.levels,
                "seed": cell.seed,
                "words": cell.words,
                "hash": cell.hash,
                "steps": cell.steps,
                "config": to_dict(cell.config),
            }
            for cell in cells
        ],
    }
