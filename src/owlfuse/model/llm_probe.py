"""Probes of an LLM on a tiny copy of it: how its layers make keys, and whether packed rows are
independent.

The copy has the LLM's class, configuration and number of layers, other widths and random weights.
It takes a tenth of a second to build, and needs neither the LLM's weights nor its memory, so that
it works for an LLM on the meta device or sharded over ranks. Results are cached by configuration.

B rows, T text positions, D width, K key-value heads, d head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from owlfuse.core.errors import error_summary
from owlfuse.model.layouts import (
    Projection,
    attention_of,
    decoder_layers,
    head_width,
    input_norm_of,
    key_value_weights,
    layout_of,
    module_at,
    projection_of,
    split_fused,
)
from owlfuse.model.llm import (
    FAILURES,
    KeyPath,
    attention_function,
    attention_name,
    cache_argument,
    layer_type_of,
    rotary,
    rotates_alone,
    shared_field,
)

# every id that a probe uses has to lie below the vocabulary
HEADS, GROUPS, HEAD_WIDTH, VOCABULARY = 4, 2, 16, 64
LARGE = 2 * 10**10
"""Numbers of an LLM whose tiny copy is counted before it is made."""
MAX_NUMBERS = 3 * 10**8
TOLERANCE = 1e-3
"""Of the largest number, between two ways to compute the same in float32 over many random
layers."""
KEY_NORMS = ("k_norm", "key_layernorm", "k_layernorm", "qk_norm")
VALUE_NORMS = ("v_norm",)
KEY_VALUE: tuple[Projection, ...] = ("key", "value")
CANDIDATES = [
    KeyPath(norm, norm_over, rotation)
    for norm in (None, *KEY_NORMS)
    for norm_over in ("heads", "width", "rotated")
    for rotation in ("whole", "part", "none")
    if norm is not None or norm_over == "heads"
]
"""How keys may come from the key projection; the first that gives a layer's own keys is used."""

SPARSE_ATTENTION = {"index_topk": 2, "index_block_size": 2, "index_topk_blocks": 1}
"""Of attention that chooses some keys (DeepSeek V3.2, MiniMax M3): so few that short rows have
more, and a fusion shows whether the choice still holds under its own attention."""
LENGTH_FLOORS = ("floor_scale", "log_scaling_n_floor")
"""Lengths from which Llama 4 and Inkling scale queries, by places in the row and not by positions
in a sample."""

Result = TypeVar("Result")

REGISTER_PARAMETER = nn.Module.register_parameter
"""torch's own: accelerate's `init_empty_weights` replaces it by one that makes parameters without
memory."""


def cached_by_configuration(
    probe: Callable[[PreTrainedModel], Result],
) -> Callable[[PreTrainedModel], Result]:
    """Decorates a probe, which gets the tiny copy, to run once for each configuration and class."""
    results: dict[Any, Result] = {}

    @wraps(probe)
    def cached_probe(llm: PreTrainedModel) -> Result:
        key = configuration_key(llm)
        if key not in results:
            with plain_cpu():
                results[key] = probe(tiny_copy(llm))
        return results[key]

    return cached_probe


def configuration_key(llm: PreTrainedModel) -> tuple[type, str]:
    """Returns all that the tiny copy of an LLM depends on."""
    return type(llm), tiny_config(llm.config).to_json_string(use_diff=False)


@contextmanager
def plain_cpu() -> Iterator[None]:
    """Makes models in memory and on the CPU inside the block, also inside of a block for the meta
    device. Torch's random state does not change.
    """
    default, registering = torch.get_default_dtype(), nn.Module.register_parameter
    torch.set_default_dtype(torch.float32)
    nn.Module.register_parameter = REGISTER_PARAMETER  # type: ignore[method-assign]
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        nn.Module.register_parameter = registering  # type: ignore[method-assign]
        torch.set_default_dtype(default)


def tiny_copy(llm: PreTrainedModel) -> PreTrainedModel:
    """Returns an LLM of the same class, layers and options, with other widths and random weights,
    in evaluation mode.

    Raises:
        ValueError: the class cannot be built with such widths.
    """
    try:
        config = tiny_config(llm.config)
        check_copy_is_small(llm, config)
        # float32 and no dropout, so that differences are no noise
        tiny = type(llm)(config).float().eval()
        decoder_layers(tiny)
    except FAILURES as error:
        raise ValueError(
            f"{type(llm).__name__} cannot be tried at a small width: {error_summary(error)}"
        ) from error
    randomize(tiny)
    return tiny


def check_copy_is_small(llm: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Raises ValueError for a copy that would take gigabytes: of a large LLM whose configuration
    has widths of experts by names that `shrink` does not know, or of one with a table for each of
    a billion positions."""
    # few others come near: a copy keeps layers and experts, and is a thousand times narrower
    if llm.num_parameters() < LARGE and count_numbers(llm.buffers()) <= MAX_NUMBERS:
        return
    with torch.device("meta"):
        tiny = type(llm)(config)
    numbers = count_numbers(tiny.parameters()) + count_numbers(tiny.buffers())
    if numbers > MAX_NUMBERS:
        raise ValueError(f"its copy would have {numbers:,} numbers")


def count_numbers(tensors: Iterable[Tensor]) -> int:
    """Returns how many numbers tensors hold together."""
    return sum(tensor.numel() for tensor in tensors)


def tiny_config(config: Any) -> PreTrainedConfig:
    """Returns the configuration with small widths; fields of single layers, positions, norms and
    experts stay.
    """
    # the LLM keeps its own
    tiny = copy.deepcopy(config)
    shrink(tiny)
    # chosen anew: an attached fusion has its own, and flash attention needs a GPU
    tiny._attn_implementation = None
    tiny.use_cache = False
    return tiny


def shrink(config: Any) -> None:
    """Sets small widths in a configuration and in those inside of it, as of Gemma 3 with
    pictures."""
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            shrink(inner)
    # Falcon's name is the second
    groups = shared_field(config, "num_key_value_heads") or shared_field(config, "num_kv_heads")
    grouped = groups not in (None, shared_field(config, "num_attention_heads"))
    tiny_groups = GROUPS if grouped else HEADS
    width = HEADS * HEAD_WIDTH
    widths = {
        "hidden_size": width,
        "num_attention_heads": HEADS,
        "num_key_value_heads": tiny_groups,
        "num_kv_heads": tiny_groups,
        # Kimi Linear, whose attention takes minutes at its own width
        "linear_num_heads": HEADS,
        "linear_head_dim": HEAD_WIDTH,
    }
    # with latent attention it is the width of the rotated part, which has a field of its own
    if "qk_rope_head_dim" not in vars(config):
        widths["head_dim"] = HEAD_WIDTH
    # OPT's and ELECTRA's embeddings, as wide as hidden states or not
    for name in ("word_embed_proj_dim", "embedding_size"):
        if shared_field(config, name) == shared_field(config, "hidden_size"):
            widths[name] = width
    # GPT-2's hidden_size is called n_embd
    synonyms = {target: name for name, target in config.attribute_map.items()}
    # vars, not getattr, which configurations with keys of single layers refuse
    for name, value in list(vars(config).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        standard_name = synonyms.get(name, name)
        if name.startswith("vocab_size"):  # Gemma 4 has several
            setattr(config, name, VOCABULARY)
        elif name.endswith(("intermediate_size", "ffn_dim", "ffn_hidden_size")):
            setattr(config, name, 32)
        elif name in SPARSE_ATTENTION:
            setattr(config, name, SPARSE_ATTENTION[name])
        elif standard_name in widths:
            setattr(config, name, widths[standard_name])
        elif name.endswith("_token_id") and value >= VOCABULARY:
            # Gemma 4 compares its inputs with the embeddings of such tokens
            setattr(config, name, VOCABULARY - 1)
    fit_state_space(config, width)
    # the embedding's table has to hold it; a configuration in another one may have none
    if isinstance(getattr(config, "pad_token_id", None), int):
        config.pad_token_id = 0
    cut_rotary_factors(config)


def fit_state_space(config: Any, width: int) -> None:
    """Sets the numbers of Mamba's heads in a configuration whose hidden states have become `width`
    wide: they share out a multiple of it, `expand`."""
    if config.model_type == "mamba2":
        config.num_heads, config.head_dim = HEADS, config.expand * HEAD_WIDTH
        config.n_groups = 1
    # Bamba, Granite 4 and Falcon H1
    if "mamba_n_heads" in vars(config) and "mamba_d_head" in vars(config):
        config.mamba_n_heads, config.mamba_d_head = HEADS, config.mamba_expand * HEAD_WIDTH
        config.mamba_n_groups = 1
        if "mamba_d_ssm" in vars(config):
            config.mamba_d_ssm = config.mamba_expand * width
    # whose attention reads the embeddings beside the layer's states
    if config.model_type in ("zamba", "zamba2"):
        config.attention_hidden_size, config.attention_head_dim = 2 * width, 2 * HEAD_WIDTH
    if config.model_type == "zamba2":
        config.mamba_headdim = config.mamba_expand * width // config.n_mamba_heads


def cut_rotary_factors(config: Any) -> None:
    """Shortens longrope's lists of factors, one for each pair of a head's numbers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # one factor for two numbers, which are rotated together
    pairs = int(HEAD_WIDTH * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if name in parameters:
            parameters[name] = parameters[name][:pairs]


def randomize(model: nn.Module) -> None:
    """Sets random weights with which each part of a model changes the result: none is zero, and no
    norm's weights are all ones."""
    # the same weights in every process: all ranks come to the same result
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # by the width, so that states neither vanish nor grow over many layers
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            # norms and biases; far from zero, where a norm would hide the rest
            parameter.uniform_(0.5, 1.5, generator=generator)


class Call(NamedTuple):
    """The arguments of a layer's call of transformers' attention function."""

    key: Tensor
    """(B, K, T, d)."""
    value: Tensor
    """(B, K, T, d)."""
    arguments: dict[str, Any]


@cached_by_configuration
def key_paths(llm: PreTrainedModel) -> list[KeyPath | str]:
    """Returns for each decoder layer how its keys come from its key projection, or why further keys
    cannot be made like them."""
    layers = list(decoder_layers(llm))
    reasons: dict[int, str] = {}
    for index, layer in enumerate(layers):
        try:
            enlarge_keys_values(llm, layer)
        except ValueError as error:
            reasons[index] = str(error)
    # not from 0, where a rotation does nothing
    position_ids = torch.arange(2, 9)[None]
    ids = torch.arange(10, 17)[None]
    recorded = record_inputs(llm)
    try:
        llm(input_ids=ids, position_ids=position_ids, visual="visual", use_cache=False)
    except FAILURES as error:
        reason = f"its forward fails with a further keyword argument ({error_summary(error)})"
        return [reason] * len(layers)
    paths: list[KeyPath | str] = []
    for index, layer in enumerate(layers):
        if index in reasons:
            paths.append(reasons[index])
            continue
        try:
            paths.append(key_path(llm, index, layer, recorded, position_ids))
        except FAILURES as error:
            paths.append(f"how it makes keys is not known ({error_summary(error)})")
    return paths


def enlarge_keys_values(llm: PreTrainedModel, layer: nn.Module) -> None:
    """Makes keys and values of a layer so large that a limit of them shows, as OLMoE may have one.

    Raises:
        ValueError: their projections are no plain linear layers.
    """
    key_value_weights(llm, layer)
    # the copy is the probe's: a fused projection may be split
    split_fused(llm, layer)
    for name in KEY_VALUE:
        projection_of(llm, layer, name).module.weight.mul_(10)


class RecordedInputs(NamedTuple):
    """The inputs of decoder layers and of their attention, by layer."""

    layers: dict[int, Tensor]
    """(B, T, D) of the layer."""
    attentions: dict[int, Tensor]
    """(B, T, D) of its attention."""
    calls: dict[int, list[Call]]


def record_inputs(llm: PreTrainedModel) -> RecordedInputs:
    """Returns what every later forward pass of the LLM fills with the inputs of its layers and of
    their attention."""
    recorded = RecordedInputs({}, {}, {})
    layers = list(decoder_layers(llm))
    path = layout_of(llm).attention
    attentions: dict[int, nn.Module] = {}
    for index, layer in enumerate(layers):
        attention = None if path is None else module_at(layer, path)
        if attention is not None:
            attentions[index] = attention
    # by identity: layer_idx may be wrong or missing in modelling files
    index_of = {id(attention): index for index, attention in attentions.items()}
    plain_name = attention_name(llm)
    plain = attention_function(plain_name)

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        calls = recorded.calls.setdefault(index_of.get(id(module), -1), [])
        calls.append(Call(key, value, arguments))
        # the plain function does not know the argument
        options = {name: value for name, value in arguments.items() if name != "visual"}
        return plain(module, query, key, value, attention_mask, **options)

    def record(inputs: dict[int, Tensor], index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    name = "owlfuse_probe"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain_name])
    llm.set_attn_implementation(name)
    # never removed: this copy of the LLM is the probe's alone
    for index, attention in attentions.items():
        of_layer = record(recorded.layers, index)
        layers[index].register_forward_pre_hook(of_layer, with_kwargs=True)
        of_attention = record(recorded.attentions, index)
        attention.register_forward_pre_hook(of_attention, with_kwargs=True)
    return recorded


def key_path(
    llm: PreTrainedModel,
    index: int,
    layer: nn.Module,
    recorded: RecordedInputs,
    position_ids: Tensor,
) -> KeyPath | str:
    """Returns the item of `key_paths` for one layer."""
    calls = recorded.calls.get(index, [])
    if len(calls) != 1:
        return (
            f"its attention calls transformers' attention functions {len(calls)} times, and "
            "once is needed"
        )
    call, attention = calls[0], attention_of(llm, layer)
    if "visual" not in call.arguments:
        return (
            "its decoder layers hand no keyword arguments to the attention, so that pictures "
            "do not reach it"
        )
    normed = recorded.attentions[index]
    norm = input_norm_of(llm, layer)
    states = recorded.layers[index]
    if not same(states if norm is None else norm(states), normed):
        return "its attention reads something else than what the norm before it gives"
    heads = (-1, head_width(llm, layer))
    projected_key = projection_of(llm, layer, "key").module(normed).unflatten(-1, heads)
    projected_value = projection_of(llm, layer, "value").module(normed).unflatten(-1, heads)
    value_norms = matching_value_norms(attention, projected_value, call.value)
    # OLMoE clips its values
    if not value_norms:
        return "its attention changes the values after their projection"
    layer_type, takes_keys_alone = layer_type_of(llm, index), rotates_alone(attention)
    for candidate in CANDIDATES:
        path = candidate._replace(
            layer_type=layer_type, rotates_alone=takes_keys_alone, value_norm=value_norms[0]
        )
        try:
            turn = None
            if path.rotation != "none":
                turn = rotary(llm, normed, position_ids, path.layer_type)
            key = path.keys(attention, projected_key, turn)
        except FAILURES:  # a candidate with a module that this attention lacks
            continue
        if same(key, call.key):
            return path
    return "its keys are more than their projection, a norm and the rotary embedding"


def matching_value_norms(attention: Any, projected: Tensor, value: Tensor) -> list[str | None]:
    """Returns by which norm values (B, K, T, d) come of projected ones (B, T, K, d), None standing
    for no norm; empty where they come of them otherwise."""
    names: list[str | None] = []
    for name in (None, *VALUE_NORMS):
        if name is None or hasattr(attention, name):
            candidate = KeyPath(value_norm=name).values(attention, projected)
            if same(candidate, value):
                names.append(name)
    return names


def same(tensor: Tensor, expected: Tensor) -> bool:
    """Returns whether two tensors are equal but for rounding."""
    if tensor.shape != expected.shape or not torch.isfinite(expected).all():
        return False
    return bool((tensor - expected).abs().max() <= TOLERANCE * expected.abs().max())


@cached_by_configuration
def packing_leak(llm: PreTrainedModel) -> str | None:
    """Returns how packed rows of this LLM differ from single ones, None where a sample's logits are
    the same."""
    first, second = [11, 12, 13, 14], [21, 22, 23, 24, 25, 26]
    # two samples in a row, each from position 0
    position_ids = torch.tensor([[*range(4), *range(6)]] * 2)
    # the second sample behind two different first ones
    packed = torch.tensor([first + second, [31, 32, 33, 34, *second]])
    try:
        # without a mask, as packed rows are given to the LLM
        logits = llm(input_ids=packed, position_ids=position_ids, use_cache=False).logits[:, 4:]
        alone = llm(
            input_ids=torch.tensor([second]), attention_mask=torch.ones(1, 6), use_cache=False
        ).logits[0]
    except FAILURES as error:
        return error_summary(error)
    if not same(logits[1], logits[0]):
        return "a sample's logits change with the text of the sample before it"
    if not same(logits[0], alone):
        return "a sample's logits are others than without packing"
    return None


@cached_by_configuration
def cache_failure(llm: PreTrainedModel) -> str | None:
    """Returns why this LLM cannot go on from a key-value cache as answers do, None where it can."""
    ids = torch.arange(11, 19)[None]
    try:
        expected = llm(input_ids=ids, use_cache=False).logits[:, -1]
        cache = DynamicCache(config=llm.config)
        options: dict[str, Any] = {cache_argument(llm): cache, "use_cache": True}
        llm(input_ids=ids[:, :-1], attention_mask=torch.ones(1, 7), **options)
        # what generate asks; a cache of Mamba's states alone does not know
        if cache.get_seq_length() != 7:
            return f"it holds {cache.get_seq_length()} positions after 7"
        mask = torch.ones(1, 8)
        logits = llm(input_ids=ids[:, -1:], attention_mask=mask, **options).logits[:, -1]
    except FAILURES as error:
        return error_summary(error)
    return None if same(logits, expected) else "with it the logits are others than without"


def idle_parameters(llm: PreTrainedModel) -> set[str]:
    """Returns the names of the parameters that no text depends on, as those of the vision tower
    that transformers' class of Gemma 3 has. Layers are not looked into: an expert that a short text
    does not reach is not idle."""
    # who has no other parts is not tried
    if not llm.config.sub_configs:
        return set()
    try:
        return unused_by_text(llm)
    # what cannot be tried is told where the fusion is
    except FAILURES:
        return set()


@cached_by_configuration
def unused_by_text(llm: PreTrainedModel) -> set[str]:
    """Returns the names of the parameters outside of the decoder layers without a gradient."""
    in_layers = {id(p) for layer in decoder_layers(llm) for p in layer.parameters()}
    named = {
        name: parameter
        for name, parameter in llm.named_parameters()
        if parameter.requires_grad and id(parameter) not in in_layers
    }
    with torch.enable_grad():
        logits = llm(input_ids=torch.arange(11, 19)[None], use_cache=False).logits
        gradients = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}


def check_cache(llm: PreTrainedModel) -> None:
    """Raises ValueError where this LLM cannot answer by a key-value cache."""
    failure = cache_failure(llm)
    if failure:
        raise ValueError(
            f"{type(llm).__name__} cannot go on from a key-value cache, and could not answer: "
            f"{failure}; choose another LLM"
        )


def check_packing(llm: PreTrainedModel, length: int) -> None:
    """Raises ValueError where the samples of a packed row of `length` are not independent in this
    LLM."""
    leak = packing_leak(llm) or scaled_by_place(llm, length)
    if leak:
        raise ValueError(
            f"{type(llm).__name__} cannot take packed rows: {leak}; set data.pack_to=null"
        )


def scaled_by_place(llm: PreTrainedModel, length: int) -> str | None:
    """Returns how the place in a row of `length` counts beside the position in a sample, None where
    it does not."""
    config = llm.config.get_text_config(decoder=True)
    for name in LENGTH_FLOORS:
        floor = getattr(config, name, None)
        # Llama 4 may be told not to
        if floor is not None and floor < length and getattr(config, "attn_temperature_tuning", 1):
            return f"it scales queries by their place in the row from {floor:,} ({name}) on"
    return None
