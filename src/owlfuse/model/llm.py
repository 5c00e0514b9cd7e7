"""Loads the LLM, a plain causal LM of transformers, and knows how it computes (see `layouts` for
where its modules are).

B rows, T text positions, D width, H query heads, K key-value heads, d head width, V vocabulary,
R positions of logits.
"""

from __future__ import annotations

import inspect
import logging
import math
import pickle
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import find_adapter_config_file

from owlfuse.core.errors import error_summary, first_line
from owlfuse.core.hub_access import check_hub_has
from owlfuse.core.packages import looks_local, missing, packaged
from owlfuse.core.types import Batch
from owlfuse.model.adapters import check_split_updates
from owlfuse.model.layouts import (
    LLAMA,
    body_of,
    decoder_layers,
    head_width,
    layout_of,
    module_at,
    text_config,
)
from owlfuse.model.quantization import Quantization, check_not_sharded

log = logging.getLogger(__name__)

TENSOR_ROLES = {
    "self_attn.q_proj": "columns",
    "self_attn.k_proj": "columns",
    "self_attn.v_proj": "columns",
    "self_attn.o_proj": "rows",
    "mlp.gate_proj": "columns",
    "mlp.up_proj": "columns",
    "mlp.down_proj": "rows",
}
"""How tensor parallelism splits the projections of a decoder layer: by the heads or hidden units
that come out (`columns`), or by those that go in (`rows`), after which the ranks' results are added
up."""
POSITIONS = re.compile(r"pos|wpe")
"""In the names of tables with a row for each position."""
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


def load_llm(
    vocab_size: int,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    gguf_file: str | None = None,
    architecture: dict[str, Any] | None = None,
    attention: Literal["sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    gradient_checkpointing: bool = False,
    quantization: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Returns a causal LM from a folder of weights or a hub name (`pretrained`;
    `package:<package>` is an installed package's folder), or random from a configuration with a
    `model_type`.

    On the meta device (`with torch.device("meta")`) only the configuration is read, and nothing is
    loaded. Embeddings grow to `vocab_size`, the tokenizer's, where the model has fewer.

    Args:
        pretrained: a folder of weights, a hub name, or `package:<package>`.
        config: the keys of a transformers configuration with its `model_type` (llama, mistral,
            qwen2, ...), for random weights.
        attention: the kernel of transformers' attention; packed rows need `sdpa`. An LLM that has
            none for it (Gemma 2, GPT-OSS) computes its attention without a kernel, which is
            logged.
        gguf_file: the name of a GGUF file in the folder, which transformers turns into weights.
        gradient_checkpointing: activations inside of decoder layers are dropped and computed again
            in the backward pass.
        architecture: what the configuration of `pretrained` says, so that a run can be checked and
            planned where the hub is not at hand: it is read on the meta device alone, in the place
            of the folder's or the hub's.
        dtype: the type of the weights, `float32` (the default), `bfloat16` or `float16`.
        quantization: holds the weights of linear layers in 4 bits; the keys are those of
            `quantization.Quantization`, `{}` its defaults. The model of the parts does it, once the
            fusion is attached.

    Raises:
        ValueError: both or none of `pretrained` and `config`, an unknown model type, or a folder
            without a configuration.
    """
    if (pretrained is None) == (config is None):
        raise ValueError(
            "give one of pretrained (a folder or a hub name) and config (with a model_type); "
            "beside model.llm.pretrained=... write model.llm.config=null"
        )
    # before anything is loaded
    settings: Any = None if quantization is None else Quantization.of(quantization)
    options: dict[str, Any] = {"dtype": dtype or "float32"}
    # sdpa is what transformers takes by itself, for a class that supports it, and else eager
    if attention != "sdpa":
        options["attn_implementation"] = attention
    on_meta = torch.get_default_device().type == "meta"
    # a plan of a hub's model needs no download, and that of a folder that is there is read from it
    is_there = pretrained is not None and Path(packaged(pretrained)).expanduser().is_dir()
    if on_meta and pretrained and architecture and not is_there:
        config = architecture
    if config is not None:
        llm_config = make_config(config, vocab_size)
        llm = random_llm(llm_config, options)
    else:
        llm = load_pretrained(str(pretrained), gguf_file, options)
    # an attribute of torch's Embedding, which transformers does not promise
    embeddings: Any = llm.get_input_embeddings()
    if pretrained:
        # before they grow: rows behind these have random values
        llm.trained_rows = embeddings.num_embeddings
    # on the meta device there is no mean of the rows to start new ones from
    if embeddings.num_embeddings < vocab_size:
        # never smaller: released tables are padded beyond their tokenizer
        llm.resize_token_embeddings(vocab_size, mean_resizing=not on_meta)
    if gradient_checkpointing:
        recompute_activations(llm)
    # the model of the parts quantizes later: a fusion copies plain layers, and trains the copies
    llm.quantization = settings
    decoder_layers(llm)  # raises for an LLM that owlfuse cannot use
    check_width(llm)
    if not on_meta:
        log_attention(llm, attention)
    return llm


# a function, whose attributes mypy does not know; see `parts.ModelPart` for what these are
load_llm.COMPUTE_ONLY = ("attention", "gradient_checkpointing")  # type: ignore[attr-defined]
load_llm.ORIGIN = ("pretrained", "gguf_file", "architecture", "dtype")  # type: ignore[attr-defined]


PLANNED_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""What of an LLM's configuration decides plans, splits and which tokens are new."""


def check_architecture(llm: PreTrainedModel, architecture: dict[str, Any] | None) -> None:
    """Raises ValueError where an LLM with loaded weights is not what `architecture` says, by which
    the run was checked and planned."""
    config = llm.config.to_dict()
    for key, expected in (architecture or {}).items():
        if key not in PLANNED_FIELDS:
            continue
        # the embeddings may have grown since
        found = getattr(llm, "trained_rows", None) if key == "vocab_size" else config.get(key)
        if found is not None and found != expected:
            raise ValueError(
                f"model.llm.architecture: {key} is {expected}, and {found} in the weights; write "
                "model.llm.architecture=null, or what their config.json has"
            )


def check_width(llm: PreTrainedModel) -> None:
    """Raises ValueError for an LLM whose embeddings are not as wide as its hidden states: a visual
    token could not be in the place of both."""
    embeddings: Any = llm.get_input_embeddings()
    embedding_width = embeddings.weight.shape[-1]
    if embedding_width != width(llm):
        raise ValueError(
            f"{type(llm).__name__} has embeddings of width {embedding_width} and hidden states of "
            f"width {width(llm)}, and visual tokens have one width; choose another LLM"
        )


def attention_name(llm: PreTrainedModel) -> str:
    """Returns the name of transformers' registry by which the LLM's layers compute attention."""
    # Private: transformers has a setter for it, and no getter. Of an LLM inside of a multimodal
    # class the layers read the text's, and the whole's may be that of the vision part.
    return text_config(llm)._attn_implementation


logged_classes: set[type] = set()


def log_attention(llm: PreTrainedModel, attention: str) -> None:
    """Logs once for each class that an LLM computes attention otherwise than asked for."""
    implementation = attention_name(llm)
    if implementation != attention and type(llm) not in logged_classes:
        logged_classes.add(type(llm))
        log.warning(
            f"attention: {type(llm).__name__} has none for {attention}, and computes it by "
            f"{implementation}"
        )


def make_config(config: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """Returns the transformers configuration for `config`, whose keys are those of its model
    type."""
    # a default pad id may lie outside of a small vocabulary
    fields = {"vocab_size": vocab_size, "pad_token_id": None, **config}
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("config has no model_type (llama, mistral, qwen2, qwen3, ...)")
    try:
        llm_config = AutoConfig.for_model(model_type, **fields)
    except (*FAILURES, StrictDataclassError) as error:
        # the last line: pydantic-like messages name the field first and say what is wrong last
        last_line = (str(error).splitlines() or [type(error).__name__])[-1]
        raise ValueError(f"config: {last_line.strip()[:200]}") from error
    # the defaults above are no keys of the user's, and RWKV has no pad_token_id
    check_keys(config, llm_config)
    heads = shared_field(llm_config, "num_attention_heads")
    groups = shared_field(llm_config, "num_key_value_heads")
    # some modelling files accept it and fail in the first forward pass
    if heads and groups and heads % groups:
        raise ValueError(
            f"config: num_attention_heads is {heads}, which num_key_value_heads of {groups} does "
            "not divide"
        )
    return llm_config


def check_keys(config: dict[str, Any], llm_config: PreTrainedConfig, prefix: str = "") -> None:
    """Raises ValueError for keys that a configuration of transformers, or one inside of it, does
    not have."""
    known = {"model_type", *config_fields(type(llm_config))}
    if prefix:  # DBRX's attention reads it, and its configuration does not declare it
        known.add("rope_theta")
    if unknown := sorted(set(config) - known):
        names = ", ".join(prefix + name for name in unknown)
        raise ValueError(f"config: {names} unknown to {type(llm_config).__name__}")
    for name in llm_config.sub_configs:
        inner = getattr(llm_config, name, None)
        if isinstance(config.get(name), dict) and isinstance(inner, PreTrainedConfig):
            check_keys(config[name], inner, f"{prefix}{name}.")


def random_llm(config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """Returns a causal LM with random weights.

    Raises:
        ValueError: one line, whatever the modelling file raises.
    """
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except FAILURES as error:
        # once: then the field is there
        if fill_head_width(config):
            return random_llm(config, options)
        raise ValueError(f"config: {config.model_type}: {error_summary(error)}") from error


def fill_head_width(config: PreTrainedConfig) -> bool:
    """Sets head_dim to hidden_size / num_attention_heads, as most families have it, where it is
    None and the modelling file needs a number (Ministral, HunYuan); returns whether it has set
    one."""
    has_none = "head_dim" in vars(config) and shared_field(config, "head_dim") is None
    heads = shared_field(config, "num_attention_heads")
    hidden_size = shared_field(config, "hidden_size")
    if not (has_none and heads and hidden_size):
        return False
    config.head_dim = hidden_size // heads
    # some configurations have one for each type of layer, and take none for all
    return shared_field(config, "head_dim") is not None


def shared_field(config: PreTrainedConfig, name: str) -> Any:
    """Returns a field of an LLM's configuration; None where it has none, or its layers differ."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError, since 5.24
        return None


def config_fields(config_class: type) -> set[str]:
    """Returns the keys of a configuration class of transformers."""
    arguments = set(inspect.signature(config_class).parameters)
    # the names of others that it understands too, as GPT-2 does hidden_size
    synonyms = set(getattr(config_class, "attribute_map", {}))
    # some read the width and do not declare it; the layers' own fields are a property
    others = {"head_dim", *({"per_layer_config"} & set(dir(config_class)))}
    return arguments | synonyms | set(vars(config_class())) | others


def recompute_activations(llm: PreTrainedModel) -> None:
    """Turns gradient checkpointing of the decoder layers on."""
    # the name from transformers 5.24 on, and the one before
    enable = getattr(llm, "activation_checkpointing_enable", None)
    enable = enable or llm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def check_split(llm: PreTrainedModel, ranks: int) -> None:
    """Raises ValueError where so many tensor ranks do not divide the LLM's heads or hidden units,
    or where its attention or its MLP have something that is not split by them."""
    if ranks == 1:
        return
    config = text_config(llm)
    heads = shared_field(config, "num_attention_heads")
    counts = {
        "num_attention_heads": heads,
        "num_key_value_heads": shared_field(config, "num_key_value_heads") or heads,
        "intermediate_size": shared_field(config, "intermediate_size"),
    }
    for name, count in counts.items():
        # Gemma 3n's configuration has a list of one size for each layer.
        if not isinstance(count, int):
            raise ValueError(
                f"the layers of {type(llm).__name__} differ in {name} or have none, and tensor "
                "ranks need the same in all; take trainer=fsdp"
            )
        if count % ranks:
            raise ValueError(
                f"{name} of the LLM is {count}, which {ranks} tensor ranks do not divide"
            )
    check_not_sharded(llm, True)
    check_split_updates(llm)
    for layer in decoder_layers(llm):
        check_layer_split(llm, layer)


def check_layer_split(llm: PreTrainedModel, layer: Any) -> None:
    """Raises ValueError for a layer with weights that tensor parallelism neither splits nor can use
    for a part of the heads."""
    layout = layout_of(llm)
    # the names of TENSOR_ROLES are Llama's
    attention = module_at(layer, "self_attn")
    if attention is None or layout.key != LLAMA.key or layout.output != LLAMA.output:
        raise ValueError(
            f"{type(llm).__name__}: tensor ranks split attention with the projections q_proj, "
            f"k_proj, v_proj and o_proj of self_attn, and {type(layer).__name__} has others; use "
            "FSDP alone (tensor: 1)"
        )
    for name, parameter in attention.named_parameters():
        module = name.partition(".")[0]
        per_head = module in PER_HEAD_NORMS and parameter.numel() == head_width(llm, layer)
        # what a fusion has put into an attention has roles of its own, `Fusion.tensor_roles`
        is_split = module == "visual" or f"self_attn.{module}" in TENSOR_ROLES
        if not is_split and not per_head:
            raise ValueError(
                f"{type(llm).__name__}: tensor ranks cannot share out self_attn.{name}; use FSDP "
                "alone (tensor: 1)"
            )
    if module_at(layer, "mlp.down_proj") is not None and module_at(layer, "mlp.up_proj") is None:
        raise ValueError(
            f"{type(llm).__name__}: tensor ranks split mlp.down_proj and have no mlp.up_proj; use "
            "FSDP alone (tensor: 1)"
        )
    # a copy of an MLP stands inside of what a fusion has put in its place
    for path in ("mlp", "mlp.text"):
        mlp = module_at(layer, path)
        if mlp is None or module_at(mlp, "down_proj") is None:
            continue
        for name, _ in mlp.named_parameters():
            if f"mlp.{name.partition('.')[0]}" not in TENSOR_ROLES:
                raise ValueError(
                    f"{type(llm).__name__}: tensor ranks cannot share out mlp.{name}; use FSDP "
                    "alone (tensor: 1)"
                )
    # StableLM's shapes the whole width's heads, of which a rank has a part
    forward = inspect.getsource(type(attention).forward)
    if re.search(r"self\.num_(?:attention_)?heads\b", forward):
        raise ValueError(
            f"{type(llm).__name__}: its attention counts all heads of the configuration, of which "
            "a tensor rank has a part; use FSDP alone (tensor: 1)"
        )


def check_length(llm: PreTrainedModel, length: int) -> None:
    """Checks that rows of so many tokens have a position each, and logs where the LLM was not made
    for as many.

    Raises:
        ValueError: the LLM has a table with fewer positions.
    """
    positions = position_limit(llm)
    if not positions or length <= positions:
        return
    name = type(llm).__name__
    if is_mpt(llm) or has_position_table(llm, positions):
        raise ValueError(
            f"data.max_length is {length}, and {name} has a table of {positions} positions; set "
            f"data.max_length={positions}"
        )
    log.warning(
        "data.max_length is %d, and %s was made for %d tokens (max_position_embeddings): what "
        "lies behind them it was not trained for",
        *(length, name, positions),
    )


def is_mpt(llm: PreTrainedModel) -> bool:
    """Returns whether an LLM is MPT, whose bias of distances has so many keys as a row may have."""
    return text_config(llm).model_type == "mpt"


def position_limit(llm: PreTrainedModel) -> int | None:
    """Returns the most positions that an LLM has, None where its configuration does not say."""
    config = text_config(llm)
    return config.max_seq_len if is_mpt(llm) else shared_field(config, "max_position_embeddings")


def has_position_table(llm: PreTrainedModel, positions: int) -> bool:
    """Returns whether an LLM looks up positions in a table of so many."""
    # OPT's table has two rows more
    sizes = range(positions, positions + 3)
    for module_name, module in llm.named_modules():
        # XGLM's is made anew for longer rows
        if hasattr(module, "make_weights"):
            continue
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in tensors:
            path = f"{module_name}.{name}"
            if tensor.ndim == 2 and len(tensor) in sizes and POSITIONS.search(path):
                return True
    return False


def width(llm: PreTrainedModel) -> int:
    """Returns D, the width of hidden states."""
    hidden_size = shared_field(text_config(llm), "hidden_size")
    embeddings: Any = llm.get_input_embeddings()
    # a configuration may not say it
    return hidden_size or embeddings.weight.shape[-1]


def rotary(
    llm: PreTrainedModel,
    like: Tensor,
    position_ids: Tensor,
    layer_type: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (B, T, d) of the LLM's own rotary embedding at `position_ids` (B,
    T), in the dtype of `like`.

    Args:
        layer_type: of `layer_type_of`, for an LLM whose types of layers are rotated differently, as
            Gemma 3's are.
    """
    body: Any = body_of(llm)
    options = {} if layer_type is None else {"layer_type": layer_type}
    return body.rotary_emb(like, position_ids, **options)


def layer_type_of(llm: PreTrainedModel, index: int) -> str | None:
    """Returns the type of a decoder layer for the LLM's rotary embedding, None where all layers
    have the same."""
    embedding = getattr(body_of(llm), "rotary_emb", None)
    if embedding is None or "layer_type" not in inspect.signature(embedding.forward).parameters:
        return None
    return text_config(llm).layer_types[index]


def attention_function(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns an attention function of transformers by the name of its implementation."""
    # there is no entry for eager attention, of which every modelling file has its own
    return eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes an attention function of transformers as the modelling file of the module does
    without a kernel. A mask of bool, True where a position sees a key, becomes one of numbers, as
    those functions add it to the scores."""
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # the lowest number and not minus infinity, as in the masks that transformers makes
        lowest = torch.finfo(query.dtype).min
        zeros = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = zeros.masked_fill(~attention_mask, lowest)
    function = sys.modules[type(module).__module__].eager_attention_forward
    return function(module, query, key, value, attention_mask, **options)


def rotate(
    attention: nn.Module, states: Tensor, cos: Tensor, sin: Tensor, alone: bool = False
) -> Tensor:
    """Returns `states` (B, K, T, d) rotated as this attention rotates its keys: by the function of
    its modelling file.

    Args:
        alone: see `KeyPath.rotates_alone`.
    """
    apply = rotary_function(attention)
    if alone:
        return apply(states, cos, sin)
    # it rotates queries too: none are given
    return apply(states[:, :0], states, cos, sin)[1]


def rotary_function(attention: nn.Module) -> Any:
    """Returns the function of an attention's modelling file that rotates, None where it has
    none."""
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def rotates_alone(attention: nn.Module) -> bool:
    """Returns whether an attention's rotary function takes one tensor, as Gemma 4's, and not
    queries and keys."""
    function = rotary_function(attention)
    return function is not None and list(inspect.signature(function).parameters)[1] == "cos"


class KeyPath(NamedTuple):
    """How an attention makes keys of its key projection's output (see `llm_probe`, which finds it
    out)."""

    norm: str | None = None
    """The attention's norm of keys, by name."""
    norm_over: Literal["heads", "width", "rotated"] = "heads"
    """Whether the norm is over each head's numbers, all heads' together, or each head's after the
    rotation."""
    rotation: Literal["whole", "part", "none"] = "whole"
    """Whether a head's numbers are rotated, only as many as there are cosines, or not at all."""
    layer_type: str | None = None
    """See `layer_type_of`."""
    rotates_alone: bool = False
    """Whether the rotary function takes keys without queries."""
    value_norm: str | None = None
    """The attention's norm of each head's values, by name, as Gemma 4's."""

    def keys(self, attention: Any, projected: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Returns keys (B, K, T, d) of projected keys (B, T, K, d), with the cosines and sines of
        `rotary` where they are rotated."""
        norm = getattr(attention, self.norm) if self.norm else None
        if norm is not None and self.norm_over == "width":
            # OLMo 2 norms all heads together, before they are split
            projected = norm(projected.flatten(2)).unflatten(-1, projected.shape[2:])
        key = projected.transpose(1, 2)
        if norm is not None and self.norm_over == "heads":
            key = norm(key)
        if self.rotation == "whole":
            assert turn is not None
            key = rotate(attention, key, *turn, self.rotates_alone)
        elif self.rotation == "part":
            assert turn is not None
            width = turn[0].shape[-1]
            turned = rotate(attention, key[..., :width], *turn, self.rotates_alone)
            key = torch.cat([turned, key[..., width:]], dim=-1)
        if norm is not None and self.norm_over == "rotated":
            key = norm(key)
        return key

    def values(self, attention: Any, projected: Tensor) -> Tensor:
        """Returns values (B, K, T, d) of projected values (B, T, K, d)."""
        value = projected.transpose(1, 2)
        return getattr(attention, self.value_norm)(value) if self.value_norm else value


def balancing_loss(llm: PreTrainedModel, router_logits: Any, attention_mask: Tensor) -> Tensor:
    """Returns how unevenly a mixture of experts uses its experts over the tokens of a batch, by the
    function of the LLM's modelling file; at least about the number of experts of a token.

    Args:
        router_logits: of the LLM's forward with `output_router_logits`.
        attention_mask: (B, T), 0 at padding, which does not count.
    """
    function = sys.modules[type(llm).__module__].load_balancing_loss_func
    model: Any = llm
    options = {}
    # Doge's experts are pairs of so many keys
    if "num_keys" in inspect.signature(function).parameters:
        options["num_keys"] = math.isqrt(model.num_experts)
    return function(
        router_logits,
        num_experts=model.num_experts,
        top_k=model.num_experts_per_tok,
        attention_mask=attention_mask,
        **options,
    )


def balancing_coefficient(llm: PreTrainedModel) -> float:
    """Returns the weight of `balancing_loss` in the loss, from the LLM's own forward; 0 for an LLM
    that has none, or a single expert."""
    model: Any = llm
    modelling_file = sys.modules[type(llm).__module__]
    has_loss = hasattr(modelling_file, "load_balancing_loss_func")
    has_experts = hasattr(llm, "num_experts_per_tok")
    returns_logits = "output_router_logits" in inspect.signature(llm.forward).parameters
    if not (has_loss and has_experts and returns_logits) or (model.num_experts or 0) < 2:
        return 0.0
    # a dense Doge has the number of experts all the same
    if getattr(text_config(llm), "is_moe", True) is False:
        return 0.0
    # the name that JetMoe has for it
    coefficient = getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", None))
    return float(coefficient or 0.0)


def cache_argument(llm: PreTrainedModel) -> str:
    """Returns the name of the key-value cache in the LLM's forward: `cache` from transformers 5.24
    on, `past_key_values` before.
    """
    return "cache" if "cache" in inspect.signature(llm.forward).parameters else "past_key_values"


def forward_positions(llm: PreTrainedModel, position_ids: Tensor) -> dict[str, Tensor]:
    """Returns position ids (B, T) as arguments of the LLM's forward: none for an LLM without, as
    BLOOM, whose positions come of its mask."""
    takes_positions = "position_ids" in inspect.signature(llm.forward).parameters
    return {"position_ids": position_ids} if takes_positions else {}


def token_inputs(llm: PreTrainedModel, input_ids: Tensor, placeholder: Tensor) -> dict[str, Tensor]:
    """Returns what the layers of Gemma 3n and 4 read of the tokens themselves, as arguments of the
    LLM's forward, which cannot know them from embeddings alone; nothing for other LLMs.

    Args:
        input_ids: (B, T).
        placeholder: (B, T) True at visual tokens, which count as padding, as in Gemma 4's own
            forward with pictures.
    """
    config = text_config(llm)
    # of the configuration: an LLM without them has a width of 0
    if not shared_field(config, "hidden_size_per_layer_input"):
        return {}
    body: Any = body_of(llm)
    # tokens that were added are in the LLM's first table alone
    unknown = input_ids >= config.vocab_size_per_layer_input
    text_ids = input_ids.masked_fill(placeholder | unknown, config.pad_token_id or 0)
    return {"per_layer_inputs": body.get_per_layer_inputs(text_ids)}


@contextmanager
def logits_at(llm: PreTrainedModel, positions: int | Tensor) -> Iterator[None]:
    """Makes the LLM's forward compute logits at some positions alone.

    The head's input (B, T, D) is gathered first. The LLM's own forward still calls the head and all
    that follows it: scaled and capped logits stay so. transformers' `logits_to_keep` has the same
    positions for every row, and some LLMs do not have it.

    Args:
        positions: (R,) of b * T + t, for logits (1, R, V); or how many at the end of each row, 0:
            everywhere.
    """
    if isinstance(positions, int) and positions == 0:
        yield
        return

    def gather(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if isinstance(positions, int):
            return args[0][:, -positions:], *args[1:]
        return args[0].flatten(0, 1).index_select(0, positions)[None], *args[1:]

    # a hook, since every family scales or caps its logits in its own forward
    handle = llm.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def mask_argument(llm: PreTrainedModel, batch: Batch, cache: Any = None) -> Tensor | None:
    """Returns the `attention_mask` of the LLM's forward: the batch's (B, T), or None for packed
    rows.

    Without one, and without a cache, transformers separates the samples of a row by position ids
    that do not increase by one, in the mask of each type of layer, sliding windows included. A
    token of padding, at position 0, attends to itself.

    Raises:
        ValueError: packed rows with a cache, or with flash attention, which separates the samples
            of a single row and not those of several.
    """
    if batch.segment_ids is None:
        return batch.attention_mask
    if cache is not None:
        raise ValueError(
            "packed rows cannot go on from a cache: give each sample a row of its own (pack_to: "
            "null)"
        )
    # a fusion's own attention has the plain one's name in it
    if "flash" in attention_name(llm):
        raise ValueError(
            "packed rows need the attention sdpa: set model.llm.attention=sdpa, or "
            "data.pack_to=null"
        )
    return None


# What transformers raises for files that are cut off, of another model, or no weights at all.
DAMAGE = (
    OSError,
    KeyError,
    IndexError,
    ValueError,
    RuntimeError,
    struct.error,
    SafetensorError,
    pickle.UnpicklingError,
)


def load_pretrained(
    pretrained: str, gguf_file: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    """Returns a causal LM from a folder or the hub, `options` being transformers'; on the meta
    device only the configuration is read."""
    pretrained = packaged(pretrained)
    check_folder(pretrained, gguf_file)
    check_hub_has(
        pretrained,
        "set model.llm.pretrained to a folder with its files, or HF_HOME to a cache that has it",
    )
    source = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        check_no_adapter(pretrained)
        check_plain(pretrained, gguf_file)
        # from_pretrained would load weights, whatever the default device
        if torch.get_default_device().type == "meta":
            return AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(pretrained, trust_remote_code=False, **source), **options
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            pretrained, **source, **options, output_loading_info=True, trust_remote_code=False
        )
    # transformers imports gguf only when a file is read
    except ImportError as error:
        if not gguf_file:
            raise
        raise missing("gguf", gguf_file) from error
    except torch.OutOfMemoryError:
        raise
    except DAMAGE as error:
        raise ValueError(f"pretrained: {pretrained}: {first_line(error)[:200]}") from error
    llm, loading_info = loaded
    # transformers gives these random values, with a warning
    if missing_weights := sorted(loading_info["missing_keys"]):
        raise ValueError(
            f"pretrained: {pretrained} has no weights for {missing_weights[0]} and "
            f"{len(missing_weights) - 1} more of its model"
        )
    # transformers' loading makes all parameters trainable, and its class may not
    with torch.device("meta"):
        names: Any = untrainable_names(type(llm)(llm.config))
    llm.untrainable = names
    return llm


def check_no_adapter(pretrained: str) -> None:
    """Raise ValueError for an adapter beside the weights: transformers would apply it, or load the
    model that it names as its base, without a word."""
    if find_adapter_config_file(pretrained) is not None:
        raise ValueError(
            "adapter_config.json is beside its weights, which transformers would apply, or load "
            "the model that it names; merge the adapter, or take the file away"
        )


def untrainable_names(llm: PreTrainedModel) -> set[str]:
    """Returns the names of the parameters that the LLM's own class never trains by gradients, as
    the biases that balance a router."""
    return {name for name, parameter in llm.named_parameters() if not parameter.requires_grad}


def check_plain(pretrained: str, gguf_file: str | None) -> None:
    """Raises ValueError for weights that are quantized in their folder, which no policy trains and
    no export writes. transformers turns those of GGUF files, and of mxfp4 on a CPU, into plain
    ones."""
    if gguf_file:
        return
    llm_config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    described = getattr(llm_config, "quantization_config", None) or {}
    method = described.get("quant_method") if isinstance(described, dict) else None
    if described and method != "mxfp4":
        raise ValueError(
            f"its weights are quantized already ({method}); name a folder of plain weights, and "
            "set model.llm.quantization to hold them in 4 bits"
        )


def check_folder(pretrained: str, gguf_file: str | None) -> None:
    """Raises ValueError for a path without a model, which transformers would look up on the hub,
    and for a file that is no GGUF file."""
    path = Path(pretrained).expanduser()
    if looks_local(pretrained) and not path.is_dir():
        raise ValueError(f"pretrained: {pretrained} is no folder")
    if gguf_file and path.is_dir():
        file = path / gguf_file
        if not file.is_file():
            names = ", ".join(sorted(entry.name for entry in path.glob("*.gguf")))
            raise ValueError(
                f"gguf_file: {pretrained} has no {gguf_file}; it has {names or 'no GGUF file'}"
            )
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(
                    f"gguf_file: {file} is no GGUF file: it does not begin with the letters GGUF"
                )
