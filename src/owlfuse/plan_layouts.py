"""Ways to share a run out over GPUs: the one that a configuration asks for, and others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from owlfuse.config import ConfigError

TENSOR_RANKS = (2, 4, 8)
"""Tried as alternatives, where they divide the GPUs."""


@dataclass(frozen=True)
class Layout:
    """One way to run the same global batch on the same GPUs."""

    data: int
    """Ranks with rows of their own."""
    tensor: int
    """Ranks that share out each layer's projections."""
    sharded: bool
    """Whether the data ranks share out parameters, gradients and optimizer state (FSDP)."""
    micro: int
    """Samples that a data rank takes at a time."""
    buckets: bool = False
    """Whether gradients are there twice, in the buckets of Lightning's own DDP too."""
    checkpointing: bool = False
    """Whether activations are computed again wherever a part can; False: as the configuration says."""
    overrides: tuple[str, ...] = ()
    """What makes this layout of the configuration, on the command line."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.data * self.tensor

    def describe(self) -> str:
        """In a few words: `FSDP 8 x TP 2, micro batch 4`."""
        names = {(False, True): "one GPU", (False, False): f"DDP {self.data}", (True, False): f"FSDP {self.data}"}
        parts = [] if self.data == 1 and self.tensor > 1 else [names[self.sharded and self.gpus > 1, self.gpus == 1]]
        parts += [f"TP {self.tensor}"] if self.tensor > 1 else []
        return f"{' x '.join(parts)}, micro batch {self.micro}{', checkpointing' if self.checkpointing else ''}"


def asked_layout(trainer: dict[str, Any], data: dict[str, Any], gpus: int | None) -> Layout:
    """What the trainer's strategy and the data's batch sizes come to on so many GPUs, by default the trainer's own.

    Raises:
        ConfigError: GPUs that the strategy or the batch sizes do not fit, or a count that is not known.
    """
    gpus = gpus or trainer_devices(trainer)
    strategy = trainer.get("strategy") or "auto"
    sharded, tensor, ranks = False, 1, gpus
    buckets = gpus > 1 and isinstance(strategy, str) and strategy.startswith(("auto", "ddp"))
    if isinstance(strategy, dict) and strategy["_target_"].endswith(".Sharded"):
        ranks, tensor = mesh(strategy.get("data", "auto"), strategy.get("tensor", 1), gpus)
        sharded = ranks > 1 or tensor == 1
    elif "FSDP" in str(strategy).upper():
        sharded = True
    batch = data.get("global_batch_size", 32)
    micro = data.get("micro_batch_size") or max(1, batch // ranks)
    if batch % (micro * ranks):
        raise ConfigError(
            f"data.global_batch_size is {batch}, which {ranks} data ranks of micro_batch_size {micro} do not divide; "
            f"choose a multiple of {micro * ranks}, or other plan.gpus"
        )
    return Layout(ranks, tensor, sharded, micro, buckets)


def trainer_devices(trainer: dict[str, Any]) -> int:
    """Devices of all nodes. Raises ConfigError where the machine would have to be asked."""
    devices = trainer.get("devices", "auto")
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 0
    if count < 1:
        raise ConfigError(f"trainer.devices is {devices!r}: say for how many GPUs to plan, plan.gpus=8")
    return count * int(trainer.get("num_nodes") or 1)


def mesh(data: int | str, tensor: int | str, gpus: int) -> tuple[int, int]:
    """Data and tensor ranks of a sharded strategy. Raises ConfigError where their product is not the number of GPUs."""
    if data == tensor == "auto":
        raise ConfigError("trainer.strategy: data and tensor are both auto; give a number for one of them")
    ranks = gpus // int(tensor) if data == "auto" else int(data)
    parts = gpus // max(ranks, 1) if tensor == "auto" else int(tensor)
    if ranks * parts != gpus:
        raise ConfigError(
            f"trainer.strategy has data {data} and tensor {tensor} ranks, whose product is not the {gpus} GPUs; "
            "set trainer.strategy.data=auto, or other plan.gpus"
        )
    return ranks, parts


def checkpointing_keys(nodes: dict[str, Any], again: dict[str, Any]) -> tuple[str, ...]:
    """The overrides that make the model's `nodes` those of `again`, which have activation checkpointing."""
    names = [name for name in ("llm", "vision", "connector") if nodes[name] != again[name]]
    return tuple(f"model.{name}.gradient_checkpointing=true" for name in names)


def alternatives(asked: Layout, keys: tuple[str, ...], batch: int) -> Iterator[Layout]:
    """Other layouts on the same GPUs, from the least change to the greatest.

    Args:
        keys: what turns activation checkpointing on, empty where it is.
        batch: samples of a global batch.
    """

    def again(layout: Layout) -> list[Layout]:
        return [replace(layout, checkpointing=True, overrides=(*layout.overrides, *keys))] if keys else []

    yield from again(asked)
    if asked.micro > 1:
        one = replace(asked, micro=1, overrides=("data.micro_batch_size=1",))
        yield from (one, *again(one))
    if asked.gpus > 1 and not asked.sharded and batch % (asked.micro * asked.gpus) == 0:
        fsdp = replace(asked, data=asked.gpus, tensor=1, sharded=True, buckets=False, overrides=("trainer=fsdp",))
        yield from (fsdp, *again(fsdp))
    for ranks in TENSOR_RANKS:
        if asked.gpus % ranks == 0 and ranks != asked.tensor:
            data = asked.gpus // ranks
            over: tuple[str, ...] = ("trainer=fsdp_tp", f"trainer.strategy.data={data}", f"trainer.strategy.tensor={ranks}")
            over += (f"data.micro_batch_size={asked.micro}",)
            split = replace(asked, data=data, tensor=ranks, sharded=data > 1, buckets=False, overrides=over)
            yield from again(split) or [split]
