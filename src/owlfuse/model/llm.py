"""The LLM is a plain causal LM of transformers; this file makes it and says where its parts are.

B rows, T text positions, D width, H query heads, K key-value heads, d head width, V vocabulary,
R places of logits.
"""

from __future__ import annotations

import inspect
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from owlfuse.core.hub_access import check_hub_has
from owlfuse.core.packages import looks_local, missing, packaged
from owlfuse.core.types import Batch

NORMS = ("input_layernorm", "post_attention_layernorm")
KEY_VALUE = ("k_proj", "v_proj")
TENSOR_ROLES = {
    **{f"self_attn.{name}": "columns" for name in ("q_proj", "k_proj", "v_proj")},
    **{f"mlp.{name}": "columns" for name in ("gate_proj", "up_proj")},
    "self_attn.o_proj": "rows",
    "mlp.down_proj": "rows",
}
"""How tensor parallelism splits the projections of a decoder layer: by the heads or hidden units
that come out (`columns`), or by those that go in (`rows`), after which the ranks' results are added
up."""
PER_HEAD_NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
"""Norms of Qwen3 and HunYuan, whose one weight serves every head."""
FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)
"""What modelling files raise for shapes, arguments and settings that they were not written for.
Interrupts, missing memory and missing packages are none of them."""


def first_line(error: BaseException) -> str:
    """What an error says, in one short line behind its class."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0][:160]}"


def load_llm(
    vocab_size: int,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    gguf_file: str | None = None,
    architecture: dict[str, Any] | None = None,
    attention: Literal["sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa",
    dtype: str | None = None,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """A causal LM from a folder of weights or a hub name (`pretrained`; `package:<package>` is an
    installed package's folder), or random from a configuration with a `model_type`.

    On the meta device (`with torch.device("meta")`) only the configuration is read, and nothing is
    loaded. Embeddings grow to `vocab_size`, the tokenizer's, where the model has fewer.

    Args:
        pretrained: a folder of weights, a hub name, or `package:<package>`.
        config: the keys of a transformers configuration with its `model_type` (llama, mistral,
            qwen2, ...), for random weights.
        attention: the kernel of transformers' attention; packed rows need `sdpa`.
        gguf_file: the name of a GGUF file in the folder, which transformers turns into weights.
        gradient_checkpointing: activations inside of decoder layers are dropped and computed again
            in the backward pass.
        architecture: what the configuration of `pretrained` says, so that a run can be checked and
            planned where the hub is not at hand: it is read on the meta device alone, in the place
            of the folder's or the hub's.
        dtype: as transformers takes it (`float32`, `bfloat16`, `auto`); by default float32.

    Raises:
        ValueError: both or none of `pretrained` and `config`, an unknown model type, or a folder
            without a configuration.
    """
    if (pretrained is None) == (config is None):
        raise ValueError(
            "give one of pretrained (a folder or a hub name) and config (with a model_type)"
        )
    options = {"attn_implementation": attention, "dtype": dtype or "float32"}
    on_meta = torch.get_default_device().type == "meta"
    if on_meta and pretrained and architecture:
        config = architecture
    if config is not None:
        made = random_config(config, vocab_size)
        try:
            llm = AutoModelForCausalLM.from_config(made, **options)
        except FAILURES as error:
            raise ValueError(f"config: {made.model_type}: {first_line(error)}") from error
    else:
        llm = load_pretrained(str(pretrained), gguf_file, options)
    if pretrained:
        # how many tokens the weights know
        llm.trained_rows = llm.get_input_embeddings().num_embeddings
    if llm.get_input_embeddings().num_embeddings < vocab_size:
        llm.resize_token_embeddings(vocab_size, mean_resizing=not on_meta)
    if gradient_checkpointing:
        recompute_activations(llm)
    decoder_layers(llm)
    return llm


def random_config(config: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """The transformers configuration for `config`, whose keys are those of its model type."""
    fields = {"vocab_size": vocab_size, "pad_token_id": None, **config}
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("config has no model_type (llama, mistral, qwen2, qwen3, ...)")
    try:
        made = AutoConfig.for_model(model_type, **fields)
    except (*FAILURES, StrictDataclassError) as error:
        raise ValueError(f"config: {str(error).splitlines()[-1].strip()[:200]}") from error
    if unknown := sorted(set(fields) - known_fields(type(made))):
        raise ValueError(f"config: {', '.join(unknown)} unknown to {type(made).__name__}")
    heads, groups = (
        getattr(made, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    if heads and groups and heads % groups:
        raise ValueError(
            f"config: num_attention_heads is {heads}, which num_key_value_heads of {groups} does "
            "not divide"
        )
    return made


def known_fields(kind: type) -> set[str]:
    """The keys of a configuration class of transformers."""
    return set(inspect.signature(kind).parameters) | set(vars(kind())) | {"head_dim"}


def recompute_activations(llm: PreTrainedModel) -> None:
    """Activations inside of decoder layers are computed again in the backward pass."""
    # before 5.24
    enable = (
        getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def decoder_layers(llm: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, each with `self_attn`, its projections and `NORMS`.

    Raises:
        ValueError: an LLM built otherwise (its class and what it lacks are named).
    """
    layers = getattr(llm.base_model, "layers", None)
    needs = [*NORMS, *(f"self_attn.{name}" for name in (*KEY_VALUE, "q_proj", "o_proj"))]
    if layers is None:
        raise ValueError(
            f"{type(llm).__name__} has no decoder layers at {llm.base_model_prefix}.layers"
        )
    for index, layer in enumerate(layers):
        for name in needs:
            if not has_module(layer, name):
                where = "its decoder layers" if index == 0 else f"its decoder layer {index}"
                raise ValueError(
                    f"{type(llm).__name__} has no {name} in {where}; Llama, Mistral and Qwen have"
                )
    return layers


def check_split(llm: PreTrainedModel, ranks: int) -> None:
    """Raises ValueError where so many tensor ranks do not divide the LLM's heads or hidden units,
    or where its attention or its MLP have something that is not split by them."""
    config = llm.config
    counts = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None)
        or config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, count in counts.items():
        if count % ranks:
            raise ValueError(
                f"{name} of the LLM is {count}, which {ranks} tensor ranks do not divide"
            )
    if ranks > 1:
        for layer in decoder_layers(llm):
            check_layer_split(llm, layer)


def check_layer_split(llm: PreTrainedModel, layer: Any) -> None:
    """Raises ValueError for a layer with weights that tensor parallelism would use on a part of
    what they are made for."""
    split = {role.rpartition(".")[2] for role in TENSOR_ROLES if role.startswith("self_attn.")}
    for name, parameter in layer.self_attn.named_parameters():
        module = name.partition(".")[0]
        per_head = module in PER_HEAD_NORMS and parameter.numel() == layer.self_attn.head_dim
        if module not in {*split, "visual"} and not per_head:
            raise ValueError(
                f"{type(llm).__name__}: tensor ranks cannot share out self_attn.{name}; use FSDP "
                "alone (tensor: 1)"
            )
    if has_module(layer, "mlp.down_proj") and not has_module(layer, "mlp.up_proj"):
        raise ValueError(
            f"{type(llm).__name__}: tensor ranks split mlp.down_proj and have no mlp.up_proj; use "
            "FSDP alone (tensor: 1)"
        )


def has_module(module: nn.Module, path: str) -> bool:
    """Whether the dotted path names a module."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return isinstance(found, nn.Module)


def width(llm: PreTrainedModel) -> int:
    """D."""
    return llm.config.hidden_size


def rotary(
    llm: PreTrainedModel, like: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, d) of the LLM's own rotary embedding at `position_ids` (B, T), in
    the dtype of `like`.

    Args:
        layer_type: of `layer_type_of`, for an LLM whose kinds of layers are rotated each in its own
            way, as Gemma 3's are.
    """
    body: Any = llm.base_model
    kind = {} if layer_type is None else {"layer_type": layer_type}
    return body.rotary_emb(like, position_ids, **kind)


def layer_type_of(llm: PreTrainedModel, index: int) -> str | None:
    """The type by which the LLM's rotary embedding tells a decoder layer from others, None where
    it is the same for all."""
    embedding = getattr(llm.base_model, "rotary_emb", None)
    if embedding is None or "layer_type" not in inspect.signature(embedding.forward).parameters:
        return None
    return llm.config.layer_types[index]


def rotate(attention: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`states` (B, K, T, d) rotated as this attention rotates its own keys: the function of its
    own modelling file."""
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return apply(states[:, :0], states, cos, sin)[1]  # of queries, which it rotates too, none


class KeyPath(NamedTuple):
    """How an attention makes its keys of what its key projection gives (see `llm_probe`, which
    finds it out)."""

    norm: str | None = None
    """The attention's norm of keys, by name."""
    place: Literal["heads", "width", "rotated"] = "heads"
    """What the norm normalises: each head's numbers, all heads' together, or each head's after
    the rotation."""
    rotation: Literal["whole", "part", "none"] = "whole"
    """Whether a head's numbers are rotated, only as many as there are cosines, or not at all."""
    layer_type: str | None = None
    """What tells the rotary embedding of this layer from those of others."""

    def keys(self, attention: Any, projected: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Projected keys (B, T, K, d) -> keys (B, K, T, d), with the cosines and sines of
        `rotary` where they are rotated."""
        norm = getattr(attention, self.norm) if self.norm else None
        if norm is not None and self.place == "width":
            projected = norm(projected.flatten(2)).unflatten(-1, projected.shape[2:])
        key = projected.transpose(1, 2)
        if norm is not None and self.place == "heads":
            key = norm(key)
        if self.rotation == "whole":
            assert turn is not None
            key = rotate(attention, key, *turn)
        elif self.rotation == "part":
            assert turn is not None
            width = turn[0].shape[-1]
            key = torch.cat([rotate(attention, key[..., :width], *turn), key[..., width:]], dim=-1)
        if norm is not None and self.place == "rotated":
            key = norm(key)
        return key


def balancing_loss(llm: PreTrainedModel, router_logits: Any, attention_mask: Tensor) -> Tensor:
    """How unevenly a mixture of experts uses its experts over the tokens of a batch, by the
    function of the LLM's own modelling file; at least about the number of experts that a token goes
    to.

    Args:
        router_logits: of the LLM's forward with `output_router_logits`.
        attention_mask: (B, T), 0 at padding, which does not count.
    """
    function = sys.modules[type(llm).__module__].load_balancing_loss_func
    model: Any = llm
    return function(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)


def balancing_coefficient(llm: PreTrainedModel) -> float:
    """The weight of `balancing_loss` in the loss, as the LLM's configuration has it; 0 for an
    LLM that has none."""
    has_loss = hasattr(sys.modules[type(llm).__module__], "load_balancing_loss_func") and hasattr(
        llm, "num_experts_per_tok"
    )
    takes_it = "output_router_logits" in inspect.signature(llm.forward).parameters
    coefficient = getattr(llm.config, "router_aux_loss_coef", None)
    return float(coefficient or 0.0) if has_loss and takes_it else 0.0


def cache_argument(llm: PreTrainedModel) -> str:
    """What the LLM's forward calls its key-value cache:

    `cache` from transformers 5.24 on, `past_key_values` before.
    """
    return "cache" if "cache" in inspect.signature(llm.forward).parameters else "past_key_values"


@contextmanager
def logits_at(llm: PreTrainedModel, places: Tensor | None) -> Iterator[None]:
    """Has the LLM's forward compute logits at `places` b * T + t alone, as (1, R, V); None:
    everywhere.

    What goes into the head (B, T, D) is gathered first. The LLM's own forward still calls it and
    what follows it: scaled and capped logits stay so. transformers' `logits_to_keep` takes the same
    positions of every row only.
    """
    if places is None:
        yield
        return

    def gather(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].flatten(0, 1).index_select(0, places)[None], *args[1:]

    handle = llm.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def mask_argument(llm: PreTrainedModel, batch: Batch, cache: Any = None) -> Tensor | None:
    """The `attention_mask` of the LLM's forward: the batch's (B, T), or None for packed rows.

    Without one, and without a cache, transformers tells the samples of a row apart by position ids
    that do not go up by one, and puts that into the mask of each kind of layer, sliding windows
    included. A token of padding, at position 0, sees itself.

    Raises:
        ValueError: packed rows with a cache, or with flash attention, which keeps the samples of a
            single row apart and not those of several.
    """
    if batch.segment_ids is None:
        return batch.attention_mask
    if cache is not None:
        raise ValueError(
            "packed rows cannot go on from a cache: give each sample a row of its own (pack_to: "
            "null)"
        )
    if "flash" in llm.config._attn_implementation:
        raise ValueError(
            "packed rows need the attention sdpa: set model.llm.attention=sdpa, or "
            "data.pack_to=null"
        )
    return None


def load_pretrained(
    pretrained: str, gguf_file: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    """From a folder or the hub, `options` being transformers'; on the meta device only the
    configuration is read."""
    pretrained = packaged(pretrained)
    check_folder(pretrained, gguf_file)
    check_hub_has(
        pretrained,
        "set model.llm.pretrained to a folder with its files, or HF_HOME to a cache that has it",
    )
    source = {"gguf_file": gguf_file} if gguf_file else {}
    found: dict[str, Any]
    try:
        if torch.get_default_device().type == "meta":
            return AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(pretrained, trust_remote_code=False, **source), **options
            )
        llm, found = _loaded(pretrained, **source, **options)
    except ImportError as error:
        if not gguf_file:
            raise
        raise missing("gguf", gguf_file) from error
    # the last three of a GGUF file that is cut off
    except (OSError, KeyError, IndexError, ValueError, struct.error) as error:
        raise ValueError(f"pretrained: {pretrained}: {str(error).splitlines()[0][:200]}") from error
    if lacking := sorted(found["missing_keys"]):  # transformers makes them up, with a warning
        raise ValueError(
            f"pretrained: {pretrained} has no weights for {lacking[0]} and {len(lacking) - 1} "
            "more of its model"
        )
    return llm


def _loaded(pretrained: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        pretrained, **options, output_loading_info=True, trust_remote_code=False
    )
    return loaded


def check_folder(pretrained: str, gguf_file: str | None = None) -> None:
    """A path that does not hold a model must not be taken for a hub name, nor another file for a
    GGUF file."""
    path = Path(pretrained).expanduser()
    if looks_local(pretrained) and not path.is_dir():
        raise ValueError(f"pretrained: {pretrained} is no folder")
    if gguf_file and path.is_dir():
        file = path / gguf_file
        if not file.is_file():
            beside = (
                ", ".join(sorted(entry.name for entry in path.glob("*.gguf"))) or "no GGUF file"
            )
            raise ValueError(f"gguf_file: {pretrained} has no {gguf_file}; it has {beside}")
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(
                    f"gguf_file: {file} is no GGUF file: it does not begin with the letters GGUF"
                )
