"""What owlfuse assumes of an LLM, tried on a tiny copy of it: how its layers make keys, and whether
packed rows stay apart.

The copy has the LLM's class, configuration and number of layers, other widths and random weights.
It takes a tenth of a second to build, and needs neither the LLM's weights nor its memory, so that
an LLM on the meta device or shared out over ranks is tried as one in memory is. What was found is
kept for each configuration.

B rows, T text positions, D width, K key-value heads, d head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from owlfuse.model.llm import FAILURES, KeyPath, decoder_layers, first_line, layer_type_of, rotary

HEADS, GROUPS, HEAD_WIDTH, VOCABULARY = 4, 2, 16, 64
TOLERANCE = 1e-3
"""Of the largest number, between two ways to compute the same in float32 over many random
layers."""
KEY_NORMS = ("k_norm", "key_layernorm", "k_layernorm")
WAYS = [
    KeyPath(norm, place, rotation)
    for norm in (None, *KEY_NORMS)
    for place in ("heads", "width", "rotated")
    for rotation in ("whole", "part", "none")
    if norm is not None or place == "heads"
]
"""How keys may come from the key projection; the first that gives a layer's own keys is taken."""

Found = TypeVar("Found")

REGISTER_PARAMETER = nn.Module.register_parameter
"""torch's own: accelerate's `init_empty_weights` puts another in its place, which makes
parameters without memory."""


def kept_by_configuration(
    probe: Callable[[PreTrainedModel], Found],
) -> Callable[[PreTrainedModel], Found]:
    """Has a probe of an LLM run once for each configuration and class. It gets the tiny copy."""
    results: dict[Any, Found] = {}

    @wraps(probe)
    def once(llm: PreTrainedModel) -> Found:
        key = configuration_key(llm)
        if key not in results:
            with aside():
                results[key] = probe(tiny_copy(llm))
        return results[key]

    return once


def configuration_key(llm: PreTrainedModel) -> tuple[type, str]:
    """What decides about the tiny copy of an LLM."""
    return type(llm), tiny_config(llm.config).to_json_string(use_diff=False)


@contextmanager
def aside() -> Iterator[None]:
    """Inside, models are made in memory and on the CPU, whatever is built around.

    Torch's random numbers stay as they are.
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
    """An LLM of the same class, layers and options, with other widths and random weights, in
    evaluation mode.

    Raises:
        ValueError: the class takes no such widths.
    """
    try:
        tiny = type(llm)(tiny_config(llm.config)).float().eval()
        decoder_layers(tiny)
    except FAILURES as error:
        raise ValueError(
            f"{type(llm).__name__} cannot be tried at a small width: {first_line(error)}"
        ) from error
    fill(tiny)
    return tiny


def tiny_config(config: Any) -> PreTrainedConfig:
    """The configuration with small widths.

    All that is said of single layers, positions, norms and experts stays.
    """
    tiny = copy.deepcopy(config)
    grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    widths = {
        "hidden_size": HEADS * HEAD_WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS if grouped else HEADS,
        "head_dim": HEAD_WIDTH,
    }
    # Gemma 4 has several
    widths |= {name: VOCABULARY for name in vars(config) if name.startswith("vocab_size")}
    widths |= {
        name: 32
        for name, value in vars(config).items()
        if name.endswith("intermediate_size") and type(value) is int
    }
    # not by getattr, which configurations with keys of single layers refuse
    for name in set(widths) & {
        name for name, value in vars(config).items() if isinstance(value, int)
    }:
        setattr(tiny, name, widths[name])
    if isinstance(config.pad_token_id, int):  # an embedding takes none outside of its table
        tiny.pad_token_id = 0
    cut_rotary_factors(tiny)
    tiny._attn_implementation = "sdpa"  # an attached fusion has put its own there
    tiny.use_cache = False
    return tiny


def cut_rotary_factors(config: Any) -> None:
    """Shortens the lists of factors, one for each pair of a head's numbers, that longrope has."""
    parameters = getattr(config, "rope_parameters", None) or {}
    pairs = int(HEAD_WIDTH * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if name in parameters:
            parameters[name] = parameters[name][:pairs]


def fill(model: nn.Module) -> None:
    """Random weights with which each part of a model matters: nothing is zero, and no norm has the
    weight of one that is left out."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)


class Call(NamedTuple):
    """What a layer's attention hands to transformers' attention function."""

    key: Tensor
    """(B, K, T, d)."""
    value: Tensor
    """(B, K, T, d)."""
    arguments: dict[str, Any]


@kept_by_configuration
def key_paths(llm: PreTrainedModel) -> list[KeyPath | str]:
    """Of each decoder layer how its keys come from its key projection, or what stands in the way of
    further keys that are made like them."""
    layers: list[Any] = list(decoder_layers(llm))
    if not all(isinstance(layer.self_attn.k_proj, nn.Linear) for layer in layers):
        return ["its key projection is no plain linear layer"] * len(layers)
    for layer in layers:  # so large that a limit of keys and values shows, as olmoe may have
        layer.self_attn.k_proj.weight.mul_(10)
        layer.self_attn.v_proj.weight.mul_(10)
    position_ids = torch.arange(2, 9)[None]
    ids = torch.arange(10, 17)[None]
    with noting_attention(llm) as notes:
        try:
            llm(input_ids=ids, position_ids=position_ids, visual="visual", use_cache=False)
        except FAILURES as error:
            return [
                f"its forward fails with a further keyword argument ({first_line(error)})"
            ] * len(layers)
    return [key_path(llm, index, layer, notes, position_ids) for index, layer in enumerate(layers)]


class Notes(NamedTuple):
    """What went into decoder layers and their attention, by layer."""

    inputs: dict[int, Tensor]
    """(B, T, D) of the layer."""
    normed: dict[int, Tensor]
    """(B, T, D) of its attention."""
    calls: dict[int, list[Call]]


@contextmanager
def noting_attention(llm: PreTrainedModel) -> Iterator[Notes]:
    """Inside, what the LLM's layers and attention get is noted."""
    notes = Notes({}, {}, {})
    layers: list[Any] = list(decoder_layers(llm))
    index_of = {id(layer.self_attn): index for index, layer in enumerate(layers)}
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        notes.calls.setdefault(index_of.get(id(module), -1), []).append(Call(key, value, arguments))
        return plain(
            module,
            query,
            key,
            value,
            attention_mask,
            **{k: v for k, v in arguments.items() if k != "visual"},
        )

    def note(into: dict[int, Tensor], index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            into[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    name = "owlfuse_probe"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    llm.set_attn_implementation(name)
    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(note(notes.inputs, index), with_kwargs=True))
        handles.append(
            layer.self_attn.register_forward_pre_hook(note(notes.normed, index), with_kwargs=True)
        )
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


def key_path(
    llm: PreTrainedModel, index: int, layer: Any, notes: Notes, position_ids: Tensor
) -> KeyPath | str:
    """See `key_paths`, for one layer."""
    calls = notes.calls.get(index, [])
    if len(calls) != 1:
        return (
            f"its attention calls transformers' attention functions {len(calls)} times, and "
            "once is needed"
        )
    call, attention = calls[0], layer.self_attn
    if "visual" not in call.arguments:
        return (
            "its decoder layers hand no keyword arguments to the attention, so that pictures "
            "do not reach it"
        )
    normed = notes.normed[index]
    if not same(layer.input_layernorm(notes.inputs[index]), normed):
        return "its attention reads something else than what input_layernorm gives"
    heads = (-1, attention.head_dim)
    projected_key = attention.k_proj(normed).unflatten(-1, heads)
    projected_value = attention.v_proj(normed).unflatten(-1, heads)
    if not same(projected_value.transpose(1, 2), call.value):
        return "its attention changes the values after v_proj"
    for way in WAYS:
        path = way._replace(layer_type=layer_type_of(llm, index))
        try:
            turn = (
                rotary(llm, normed, position_ids, path.layer_type)
                if path.rotation != "none"
                else None
            )
            key = path.keys(attention, projected_key, turn)
        except FAILURES:  # a way that this attention has no part for
            continue
        if same(key, call.key):
            return path
    return "its keys are more than k_proj, a key norm and the rotary embedding"


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    if one.shape != other.shape or not torch.isfinite(other).all():
        return False
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


@kept_by_configuration
def packing_leak(llm: PreTrainedModel) -> str | None:
    """What packed rows of this LLM do wrong, None where a sample's logits are those that it has
    alone."""
    first, second = [11, 12, 13, 14], [21, 22, 23, 24, 25, 26]
    position_ids = torch.tensor([[*range(4), *range(6)]] * 2)
    packed = torch.tensor([first + second, [31, 32, 33, 34, *second]])
    try:
        logits = llm(input_ids=packed, position_ids=position_ids, use_cache=False).logits[:, 4:]
        alone = llm(
            input_ids=torch.tensor([second]), attention_mask=torch.ones(1, 6), use_cache=False
        ).logits[0]
    except FAILURES as error:
        return first_line(error)
    if not same(logits[1], logits[0]):
        return "a sample's logits change with the text of the sample before it"
    if not same(logits[0], alone):
        return "a sample's logits are others than without packing"
    return None


def check_packing(llm: PreTrainedModel) -> None:
    """Raises ValueError where the samples of a packed row do not stay apart in this LLM."""
    leak = packing_leak(llm)
    if leak:
        raise ValueError(
            f"{type(llm).__name__} cannot take packed rows: {leak}; set data.pack_to=null"
        )
