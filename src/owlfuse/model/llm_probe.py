"""Probes of an LLM on a tiny copy of it: how its layers make keys, and whether packed rows are
independent.

The copy has the LLM's class, configuration and number of layers, other widths and random weights.
It takes a tenth of a second to build, and needs neither the LLM's weights nor its memory, so that
it works for an LLM on the meta device or sharded over ranks. Results are cached by configuration.

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

from owlfuse.model.layouts import decoder_layers, module_at
from owlfuse.model.llm import (
    FAILURES,
    KeyPath,
    first_line,
    layer_type_of,
    rotary,
    shared_field,
)

HEADS, GROUPS, HEAD_WIDTH, VOCABULARY = 4, 2, 16, 64
TOLERANCE = 1e-3
"""Of the largest number, between two ways to compute the same in float32 over many random
layers."""
KEY_NORMS = ("k_norm", "key_layernorm", "k_layernorm")
CANDIDATES = [
    KeyPath(norm, norm_over, rotation)
    for norm in (None, *KEY_NORMS)
    for norm_over in ("heads", "width", "rotated")
    for rotation in ("whole", "part", "none")
    if norm is not None or norm_over == "heads"
]
"""How keys may come from the key projection; the first that gives a layer's own keys is used."""

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
        # float32 and no dropout, so that differences are no noise
        tiny = type(llm)(tiny_config(llm.config)).float().eval()
        decoder_layers(tiny)
    except FAILURES as error:
        raise ValueError(
            f"{type(llm).__name__} cannot be tried at a small width: {first_line(error)}"
        ) from error
    randomize(tiny)
    return tiny


def tiny_config(config: Any) -> PreTrainedConfig:
    """Returns the configuration with small widths; fields of single layers, positions, norms and
    experts stay.
    """
    # the LLM keeps its own
    tiny = copy.deepcopy(config)
    groups = shared_field(config, "num_key_value_heads")
    grouped = groups not in (None, shared_field(config, "num_attention_heads"))
    widths = {
        "hidden_size": HEADS * HEAD_WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS if grouped else HEADS,
        "head_dim": HEAD_WIDTH,
    }
    # vars, not getattr, which configurations with keys of single layers refuse
    for name, value in vars(config).items():
        if not isinstance(value, int):
            continue
        if name.startswith("vocab_size"):  # Gemma 4 has several
            setattr(tiny, name, VOCABULARY)
        elif name.endswith("intermediate_size") and not isinstance(value, bool):
            setattr(tiny, name, 32)
        elif name in widths:
            setattr(tiny, name, widths[name])
    if isinstance(config.pad_token_id, int):  # the embedding's table has to hold it
        tiny.pad_token_id = 0
    cut_rotary_factors(tiny)
    tiny._attn_implementation = "sdpa"  # an attached fusion has its own
    tiny.use_cache = False
    return tiny


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
    layers: list[Any] = list(decoder_layers(llm))
    for name in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj"):
        if any(module_at(layer, name) is None for layer in layers):
            return [f"not all its decoder layers have {name}, as Llama's have"] * len(layers)
    if not all(isinstance(layer.self_attn.k_proj, nn.Linear) for layer in layers):
        return ["its key projection is no plain linear layer"] * len(layers)
    for layer in layers:  # so large that a limit of keys and values shows, as olmoe may have
        layer.self_attn.k_proj.weight.mul_(10)
        layer.self_attn.v_proj.weight.mul_(10)
    # not from 0, where a rotation does nothing
    position_ids = torch.arange(2, 9)[None]
    ids = torch.arange(10, 17)[None]
    with record_inputs(llm) as recorded:
        try:
            llm(input_ids=ids, position_ids=position_ids, visual="visual", use_cache=False)
        except FAILURES as error:
            reason = f"its forward fails with a further keyword argument ({first_line(error)})"
            return [reason] * len(layers)
    paths = []
    for index, layer in enumerate(layers):
        paths.append(key_path(llm, index, layer, recorded, position_ids))
    return paths


class RecordedInputs(NamedTuple):
    """The inputs of decoder layers and of their attention, by layer."""

    layers: dict[int, Tensor]
    """(B, T, D) of the layer."""
    attentions: dict[int, Tensor]
    """(B, T, D) of its attention."""
    calls: dict[int, list[Call]]


@contextmanager
def record_inputs(llm: PreTrainedModel) -> Iterator[RecordedInputs]:
    """Records the inputs of the LLM's layers and their attention inside the block."""
    recorded = RecordedInputs({}, {}, {})
    layers: list[Any] = list(decoder_layers(llm))
    # by identity: layer_idx may be wrong or missing in modelling files
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
        calls = recorded.calls.setdefault(index_of.get(id(module), -1), [])
        calls.append(Call(key, value, arguments))
        options = {name: value for name, value in arguments.items() if name != "visual"}
        return plain(module, query, key, value, attention_mask, **options)

    def record(inputs: dict[int, Tensor], index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    name = "owlfuse_probe"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    llm.set_attn_implementation(name)
    handles = []
    for index, layer in enumerate(layers):
        for module, inputs in (
            (layer, recorded.layers),
            (layer.self_attn, recorded.attentions),
        ):
            hook = record(inputs, index)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def key_path(
    llm: PreTrainedModel,
    index: int,
    layer: Any,
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
    call, attention = calls[0], layer.self_attn
    if "visual" not in call.arguments:
        return (
            "its decoder layers hand no keyword arguments to the attention, so that pictures "
            "do not reach it"
        )
    normed = recorded.attentions[index]
    if not same(layer.input_layernorm(recorded.layers[index]), normed):
        return "its attention reads something else than what input_layernorm gives"
    heads = (-1, attention.head_dim)
    projected_key = attention.k_proj(normed).unflatten(-1, heads)
    projected_value = attention.v_proj(normed).unflatten(-1, heads)
    # olmoe clips its values
    if not same(projected_value.transpose(1, 2), call.value):
        return "its attention changes the values after v_proj"
    for candidate in CANDIDATES:
        path = candidate._replace(layer_type=layer_type_of(llm, index))
        try:
            turn = None
            if path.rotation != "none":
                turn = rotary(llm, normed, position_ids, path.layer_type)
            key = path.keys(attention, projected_key, turn)
        except FAILURES:  # a candidate with a module that this attention lacks
            continue
        if same(key, call.key):
            return path
    return "its keys are more than k_proj, a key norm and the rotary embedding"


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
    """Raises ValueError where the samples of a packed row are not independent in this LLM."""
    leak = packing_leak(llm)
    if leak:
        raise ValueError(
            f"{type(llm).__name__} cannot take packed rows: {leak}; set data.pack_to=null"
        )
