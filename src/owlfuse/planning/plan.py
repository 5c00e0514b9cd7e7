"""`owlfuse train ... dry_run=true`: what a step will need on so many GPUs of a size, worked out
without weights or data.

B rows, T text positions, I images of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import PlanOptions, with_config_origin
from owlfuse.core.errors import ConfigError
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.planning.meter import Reading
from owlfuse.planning.step import (
    Precision,
    checkpointed,
    gathered,
    meta_batch,
    optimizer_state,
    part_of_rank,
    read_step,
    size_of,
    whole_model,
)

GB = 1e9


@dataclass
class Estimate:
    """What a layout needs. Bytes are those of one GPU."""

    layout: Layout
    accumulation: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """Whole layers that FSDP holds while it computes them."""
    activations: int
    """The most at once, from the forward to the end of the backward pass."""
    peak: int
    """Of all of these together, the most at once: gradients of a single micro batch come while
    activations go."""
    flops: float
    """Of an optimizer step, all GPUs together, what is computed again included."""
    seconds: float
    """Of an optimizer step at the stated share of the peak."""


@dataclass
class Plan:
    """What a run will need, and what other layouts would."""

    asked: Estimate
    others: list[Estimate]
    options: PlanOptions
    length: int
    global_batch: int
    text_tokens: int
    """Of a global batch, padding included; `visual_tokens` are those that the connector makes."""
    visual_tokens: int
    trained: int
    total: int

    def fits(self, estimate: Estimate) -> bool:
        """Whether a layout's peak and what is kept in reserve are within the card."""
        return estimate.peak / GB + self.options.reserve <= self.options.gpu_memory


class Workload:
    """A configuration's model, batch and optimizer, as any layout would run them.

    Raises:
        ValueError: parts that do not fit together.
        ConfigError: images that do not fit into a sample.
    """

    def __init__(self, plain: dict[str, Any], options: PlanOptions) -> None:
        self.nodes = plain["model"]
        self.options = options
        self.optim = build(plain["optim"])
        gpu = plain["trainer"].get("accelerator") != "cpu"
        self.precision = Precision.of(
            plain["trainer"].get("precision") or ("bf16-mixed" if gpu else "32-true")
        )
        self.vocab_size = options.vocab_size or 32000
        config = self.nodes["llm"].get("config") or {}
        if options.vocab_size is None and (
            "vocab_size" in config or self.nodes["llm"].get("pretrained")
        ):
            self.vocab_size = 1  # the LLM's own
        self.length = options.length or plain["data"].get("max_length", 2048)
        self.global_batch = plain["data"].get("global_batch_size", 32)
        self.models: dict[tuple, MultimodalLM] = {}
        self.readings: dict[tuple, Reading] = {}
        self.model = self.model_of(1, False, self.precision.parameters)
        taken = options.images_per_sample * self.model.fusion.tokens_per_image
        if taken >= self.length:
            raise ConfigError(
                f"plan.images_per_sample: {options.images_per_sample} images take {taken} "
                "positions, and a sample has "
                f"{self.length} (plan.length, else data.max_length); take fewer images or a "
                "greater length"
            )

    def estimate(self, layout: Layout) -> Estimate:
        """What the layout needs.

        Raises ValueError for tensor ranks that do not divide the LLM's heads.
        """
        model, reading = (
            self.model_of(layout.tensor, False, self.precision.parameters),
            self.reading(layout),
        )
        share = 1 / layout.data if layout.sharded else 1.0
        accumulation = max(1, self.global_batch // (layout.micro * layout.data))
        trained = size_of(p for p in model.parameters() if p.requires_grad)
        whole = (
            gathered(model, self.gathered_dtype(layout))
            if layout.sharded and layout.data > 1
            else 0
        )
        parameters = size_of(model.parameters()) * share + size_of(model.buffers())
        optimizer = optimizer_state(model, self.optim) * share
        buckets = trained if layout.buckets else 0
        alive = reading.peak(trained if accumulation > 1 else None, share)
        flops = (
            float(reading.forward + reading.backward) * accumulation * layout.data * layout.tensor
        )
        per_second = (
            self.options.peak_tflops
            * 1e12
            * self.options.share_of_peak
            * layout.data
            * layout.tensor
        )
        return Estimate(
            layout=layout,
            accumulation=accumulation,
            parameters=int(parameters),
            gradients=int(trained * share) + buckets,
            optimizer=int(optimizer),
            gathered=whole,
            activations=reading.activations,
            peak=int(parameters + optimizer + buckets + whole + max(alive, trained * share)),
            flops=flops,
            seconds=flops / per_second,
        )

    def gathered_dtype(self, layout: Layout) -> torch.dtype | None:
        """What FSDP gathers parameters in: the lower precision of a mixed one."""
        return self.precision.autocast if layout.sharded else None

    def reading(self, layout: Layout) -> Reading:
        """What a micro batch's step needs, read once. With FSDP in a mixed precision the layers
        compute with parameters that were gathered in the lower one, and autocast makes no copies.
        """
        dtype = self.gathered_dtype(layout) or self.precision.parameters
        key = layout.tensor, layout.checkpointing, dtype, layout.micro
        if key not in self.readings:
            model = self.model_of(layout.tensor, layout.checkpointing, dtype)
            batch = meta_batch(model, layout.micro, self.length, self.options.images_per_sample)
            self.readings[key] = read_step(model, batch, self.precision.autocast)
        return self.readings[key]

    def model_of(self, tensor: int, checkpointing: bool, dtype: torch.dtype | None) -> MultimodalLM:
        """One rank's model, made once."""
        if (1, checkpointing, None) not in self.models:
            self.models[1, checkpointing, None] = whole_model(
                checkpointed(self.nodes, self.model) if checkpointing else self.nodes,
                self.vocab_size,
            )
        key = tensor, checkpointing, dtype
        if key not in self.models:
            self.models[key] = part_of_rank(self.models[1, checkpointing, None], tensor, dtype)
        return self.models[key]

    def others(self, layout: Layout) -> list[Estimate]:
        """Other ways on the same GPUs."""
        found = []
        keys = checkpointing_keys(self.nodes, checkpointed(self.nodes, self.model))
        for other in alternatives(layout, keys, self.global_batch):
            try:
                found.append(self.estimate(other))
            except ValueError:  # heads that so many ranks do not divide
                continue
        return found


def make_plan(config: DictConfig, compare: bool = True) -> Plan:
    """The plan of a composed configuration: its `plan`, and of its data only `max_length` and batch
    sizes, count.

    Args:
        compare: with other ways on the same GPUs.

    Raises:
        ConfigError: parts that do not fit together, a count of GPUs that the strategy or the batch
            do not fit, or a precision that is not known here.
    """
    plain = to_dict(config)
    options = PlanOptions(**(plain.get("plan") or {}))
    try:
        workload = Workload(plain, options)
        layout = asked_layout(plain["trainer"], plain["data"], options.gpus)
        asked = workload.estimate(layout)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(with_config_origin(config, str(error))) from error
    others = workload.others(layout) if compare else []
    parameters = list(workload.model.parameters())
    images = workload.global_batch * options.images_per_sample
    return Plan(
        asked=asked,
        others=others,
        options=options,
        length=workload.length,
        global_batch=workload.global_batch,
        text_tokens=workload.global_batch * workload.length
        - images * workload.model.fusion.tokens_per_image,
        visual_tokens=images * workload.model.connector.tokens,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
    )


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
    """Whether activations are computed again wherever a part can; False: as the configuration
    says."""
    overrides: tuple[str, ...] = ()
    """What makes this layout of the configuration, on the command line."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.data * self.tensor

    def describe(self) -> str:
        """In a few words: `FSDP 8 x TP 2, micro batch 4`."""
        names = {
            (False, True): "one GPU",
            (False, False): f"DDP {self.data}",
            (True, False): f"FSDP {self.data}",
        }
        parts = (
            []
            if self.data == 1 and self.tensor > 1
            else [names[self.sharded and self.gpus > 1, self.gpus == 1]]
        )
        parts += [f"TP {self.tensor}"] if self.tensor > 1 else []
        return (
            f"{' x '.join(parts)}, micro batch "
            f"{self.micro}{', checkpointing' if self.checkpointing else ''}"
        )


def asked_layout(trainer: dict[str, Any], data: dict[str, Any], gpus: int | None) -> Layout:
    """What the trainer's strategy and the data's batch sizes come to on so many GPUs, by default
    the trainer's own.

    Raises:
        ConfigError: GPUs that the strategy or the batch sizes do not fit, or a count that is not
            known.
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
            f"data.global_batch_size is {batch}, which {ranks} data ranks of micro_batch_size "
            f"{micro} do not divide; "
            f"choose a multiple of {micro * ranks}, or other plan.gpus"
        )
    return Layout(ranks, tensor, sharded, micro, buckets)


def trainer_devices(trainer: dict[str, Any]) -> int:
    """Devices of all nodes. Raises ConfigError where the machine would have to be asked."""
    devices = trainer.get("devices", "auto")
    count = (
        len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 0
    )
    if count < 1:
        raise ConfigError(
            f"trainer.devices is {devices!r}: say for how many GPUs to plan, plan.gpus=8"
        )
    return count * int(trainer.get("num_nodes") or 1)


def mesh(data: int | str, tensor: int | str, gpus: int) -> tuple[int, int]:
    """Data and tensor ranks of a sharded strategy.

    Raises ConfigError where their product is not the number of GPUs.
    """
    if data == tensor == "auto":
        raise ConfigError(
            "trainer.strategy: data and tensor are both auto; give a number for one of them"
        )
    ranks = gpus // int(tensor) if data == "auto" else int(data)
    parts = gpus // max(ranks, 1) if tensor == "auto" else int(tensor)
    if ranks * parts != gpus:
        raise ConfigError(
            f"trainer.strategy has data {data} and tensor {tensor} ranks, whose product is not "
            f"the {gpus} GPUs; "
            "set trainer.strategy.data=auto, or other plan.gpus"
        )
    return ranks, parts


def checkpointing_keys(nodes: dict[str, Any], again: dict[str, Any]) -> tuple[str, ...]:
    """The overrides that make the model's `nodes` those of `again`, which have activation
    checkpointing."""
    names = [name for name in ("llm", "vision", "connector") if nodes[name] != again[name]]
    return tuple(f"model.{name}.gradient_checkpointing=true" for name in names)


def alternatives(asked: Layout, keys: tuple[str, ...], batch: int) -> Iterator[Layout]:
    """Other layouts on the same GPUs, from the least change to the greatest.

    Args:
        keys: what turns activation checkpointing on, empty where it is.
        batch: samples of a global batch.
    """

    def again(layout: Layout) -> list[Layout]:
        return (
            [replace(layout, checkpointing=True, overrides=(*layout.overrides, *keys))]
            if keys
            else []
        )

    yield from again(asked)
    if asked.micro > 1:
        one = replace(asked, micro=1, overrides=("data.micro_batch_size=1",))
        yield from (one, *again(one))
    if asked.gpus > 1 and not asked.sharded and batch % (asked.micro * asked.gpus) == 0:
        fsdp = replace(
            asked,
            data=asked.gpus,
            tensor=1,
            sharded=True,
            buckets=False,
            overrides=("trainer=fsdp",),
        )
        yield from (fsdp, *again(fsdp))
    for ranks in TENSOR_RANKS:
        if asked.gpus % ranks == 0 and ranks != asked.tensor:
            data = asked.gpus // ranks
            over: tuple[str, ...] = (
                "trainer=fsdp_tp",
                f"trainer.strategy.data={data}",
                f"trainer.strategy.tensor={ranks}",
            )
            over += (f"data.micro_batch_size={asked.micro}",)
            split = replace(
                asked, data=data, tensor=ranks, sharded=data > 1, buckets=False, overrides=over
            )
            yield from again(split) or [split]
