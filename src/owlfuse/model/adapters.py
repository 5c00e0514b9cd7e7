"""How each part is trained. The only place where requires_grad changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from peft import LoraConfig, inject_adapter_in_model
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from owlfuse.core.console import PlainConsole as Console

log = logging.getLogger(__name__)
PARTS = ("vision", "connector", "fusion", "llm")


@dataclass
class Part:
    """One part of a model: its parameters by name, without those it shares with another part."""

    name: str
    root: nn.Module
    """The module that holds the part's linear layers, the whole LLM for `fusion` and `llm`."""
    parameters: dict[str, nn.Parameter]
    """By their names in `root`."""
    blocks: list[list[nn.Parameter]] = field(default_factory=list)
    """Layers from first to last, for the parts that have them."""
    tables: dict[str, nn.Parameter] = field(default_factory=dict)
    """Of an LLM the embeddings of its tokens and its head, with a row for each token; one table
    where they are tied."""
    untrainable: set[str] = field(default_factory=set)
    """Parameters that the model itself never trains by gradients, as the biases that balance a
    router."""


class PartedModel(Protocol):
    """A model whose parameters are grouped into parts."""

    new_rows: dict[str, list[int]]
    """Of the LLM's tables by name the rows that are trained, where not all rows are."""

    def part(self, name: str) -> Part:
        """The part as it is now."""


class Policy(Protocol):
    """How a part is trained."""

    def apply(self, part: Part) -> None:
        """Sets requires_grad on the part's parameters, and adds what the policy adds."""


class Frozen:
    """Nothing of the part is trained."""

    def apply(self, part: Part) -> None:
        """Freezes every parameter."""
        for parameter in part.parameters.values():
            parameter.requires_grad_(False)


class Full:
    """All of the part is trained."""

    def apply(self, part: Part) -> None:
        """Trains every parameter that can be."""
        for name, parameter in part.parameters.items():
            parameter.requires_grad_(name not in part.untrainable)


class LastN:
    """The last n layers are trained: decoder layers of an LLM, blocks of a backbone, layers of an
    abstractor, with the norm after them where it is grouped with them.

    Args:
        n: layers.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def apply(self, part: Part) -> None:
        """Trains the last layers and freezes the others.

        Raises:
            ValueError: the part has fewer layers than n, or none.
        """
        if not 1 <= self.n <= len(part.blocks):
            raise ValueError(
                f"n is {self.n}, and the part has {len(part.blocks)} layers to choose from"
            )
        Frozen().apply(part)
        untrainable = {id(part.parameters[name]) for name in part.untrainable}
        for block in part.blocks[-self.n :]:
            for parameter in block:
                parameter.requires_grad_(id(parameter) not in untrainable)


class LoRA:
    """Low-rank updates of the part's linear layers by peft (arXiv 2106.09685), the layers
    themselves frozen.

    Args:
        r: the rank of the updates.
        dropout: the share of a layer's inputs that its update does not see, in training.
        targets: names of linear layers, `q_proj` reaching each `...q_proj` of the part, or
            `all-linear`. The visual copies of `modality_adaptive` belong to the part `fusion`:
            `lora` there reaches `k_proj` and `v_proj`'s visual copies, and `lora` on `llm` reaches
            the text's.
        alpha: the update is scaled by alpha / r.
        target_parameters: names of further matrices that are no linear layers, such as
            `experts.gate_up_proj` and `experts.down_proj` of a mixture of experts; each reaches
            every parameter of the part whose name ends so.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: list[str] | str = "all-linear",
        target_parameters: list[str] | None = None,
    ):
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.target_parameters = target_parameters or []

    def apply(self, part: Part) -> None:
        """Freezes the part and adds the updates.

        Raises:
            ValueError: a target that no linear layer or parameter of the part has as its name, or
                an r under 1.
        """
        if self.r < 1:
            raise ValueError(f"r is {self.r}, and a rank is at least 1")
        Frozen().apply(part)
        names = self.target_layers(part)
        parameters = self.target_matrices(part)
        if self.targets == "all-linear":
            warn_of_unreached(part, parameters)
        # of the whole LLM, whose other part is in the same module
        before = {name: parameter.requires_grad for name, parameter in part.root.named_parameters()}
        alpha: Any = self.alpha  # peft, which says an int, takes any number
        config = LoraConfig(
            r=self.r,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            target_parameters=parameters or None,
            bias="none",
        )
        inject_adapter_in_model(config, part.root)
        # peft freezes all of the root but its adapters: the other parts in it are set back
        for name, parameter in part.root.named_parameters():
            parameter.requires_grad_(before.get(name, before.get(without_base_layers(name), True)))

    def target_layers(self, part: Part) -> list[str]:
        """Returns the full names of the part's linear layers that are targets, the LLM's head
        never."""
        paths_by_name: dict[str, list[str]] = {}
        for path, module in part.root.named_modules():
            if isinstance(module, nn.Linear) and f"{path}.weight" in part.parameters:
                paths_by_name.setdefault(layer_name(path), []).append(path)
        # an update of the head is trained by `train_rows` or `full` alone
        paths_by_name.pop("lm_head", None)
        if self.targets == "all-linear":
            targets = list(paths_by_name)
        else:
            targets = self.targets if isinstance(self.targets, list) else [self.targets]
        if missing := [name for name in targets if name not in paths_by_name]:
            raise ValueError(
                f"targets {missing} are no linear layers of {part.name}, which has "
                f"{', '.join(sorted(paths_by_name)) or 'none'}"
            )
        if not targets:
            raise ValueError(f"{part.name} has no linear layer for lora")
        return list(chain.from_iterable(paths_by_name[name] for name in targets))

    def target_matrices(self, part: Part) -> list[str]:
        """Returns the full names of the parameters that `target_parameters` names."""
        names = []
        for target in self.target_parameters:
            matching = []
            for name, parameter in part.parameters.items():
                if f".{name}".endswith(f".{target}") and parameter.ndim in (2, 3):
                    matching.append(name)
            if not matching:
                raise ValueError(
                    f"target_parameters: {part.name} has no matrix {target}; matrices that are no "
                    f"linear layers are {', '.join(short_names(stacked_matrices(part))) or 'none'}"
                )
            names += matching
        return names


def stacked_matrices(part: Part) -> dict[str, nn.Parameter]:
    """Returns the part's parameters that hold several matrices, as those of a mixture's experts."""
    stacked = {}
    for name, parameter in part.parameters.items():
        if parameter.ndim == 3 and min(parameter.shape) > 1:
            stacked[name] = parameter
    return stacked


def short_names(names: Iterable[str]) -> list[str]:
    """Returns the last two parts of dotted names, sorted, each once."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def warn_of_unreached(part: Part, reached: list[str]) -> None:
    """Logs which matrices of an LLM `all-linear` does not reach."""
    missed = {name: p for name, p in stacked_matrices(part).items() if name not in reached}
    if part.name == "llm" and missed:
        total = sum(parameter.numel() for parameter in part.parameters.values())
        share = sum(parameter.numel() for parameter in missed.values()) / total
        log.warning(
            "adapter.llm: all-linear reaches linear layers, and %s, which hold %.0f %% of the "
            "LLM's parameters, are none: they stay frozen; name them in target_parameters to train "
            "them too",
            ", ".join(short_names(missed)),
            100 * share,
        )


def without_base_layers(name: str) -> str:
    """Returns the name that a parameter has where no LoRA layer is put around its module."""
    return name.replace(".base_layer", "")


def layer_name(path: str) -> str:
    """Returns the last name of a path, `layers.0.self_attn.k_proj` -> `k_proj`, and the same for
    its copies by modality, `....k_proj.vision`."""
    *_, parent, name = ["", *path.split(".")]
    return parent if name in ("text", "vision") else name


@dataclass
class PartSummary:
    """One line of the table at start: parameter counts of a part under its policy."""

    part: str
    policy: str
    trained: int
    frozen: int


def train_rows(part: Part) -> list[str]:
    """Makes the tables of an LLM that its policy has frozen trainable, for the rows of new tokens
    alone. Returns their names."""
    names = [name for name, table in part.tables.items() if not table.requires_grad]
    for name in names:
        part.tables[name].requires_grad_(True)
    return names


def apply_adapters(
    model: PartedModel, policies: dict[str, Policy], new_tokens: dict[str, int] | None = None
) -> list[PartSummary]:
    """Applies each part's policy and counts parameters. Where the embeddings and the head of an LLM
    are not trained, the rows of `new_tokens` are, which have no meaning yet; `model.new_rows` then
    lists the rows by table.

    Raises:
        ValueError: nothing is trained, or a policy does not fit its part (which is named).
    """
    for name in PARTS:
        part = model.part(name)
        # concat has none: a policy for it is not wrong, there is nothing to do
        if not part.parameters:
            continue
        try:
            policies[name].apply(part)
        except ValueError as error:
            raise ValueError(f"adapter.{name}: {error}") from error
    # after the policies, which freeze the tables
    names = train_rows(model.part("llm")) if new_tokens else []
    model.new_rows = {name: sorted((new_tokens or {}).values()) for name in names}
    summaries = []
    for name in PARTS:
        part = model.part(name)
        parameters = part.parameters.values()
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        if name == "llm":
            for table, rows in model.new_rows.items():
                weight = part.parameters[table]
                # the gradient of the other rows is masked, so they count as frozen
                trained -= weight.numel() - len(rows) * weight.shape[1]
        frozen = sum(p.numel() for p in parameters) - trained
        summaries.append(PartSummary(name, type(policies[name]).__name__, trained, frozen))
    if not any(summary.trained for summary in summaries):
        raise ValueError(
            "adapter: every part is frozen, so there is nothing to train; give one of them full, "
            "lora or last_n"
        )
    return summaries


def print_summary(summaries: list[PartSummary], nodes: dict[str, Any] | None = None) -> None:
    """Prints the table of parts, policies and parameters.

    Args:
        nodes: the configuration's `model`, whose parts are named.
    """
    table = Table(box=SIMPLE_HEAD)
    for column in ("part", "which", "policy"):
        table.add_column(column, overflow="fold")
    for column in ("trained", "frozen"):
        table.add_column(column, justify="right", overflow="fold")
    trained = sum(summary.trained for summary in summaries)
    frozen = sum(summary.frozen for summary in summaries)
    for summary in (*summaries, PartSummary("all", "", trained, frozen)):
        description = describe_node((nodes or {}).get(summary.part))
        counts = f"{summary.trained:,}", f"{summary.frozen:,}"
        table.add_row(summary.part, description, summary.policy, *counts)
    Console().print(table)


def describe_node(node: dict[str, Any] | None) -> str:
    """Returns the class of a part, unless a function makes it, and its model's name, as in
    `TimmBackbone vit_tiny_patch16_224`."""
    if not node:
        return ""
    target = str(node.get("_target_", "")).rpartition(".")[2]
    config = node.get("config")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    model = node.get("pretrained") or node.get("name") or model_type
    if not model:
        return target
    return f"{target} {model}" if target[:1].isupper() else str(model)
