"""Where the causal LMs of transformers keep their decoder layers, norms and projections: one table
of data, and the functions that read it.

B rows, T text positions, D width, H query heads, K key-value heads, d head width.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.pytorch_utils import Conv1D

Projection = Literal["query", "key", "value", "output"]
Need = Literal[
    "inputs_embeds",
    "layers",
    "attention",
    "norms",
    "mlp",
    "separate_keys_values",
]
"""What a fusion may need of an LLM: a forward from embeddings; a list of decoder layers; in its
layers an attention module, norms that are modules, an MLP, projections to keys and to values that
are linear layers of their own or can be split off."""


@dataclass(frozen=True)
class Layout:
    """The dotted names of a family's modules; by default Llama's. None: there is no such module."""

    layers: str = "layers"
    """The list of decoder layers, below the LLM's `base_model`."""
    attention: str | None = "self_attn"
    """Below a decoder layer, as all names that follow."""
    input_norm: str | None = "input_layernorm"
    """What hidden states pass before the attention."""
    mlp_norm: str | None = "post_attention_layernorm"
    """What hidden states pass before the MLP; the input norm where both stand side by side."""
    output_norms: tuple[str, ...] = ()
    """What the results of attention and MLP pass where nothing is normed before, as in OLMo 2."""
    mlp: str | None = "mlp"
    query: str | None = "self_attn.q_proj"
    key: str | None = "self_attn.k_proj"
    value: str | None = "self_attn.v_proj"
    output: str | None = "self_attn.o_proj"
    fused: str | None = None
    """One projection to queries, keys and values, in the place of those three."""
    fused_order: Literal["blocks", "groups"] = "blocks"
    """The rows of the fused projection: all queries, all keys, all values (`blocks`), or for each
    key-value head its queries, its key and its value (`groups`)."""
    other_sizes: tuple[Layout, ...] = ()
    """Those of the family's other sizes, whose norms have other names."""

    @property
    def norms(self) -> tuple[str, ...]:
        """The norm before the attention and that before the MLP, or those after them."""
        before = [name for name in (self.input_norm, self.mlp_norm) if name is not None]
        # once, where attention and MLP read the same
        return tuple(dict.fromkeys(before)) or self.output_norms


def attention_at(
    path: str, output: str, query: str = "q_proj", key: str = "k_proj", value: str = "v_proj"
) -> dict[str, Any]:
    """Returns the fields of a layout whose attention has separate projections of these names."""
    return {
        "attention": path,
        "query": f"{path}.{query}",
        "key": f"{path}.{key}",
        "value": f"{path}.{value}",
        "output": f"{path}.{output}",
    }


def fused_attention_at(path: str, fused: str, output: str, order: str) -> dict[str, Any]:
    """Returns the fields of a layout whose attention has one projection of this name."""
    return {
        "attention": path,
        "query": None,
        "key": None,
        "value": None,
        "output": f"{path}.{output}",
        "fused": f"{path}.{fused}",
        "fused_order": order,
    }


LLAMA = Layout()
ONE_NORM = Layout(mlp_norm="input_layernorm")
OUTPUT_NORMS = Layout(
    input_norm=None,
    mlp_norm=None,
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
FOUR_NORMS = Layout(mlp_norm="pre_feedforward_layernorm")
INNER_FOUR_NORMS = replace(FOUR_NORMS, layers="language_model.layers")
NO_ATTENTION = Layout(
    attention=None,
    input_norm="norm",
    mlp_norm=None,
    mlp=None,
    query=None,
    key=None,
    value=None,
    output=None,
)
BART_ATTENTION = attention_at("self_attn", "out_proj")
BART_LAYER = Layout(
    **BART_ATTENTION,
    input_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    mlp=None,
)
BART = replace(BART_LAYER, layers="decoder.layers")
BERT = Layout(
    layers="encoder.layer",
    attention="attention.self",
    input_norm=None,
    mlp_norm=None,
    output_norms=("attention.output.LayerNorm", "output.LayerNorm"),
    mlp=None,
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
)
GPT2 = Layout(
    layers="h",
    input_norm="ln_1",
    mlp_norm="ln_2",
    **fused_attention_at("attn", "c_attn", "c_proj", "blocks"),
)
GPT_NEOX = Layout(**fused_attention_at("attention", "query_key_value", "dense", "groups"))
FALCON = Layout(
    layers="h",
    **fused_attention_at("self_attention", "query_key_value", "dense", "groups"),
)
LFM2 = Layout(
    **BART_ATTENTION,
    input_norm="operator_norm",
    mlp_norm="ffn_norm",
    mlp="feed_forward",
)
PERSIMMON = Layout(**fused_attention_at("self_attn", "query_key_value", "dense", "groups"))
PHI3 = Layout(**fused_attention_at("self_attn", "qkv_proj", "o_proj", "blocks"))
MAMBA_HYBRID = Layout(mlp_norm="pre_ff_layernorm", mlp="feed_forward")
GRANITE_MOE = Layout(mlp="block_sparse_moe")
INNER = Layout(layers="language_model.layers")
APERTUS = Layout(input_norm="attention_layernorm", mlp_norm="feedforward_layernorm")
# of these two base_model is the LLM itself, whose body stands at `model`
MLLAMA = Layout(layers="model.layers")
LLAMA4 = replace(MLLAMA, mlp="feed_forward")

LAYOUTS: dict[str, Layout] = {
    # a family that is in no row has the names of Llama
    "afmoe": Layout(mlp_norm="pre_mlp_layernorm"),
    "apertus": APERTUS,
    "apertus1p5_text": APERTUS,
    "bamba": MAMBA_HYBRID,
    "bart": BART,
    "beam": FOUR_NORMS,
    "bert": BERT,
    "bert-generation": BERT,
    "big_bird": BERT,
    "bigbird_pegasus": BART,
    "biogpt": BART_LAYER,
    "blenderbot": BART,
    "blenderbot-small": BART,
    # BLOOM, which is older, has the names of Falcon
    "bloom": FALCON,
    "camembert": BERT,
    # its fused projection has an order of its own
    "codegen": replace(GPT2, mlp_norm="ln_1", fused=None, output="attn.out_proj"),
    "cohere": ONE_NORM,
    "cohere2": ONE_NORM,
    "cohere2_moe": ONE_NORM,
    "cohere_compass_text": ONE_NORM,
    "cpmant": Layout(
        layers="encoder.layers",
        input_norm="self_att.layernorm_before_attention",
        mlp_norm="ffn.layernorm_before_ffn",
        mlp="ffn.ffn",
        **attention_at(
            "self_att.self_attention", "attention_out", "project_q", "project_k", "project_v"
        ),
    ),
    "ctrl": Layout(
        layers="h",
        input_norm="layernorm1",
        mlp_norm="layernorm2",
        mlp="ffn",
        **attention_at("multi_head_attention", "dense", "Wq", "Wk", "Wv"),
    ),
    "data2vec-text": BERT,
    "dory": FOUR_NORMS,
    "electra": BERT,
    "ernie": BERT,
    "exaone4": OUTPUT_NORMS,
    # of 40B and 180B, of falcon-rw, and of 7B
    "falcon": replace(
        FALCON,
        input_norm="ln_attn",
        mlp_norm="ln_mlp",
        other_sizes=(FALCON, replace(FALCON, mlp_norm="input_layernorm")),
    ),
    "falcon_h1": MAMBA_HYBRID,
    "falcon_mamba": NO_ATTENTION,
    "flex_olmo": OUTPUT_NORMS,
    "fuyu": replace(PERSIMMON, layers="language_model.layers"),
    "gemma2": FOUR_NORMS,
    "gemma3": INNER_FOUR_NORMS,
    "gemma3_text": FOUR_NORMS,
    "gemma3n": INNER_FOUR_NORMS,
    "gemma3n_text": FOUR_NORMS,
    "gemma4": INNER_FOUR_NORMS,
    "gemma4_text": FOUR_NORMS,
    "gemma4_unified": INNER_FOUR_NORMS,
    "gemma4_unified_text": FOUR_NORMS,
    "git": BERT,
    "got_ocr2": INNER,
    "gpt2": GPT2,
    # a group for each head, or a single one where all heads share a key
    "gpt_bigcode": replace(GPT2, fused_order="groups"),
    "gpt_neo": Layout(
        layers="h",
        input_norm="ln_1",
        mlp_norm="ln_2",
        **attention_at("attn.attention", "out_proj"),
    ),
    "gpt_neox": GPT_NEOX,
    "gpt_neox_japanese": GPT_NEOX,
    "gptj": Layout(
        layers="h",
        input_norm="ln_1",
        mlp_norm="ln_1",
        **attention_at("attn", "out_proj"),
    ),
    "granitemoe": GRANITE_MOE,
    "granitemoe_swa": GRANITE_MOE,
    "granitemoehybrid": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE,
    "jamba": MAMBA_HYBRID,
    # queries are made by experts, and keys and values together by one projection
    "jetmoe": replace(
        LLAMA, attention="self_attention", query=None, key=None, value=None, output=None
    ),
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "lfm3": LFM2,
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "marian": BART,
    "mbart": BART,
    "megatron-bert": replace(BERT, output_norms=(), input_norm="attention.ln", mlp_norm="ln"),
    "mllama": MLLAMA,
    "mllama_text_model": MLLAMA,
    "modernbert-decoder": Layout(
        input_norm="attn_norm",
        mlp_norm="mlp_norm",
        **attention_at("attn", "Wo"),
    ),
    "moss_transcribe_diarize": INNER,
    "mpt": Layout(
        layers="blocks",
        input_norm="norm_1",
        mlp_norm="norm_2",
        mlp="ffn",
        **fused_attention_at("attn", "Wqkv", "out_proj", "blocks"),
    ),
    "mvp": BART,
    "nemotron_h": NO_ATTENTION,
    "olmo2": OUTPUT_NORMS,
    "olmo3": OUTPUT_NORMS,
    # the first GPT norms behind each residual sum
    "openai-gpt": replace(GPT2, input_norm=None, mlp_norm=None, output_norms=("ln_1", "ln_2")),
    "opt": BART,
    "pegasus": BART,
    "persimmon": PERSIMMON,
    "phi": Layout(
        mlp_norm="input_layernorm",
        **attention_at("self_attn", "dense"),
    ),
    "phi3": PHI3,
    "phi4_multimodal": PHI3,
    "plbart": BART,
    # a temporal block is an attention in some layers, and a recurrence in others
    "recurrent_gemma": Layout(
        input_norm="temporal_pre_norm",
        mlp_norm="channel_pre_norm",
        mlp="mlp_block",
        **attention_at("temporal_block", "o_proj"),
    ),
    "rembert": BERT,
    "roberta": BERT,
    # unlike BERT's, its norms stand before attention and MLP
    "roberta-prelayernorm": replace(
        BERT,
        output_norms=(),
        input_norm="attention.LayerNorm",
        mlp_norm="intermediate.LayerNorm",
    ),
    "roc_bert": BERT,
    "roformer": BERT,
    "rwkv": replace(
        NO_ATTENTION, layers="blocks", input_norm="ln1", mlp_norm="ln2", mlp="feed_forward"
    ),
    "trocr": BART,
    "vaultgemma": FOUR_NORMS,
    "whisper": BART,
    "xglm": BART_LAYER,
    "xlm-roberta": BERT,
    "xlstm": replace(
        NO_ATTENTION, layers="blocks", input_norm="norm_mlstm", mlp_norm="norm_ffn", mlp="ffn"
    ),
    "xmod": BERT,
}
"""By transformers' `model_type`, what differs from Llama; where sizes of a family differ, the first
whose norms are there."""


SPLIT_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
"""Of the projections of a `SplitProjection`."""


class Slot(NamedTuple):
    """A module's place in a model, where another one can be put."""

    parent: Any
    name: str

    @property
    def module(self) -> Any:
        """The module that is there."""
        return getattr(self.parent, self.name)

    def put(self, module: nn.Module) -> None:
        """Puts another module there."""
        setattr(self.parent, self.name, module)


def text_config(llm: PreTrainedModel) -> Any:
    """Returns the configuration of the decoder layers, inside of a multimodal class's."""
    return llm.config.get_text_config(decoder=True)


def layout_of(llm: PreTrainedModel) -> Layout:
    """Returns the layout of an LLM's family.

    Raises:
        ValueError: there is no list of decoder layers where the family has it, nor is there one
            list of modules with as many as the configuration says.
    """
    layout = LAYOUTS.get(llm.config.model_type, LLAMA)
    layers = module_at(llm.base_model, layout.layers)
    # a family in no row that is not built like Llama
    if not isinstance(layers, nn.ModuleList):
        return replace(layout, layers=path_of_layers(llm))
    for size in (layout, *layout.other_sizes):
        # sizes of a family are told apart by their norms alone
        if len(layers) and all(module_at(layers[0], name) for name in size.norms):
            return size
    return layout


def path_of_layers(llm: PreTrainedModel) -> str:
    """Returns the dotted name below `base_model` of the one list that has as many modules as the
    LLM has layers, for a family that the table does not know.

    Raises:
        ValueError: there is none, or several.
    """
    config = text_config(llm)
    count = getattr(config, "num_hidden_layers", None)
    paths: list[str] = []
    for path, module in llm.base_model.named_modules():
        # a list inside of a layer, as of its experts, may be as long
        inside = any(path.startswith(f"{outer}.") for outer in paths)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            paths.append(path)
    if len(paths) == 1:
        return paths[0]
    reason = f"several lists of {count} layers ({', '.join(paths)})" if paths else "none"
    raise ValueError(
        f"{type(llm).__name__} has no list of decoder layers at {llm.base_model_prefix}.layers, "
        f"where Llama has it; found {reason}; choose another LLM"
    )


def decoder_layers(llm: PreTrainedModel) -> nn.ModuleList:
    """Returns the decoder layers of a causal LM, whatever is in them.

    Raises:
        ValueError: there is no list of them, or an empty one.
    """
    layers = module_at(llm.base_model, layout_of(llm).layers)
    assert isinstance(layers, nn.ModuleList)
    if len(layers) == 0:
        raise ValueError(f"{type(llm).__name__} has no decoder layer: num_hidden_layers is 0")
    return layers


def body_of(llm: PreTrainedModel) -> nn.Module:
    """Returns the module that holds the decoder layers, and beside them the LLM's rotary
    embedding."""
    path, _, _ = layout_of(llm).layers.rpartition(".")
    return llm.base_model.get_submodule(path)


def attention_of(llm: PreTrainedModel, layer: nn.Module) -> Any:
    """Returns the attention module of a decoder layer.

    Raises:
        ValueError: the layer has none, as those of linear attention or convolution.
    """
    return slot_of(llm, layer, layout_of(llm).attention, "attention").module


def input_norm_of(llm: PreTrainedModel, layer: nn.Module) -> nn.Module | None:
    """Returns the norm before a layer's attention; None where the attention reads hidden states as
    they are, as in OLMo 2.

    Raises:
        ValueError: the family has one, and this layer does not.
    """
    path = layout_of(llm).input_norm
    return None if path is None else slot_of(llm, layer, path, "norm before its attention").module


def mlp_norm_of(llm: PreTrainedModel, layer: nn.Module) -> nn.Module | None:
    """Returns the norm before a layer's MLP; None where the MLP reads hidden states as they are.

    Raises:
        ValueError: the family has one, and this layer does not.
    """
    path = layout_of(llm).mlp_norm
    return None if path is None else slot_of(llm, layer, path, "norm before its MLP").module


def norms_of(llm: PreTrainedModel, layer: nn.Module) -> list[Slot]:
    """Returns the places of a layer's norms: before attention and MLP, or after them in a family
    that norms nothing before.

    Raises:
        ValueError: this layer lacks one.
    """
    return [slot_of(llm, layer, path, "norm") for path in layout_of(llm).norms]


def mlp_of(llm: PreTrainedModel, layer: nn.Module) -> Slot:
    """Returns the place of a layer's MLP, which may be a mixture of experts.

    Raises:
        ValueError: the layer has none that is one module.
    """
    return slot_of(llm, layer, layout_of(llm).mlp, "MLP")


def projection_of(llm: PreTrainedModel, layer: nn.Module, name: Projection) -> Slot:
    """Returns the place of one of a layer's projections; of a fused one after `split_fused`.

    Raises:
        ValueError: the layer has none that is a module of its own.
    """
    layout = layout_of(llm)
    # the fields are called as the projections
    path: str | None = getattr(layout, name)
    if path is None and layout.fused is not None:
        fused = module_at(layer, layout.fused)
        if isinstance(fused, SplitProjection) and name in SPLIT_NAMES:
            return Slot(fused, SPLIT_NAMES[name])
    return slot_of(llm, layer, path, f"{name} projection")


def slot_of(llm: PreTrainedModel, layer: nn.Module, path: str | None, what: str) -> Slot:
    """Returns the place of a module by its dotted name below a decoder layer.

    Raises:
        ValueError: there is none (path None: the family has none).
    """
    # hybrid families have layers with other modules than their attention layers
    if path is None or module_at(layer, path) is None:
        reason = "" if path is None else f" at {path}"
        index = list(decoder_layers(llm)).index(layer)
        raise ValueError(
            f"{type(llm).__name__} has no {what}{reason} in decoder layer {index} "
            f"({type(layer).__name__})"
        )
    parent, _, name = path.rpartition(".")
    # an empty parent is the layer itself
    return Slot(layer.get_submodule(parent), name)


def module_at(module: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at a dotted name; None where there is none."""
    child: Any = module
    for name in path.split("."):
        # of None it gives None again, so a parent that is missing ends as None
        child = getattr(child, name, None)
    # an attribute of that name may be something else, or be set to None in some layers
    return child if isinstance(child, nn.Module) else None


class KeyValue(NamedTuple):
    """Weights of a layer's projections to keys and values, as nn.Linear has them."""

    key: Tensor
    """(K * d, D)."""
    value: Tensor
    """(K * d, D)."""
    key_bias: Tensor | None
    """(K * d,)."""
    value_bias: Tensor | None
    """(K * d,)."""


def head_width(llm: PreTrainedModel, layer: nn.Module) -> int:
    """Returns d of a layer's attention.

    Raises:
        ValueError: the attention does not say it.
    """
    attention = attention_of(llm, layer)
    # as Llama, GPT-NeoX and BERT call it
    for name in ("head_dim", "head_size", "attention_head_size"):
        size = getattr(attention, name, None)
        if isinstance(size, int):
            return size
    raise ValueError(f"{type(llm).__name__}: {type(attention).__name__} says no width of its heads")


def heads_width(llm: PreTrainedModel, layer: nn.Module) -> int:
    """Returns H * d, the width of the attention's result before its output projection."""
    output = projection_of(llm, layer, "output").module
    # a Conv1D holds its weight as (in, out), and has no in_features
    return output.weight.shape[0] if isinstance(output, Conv1D) else output.in_features


def key_value_weights(llm: PreTrainedModel, layer: nn.Module) -> KeyValue:
    """Returns the weights of a layer's projections to keys and values, of a fused one its rows.

    Raises:
        ValueError: they are no plain linear layers.
    """
    fused = fused_projection(llm, layer)
    if fused is None:
        key = linear_weights(llm, projection_of(llm, layer, "key").module)
        value = linear_weights(llm, projection_of(llm, layer, "value").module)
        return KeyValue(key[0], value[0], key[1], value[1])
    weight, bias = linear_weights(llm, fused)
    _, key_rows, value_rows = fused_rows(llm, layer)
    key_rows, value_rows = key_rows.flatten(), value_rows.flatten()
    if bias is None:
        return KeyValue(weight[key_rows], weight[value_rows], None, None)
    return KeyValue(weight[key_rows], weight[value_rows], bias[key_rows], bias[value_rows])


def fused_projection(llm: PreTrainedModel, layer: nn.Module) -> nn.Module | None:
    """Returns the layer's projection to queries, keys and values together; None where it has none,
    or one that was split."""
    path = layout_of(llm).fused
    module = None if path is None else module_at(layer, path)
    return None if isinstance(module, SplitProjection) else module


def linear_weights(llm: PreTrainedModel, module: Any) -> tuple[Tensor, Tensor | None]:
    """Returns weight (out, in) and bias of a linear layer, GPT-2's transposed one included.

    Raises:
        ValueError: another module.
    """
    if type(module) is Conv1D:
        return module.weight.T, module.bias
    if isinstance(module, nn.Linear):
        return module.weight, module.bias
    raise ValueError(
        f"{type(llm).__name__} projects keys by a {type(module).__name__}, which is no plain "
        "linear layer"
    )


def fused_rows(llm: PreTrainedModel, layer: nn.Module) -> tuple[Tensor, ...]:
    """Returns which rows of a fused projection make queries, keys and values, by the groups of
    queries, keys and values that follow each other in it: (K, H / K * d), (K, d) and (K, d), or one
    row each where all queries come first.

    Raises:
        ValueError: it is no plain linear layer.
    """
    weight, _ = linear_weights(llm, fused_projection(llm, layer))
    # the output projection takes all heads, so its width is the number of rows for queries
    query_count = heads_width(llm, layer)
    key_count = (weight.shape[0] - query_count) // 2
    groups = 1
    if layout_of(llm).fused_order == "groups":
        groups = key_count // head_width(llm, layer)
    # on the CPU, also in a block for the meta device: these are indices, and no weights
    rows = torch.arange(weight.shape[0], device="cpu").view(groups, -1)
    sizes = [query_count // groups, key_count // groups, key_count // groups]
    return rows.split(sizes, dim=1)


class SplitProjection(nn.Module):
    """A fused projection as three, with Llama's names, whose results are put in the order of the
    fused one's.

    Args:
        weight: ((H + 2 K) * d, D), of the fused projection.
        bias: ((H + 2 K) * d,).
        rows: of `fused_rows`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: tuple[Tensor, ...]) -> None:
        super().__init__()
        query_rows, key_rows, value_rows = rows
        self.groups = len(query_rows)
        self.q_proj = linear_of_rows(weight, bias, query_rows)
        self.k_proj = linear_of_rows(weight, bias, key_rows)
        self.v_proj = linear_of_rows(weight, bias, value_rows)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, (H + 2 K) * d)."""
        grouped = []
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            # the attention splits the result as it split that of the fused projection
            grouped.append(projection(hidden_states).unflatten(-1, (self.groups, -1)))
        return torch.cat(grouped, dim=-1).flatten(-2)


def linear_of_rows(weight: Tensor, bias: Tensor | None, rows: Tensor) -> nn.Linear:
    """Returns a linear layer with some rows of a weight (out, in) and of its bias (out,)."""
    # they are made on the CPU
    rows = rows.flatten().to(weight.device)
    linear = nn.Linear(
        weight.shape[1],
        len(rows),
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        linear.weight.copy_(weight[rows])
        if bias is not None:
            linear.bias.copy_(bias[rows])
    return linear


def split_fused(llm: PreTrainedModel, layer: nn.Module) -> None:
    """Replaces a layer's fused projection by a `SplitProjection`, so that keys and values have
    projections of their own; a layer without a fused one stays as it is."""
    fused = fused_projection(llm, layer)
    if fused is None:
        return
    weight, bias = linear_weights(llm, fused)
    split = SplitProjection(weight, bias, fused_rows(llm, layer))
    slot_of(llm, layer, layout_of(llm).fused, "fused projection").put(split)


def check_needs(
    llm: PreTrainedModel, needs: tuple[Need, ...], fusion: str, layer_indices: list[int]
) -> None:
    """Checks what a fusion needs of the layout of an LLM; see `fusion.probe` for what only a
    forward pass can show.

    Args:
        fusion: its name in the message.
        layer_indices: of the layers that it needs something of, from 0.

    Raises:
        ValueError: the LLM's class and the missing module.
    """
    parameters = inspect.signature(llm.forward).parameters
    if "inputs_embeds" in needs and "inputs_embeds" not in parameters:
        raise ValueError(
            f"{fusion} needs an LLM that takes inputs_embeds, and {type(llm).__name__} takes none; "
            "choose another LLM"
        )
    if not parameters.keys() & {"cache", "past_key_values"}:
        raise ValueError(
            f"{type(llm).__name__} takes no key-value cache, and could not answer; choose another "
            "LLM"
        )
    layers = decoder_layers(llm)
    for index in layer_indices:
        try:
            check_layer_needs(llm, layers[index], needs)
        except ValueError as error:
            raise ValueError(
                f"{fusion} cannot serve this LLM: {error}; choose another LLM, other layers or "
                "another fusion"
            ) from error


def check_layer_needs(llm: PreTrainedModel, layer: nn.Module, needs: tuple[Need, ...]) -> None:
    """Raises ValueError where a decoder layer lacks a module that is needed."""
    # each raises for a module that is missing
    if "attention" in needs:
        attention_of(llm, layer)
    if "norms" in needs:
        norms_of(llm, layer)
    if "mlp" in needs:
        mlp_of(llm, layer)
    if "separate_keys_values" in needs:
        key_value_weights(llm, layer)


def names_in_float32(llm: PreTrainedModel, strict: bool = True) -> set[str]:
    """Returns the names of the weights that transformers keeps in float32 where it loads an LLM in
    16 bits, as those that choose a token's experts.

    Args:
        strict: in any 16 bits; else in float16, too.
    """
    # private names of transformers, which offers no others
    patterns = {*(getattr(llm, "_keep_in_fp32_modules_strict", None) or ())}
    if not strict:
        patterns |= {*(getattr(llm, "_keep_in_fp32_modules", None) or ())}
    if not patterns:
        return set()
    # it searches for them in the same way
    expression = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    names = set()
    for name, _ in (*llm.named_parameters(), *llm.named_buffers()):
        # LoRA puts a name between
        if expression.search(name.replace(".base_layer", "")):
            names.add(name)
    return names


READ_WEIGHT = re.compile(r"\bself\.(\w+)\.weight\b(?:\.(\w+))?")
"""A weight of a child in the source of a class, and the attribute of it that is read, if any."""
BASES = (nn.Module, PreTrainedModel, GenerationMixin)


def layers_past_their_forward(root: nn.Module, types_too: bool = False) -> set[int]:
    """Returns by id the linear layers below a module whose weight is read without a call of the
    layer, as Mamba's kernels do in training and the attention of timm's BEiT, EVA and Swin V2: what
    is put in their place, or added to them, would not be seen.

    Args:
        types_too: also those whose weight is asked for its type alone, to which an input is cast:
            a weight in 4 bits has that of its bytes.
    """
    ids: set[int] = set()
    for module in root.modules():
        owner_class: Any = type(module)
        for name in names_of_read_weights(owner_class, types_too):
            layer = getattr(module, name, None)
            if isinstance(layer, nn.Linear | Conv1D):
                ids.add(id(layer))
    return ids


@cache
def names_of_read_weights(module_class: type[nn.Module], types_too: bool) -> set[str]:
    """Returns the attributes of a class whose `weight` its computation reads, by the source: there
    is no other sign of it where the kernels are not installed."""
    harmless = {"device", "shape"} if types_too else {"device", "shape", "dtype"}
    names: set[str] = set()
    for method_name, method in inspect.getmembers(module_class, inspect.isfunction):
        # hundreds that read no weight of a layer
        if any(getattr(base, method_name, None) is method for base in BASES):
            continue
        # weights are drawn, and joined for inference, outside of any forward pass
        if any(word in method_name for word in ("init", "reset", "fuse")):
            continue
        try:
            source = inspect.getsource(method)
        except (OSError, TypeError):  # a class without a file
            continue
        for name, attribute in READ_WEIGHT.findall(source):
            if attribute not in harmless:
                names.add(name)
    return names
