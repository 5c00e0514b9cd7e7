"""Measurements side by side: what is compared runs in turns, so that a slow minute of the machine
falls on all, and a ratio is the median of those of single turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


def device_name() -> str:
    """Where the benches compute: `cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def lowered(precision: str) -> AbstractContextManager:
    """Under which a forward runs:

    `bf16-mixed` has autocast do the products in bf16, `32-true` nothing.
    """
    return torch.autocast(device_name(), torch.bfloat16, enabled=precision == "bf16-mixed")


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """How long it takes, the device's work included."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def in_turns(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each of `runs`, `repeats` turns in which each runs once, every other turn the
    other way round."""
    device = device_name()
    for run in runs.values():
        for _ in range(warm_up):
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            found[name].append(seconds_of(runs[name], device))
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of the turns' quotients, and between which two values their middle half lies."""
    quotients = sorted(a / b for a, b in zip(above, below, strict=True))
    low, _, high = (
        statistics.quantiles(quotients, n=4, method="inclusive")
        if len(quotients) > 1
        else quotients * 3
    )
    return {"median": statistics.median(quotients), "low": low, "high": high}


def shown(ratio: Mapping[str, float], digits: int = 2) -> str:
    """`2.10 (2.05 to 2.20)`."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def slope(points: dict[int, float]) -> float:
    """Of the least-squares line, per image."""
    xs, ys = (
        torch.tensor(list(points), dtype=torch.float64),
        torch.tensor(list(points.values()), dtype=torch.float64),
    )
    return float(((xs - xs.mean()) * (ys - ys.mean())).sum() / (xs - xs.mean()).square().sum())
