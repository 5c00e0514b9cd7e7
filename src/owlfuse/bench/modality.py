"""`owlfuse bench modality_adaptive`: what the visual copies of norms, keys and values add to the plain LLM's step.

The plain LLM's step is concat's, with the same backbone, connector, samples and optimizer, so that the copies are all that
differs. Measured where keys and values are as wide as the hidden states, and where groups of heads share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from owlfuse.bench.pairs import in_turns, ratios, shown
from owlfuse.bench.report import leave
from owlfuse.bench.step import SIZES, Sizes, batch_of, our_model, samples_of, step_of
from owlfuse.module import batch_loss
from owlfuse.types import Batch

FUSIONS = {
    "concat": {"_target_": "owlfuse.fusion.concat.Concat"},
    "modality_adaptive": {"_target_": "owlfuse.fusion.modality_adaptive.ModalityAdaptive"},
}
EVERYWHERE = "modality_adaptive, both copies everywhere"


def runs_of(own: Sizes, batch: Batch, precision: str) -> dict[str, Callable[[], Tensor]]:
    """The steps by name."""
    models = {name: our_model(own, fusion) for name, fusion in FUSIONS.items()}
    steps = {name: step_of(model, precision) for name, model in models.items()}
    of = {**{name: (name, batch) for name in FUSIONS}, EVERYWHERE: ("modality_adaptive", replace(batch, visual_count=None))}

    def run(name: str, batch: Batch) -> Tensor:
        return steps[name](lambda: batch_loss(models[name], batch))

    return {name: partial(run, *what) for name, what in of.items()}


def bench_modality_adaptive(
    out: Path, repeats: int = 9, pack_to: int = 320, precision: str = "32-true", size: str = "small"
) -> dict[str, Any]:
    """Prints the table, and writes modality_adaptive.md and modality_adaptive.json into `out`.

    Args:
        pack_to: the most tokens of a row.
        precision: 32-true or bf16-mixed.
        size: of `SIZES`.
    """
    sizes, data = SIZES[size]
    rows: list[list[str]] = []
    found: dict[str, dict[str, Any]] = {}
    for groups in (1, 4):
        own = replace(sizes, key_value_heads=sizes.heads // groups)
        samples = samples_of(data, own, own.visual_tokens)
        batch = batch_of(samples, own, pack_to)
        seconds = in_turns(runs_of(own, batch, precision), repeats)
        name = f"{own.heads} query heads, {own.key_value_heads} key-value heads"
        found[name] = {"seconds": seconds, "over_concat": {k: ratios(v, seconds["concat"]) for k, v in seconds.items()}}
        for run, ratio in found[name]["over_concat"].items():
            median = 1000 * sorted(seconds[run])[len(seconds[run]) // 2]
            overhead = {key: 100 * (value - 1) for key, value in ratio.items()}
            rows.append([f"{name}: {run}", f"{median:.0f}", shown(overhead, 1)])
    visual = (batch.visual_count or 0) / sum(batch.lengths)
    title = (
        f"a training step of {data.rows} samples, {sum(batch.lengths)} tokens, {visual:.0%} of them visual, {precision}: "
        f"medians of {repeats} turns, and of the turns' ratios with their middle half"
    )
    result = {"sizes": vars(sizes), "data": vars(data), "precision": precision, "visual_share": visual, "steps": found}
    leave(out, "modality_adaptive", result, [(title, ["", "ms a step", "over concat, %"], rows)])
    return result
