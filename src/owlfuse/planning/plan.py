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
from owlfuse.config.compose import PlanOptions, naming_part
from owlfuse.core.errors import ConfigError
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.model.quantization import check_not_sharded, planned_bytes
from owlfuse.planning.meter import StepCost
from owlfuse.planning.step import (
    Precision,
    bytes_of,
    gathered_bytes,
    measure_batch,
    meta_batch,
    meta_model,
    optimizer_bytes,
    rank_model,
    with_checkpointing,
)

GB = 1e9
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
    """Whether gradients exist twice, in the buckets of Lightning's own DDP too."""
    checkpointing: bool = False
    """Whether activations are computed again wherever a part can; False: as the configuration
    says."""
    overrides: tuple[str, ...] = ()
    """What makes this layout of the configuration, on the command line."""

    @property
    def gpus(self) -> int:
        """The number of all GPUs."""
        return self.data * self.tensor

    def describe(self) -> str:
        """Return the layout in a few words: `FSDP 8 x TP 2, micro batch 4`."""
        names = []
        if self.gpus == 1:
            names.append("one GPU")
        elif self.data > 1:
            names.append(f"FSDP {self.data}" if self.sharded else f"DDP {self.data}")
        if self.tensor > 1:
            names.append(f"TP {self.tensor}")
        checkpointing = ", checkpointing" if self.checkpointing else ""
        return f"{' x '.join(names)}, micro batch {self.micro}{checkpointing}"


@dataclass
class Estimate:
    """What a layout needs. Bytes are those of one GPU."""

    layout: Layout
    accumulation: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """Layers that FSDP holds unsharded while it computes them."""
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

    estimate: Estimate
    """Of the configuration's layout."""
    alternatives: list[Estimate]
    options: PlanOptions
    length: int
    global_batch: int
    text_tokens: int
    """Of a global batch, padding included; `visual_tokens` are those that the connector makes."""
    visual_tokens: int
    trained: int
    total: int
    precision: str
    """In which all layouts are planned."""

    def fits(self, estimate: Estimate) -> bool:
        """Return whether a layout's peak and the reserve are within the card."""
        return estimate.peak / GB + self.options.reserve <= self.options.gpu_memory


class Workload:
    """A configuration's model, batch and optimizer, as any layout would run them.

    Raises:
        ValueError: parts that do not fit together.
        ConfigError: images that do not fit into a sample.
    """

    def __init__(self, config: dict[str, Any], options: PlanOptions) -> None:
        self.part_configs = config["model"]
        self.options = options
        self.optim = build(config["optim"])
        trainer, data = config["trainer"], config["data"]
        # What owlfuse trains in by default on each kind of device.
        default = "32-true" if trainer.get("accelerator") == "cpu" else "bf16-mixed"
        self.precision_name = str(trainer.get("precision") or default)
        self.precision = Precision.of(self.precision_name)
        self.vocab_size = vocabulary_size(self.part_configs["llm"], options)
        self.length = options.length or data.get("max_length", 2048)
        self.global_batch = data.get("global_batch_size", 32)
        # Layouts share models and measurements: each takes seconds for a 7B model.
        self.unsplit_models: dict[bool, MultimodalLM] = {}
        self.models: dict[tuple, MultimodalLM] = {}
        self.costs: dict[tuple, StepCost] = {}
        self.model = self.model_for(1, False, self.precision.parameters)
        image_positions = options.images_per_sample * self.model.fusion.tokens_per_image
        if image_positions >= self.length:
            raise ConfigError(
                f"plan.images_per_sample: {options.images_per_sample} images take "
                f"{image_positions} positions, and a sample has {self.length} (plan.length, else "
                "data.max_length); take fewer images or a greater length"
            )

    def estimate(self, layout: Layout) -> Estimate:
        """Return what the layout needs.

        Raises ValueError for tensor ranks that do not divide the LLM's heads, and for an LLM in
        4 bits that is to be split.
        """
        check_not_sharded(self.model.llm, layout.sharded or layout.tensor > 1)
        model = self.model_for(layout.tensor, False, self.precision.parameters)
        cost = self.step_cost(layout)
        share = 1 / layout.data if layout.sharded else 1.0
        accumulation = max(1, self.global_batch // (layout.micro * layout.data))

        # FSDP shares out parameters, and every rank has the buffers.
        parameters = planned_bytes(model) * share + bytes_of(model.buffers())
        optimizer = optimizer_bytes(model, self.optim) * share
        trained = bytes_of(p for p in model.parameters() if p.requires_grad)
        buckets = trained if layout.buckets else 0
        gathered = 0
        # A single data rank has all of it already.
        if layout.sharded and layout.data > 1:
            gathered = gathered_bytes(model, self.precision.autocast)
        # From the second micro batch on, all gradients exist from the beginning.
        earlier_gradients = trained if accumulation > 1 else None
        # The optimizer steps with all gradients and no activations.
        alive = max(cost.peak(earlier_gradients, share), trained * share)

        # The cost is that of one GPU, of which tensor ranks have a part each.
        flops = float(cost.forward + cost.backward) * accumulation * layout.gpus
        flops_per_gpu_second = self.options.peak_tflops * 1e12 * self.options.share_of_peak
        return Estimate(
            layout=layout,
            accumulation=accumulation,
            parameters=int(parameters),
            gradients=int(trained * share) + buckets,
            optimizer=int(optimizer),
            gathered=gathered,
            activations=cost.activations,
            peak=int(parameters + optimizer + buckets + gathered + alive),
            flops=flops,
            seconds=flops / (flops_per_gpu_second * layout.gpus),
        )

    def step_cost(self, layout: Layout) -> StepCost:
        """Return what a micro batch's step needs, measured once.

        With FSDP in a mixed precision the layers compute with parameters that were gathered in the
        lower one, and autocast makes no copies.
        """
        dtype = self.precision.parameters
        if layout.sharded:
            dtype = self.precision.autocast or dtype
        key = layout.tensor, layout.checkpointing, dtype, layout.micro
        if key not in self.costs:
            model = self.model_for(layout.tensor, layout.checkpointing, dtype)
            batch = meta_batch(model, layout.micro, self.length, self.options.images_per_sample)
            self.costs[key] = measure_batch(model, batch, self.precision.autocast)
        return self.costs[key]

    def model_for(
        self, tensor: int, checkpointing: bool, dtype: torch.dtype | None
    ) -> MultimodalLM:
        """Return the model that one of `tensor` ranks holds, made once."""
        if checkpointing not in self.unsplit_models:
            configs = self.part_configs
            if checkpointing:
                configs = with_checkpointing(configs, self.model)
            self.unsplit_models[checkpointing] = meta_model(configs, self.vocab_size)
        key = tensor, checkpointing, dtype
        if key not in self.models:
            self.models[key] = rank_model(self.unsplit_models[checkpointing], tensor, dtype)
        return self.models[key]

    def alternatives(self, layout: Layout) -> list[Estimate]:
        """Return what other layouts on the same GPUs need."""
        configs = with_checkpointing(self.part_configs, self.model)
        keys = checkpointing_keys(self.part_configs, configs)
        estimates = []
        for alternative in alternative_layouts(layout, keys, self.global_batch):
            try:
                estimates.append(self.estimate(alternative))
            # Heads that so many ranks do not divide are no alternative.
            except ValueError:
                continue
        return estimates


def vocabulary_size(llm: dict[str, Any], options: PlanOptions) -> int:
    """Return the tokens of the tokenizer that the LLM is made for."""
    if options.vocab_size is not None:
        return options.vocab_size
    if llm.get("pretrained") or "vocab_size" in (llm.get("config") or {}):
        return 1  # the LLM has a greater one of its own
    return 32000


def make_plan(config: DictConfig, compare: bool = True) -> Plan:
    """Return the plan of a composed configuration: its `plan`, and of its data only `max_length`
    and batch sizes, count.

    Args:
        compare: with other layouts on the same GPUs.

    Raises:
        ConfigError: parts that do not fit together, a count of GPUs that the strategy or the batch
            do not fit, or a precision that is not known here.
    """
    plain = to_dict(config)
    options = PlanOptions(**(plain.get("plan") or {}))
    with naming_part(config):
        workload = Workload(plain, options)
        layout = configured_layout(plain["trainer"], plain["data"], options.gpus)
        estimate = workload.estimate(layout)
    model = workload.model
    # Placeholders of images are positions, and no text.
    images = workload.global_batch * options.images_per_sample
    positions = workload.global_batch * workload.length
    return Plan(
        estimate=estimate,
        alternatives=workload.alternatives(layout) if compare else [],
        options=options,
        length=workload.length,
        global_batch=workload.global_batch,
        text_tokens=positions - images * model.fusion.tokens_per_image,
        visual_tokens=images * model.connector.tokens,
        trained=model.trained_count(),
        total=sum(p.numel() for p in model.parameters()),
        precision=workload.precision_name,
    )


def configured_layout(trainer: dict[str, Any], data: dict[str, Any], gpus: int | None) -> Layout:
    """Return the layout of the trainer's strategy and the data's batch sizes on so many GPUs, by
    default the trainer's own.

    Raises:
        ConfigError: GPUs that the strategy or the batch sizes do not fit, or a count that is not
            known.
    """
    gpus = gpus or trainer_devices(trainer)
    strategy = trainer.get("strategy") or "auto"
    sharded, tensor, ranks = False, 1, gpus
    buckets = False
    if isinstance(strategy, dict) and strategy["_target_"].endswith(".Sharded"):
        ranks, tensor = mesh_sizes(strategy.get("data", "auto"), strategy.get("tensor", 1), gpus)
        sharded = ranks > 1 or tensor == 1
    # Lightning's own, by its name or as a class.
    elif "FSDP" in str(strategy).upper():
        sharded = True
    elif isinstance(strategy, str):
        # Lightning's own DDP has gradients in buckets beside the parameters' own.
        buckets = gpus > 1 and strategy.startswith(("auto", "ddp"))
    # As the trainer shares out a batch: evenly, in one go where no micro batch is given.
    batch = data.get("global_batch_size", 32)
    micro = data.get("micro_batch_size") or max(1, batch // ranks)
    if batch % (micro * ranks):
        raise ConfigError(
            f"data.global_batch_size is {batch}, which {ranks} data ranks of micro_batch_size "
            f"{micro} do not divide; choose a multiple of {micro * ranks}, or other plan.gpus"
        )
    return Layout(ranks, tensor, sharded, micro, buckets)


def trainer_devices(trainer: dict[str, Any]) -> int:
    """Return the devices of all nodes. Raises ConfigError where the machine would have to be
    asked."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        count = len(devices)
    else:
        count = int(devices) if str(devices).isdecimal() else 0
    # `auto` and -1 are known on the machine that trains.
    if count < 1:
        raise ConfigError(
            f"trainer.devices is {devices!r}: say for how many GPUs to plan, plan.gpus=8"
        )
    return count * int(trainer.get("num_nodes") or 1)


def mesh_sizes(data: int | str, tensor: int | str, gpus: int) -> tuple[int, int]:
    """Return the data and tensor ranks of a sharded strategy.

    Raises ConfigError where their product is not the number of GPUs.
    """
    if data == tensor == "auto":
        raise ConfigError(
            "trainer.strategy: data and tensor are both auto; give a number for one of them"
        )
    data_ranks = gpus // int(tensor) if data == "auto" else int(data)
    tensor_ranks = gpus // max(data_ranks, 1) if tensor == "auto" else int(tensor)
    if data_ranks * tensor_ranks != gpus:
        raise ConfigError(
            f"trainer.strategy has data {data} and tensor {tensor} ranks, whose product is not "
            f"the {gpus} GPUs; set trainer.strategy.data=auto, or other plan.gpus"
        )
    return data_ranks, tensor_ranks


def checkpointing_keys(
    configs: dict[str, Any], checkpointed_configs: dict[str, Any]
) -> tuple[str, ...]:
    """Return the overrides that turn activation checkpointing on."""
    keys = []
    for name in ("llm", "vision", "connector"):
        if configs[name] != checkpointed_configs[name]:
            keys.append(f"model.{name}.gradient_checkpointing=true")
    return tuple(keys)


def alternative_layouts(layout: Layout, keys: tuple[str, ...], batch: int) -> Iterator[Layout]:
    """Yields other layouts on the same GPUs, from the least change to the greatest.

    Args:
        keys: what turns activation checkpointing on, empty where it is on.
        batch: samples of a global batch.
    """

    def checkpointed(plain: Layout) -> list[Layout]:
        if not keys:
            return []
        return [replace(plain, checkpointing=True, overrides=(*plain.overrides, *keys))]

    # Checkpointing changes no number of the training: it comes first.
    yield from checkpointed(layout)
    if layout.micro > 1:
        single = replace(layout, micro=1, overrides=("data.micro_batch_size=1",))
        yield single
        yield from checkpointed(single)
    fits_fsdp = batch % (layout.micro * layout.gpus) == 0
    if layout.gpus > 1 and not layout.sharded and fits_fsdp:
        fsdp = replace(
            layout,
            data=layout.gpus,
            tensor=1,
            sharded=True,
            buckets=False,
            overrides=("trainer=fsdp",),
        )
        yield fsdp
        yield from checkpointed(fsdp)
    for ranks in TENSOR_RANKS:
        if layout.gpus % ranks or ranks == layout.tensor:
            continue
        data = layout.gpus // ranks
        if batch % (layout.micro * data):
            continue
        overrides = (
            "trainer=fsdp_tp",
            f"trainer.strategy.data={data}",
            f"trainer.strategy.tensor={ranks}",
            f"data.micro_batch_size={layout.micro}",
        )
        split = replace(
            layout, data=data, tensor=ranks, sharded=data > 1, buckets=False, overrides=overrides
        )
        # One layout for each count: with checkpointing, unless that is on already.
        yield from checkpointed(split) or [split]
