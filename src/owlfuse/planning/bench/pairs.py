"""Measurements side by side: what is compared runs in turns, so that a slow minute of the machine
falls on all, and a ratio is the median of those of single turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch


def device_name() -> str:
    """Return where the benches compute: `cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(precision: str) -> AbstractContextManager:
    """Return the context of a forward: `bf16-mixed` has the products in bf16, `32-true` changes
    nothing."""
    return torch.autocast(device_name(), torch.bfloat16, enabled=precision == "bf16-mixed")


def fusion_configs(layers: list[int]) -> dict[str, dict[str, Any]]:
    """Return the fusions that are compared.

    Args:
        layers: those of hyperattention.
    """
    return {
        "concat": {"_target_": "owlfuse.model.fusion.concat.Concat"},
        "modality_adaptive": {
            "_target_": "owlfuse.model.fusion.modality_adaptive.ModalityAdaptive"
        },
        "hyperattention": {
            "_target_": "owlfuse.model.fusion.hyperattention.HyperAttention",
            "layers": layers,
        },
    }


def llama_config(
    width: int,
    hidden: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    **fields: Any,
) -> dict[str, Any]:
    """Return the configuration of a Llama of a size, and of any length that is measured."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 65536,
        **fields,
    }


def full_adapters() -> dict[str, dict[str, str]]:
    """Return the adapters of a model that is trained in all its parts."""
    full = {"_target_": "owlfuse.model.adapters.Full"}
    return dict.fromkeys(("vision", "connector", "fusion", "llm"), full)


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Return how long it takes, the device's work included."""
    # Kernels run on after the call that starts them.
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each of `runs`, `repeats` turns in which each runs once, every second
    turn in the reverse order."""
    device = device_name()
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    # In both orders: a run may leave the caches warm for the next one.
    names = list(runs)
    for turn in range(repeats):
        for name in reversed(names) if turn % 2 else names:
            seconds[name].append(seconds_of(runs[name], device))
    return seconds


def upper_median(values: Sequence[float]) -> float:
    """Return the value in the middle, of an even number the upper one of the two."""
    return sorted(values)[len(values) // 2]


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the median of the turns' quotients, and between which two values their middle half
    lies."""
    quotients = [a / b for a, b in zip(above, below, strict=True)]
    low, high = quotients[0], quotients[0]  # quantiles need two values
    if len(quotients) > 1:
        low, _, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return {"median": statistics.median(quotients), "low": low, "high": high}


def ratio_text(ratio: Mapping[str, float], digits: int = 2) -> str:
    """Return `2.10 (2.05 to 2.20)`."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def slope(points: Mapping[int, float]) -> float:
    """Return the slope of the least-squares line, per image."""
    gradient, _ = np.polyfit(list(points), list(points.values()), deg=1)
    return float(gradient)
