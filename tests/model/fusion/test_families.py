"""What fusions and packing promise, for many families of LLMs; the expectations come from the
LLMs' own forward passes."""

from functools import wraps

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import (
    FAMILIES,
    MORE_FAMILIES,
    NO_HYPERATTENTION,
    NO_PACKING,
    SMALL,
    fields_of,
    small_fields,
)
from helpers import (
    FUSIONS,
    HYPERATTENTION,
    IMAGE,
    VOCAB,
    fused_llm,
    make_batch,
    model_node,
    plain_llm,
    policy,
    visual_tokens,
    yaml_nodes,
)
from owlfuse.core.types import Encoded
from owlfuse.data.collate import Collator
from owlfuse.model.connectors.base import Connector
from owlfuse.model.fusion.base import Fusion, splice
from owlfuse.model.fusion.concat import Concat
from owlfuse.model.fusion.probe import check_fusion
from owlfuse.model.layouts import decoder_layers
from owlfuse.model.llm import cache_argument, load_llm, rotary
from owlfuse.model.llm_probe import (
    check_cache,
    check_packing,
    key_paths,
    plain_cpu,
    tiny_copy,
)
from owlfuse.model.multimodal import MultimodalLM, build_model, make_part
from owlfuse.model.vision.base import Backbone

TOKENS = 3
EVERY_LAYER = {"_target_": HYPERATTENTION, "layers": [0, 1, 2, 3], "gate": "adaptive"}
KINDS = {
    "concat": FUSIONS["concat"],
    "modality_adaptive": FUSIONS["modality_adaptive"],
    "hyperattention": EVERY_LAYER,
}
ALL = {**FAMILIES, **NO_PACKING, **MORE_FAMILIES}


def cases(families, slow):
    """The first families in the fast part, `slow` marked as such."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in families
    ]


family = pytest.mark.parametrize("name", cases(ALL, MORE_FAMILIES))
every_kind = pytest.mark.parametrize("kind", KINDS)


@family
@every_kind
@torch.no_grad()
@pytest.mark.fast_cases(15)
def test_pictures_change_what_comes_behind_them_alone_and_text_rows_are_the_plain_ones(name, kind):
    fields = fields_of(name, **ALL[name])
    model = fused_llm(KINDS[kind], fields, TOKENS)
    rows = [[11, 12, IMAGE, 13, IMAGE, 14, 15], [21, 22, 23, 24]]
    batch = make_batch(rows, model.fusion.tokens_per_image)
    tokens = torch.randn(2, TOKENS, 64)
    before = model(batch, visual_tokens(batch, tokens))
    after = model(batch, visual_tokens(batch, torch.stack([tokens[0], -tokens[1]])))
    second = int(batch.image_positions[0, 1])
    torch.testing.assert_close(after[0, :second], before[0, :second], rtol=1e-4, atol=1e-4)
    assert (after[0, -1] - before[0, -1]).abs().max() > 1e-3
    plain = plain_llm(model, fields)(
        input_ids=torch.tensor([rows[1]]), attention_mask=torch.ones(1, 4)
    ).logits[0]
    torch.testing.assert_close(before[1, :4], plain, rtol=1e-3, atol=1e-3)


@family
@torch.no_grad()
def test_visual_keys_are_the_text_keys_of_the_same_state_at_the_same_position(name):
    model = fused_llm(EVERY_LAYER, fields_of(name, **ALL[name]), TOKENS)
    llm, states, keys = model.llm, {}, {}
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def note(module, query, key, value, attention_mask, **arguments):
        keys[module.layer_idx] = key
        return plain(module, query, key, value, attention_mask, **arguments)

    ALL_ATTENTION_FUNCTIONS.register("test_families", note)
    llm.set_attn_implementation("test_families")
    for index, layer in enumerate(decoder_layers(llm)):
        keep = lambda module, args, kwargs, index=index: states.update(  # noqa: E731
            {index: args[0] if args else kwargs["hidden_states"]}
        )
        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    llm(
        input_ids=torch.tensor([[11, 12, 13, 14, 15, 16]]),
        attention_mask=torch.ones(1, 6, dtype=torch.long),
    )
    for index, layer in enumerate(decoder_layers(llm)):
        visual = layer.self_attn.visual
        path = visual.key_path
        turn = (
            ()
            if path.rotation == "none"
            else rotary(llm, states[index], torch.arange(6)[None], path.layer_type)
        )
        key, _ = visual.keys_values(states[index], layer.self_attn, *turn)
        torch.testing.assert_close(key, keys[index], rtol=1e-4, atol=1e-4)


@family
@every_kind
@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_row(name, kind):
    model = fused_llm(KINDS[kind], fields_of(name, **ALL[name]), TOKENS)
    whole = make_batch([[11, 12, IMAGE, 13, 14, 15]], model.fusion.tokens_per_image)
    visual = visual_tokens(whole, torch.randn(1, TOKENS, 64))
    expected = model(whole, visual)[0, -1]
    cache = DynamicCache(config=model.llm.config)
    visual.kv_cache = {}
    first = make_batch([[11, 12, IMAGE, 13, 14]], model.fusion.tokens_per_image)
    model(first, visual, cache)
    step = make_batch([[11, 12, IMAGE, 13, 14, 15]], model.fusion.tokens_per_image)
    step.input_ids, step.placeholder = step.input_ids[:, -1:], step.placeholder[:, -1:]
    assert cache_argument(model.llm) in ("cache", "past_key_values")
    torch.testing.assert_close(model(step, visual, cache)[0, -1], expected, rtol=1e-3, atol=1e-3)


def encoded(ids):
    ids = torch.tensor(ids)
    return Encoded("sample", "source", ids, ids, torch.zeros(len(ids), dtype=torch.bool), [], [])


@family
@torch.no_grad()
def test_packed_samples_have_their_own_logits_or_are_refused(name):
    model = fused_llm(KINDS["concat"], fields_of(name, **ALL[name]), TOKENS)
    second = [21, 22, 23, 24, 25]
    batch = Collator(0, (3, 2, 2), pack_to=64)([encoded([11, 12, 13, 14]), encoded(second)])
    blank = visual_tokens(batch, torch.zeros(1, TOKENS, 64))
    if name in NO_PACKING:
        with pytest.raises(
            ValueError, match=r"cannot take packed rows.*data\.pack_to=null"
        ) as refusal:
            model(batch, blank)
        assert "\n" not in str(refusal.value)
        return
    alone = model.llm(input_ids=torch.tensor([second]), attention_mask=torch.ones(1, 5)).logits[0]
    torch.testing.assert_close(
        model(batch, blank)[0][batch.segment_ids[0] == 2], alone, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", NO_HYPERATTENTION)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_hyperattention_refuses_an_llm_that_it_cannot_serve_with_its_class_and_the_reason(
    name, device
):
    fields, reason = NO_HYPERATTENTION[name]
    with torch.device(device):
        llm = load_llm(VOCAB, config=fields_of(name, **fields))
        with pytest.raises(ValueError, match=reason) as refusal:
            MultimodalLM(Backbone(), Connector(), fusion_of("hyperattention"), llm)
    assert type(llm).__name__ in str(refusal.value)
    assert "\n" not in str(refusal.value)
    MultimodalLM(
        Backbone(),
        Connector(),
        fusion_of("concat"),
        load_llm(VOCAB, config=fields_of(name, **fields)),
    )


def fusion_of(kind) -> Fusion:
    return make_part("fusion", {"fusion": KINDS[kind]}, connector_tokens=TOKENS)


class Blind(Fusion):
    """Shows no picture."""

    def __init__(self, connector_tokens=1):
        super().__init__()
        self.tokens_per_image = connector_tokens

    def forward(self, embeddings, visual, batch, position_ids, llm):
        return embeddings, {}


class Leaking(Blind):
    """Shows every text the last picture."""

    def forward(self, embeddings, visual, batch, position_ids, llm):
        last = (visual.image_index >= 0).any(1)[:, None, None] * visual.tokens[-1].mean(0)
        return splice(embeddings, visual, batch) + last, {}


class TextChanging(Blind):
    """Changes rows without a picture."""

    def forward(self, embeddings, visual, batch, position_ids, llm):
        return splice(embeddings, visual, batch) * 1.5, {}


class Failing(Blind):
    """Does not run."""

    def forward(self, embeddings, visual, batch, position_ids, llm):
        return splice(embeddings, visual, batch)[..., :5], {}


@pytest.mark.parametrize(
    ("fusion", "reason"),
    [
        (Blind(), "pictures do not change the logits"),
        (Leaking(), "a picture changes logits of the text before it"),
        (TextChanging(), "a row without pictures, padded on the right, has other logits"),
        (Failing(), "a forward pass with a picture fails"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Fusion) else "",
)
def test_a_fusion_that_breaks_a_promise_is_refused(fusion, reason):
    with pytest.raises(
        ValueError, match=f"{type(fusion).__name__} does not work with LlamaForCausalLM: {reason}"
    ):
        check_fusion(fusion, load_llm(VOCAB, config=fields_of("llama")))


class Drifting(LlamaForCausalLM):
    """Has other logits with a cache than without."""

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if cache := kwargs.get(cache_argument(self)):
            output.logits[..., 0] += cache.get_seq_length()
        return output


def test_an_llm_that_cannot_go_on_from_a_cache_is_refused():
    config = CONFIG_MAPPING["llama"](**SMALL, vocab_size=VOCAB)
    check_cache(LlamaForCausalLM(config))
    with pytest.raises(ValueError, match="Drifting .* could not answer: with it the logits are"):
        check_fusion(fusion_of("concat"), Drifting(config))
    mamba = load_llm(VOCAB, config=small_fields("mamba"))
    with pytest.raises(ValueError, match="MambaForCausalLM .* could not answer: ValueError"):
        check_cache(mamba)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bamba", {"mamba_n_heads": 16, "mamba_d_head": 8}),
        ("falcon_h1", {"mamba_n_heads": 16, "mamba_d_head": 8}),
        ("granitemoehybrid", {"mamba_n_heads": 16, "mamba_d_head": 8}),
        ("mamba2", {"num_heads": 8, "head_dim": 16}),
        ("zamba", {"num_attention_heads": 8, "num_key_value_heads": 8, "attention_head_dim": 16}),
        ("zamba2", {"n_mamba_heads": 4, "num_attention_heads": 8, "num_key_value_heads": 8}),
    ],
)
@torch.no_grad()
def test_a_tiny_copy_of_an_llm_with_state_spaces_computes_whatever_its_heads(name, heads):
    with torch.device("meta"):
        llm = load_llm(VOCAB, config={**small_fields(name), **heads})
    with plain_cpu():
        logits = tiny_copy(llm)(input_ids=torch.arange(10, 15)[None], use_cache=False).logits
    assert torch.isfinite(logits).all()


def test_a_tiny_copy_that_would_take_gigabytes_is_refused(monkeypatch):
    """Widths of experts that have an unknown name stay as they are."""
    monkeypatch.setattr("owlfuse.model.llm_probe.LARGE", 0)
    monkeypatch.setattr("owlfuse.model.llm_probe.MAX_NUMBERS", 1000)
    llm = load_llm(VOCAB, config=small_fields("llama"))
    with pytest.raises(ValueError, match=r"small width: .*its copy would have \d+,\d+ numbers"):
        tiny_copy(llm)


def test_a_fusion_in_layers_that_are_not_computed_is_refused():
    fields = small_fields("mllama")
    fields["text_config"]["cross_attention_layers"] = [1]
    node = {**yaml_nodes("fusion")["cross_attention"], "layers": [0, 1]}
    fusion = make_part("fusion", {"fusion": node}, connector_tokens=TOKENS)
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"its layers \[1\] are not computed"),
    ):
        check_fusion(fusion, load_llm(VOCAB, config=fields))


@pytest.mark.parametrize(
    ("family", "fields", "name"),
    [
        ("deepseek_v32", {"index_topk": 2048}, "concat-bidirectional"),
        ("hy_v4", {}, "concat-bidirectional"),
        ("minimax_m3_vl_text", {"layer_types": ["minimax_m3_sparse"] * 4}, "concat"),
        ("minimax_m3_vl_text", {"layer_types": ["minimax_m3_sparse"] * 4}, "hyperattention"),
    ],
)
def test_attention_that_chooses_keys_is_refused_where_the_choice_would_be_lost(
    family, fields, name
):
    """transformers applies it under the names eager and sdpa alone, and MiniMax's not by positions;
    rows of a probe are shorter than what is chosen."""
    fusion = fusion_of("concat")
    if name == "concat-bidirectional":
        fusion = Concat(TOKENS, attention="bidirectional")
    with torch.device("meta"):
        llm = load_llm(VOCAB, config={**small_fields(family), **fields})
        with pytest.raises(ValueError, match="(padded on the|cannot make visual keys)"):
            check_fusion(fusion, llm)


def test_packed_rows_longer_than_a_length_from_which_places_count_are_refused():
    with torch.device("meta"):
        llm = load_llm(VOCAB, config={**small_fields("llama4_text"), "floor_scale": 64})
        check_packing(llm, 64)
        with pytest.raises(ValueError, match=r"cannot take packed rows: .* from 64 \(floor_scale"):
            check_packing(llm, 65)


def test_a_tower_that_texts_do_not_pass_is_not_trained():
    with torch.device("meta"):
        model, _ = build_model(
            model_node(llm=small_fields("gemma3"), adapter={"llm": policy("Full")}), VOCAB
        )
    trained = {name for name, p in model.llm.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if "vision_tower" in name or "projector" in name]
    with torch.device("meta"):
        model, _ = build_model(
            model_node(llm=small_fields("gemma3"), adapter={"llm": policy("LoRA", r=2)}), VOCAB
        )
    updates = [name for name, _ in model.llm.named_parameters() if "lora_" in name]
    assert updates
    assert not [name for name in updates if "vision_tower" in name]


def test_a_probe_leaves_random_numbers_the_llm_and_the_device_as_they_are():
    llm = load_llm(VOCAB, config=fields_of("qwen3", attention_dropout=0.1))
    weights = {name: value.clone() for name, value in llm.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.device("meta"):
        check_fusion(fusion_of("modality_adaptive"), llm)
        check_packing(llm, 10)
        key_paths(llm)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, weights[name]) for name, value in llm.state_dict().items())
    assert llm.config.hidden_size == 64
    assert llm.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIG_MAPPING))
def test_every_llm_of_transformers_with_its_usual_size_is_served_or_refused_in_one_line(name):
    """Of the configuration alone, as a run checks it before weights are loaded."""
    # built once, since the largest take seconds
    try:
        with torch.device("meta"):
            llm = load_llm(64, config={"model_type": name})
        check_fusion(fusion_of("concat"), llm)
        check_fusion(fusion_of("hyperattention"), llm)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    with plain_cpu():
        assert len(decoder_layers(tiny_copy(llm))) == len(decoder_layers(llm))
