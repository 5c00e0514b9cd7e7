"""What of each part is trained, and how. The only place where requires_grad changes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
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
    """One part of a model as adapters see it: its parameters by name, those it shares with
    another part left out."""

    name: str
    root: nn.Module
    """The module that holds the part's linear layers, the whole LLM for `fusion` and `llm`."""
    parameters: dict[str, nn.Parameter]
    """By their names in `root`."""
    blocks: list[list[nn.Parameter]] = field(default_factory=list)
    """Layers from first to last, for the parts that have them."""
    tables: dict[str, nn.Parameter] = field(default_factory=dict)
    """Of an LLM the embeddings of its tokens and its head, with a row for each token; one where
    they are tied."""
    fixed: set[str] = field(default_factory=set)
    """Parameters that the model itself never trains by gradients, as the biases that balance a
    router."""


class PartedModel(Protocol):
    """A model that says which of its parameters belong to which part."""

    new_rows: dict[str, list[int]]
    """Of the LLM's tables by name the rows that are trained, where they are not trained as a
    whole."""

    def part(self, name: str) -> Part:
        """The part as it is now."""


class Policy(Protocol):
    """How a part is trained."""

    def apply(self, part: Part) -> None:
        """Sets requires_grad on the part's parameters, and adds what the policy adds."""


class Frozen:
    """Nothing of the part is trained."""

    def apply(self, part: Part) -> None:
        """See `Policy`."""
        for parameter in part.parameters.values():
            parameter.requires_grad_(False)


class Full:
    """All of the part is trained."""

    def apply(self, part: Part) -> None:
        """See `Policy`."""
        for name, parameter in part.parameters.items():
            parameter.requires_grad_(name not in part.fixed)


class LastN:
    """The last n layers are trained: decoder layers of an LLM, blocks of a backbone, layers of an
    abstractor, with the norm after them where it is grouped with them.

    Args:
        n: layers.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def apply(self, part: Part) -> None:
        """See `Policy`.

        Raises:
            ValueError: the part has fewer layers than n, or none.
        """
        if not 1 <= self.n <= len(part.blocks):
            raise ValueError(
                f"n is {self.n}, and the part has {len(part.blocks)} layers to choose from"
            )
        Frozen().apply(part)
        fixed = {id(part.parameters[name]) for name in part.fixed}
        for block in part.blocks[-self.n :]:
            for parameter in block:
                parameter.requires_grad_(id(parameter) not in fixed)


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
        """See `Policy`.

        Raises:
            ValueError: a target that no linear layer or parameter of the part has as its name, or
                an r under 1.
        """
        if self.r < 1:
            raise ValueError(f"r is {self.r}, and a rank is at least 1")
        Frozen().apply(part)
        names = self.find(part)
        parameters = self.find_parameters(part)
        if self.targets == "all-linear":
            warn_of_unreached(part, parameters)
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
        # peft freezes all of the root but its adapters: the other parts in it go back to what they
        # were
        for name, parameter in part.root.named_parameters():
            parameter.requires_grad_(before.get(name, before.get(without_base_layers(name), True)))

    def find(self, part: Part) -> list[str]:
        """Full names of the part's linear layers that the targets mean, the LLM's head never."""
        linear: dict[str, list[str]] = {}
        for name, module in part.root.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in part.parameters:
                linear.setdefault(layer_name(name), []).append(name)
        linear.pop("lm_head", None)
        named = self.targets if isinstance(self.targets, list) else [self.targets]
        wanted = list(linear) if self.targets == "all-linear" else named
        if missing := [name for name in wanted if name not in linear]:
            raise ValueError(
                f"targets {missing} are no linear layers of {part.name}, which has "
                f"{', '.join(sorted(linear)) or 'none'}"
            )
        if not wanted:
            raise ValueError(f"{part.name} has no linear layer for lora")
        return [name for key in wanted for name in linear[key]]

    def find_parameters(self, part: Part) -> list[str]:
        """Full names of the parameters that `target_parameters` mean."""
        found = []
        for target in self.target_parameters:
            names = [
                name
                for name, p in part.parameters.items()
                if f".{name}".endswith(f".{target}") and p.ndim in (2, 3)
            ]
            if not names:
                fused = sorted({".".join(name.split(".")[-2:]) for name in stacked(part)})
                raise ValueError(
                    f"target_parameters: {part.name} has no matrix {target}; matrices that are no "
                    "linear layers are "
                    f"{', '.join(fused) or 'none'}"
                )
            found += names
        return found


def stacked(part: Part) -> dict[str, nn.Parameter]:
    """The part's matrices of which several are one parameter, as those of a mixture's experts
    are."""
    return {name: p for name, p in part.parameters.items() if p.ndim == 3 and min(p.shape) > 1}


def warn_of_unreached(part: Part, reached: list[str]) -> None:
    """Says which matrices of an LLM `all-linear` does not reach."""
    missed = {name: p for name, p in stacked(part).items() if name not in reached}
    if part.name == "llm" and missed:
        kinds = sorted({".".join(name.split(".")[-2:]) for name in missed})
        share = sum(p.numel() for p in missed.values()) / sum(
            p.numel() for p in part.parameters.values()
        )
        log.warning(
            "adapter.llm: all-linear reaches linear layers, and %s, which hold %.0f %% of the "
            "LLM's parameters, are none: they "
            "stay frozen; name them in target_parameters to train them too",
            ", ".join(kinds),
            100 * share,
        )


def without_base_layers(name: str) -> str:
    """The name that a parameter has where no LoRA layer is put around its module."""
    return name.replace(".base_layer", "")


def layer_name(path: str) -> str:
    """`layers.0.self_attn.k_proj` -> `k_proj`, and the same for its copies by modality,
    `....k_proj.vision`."""
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
    """Has the tables of an LLM trained that its policy has frozen, for their new tokens' rows
    alone. Returns their names."""
    names = [name for name, table in part.tables.items() if not table.requires_grad]
    for name in names:
        part.tables[name].requires_grad_(True)
    return names


def apply_adapters(
    model: PartedModel, policies: dict[str, Policy], new_tokens: dict[str, int] | None = None
) -> list[PartSummary]:
    """Applies each part's policy and counts. Of an LLM that is not trained as a whole the rows of
    `new_tokens` are trained in its embeddings and its head, which have no meaning yet;
    `model.new_rows` then says of which tables and which rows.

    Raises:
        ValueError: nothing is left to train, or a policy does not fit its part (which is named).
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
                trained -= weight.numel() - len(rows) * weight.shape[1]
        policy = type(policies[name]).__name__
        summaries.append(
            PartSummary(name, policy, trained, sum(p.numel() for p in parameters) - trained)
        )
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
    left = ("part", "which", "policy")
    for column in (*left, "trained", "frozen"):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    total = PartSummary(
        "all", "", sum(s.trained for s in summaries), sum(s.frozen for s in summaries)
    )
    for summary in (*summaries, total):
        which = described_part((nodes or {}).get(summary.part))
        table.add_row(
            summary.part, which, summary.policy, f"{summary.trained:,}", f"{summary.frozen:,}"
        )
    Console().print(table)


def described_part(node: dict[str, Any] | None) -> str:
    """`TimmBackbone vit_tiny_patch16_224`: the class of a part, where a class makes it, and
    which model it is of."""
    if not node:
        return ""
    kind = str(node.get("_target_", "")).rpartition(".")[2]
    config = node.get("config") or {}
    model = (
        node.get("pretrained")
        or node.get("name")
        or (config.get("model_type") if isinstance(config, dict) else None)
    )
    words = [kind] if kind[:1].isupper() or not model else []
    return " ".join([*words, str(model)] if model else words)
