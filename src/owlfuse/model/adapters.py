"""How each part is trained. The only place where requires_grad changes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

from owlfuse.core.console import PlainConsole as Console
from owlfuse.model.layouts import layers_past_their_forward
from owlfuse.model.parts import named_errors

log = logging.getLogger(__name__)
PARTS = ("vision", "connector", "fusion", "llm")
NAME = "default"
"""peft's name of the updates that are trained."""
START = "start"
"""peft's name of updates that stay what the trained ones were at first, and are subtracted (see
`LoRA.start_from_weights`)."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of peft's `init_lora_weights` that draw random numbers alone."""
NEEDS_DATA = ("eva", "corda", "lora_ga")
"""Those that peft computes of activations or gradients, by functions of its own."""

Value = TypeVar("Value")


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
    quantized: dict[str, int] = field(default_factory=dict)
    """Weights that are held in 4 bits (see `owlfuse.model.quantization`), with how many numbers
    each stands for."""
    closed_gates: set[str] = field(default_factory=set)
    """Factors that begin at zero, so that nothing else of the part has an effect or a gradient
    until they have moved."""

    def count(self, name: str) -> int:
        """Returns how many numbers a parameter stands for."""
        return self.quantized.get(name, self.parameters[name].numel())


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
        """Trains every parameter that can be.

        Raises:
            ValueError: weights in 4 bits.
        """
        check_not_quantized(part, part.parameters)
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
            ValueError: the part has fewer layers than n, or none; weights in 4 bits.
        """
        if not 1 <= self.n <= len(part.blocks):
            raise ValueError(
                f"n is {self.n}, and the part has {len(part.blocks)} layers to choose from"
            )
        check_not_quantized(part, part.parameters)
        Frozen().apply(part)
        # a block lists parameters without their names, so they are compared by identity
        untrainable = {id(part.parameters[name]) for name in part.untrainable}
        # what is in no block, as the embeddings, stays frozen
        for block in part.blocks[-self.n :]:
            for parameter in block:
                parameter.requires_grad_(id(parameter) not in untrainable)


@dataclass
class LoRA:
    """Low-rank updates of the part's linear layers by peft (arXiv 2106.09685), the layers
    themselves frozen, and the gates that begin closed trained with them. Arguments that peft's
    `LoraConfig` has too mean what they mean there.

    Args:
        r: the rank of the updates.
        alpha: the update is scaled by alpha / r.
        dropout: the share of a layer's inputs that its update does not see, in training.
        targets: names of linear layers, `q_proj` reaching each `...q_proj` of the part, or
            `all-linear`. The visual copies of `modality_adaptive` belong to the part `fusion`:
            `lora` there reaches `k_proj` and `v_proj`'s visual copies, and `lora` on `llm` reaches
            the text's.
        target_parameters: names of further matrices that are no linear layers, such as
            `experts.gate_up_proj` and `experts.down_proj` of a mixture of experts; each reaches
            every parameter of the part whose name ends so.
        use_dora: the update changes the direction of each row of a weight, and a vector that is
            trained its length (arXiv 2402.09353).
        use_rslora: the update is scaled by alpha / sqrt(r) (arXiv 2312.03732).
        rank_pattern: other ranks by layer, as `{q_proj: 16, layers.0.mlp.down_proj: 4}`: names, or
            regular expressions of their ends; the first that fits a layer counts.
        alpha_pattern: other alphas by layer, as `rank_pattern`.
        modules_to_save: names of modules of the part that are trained in full beside the updates,
            such as `norm` or `lm_head`; each reaches every module whose name ends so. They are
            trained in place: peft would keep a copy of what they were.
        init_lora_weights: what the updates start from. Nothing that changes the logits: `true`
            (peft's default), `gaussian`, `orthogonal`. The layer's largest singular vectors:
            `pissa`, `pissa_niter_<n>` (arXiv 2404.02948), or its QR decomposition: `olora` (arXiv
            2406.01775), whose start is subtracted (see `start_from_weights`). `false`: random, so
            that logits change.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | str = "all-linear"
    target_parameters: list[str] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True

    @property
    def starts_from_weights(self) -> bool:
        """Whether the updates start from the layers' own weights."""
        return self.init_lora_weights not in PLAIN_STARTS

    def apply(self, part: Part) -> None:
        """Freezes the part and adds the updates.

        Raises:
            ValueError: a target, a pattern or a module that the part does not have; a rank under 1;
                options that do not go together, or with 4-bit weights.
        """
        self.check_options(part)
        Frozen().apply(part)
        names = self.target_layers(part)
        parameters = self.target_matrices(part)
        ranks = matched(self.rank_pattern or {}, names, "rank_pattern", part)
        alphas = matched(self.alpha_pattern or {}, names, "alpha_pattern", part)
        self.check_ranks(part, names, ranks)
        saved = self.saved_parameters(part, names)
        # who names layers has chosen; `all-linear` sounds as if nothing were left out
        if self.targets == "all-linear":
            warn_of_unreached(part, parameters)
        # of the whole LLM, whose other part is in the same module
        before = {name: parameter.requires_grad for name, parameter in part.root.named_parameters()}
        alpha: Any = self.alpha  # peft, which says an int, takes any number
        # what starts from the weights is drawn first, and set below
        init: Any = True if self.starts_from_weights else self.init_lora_weights
        config = LoraConfig(
            r=self.r,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            # full names: a short one would reach the other part in the same LLM, too
            target_modules=names,
            target_parameters=parameters or None,
            bias="none",
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            rank_pattern=anchored(ranks),
            alpha_pattern=anchored(alphas),
            init_lora_weights=init,
        )
        with without_peft_warnings():
            inject_adapter_in_model(config, part.root, NAME)
        if self.starts_from_weights:
            config.init_lora_weights = False
            # the start stands for a part of the frozen weight, whose input is not dropped
            config.lora_dropout = 0.0
            with without_peft_warnings():
                inject_adapter_in_model(config, part.root, START)
            self.start_from_weights(part, names)
        activate_updates(part.root)
        # in 16 bits small steps of the optimizer would be lost; a run in bf16-true asks for it
        for name, parameter in part.root.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        # peft freezes all of the root but its adapters: the other parts in it are set back
        for name, parameter in part.root.named_parameters():
            base_name = without_base_layers(name)
            is_trained = before.get(base_name, not is_saved_start(name))
            parameter.requires_grad_(before.get(name, is_trained))
        for name in part.closed_gates:
            gate = part.parameters[name]
            gate.data = gate.data.float()
            gate.requires_grad_(True)
        for parameter in saved:
            parameter.requires_grad_(True)

    def check_options(self, part: Part) -> None:
        """Raises ValueError for options that peft lacks, or that do not go together."""
        init = self.init_lora_weights
        if self.r < 1:
            raise ValueError(f"r is {self.r}, and a rank is at least 1")
        if init in NEEDS_DATA or init == "loftq":
            reason = "a quantizer of its own" if init == "loftq" else "a pass over the data"
            raise ValueError(
                f"init_lora_weights: {init} needs {reason} before training, which owlfuse does "
                "not run; take pissa, olora, gaussian, orthogonal or true"
            )
        is_pissa = isinstance(init, str) and re.fullmatch(r"pissa(_niter_\d+)?", init)
        if init not in PLAIN_STARTS and init != "olora" and not is_pissa:
            raise ValueError(
                f"init_lora_weights is {init!r}, expected true, false, gaussian, orthogonal, "
                "pissa, pissa_niter_<n> or olora"
            )
        if self.starts_from_weights and self.use_dora:
            raise ValueError(
                f"init_lora_weights: {init} subtracts its start from the layer, which use_dora "
                "would scale too; give one of the two"
            )
        if self.target_parameters and (self.use_dora or init not in (True, False, "gaussian")):
            raise ValueError(
                "target_parameters are no linear layers, and peft has neither use_dora nor "
                f"init_lora_weights: {init} for them; leave that out"
            )
        if part.quantized and (self.starts_from_weights or init == "orthogonal"):
            how = "decomposes" if self.starts_from_weights else "has the type of the"
            raise ValueError(
                f"init_lora_weights: {init} {how} weights, and these are in 4 bits; take gaussian "
                "or true"
            )

    def check_ranks(self, part: Part, names: list[str], ranks: dict[str, int]) -> None:
        """Raises ValueError for a rank under 1, or one that a start does not have."""
        for name in names:
            layer: Any = part.root.get_submodule(name)
            rank = ranks.get(name, self.r)
            if rank < 1:
                raise ValueError(f"rank_pattern: {name} has rank {rank}, and a rank is at least 1")
            smallest = min(layer.weight.shape)
            if self.init_lora_weights == "olora" and isinstance(layer, Conv1D):
                raise ValueError(
                    "init_lora_weights: olora takes weights as linear layers hold them, and "
                    f"{name} holds them transposed; take pissa, gaussian or true"
                )
            if self.starts_from_weights and rank > smallest:
                raise ValueError(
                    f"init_lora_weights: {self.init_lora_weights} takes {rank} directions of "
                    f"{name}, which has {smallest}; give a lower r or rank_pattern"
                )
            if self.init_lora_weights == "orthogonal" and rank % 2:
                raise ValueError(
                    f"init_lora_weights: orthogonal halves the rank, and {name} has {rank}; give "
                    "an even one"
                )

    def saved_parameters(self, part: Part, targets: list[str]) -> list[nn.Parameter]:
        """Returns the parameters of the modules that `modules_to_save` names.

        Raises:
            ValueError: no such module in the part, or one that has an update or 4-bit weights.
        """
        # a tied head is the table of embeddings, under its name
        names_by_id = {id(parameter): name for name, parameter in part.parameters.items()}
        saved: dict[str, nn.Parameter] = {}
        for module_name in self.modules_to_save or []:
            matching: dict[str, nn.Parameter] = {}
            for path, module in part.root.named_modules():
                # the dots keep `norm` from reaching `q_norm`
                if not f".{path}".endswith(f".{module_name}"):
                    continue
                for parameter in module.parameters():
                    name = names_by_id.get(id(parameter))
                    if name is not None:
                        matching[name] = parameter
            if not matching:
                raise ValueError(
                    f"modules_to_save: {part.name} has no module {module_name} with weights; its "
                    f"weights are those of {', '.join(short_modules(part))}"
                )
            saved |= matching
        weights_of_targets = {f"{name}.weight" for name in targets}
        for name in saved:
            if name in weights_of_targets:
                raise ValueError(
                    f"modules_to_save: {name.removesuffix('.weight')} has an update, too; leave "
                    "it out here or in targets"
                )
        check_not_quantized(part, saved)
        return [parameter for name, parameter in saved.items() if name not in part.untrainable]

    def start_from_weights(self, part: Part, names: list[str]) -> None:
        """Gives the updates B A of linear layers W the start B0 A0 that PiSSA or OLoRA takes of W,
        and subtracts it: the layer computes W x - s B0 A0 x + s B A x, s being the scale.

        peft's own changes W to W - s B0 A0 instead. That is the same function, but a base that no
        folder has, and that another machine's singular vectors would not give again; here W stays
        what was loaded, and the small B0 and A0 are saved with the updates.
        """
        for name in names:
            layer: Any = part.root.get_submodule(name)
            weight = layer.get_base_layer().weight
            storage, original = weight.data, weight.data.clone()
            if self.init_lora_weights == "olora":
                layer.olora_init(NAME)
            else:
                layer.pissa_init(NAME, self.init_lora_weights)
            # one of the two writes into the weight, the other puts a new one into its place
            storage.copy_(original)
            weight.data = storage
            with torch.no_grad():
                for matrices in (layer.lora_A, layer.lora_B):
                    # the decomposition is in float32, whatever the layer's type
                    trained = matrices[NAME].weight.data.to(weight.dtype)
                    matrices[NAME].weight.data = trained.contiguous()
                    # a copy: training moves the other one
                    matrices[START].weight.data = trained.clone().contiguous()
            layer.scaling[START] = -layer.scaling[NAME]

    def target_layers(self, part: Part) -> list[str]:
        """Returns the full names of the part's linear layers that are targets, the LLM's head
        never."""
        paths_by_name: dict[str, list[str]] = {}
        # an update of the head is trained by `train_rows` or `full` alone
        root: Any = part.root
        head = root.get_output_embeddings() if part.name == "llm" else None
        # in a forward pass that reads their weights an update would have no part
        past_their_forward = layers_past_their_forward(part.root)
        left_out = set()
        for path, module in part.root.named_modules():
            is_linear = isinstance(module, nn.Linear | Conv1D) and module is not head
            if not is_linear or f"{path}.weight" not in part.parameters:
                continue
            # a tower that texts do not pass, whose updates would never move
            if f"{path}.weight" in part.untrainable:
                continue
            if id(module) in past_their_forward:
                left_out.add(layer_name(path))
            else:
                paths_by_name.setdefault(layer_name(path), []).append(path)
        if self.targets == "all-linear":
            targets = list(paths_by_name)
            if left_out:
                log.warning(
                    "adapter.%s: all-linear leaves out %s, whose weights the model reads without a "
                    "call of the layers, so that updates would have no effect: they stay frozen",
                    part.name,
                    ", ".join(sorted(left_out)),
                )
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
        for target in self.target_parameters or []:
            matching = []
            for name, parameter in part.parameters.items():
                # the dots keep `proj` from reaching `up_proj`
                if f".{name}".endswith(f".{target}") and parameter.ndim in (2, 3):
                    matching.append(name)
            if not matching:
                raise ValueError(
                    f"target_parameters: {part.name} has no matrix {target}; matrices that are no "
                    f"linear layers are {', '.join(short_names(stacked_matrices(part))) or 'none'}"
                )
            names += matching
        check_not_quantized(part, names)
        return names


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Inside, peft does not warn of what is found out or checked anyway: which layers hold their
    weights transposed, as GPT-2's; patterns that it has added by itself for fused experts; and
    updates that a file lacks."""
    with warnings.catch_warnings():
        for message in (
            "fan_in_fan_out is set to",
            "The following (rank|alpha)_pattern keys did not match",
            "Found missing adapter keys",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def matched(
    pattern: Mapping[str, Value], names: list[str], option: str, part: Part
) -> dict[str, Value]:
    """Returns the values of a pattern by the full names of the layers that it reaches, the first
    key that fits counting, as in peft.

    Raises:
        ValueError: a key that fits no layer, or is no regular expression.
    """
    values: dict[str, Value] = {}
    unused = set(pattern)
    for key, value in pattern.items():
        try:
            # as peft matches a key: with the end of a name, behind a dot
            ends = re.compile(rf"(.*\.)?({key})")
        except re.error as error:
            raise ValueError(f"{option}: {key} is no regular expression: {error}") from error
        for name in names:
            # `k_proj` stands for its copies by modality, too, as in `targets`
            plain = re.sub(r"\.(text|vision)$", "", name)
            if ends.fullmatch(name) or ends.fullmatch(plain):
                unused.discard(key)
                values.setdefault(name, value)
    if unused:
        known = sorted({layer_name(name) for name in names})
        raise ValueError(
            f"{option}: {min(unused)} fits no layer of {part.name} with an update; those are "
            f"{', '.join(known)}"
        )
    return values


def anchored(values: Mapping[str, Value]) -> dict[str, Value]:
    """Returns values by full names as a pattern of peft's, which else takes a name for the end of
    longer ones."""
    return {f"^{re.escape(name)}": value for name, value in values.items()}


def activate_updates(root: nn.Module) -> None:
    """Has every layer below a module add all the updates that it has. peft leaves each layer with
    those that were added last anywhere in the module."""
    for module in root.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(module.r))


def is_saved_start(name: str) -> bool:
    """Returns whether a parameter is the start of an update, which is frozen and yet saved with
    what is trained."""
    return ".lora_" in name and f".{START}." in name


def check_not_quantized(part: Part, names: Iterable[str]) -> None:
    """Raises ValueError where one of the parameters, which are to be trained, is in 4 bits."""
    for name in names:
        if name in part.quantized:
            raise ValueError(
                f"{name} is held in 4 bits (model.llm.quantization), which are not trained; give "
                "lora or frozen, or leave the quantization out"
            )


def check_split_updates(llm: nn.Module) -> None:
    """Raises ValueError for updates that tensor parallelism cannot split: DoRA, whose lengths are
    of rows that no rank has in full."""
    for name, module in llm.named_modules():
        if isinstance(module, LoraLayer) and len(module.lora_magnitude_vector):
            raise ValueError(
                f"adapter: {name} has use_dora, and tensor ranks do not have the whole rows whose "
                "lengths it trains; use FSDP alone (tensor: 1), or use_dora: false"
            )


def stacked_matrices(part: Part) -> list[str]:
    """Returns the names of the part's parameters that hold several matrices, as those of a
    mixture's experts."""
    stacked = []
    for name, parameter in part.parameters.items():
        # the weight of a depthwise convolution has three dimensions too, and one of them is 1
        if parameter.ndim == 3 and min(parameter.shape) > 1:
            stacked.append(name)
    return stacked


def short_modules(part: Part) -> list[str]:
    """Returns the last names of the modules that hold a part's parameters, sorted, each once."""
    modules = {name.rpartition(".")[0] for name in part.parameters}
    return sorted({layer_name(module) for module in modules if module})


def short_names(names: Iterable[str]) -> list[str]:
    """Returns the last two parts of dotted names, sorted, each once."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def warn_of_unreached(part: Part, reached: list[str]) -> None:
    """Logs which matrices of an LLM `all-linear` does not reach."""
    missed = [name for name in stacked_matrices(part) if name not in reached]
    if part.name == "llm" and missed:
        total = sum(part.count(name) for name in part.parameters)
        share = sum(part.count(name) for name in missed) / total
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
    # a path of a single name has no parent
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
        with named_errors(f"adapter.{name}"):
            policies[name].apply(part)
    # after the policies, which freeze the tables
    names = train_rows(model.part("llm")) if new_tokens else []
    model.new_rows = {name: sorted((new_tokens or {}).values()) for name in names}
    summaries = []
    for name in PARTS:
        part = model.part(name)
        # the part is read anew: LoRA has added parameters and renamed others
        counts = {name: part.count(name) for name in part.parameters}
        trained = sum(counts[name] for name, p in part.parameters.items() if p.requires_grad)
        if name == "llm":
            for table, rows in model.new_rows.items():
                weight = part.parameters[table]
                # the gradient of the other rows is masked, so they count as frozen
                trained -= weight.numel() - len(rows) * weight.shape[1]
        frozen = sum(counts.values()) - trained
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
    `TimmBackbone vit_tiny_patch16_224`, with `in 4 bits` where it is quantized."""
    if not node:
        return ""
    target = str(node.get("_target_", "")).rpartition(".")[2]
    config = node.get("config")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    model = node.get("pretrained") or node.get("name") or model_type
    if not model:
        return target
    # a class says how the part is built; a function, load_llm, says nothing beside the model
    if target[:1].isupper():
        return f"{target} {model}"
    return f"{model} in 4 bits" if node.get("quantization") is not None else f"{model}"
