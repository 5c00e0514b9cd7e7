"""The optimizer and its schedule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from owlfuse.core.errors import ConfigError
from owlfuse.model.adapters import PARTS, Part
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.model.vision.body import PREFIX_TOKENS

log = logging.getLogger(__name__)

FLOAT16_EPS = 1e-3
"""Adam's least `eps` for weights in float16 alone (`16-true`): the mean square of a gradient below
0.008 is 0 there, and an update divided by a smaller eps would be hundreds of times the learning
rate."""
BFLOAT16_BETA = 0.99
"""AdamW's greatest beta of squares for weights in bfloat16 alone (`bf16-true`), whose last bit is
0.4 to 0.8 % of a number."""
INPUTS = ("queries", "latents", "end_token", *PREFIX_TOKENS)
POSITIONS = (
    "pos_embed",
    "pos_embed_x",
    "pos_embed_y",
    "pos_embed_win",
    "pos_embed_window",
    "pos_embed_abs",
    "position_embedding_table",
    "pixel_pos",
    "position_embeddings",
    "embed_positions",
    "wpe",
    "relative_position_bias_table",
    "attention_biases",
    "rel_pos_h",
    "rel_pos_w",
    "patch_pos",
)
SCALES = ("slope", "gamma", "logit_scale", "temperature", "A_log")
NO_DECAY = (*INPUTS, *POSITIONS, *SCALES)
"""Names of what is learned in place of an input, of tables of positions, and of factors that have
several dimensions."""
BEHIND_THE_LAYERS = ("end_token", "final_layer_norm")
"""Names of what a module makes before its layers and reads behind them: an abstractor's last token,
and the last norm of OPT."""


@dataclass(eq=False)
class AdamWCosine:
    """AdamW (arXiv 1711.05101), warm-up, then a cosine to `min_lr_ratio` of the peak.

    Args:
        lr: peak learning rate.
        part_lr: peaks of single parts (vision, connector, fusion, llm) where they differ.
        layer_decay: of single parts with layers: the last layer has the part's rate, each layer
            before it so many times that of the next, and what comes before the first, as
            embeddings (layer -1), so many times that of the first; as with 0.9 in the ViT of
            mPLUG-Owl2 (arXiv 2311.04257).
        weight_decay: of weight matrices; norms, biases, gates, queries and positions have none, nor
            what a backbone names (see `Backbone.undecayed`).
        betas: of AdamW's running means of the gradient and its square.
        eps: added to the root of AdamW's mean square; at least 1e-3 for weights that are float16
            alone (`16-true`).
        warmup_steps: optimizer steps in which the rate rises from 0.
        min_lr_ratio: the rate at the end, as a share of the peak.
    """

    lr: float = 1e-3
    part_lr: dict[str, float | None] = field(default_factory=dict)
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    layer_decay: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rates in (("part_lr", self.part_lr), ("layer_decay", self.layer_decay)):
            if unknown := set(rates) - set(PARTS):
                raise ValueError(
                    f"{name} names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}"
                )

        self.check_numbers()

    def check_numbers(self) -> None:
        """Raises ValueError for numbers that torch and transformers take, and that turn the
        schedule or the decay round."""
        expected = {
            "weight_decay": ("at least 0", self.weight_decay >= 0),
            "eps": ("above 0", self.eps > 0),
            "betas": ("two from 0 to below 1", all(0 <= beta < 1 for beta in self.betas)),
            "warmup_steps": ("at least 0", self.warmup_steps >= 0),
            "min_lr_ratio": ("a share from 0 to 1", 0 <= self.min_lr_ratio <= 1),
        }
        for name, (words, is_right) in expected.items():
            if not is_right:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, expected {words}")

    def check_precision(self, precision: Any) -> None:
        """Raises ValueError where AdamW's mean of squares, which has the weights' type, could not
        fall: it is rounded back where it changes by less than half of bfloat16's last bit."""
        if precision == "bf16-true" and self.betas[1] > BFLOAT16_BETA:
            raise ValueError(
                f"optim.betas: in bf16-true a mean that keeps {self.betas[1]:g} of itself in each "
                f"step never falls, by rounding; expected at most {BFLOAT16_BETA}, or "
                "trainer.precision=bf16-mixed"
            )

    def groups(self, model: MultimodalLM) -> list[dict[str, Any]]:
        """Parameter groups of the trained parameters: per part (and layer, with `layer_decay`),
        with and without weight decay.

        Raises:
            ValueError: `layer_decay` for a part without layers; a part that is meant to train at a
                rate that is not above 0.
        """
        groups = []
        # decay would shrink the rows that are not trained
        without_decay = {id(table) for table, _ in model.row_limits()}
        without_decay.update(id(parameter) for parameter in model.vision.undecayed())
        for part in PARTS:
            part_lr = self.part_lr.get(part)
            # by None, since a rate of 0 is refused below and not replaced
            peak = self.lr if part_lr is None else part_lr
            for layer_name, scale, trained in self.layers(model.part(part)):
                if trained and not 0 < peak * scale < math.inf:
                    key = "lr" if part_lr is None else f"part_lr.{part}"
                    raise ValueError(
                        f"optim.{key}: the learning rate of {layer_name} is {peak * scale:g}, and "
                        "it is meant to train; give a rate above 0, or "
                        f"model/adapter@model.adapter.{part}=frozen"
                    )
                decayed: list[nn.Parameter] = []
                undecayed: list[nn.Parameter] = []
                for name, parameter in trained.items():
                    decays = has_decay(name, parameter) and id(parameter) not in without_decay
                    (decayed if decays else undecayed).append(parameter)
                kinds = (("", self.weight_decay, decayed), ("_no_decay", 0.0, undecayed))
                for suffix, weight_decay, kind_parameters in kinds:
                    # one fused call mixes no parameters of several meshes
                    for index, parameters in enumerate(by_mesh(kind_parameters)):
                        group = {"params": parameters, "lr": peak * scale}
                        group["weight_decay"] = weight_decay
                        group["name"] = f"{layer_name}{'_split' * index}{suffix}"
                        groups.append(group)
        return groups

    def layers(self, part: Part) -> list[tuple[str, float, dict[str, nn.Parameter]]]:
        """A part's trained parameters in one piece, or by layer, each with a name and its share
        of the learning rate."""
        trained = {n: p for n, p in part.parameters.items() if p.requires_grad}
        decay = self.layer_decay.get(part.name)
        if decay is None:
            return [(part.name, 1.0, trained)]
        if not part.blocks:
            raise ValueError(f"layer_decay: {part.name} has no layers")
        last = len(part.blocks) - 1
        index = {id(p): i for i, block in enumerate(part.blocks) for p in block}
        layers: dict[int, dict[str, nn.Parameter]] = {}
        # in the order of the modules: what is in no layer comes before the first, as embeddings do,
        # or belongs to the last
        outside = -1
        for name, parameter in part.parameters.items():
            layer = index.get(id(parameter), outside)
            if layer >= 0:
                outside = last
            elif any(word in BEHIND_THE_LAYERS for word in name.split(".")):
                layer = last
            if name in trained:
                layers.setdefault(layer, {})[name] = parameter
        return [(f"{part.name}_{i}", decay ** (last - i), layers[i]) for i in sorted(layers)]

    def build(self, model: MultimodalLM, steps: int) -> dict[str, Any]:
        """What Lightning's `configure_optimizers` returns."""
        groups = self.groups(model)
        if 0 < steps <= self.warmup_steps:
            log.warning(
                "optim.warmup_steps is %d, and the run has %d steps: the learning rate comes to "
                "%.0f %% of its peak",
                self.warmup_steps,
                steps,
                100 * (steps - 1) / self.warmup_steps,
            )
        if any(p.dtype == torch.float16 for group in groups for p in group["params"]):
            self.eps = max(self.eps, FLOAT16_EPS)
        optimizer = self.optimizer(groups)
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, self.warmup_steps, steps, min_lr_rate=self.min_lr_ratio
        )
        return {
            "optimizer": optimizer,
            # Lightning's default is a step an epoch, and a run is one epoch.
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of the groups."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(eq=False)
class MuonCosine(AdamWCosine):
    """Muon (arXiv 2502.16982, updates as large as AdamW's) for matrices between hidden widths;
    AdamW, at half the learning rate, for kernels, embeddings and all that has no weight decay.
    Arguments and the schedule are AdamWCosine's; `betas` and `eps` are of AdamW alone.

    Matrices are made orthogonal in bfloat16, as in the paper; on a CPU in float32, since many have
    no bfloat16 products and take ten times as long for them.
    """

    def groups(self, model: MultimodalLM) -> list[dict[str, Any]]:
        """The groups of AdamWCosine, those of matrices and kernels in two where Muon trains some
        of them."""
        # those of tokens and of positions
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = model.llm.get_output_embeddings()
        if head is not None:
            tables.add(id(head.weight))
        groups = []
        for group in super().groups(model):
            vectors = group["name"].endswith("_no_decay")
            for muon in (False, True):
                parameters = [
                    p
                    for p in group["params"]
                    if (p.ndim == 2 and not vectors and id(p) not in tables) == muon
                ]
                if parameters:
                    name = group["name"] + "_muon" * muon
                    lr = group["lr"] if muon else group["lr"] / 2
                    changes = {"params": parameters, "name": name, "lr": lr, "muon": muon}
                    groups.append({**group, **changes})
        return groups

    def build(self, model: MultimodalLM, steps: int) -> dict[str, Any]:
        """See `AdamWCosine`; says what of the LLM's matrices Muon does not train."""
        stacked = [p for p in model.part("llm").parameters.values() if p.ndim == 3]
        count = sum(p.numel() for p in stacked if p.requires_grad)
        if count:
            log.warning(
                "optim: %s numbers of the LLM are matrices in one tensor, as its experts are, and "
                "trained by AdamW at half the rate: Muon takes single matrices",
                f"{count:,}",
            )
        return super().build(model, steps)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Returns the optimizer of the groups."""
        optimizers: list[torch.optim.Optimizer] = []
        if matrices := [group for group in groups if group["muon"]]:
            optimizers.append(torch.optim.Muon(matrices, self.lr, adjust_lr_fn="match_rms_adamw"))
        if others := [group for group in groups if not group["muon"]]:
            optimizers.append(super().optimizer(others))
        return MuonAndAdamW(optimizers)


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW as one optimizer: Lightning trains several only by hand, and a
    checkpoint, the schedule and clipping of gradients know one list of groups and one state.

    Args:
        optimizers: one of each or one of them; a group's `muon` says whose it is.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for part in optimizers for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """See torch."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for optimizer in self.optimizers:
            # Set anew in each step, since load_state_dict replaces both.
            is_muon = isinstance(optimizer, torch.optim.Muon)
            optimizer.state = self.state
            optimizer.param_groups = [g for g in self.param_groups if g["muon"] == is_muon]
            with Float32OnCpu() if is_muon else nullcontext():
                optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.

        Raises ConfigError for the state of timm's Muon, which runs of before were trained with.
        """
        if not all("muon" in group for group in state_dict["param_groups"]):
            raise ConfigError(
                "optim: the checkpoint holds the state of timm's Muon, expected torch's; start "
                "another run from its weights by init_from= of its export"
            )
        super().load_state_dict(state_dict)


class Float32OnCpu(TorchFunctionMode):
    """Inside, `Tensor.bfloat16` gives a float32 copy of what is on a CPU. torch's Muon converts
    each matrix by it, and has no option for another type."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See torch."""
        if func is Tensor.bfloat16 and args[0].device.type == "cpu":
            # a copy, as the conversion would be: Muon goes on in place
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What each parameter group has beside its parameters and its rate of the moment."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


def check_groups(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Raises ConfigError where a checkpoint's parameter groups are not those of the run."""
    before = {group.get("name"): len(group["params"]) for group in saved}
    now = {group["name"]: len(group["params"]) for group in groups}
    if before != now:
        differing = sorted(f"{name}" for name, _ in before.items() ^ now.items())
        raise ConfigError(
            f"optim: the checkpoint's optimizer has {differing[0]} otherwise than this run (of its "
            f"parameter groups, {len(set(differing))} differ); give `optim` as it was, or start "
            "another run from its weights by init_from= of its export"
        )


def apply_schedule(
    scheduler: Any, settings: list[dict[str, Any]] | None = None
) -> tuple[float, float] | None:
    """Sets the rates that the schedule has at its step. A checkpoint brings those that its own
    schedule had, and only the step after it would have the new ones.

    Args:
        settings: those of the groups (`group_settings`) to take in the place of the checkpoint's.

    Returns:
        The old and the new rate of the group that changes most, None where none does.

    Raises:
        ValueError: a schedule that is no function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        if settings is None:
            return None
        raise ValueError(
            f"optim: a {type(scheduler).__name__} cannot go on with other rates; begin another run"
        )
    groups = scheduler.optimizer.param_groups
    # The checkpoint has brought its own weight decay and peak rates too.
    for group, configured in zip(groups, settings or [{}] * len(groups), strict=True):
        group.update(configured)
    scheduler.base_lrs = []
    scheduler._last_lr = []  # what get_last_lr gives, for which torch has no setter
    changes = []
    for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
        peak, old = float(group["initial_lr"]), float(group["lr"])
        new = peak * factor(scheduler.last_epoch)
        group["lr"] = new
        scheduler.base_lrs.append(peak)
        scheduler._last_lr.append(new)
        if new != old:
            changes.append((abs(new - old) / max(new, old), old, new))
    share, old, new = max(changes, default=(0.0, 0.0, 0.0))
    # Rates that differ by rounding alone are no change to tell of.
    return (old, new) if share > 1e-6 else None


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels have weight decay; vectors and biases have none, the biases of several
    experts in one tensor among them, nor what is in NO_DECAY."""
    is_matrix = parameter.ndim > 1 and not name.endswith("bias")
    # CrossViT and Visformer number theirs: pos_embed_0, pos_embed1
    parts = [re.sub(r"_?\d+$", "", part) for part in name.split(".")]
    return is_matrix and not any(part in NO_DECAY for part in parts)


def by_mesh(tensors: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in lists that one call of an optimizer may mix, each shared out over one
    mesh or over none."""
    lists: dict[Any, list[nn.Parameter]] = {}
    for tensor in tensors:
        # Only a parameter that is sharded has a mesh.
        lists.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(lists.values())
