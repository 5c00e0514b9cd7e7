"""What holds for every fusion, those of every yaml included."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from helpers import (
    FUSIONS,
    IMAGE,
    ROWS,
    VOCAB,
    all_fusions,
    alone,
    each,
    fused_llm,
    fusion_parameters,
    gradients,
    images_of,
    llm_fields,
    loss_of,
    make_batch,
    make_model,
    of_row,
    perturb,
    plain_llm,
    policy,
    visual_tokens,
)
from owlfuse.model.fusion.cross_attention import CrossAttentionBlock
from owlfuse.model.fusion.hyperattention import VisualAttention
from owlfuse.model.layouts import decoder_layers
from owlfuse.model.llm import load_llm
from owlfuse.model.multimodal import make_part

TOKENS = 3
TEXT_ONLY = [[11, 12, 13, 14, 15], [21, 22, 23]]
LLMS = {"llama": llm_fields("llama"), "qwen3": llm_fields("qwen3", head_dim=16)}
is_hyperattention = {
    name for name, node in all_fusions().items() if "HyperAttention" in node["_target_"]
}
HYPERATTENTIONS = {name: node for name, node in all_fusions().items() if name in is_hyperattention}
FROM_COPIES = {
    name: node for name, node in all_fusions().items() if "ModalityAdaptive" in node["_target_"]
}


def random_tokens(batch, width=32):
    return torch.randn(len(batch.pixel_values), TOKENS, width)


def plain_logits(plain, batch):
    """The plain LLM's logits of a batch; what a placeholder holds is its own embedding."""
    position_ids = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
    return plain(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=position_ids
    ).logits


# Without images


@each(HYPERATTENTIONS)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("llm", LLMS)
def test_without_images_hyperattention_gives_exactly_the_plain_logits(node, left, llm):
    model = fused_llm(node, LLMS[llm], TOKENS)
    perturb(fusion_parameters(model).values())
    batch = make_batch(TEXT_ONLY, left=left)
    got = model(batch, visual_tokens(batch, random_tokens(batch)))
    expected = plain_logits(plain_llm(model, LLMS[llm]), batch)
    assert torch.equal(got, expected)


@each(all_fusions())
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_without_images_the_logits_are_the_plain_ones_at_initialisation(node, left):
    model = fused_llm(node, LLMS["qwen3"], TOKENS)
    batch = make_batch(TEXT_ONLY, left=left)
    got = model(batch, visual_tokens(batch, torch.zeros(1, TOKENS, 32)))
    torch.testing.assert_close(
        got, plain_logits(plain_llm(model, LLMS["qwen3"]), batch), rtol=0, atol=0
    )


@each(all_fusions())
def test_without_images_the_visual_parameters_do_not_matter(node):
    model = fused_llm(node, LLMS["llama"], TOKENS)
    batch = make_batch(TEXT_ONLY)
    before = model(batch, visual_tokens(batch, random_tokens(batch)))
    perturb(fusion_parameters(model).values())
    after = model(batch, visual_tokens(batch, random_tokens(batch)))
    assert torch.equal(before, after)


# What sees what


@each(HYPERATTENTIONS)
@pytest.mark.parametrize("llm", LLMS)
def test_a_token_that_sees_no_image_keeps_its_self_attention_exactly(node, llm):
    model = fused_llm(node, LLMS[llm], TOKENS)
    perturb(fusion_parameters(model).values())
    batch = make_batch([[11, 12, 13, IMAGE, 14], [21, IMAGE, 22, 23, 24], [31, 32, 33, 34, 35]])
    got = model(batch, visual_tokens(batch, random_tokens(batch)))
    expected = plain_logits(plain_llm(model, LLMS[llm]), batch)
    for row, first in ((0, 3), (1, 1), (2, 5)):
        assert torch.equal(got[row, :first], expected[row, :first])
        assert ((got[row, first:] - expected[row, first:]).abs().amax(-1) > 1e-4).all()


@each(all_fusions())
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_an_image_changes_its_placeholder_and_what_follows_and_nothing_before(node, left):
    model = fused_llm(node, LLMS["llama"], TOKENS)
    perturb(fusion_parameters(model).values())
    batch = make_batch(
        [[11, 12, IMAGE, 13, 14, IMAGE, 15], [21, 22]], model.fusion.tokens_per_image, left
    )
    tokens = random_tokens(batch)
    before = model(batch, visual_tokens(batch, tokens))
    changed = tokens.clone()
    changed[1] = torch.randn_like(changed[1])
    after = model(batch, visual_tokens(batch, changed))
    start = batch.image_positions[0, 1].item()
    assert torch.equal(before[0, :start], after[0, :start])
    assert ((before[0, start:] - after[0, start:]).abs().amax(-1) > 1e-4).all()
    assert torch.equal(of_row(before, batch, 1), of_row(after, batch, 1))


@each(all_fusions())
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.fast_cases(11)
def test_each_row_of_a_mixed_batch_has_the_logits_it_has_alone(node, left, window):
    model = fused_llm(node, llm_fields("mistral", sliding_window=window), TOKENS)
    perturb(fusion_parameters(model).values())
    per_image = model.fusion.tokens_per_image
    batch = make_batch(ROWS, per_image, left)
    tokens = random_tokens(batch)
    together = model(batch, visual_tokens(batch, tokens))
    for row in range(len(ROWS)):
        single = alone(batch, row, ROWS, per_image)
        own = tokens[images_of(batch, row)] if single.has_images else tokens[:1] * 0
        by_itself = model(single, visual_tokens(single, own))[0]
        torch.testing.assert_close(of_row(together, batch, row), by_itself, rtol=1e-5, atol=1e-5)


def test_attaching_leaves_every_other_llm_as_it_was():
    plain = load_llm(VOCAB, config=LLMS["llama"]).eval()
    batch = make_batch(TEXT_ONLY)
    before = plain_logits(plain, batch)
    for node in FUSIONS.values():
        fused_llm(node, LLMS["llama"], TOKENS)
    assert torch.equal(plain_logits(plain, batch), before)
    assert plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layers", [[], [0, 3], [-1], [1, 1]])
def test_layers_that_the_llm_does_not_have_are_an_error_that_says_how_many_it_has(layers):
    node = {**FUSIONS["hyperattention-fused"], "layers": layers}
    with pytest.raises(ValueError, match="3 layers, 0 to 2"):
        fused_llm(node, LLMS["llama"], TOKENS)


def test_hyperattention_refuses_flash_attention():
    llm = load_llm(VOCAB, config=LLMS["llama"])
    # the setter wants the package of its kernel
    llm.config._attn_implementation = "flash_attention_2"
    node = FUSIONS["hyperattention-fused"]
    fusion = make_part("fusion", {"fusion": node}, connector_tokens=TOKENS)
    with pytest.raises(ValueError, match=r"needs masks.*set model\.llm\.attention=sdpa"):
        fusion.attach(llm)


# Where the visual parameters start


@each(HYPERATTENTIONS)
@pytest.mark.parametrize(
    "fields",
    [
        llm_fields("llama"),
        llm_fields("qwen2", num_key_value_heads=4, head_dim=16),
        llm_fields("llama", attention_bias=True, num_key_value_heads=1),
    ],
    ids=["2-heads", "4-heads-biases", "1-head-biases"],
)
def test_the_visual_projection_starts_from_the_llms_per_head_key_then_value(node, fields):
    llm = load_llm(VOCAB, config=fields)
    perturb(llm.parameters())  # random biases start at zero
    make_part("fusion", {"fusion": node}, connector_tokens=TOKENS).attach(llm)
    heads, d = fields["num_key_value_heads"], fields["head_dim"]
    found = [layer.self_attn for layer in decoder_layers(llm) if hasattr(layer.self_attn, "visual")]
    assert len(found) == len(node["layers"])
    for attention in found:
        for kind in ("weight", "bias"):
            joint, key, value = (
                getattr(x, kind)
                for x in (attention.visual.kv_proj, attention.k_proj, attention.v_proj)
            )
            assert (joint is None) == (key is None)
            for k in range(heads if key is not None else 0):
                assert torch.equal(joint[2 * d * k : 2 * d * k + d], key[d * k : d * (k + 1)])
                assert torch.equal(
                    joint[2 * d * k + d : 2 * d * (k + 1)], value[d * k : d * (k + 1)]
                )


@each(FROM_COPIES)
def test_the_visual_copies_start_from_the_text_and_are_their_own(node):
    model = fused_llm(node, llm_fields("qwen2"), TOKENS)
    copies = {name: p for name, p in model.llm.named_parameters() if ".vision." in name}
    # per layer two norms, and two projections with biases
    count = 2 + 2 * 2
    if "copies" in node and len(node["copies"]) == 6:
        # a query with a bias, an output without, and an MLP of three projections
        count += 2 + 1 + 3
    assert len(copies) == 3 * count
    parameters = dict(model.llm.named_parameters())
    for name, copied in copies.items():
        text = parameters[name.replace(".vision.", ".text.")]
        assert torch.equal(copied, text)
        assert copied.data_ptr() != text.data_ptr()


@each(all_fusions())
@pytest.mark.fast_cases(4)
def test_weights_from_a_folder_are_those_the_fusion_starts_from(node, tmp_path):
    saved = load_llm(VOCAB, config=LLMS["qwen3"]).eval()
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = make_model(node, pretrained=str(tmp_path))
    batch = make_batch(TEXT_ONLY)
    torch.testing.assert_close(model(batch), plain_logits(saved, batch), rtol=0, atol=0)
    weights = saved.state_dict()
    for name, parameter in fusion_parameters(model).items():
        if name.endswith("kv_proj.weight"):
            key, value = (
                weights[name.replace("visual.kv_proj", kind)].unflatten(0, (2, 16))
                for kind in ("k_proj", "v_proj")
            )
            assert torch.equal(parameter, torch.stack([key, value], dim=1).flatten(0, 2))
        elif ".vision." in name:
            assert torch.equal(parameter, weights[name.replace(".vision.", ".")])


# Training


ADAPTERS = {
    "full": {},
    "lora": {
        "vision": policy("LoRA", r=2),
        "connector": policy("LoRA"),
        "fusion": policy("LoRA"),
        "llm": policy("LoRA"),
    },
    "last_n": {"vision": policy("LastN", n=1), "llm": policy("LastN", n=1)},
    "frozen": {"vision": policy("Frozen"), "fusion": policy("Frozen"), "llm": policy("Frozen")},
    "lora-beside-full": {"vision": policy("Frozen"), "llm": policy("LoRA")},
}


@each(all_fusions())
@pytest.mark.parametrize("rows", [ROWS, TEXT_ONLY], ids=["images", "no images"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.fast_cases(22)
def test_every_trained_parameter_has_a_finite_gradient_in_every_batch(node, rows, adapter):
    model = make_model(node, adapter=ADAPTERS[adapter]).train()
    batch = make_batch(rows, model.fusion.tokens_per_image)
    found = gradients(model, loss_of(model(batch), batch))
    assert found
    assert [name for name, gradient in found.items() if gradient is None] == []
    assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == []


@each(all_fusions())
@pytest.mark.parametrize("rows", [ROWS, TEXT_ONLY], ids=["images", "no images"])
@pytest.mark.fast_cases(6)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(node, rows):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_model(node, gradient_checkpointing=checkpointing).train()
        assert model.llm.is_gradient_checkpointing == checkpointing
        perturb(fusion_parameters(model).values())
        batch = make_batch(rows, model.fusion.tokens_per_image)
        loss = loss_of(model(batch), batch)
        results.append((loss, gradients(model, loss)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(
            results[1][1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@each(all_fusions())
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.fast_cases(6)
def test_two_forwards_before_one_backward_give_the_sum_of_their_gradients(node, checkpointing):
    model = make_model(node, gradient_checkpointing=checkpointing).train()
    perturb(fusion_parameters(model).values())
    batches = [
        make_batch(rows, model.fusion.tokens_per_image) for rows in (ROWS, TEXT_ONLY, ROWS[:1])
    ]
    separate = [gradients(model, loss_of(model(batch), batch)) for batch in batches]
    together = gradients(model, sum(loss_of(model(batch), batch) for batch in batches))
    for name, gradient in together.items():
        expected = sum(found[name] for found in separate)
        torch.testing.assert_close(
            gradient, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@each(all_fusions())
def test_bfloat16_autocast_is_near_float32(node):
    model = make_model(node, llm=llm_fields("qwen3", initializer_range=0.1)).train()
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch)
        loss = loss_of(logits, batch)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(
        logits.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item()
    )
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


# Generation


def prefix(batch, length):
    """The first `length` positions of a batch."""
    cut = {
        name: getattr(batch, name)[:, :length]
        for name in ("input_ids", "attention_mask", "labels", "placeholder")
    }
    return dataclasses.replace(batch, **cut)


def next_step(batch, tokens):
    """The batch of a decoding step: the new tokens (B, 1), and the mask of everything so far."""
    one = torch.ones_like(tokens)
    return dataclasses.replace(
        batch,
        input_ids=tokens,
        attention_mask=torch.cat([batch.attention_mask, one], dim=1),
        placeholder=torch.zeros_like(tokens, dtype=torch.bool),
        labels=one * -100,
    )


@each(all_fusions())
@pytest.mark.parametrize(
    ("left", "window"),
    [(False, None), (True, None), (True, 4)],
    ids=["right", "left", "left-window"],
)
@pytest.mark.parametrize("prompts", [ROWS, TEXT_ONLY], ids=["images", "no images"])
@torch.no_grad()
@pytest.mark.fast_cases(14)
def test_cached_steps_give_the_logits_of_whole_rows_and_project_the_images_once(
    node, left, window, prompts, monkeypatch
):
    model = make_model(node, llm=llm_fields("mistral", sliding_window=window))
    perturb(fusion_parameters(model).values())
    per_image = model.fusion.tokens_per_image
    answers = torch.randint(10, VOCAB, (len(prompts), 4))
    calls = []
    projection = VisualAttention.keys_values
    monkeypatch.setattr(
        VisualAttention,
        "keys_values",
        lambda self, *args: calls.append(self) or projection(self, *args),
    )
    for block in model.fusion.owned(model.llm):
        if isinstance(block, CrossAttentionBlock):
            block.k_proj.register_forward_hook(lambda module, args, out: calls.append(module))

    batch = make_batch(prompts, per_image, left)
    visual = model.encode(batch)
    visual.kv_cache = {}
    cache = DynamicCache(config=model.llm.config)
    prompt_logits = model(batch, visual, cache)
    steps, step = [], batch
    for k in range(answers.shape[1]):
        step = next_step(step, answers[:, k : k + 1])
        steps.append(model(step, visual, cache)[:, 0])
    assert len(calls) == len(node.get("layers", []))

    for row, prompt in enumerate(prompts):
        whole = alone(batch, 0, [[*prompt, *answers[row].tolist()]], per_image)
        if whole.has_images:
            whole.pixel_values = batch.pixel_values[images_of(batch, row)]
        expected = model(whole)[0]
        got = torch.cat([of_row(prompt_logits, batch, row), torch.stack([s[row] for s in steps])])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@each(all_fusions())
@pytest.mark.parametrize("cut", [1, 3, 5])
@torch.no_grad()
@pytest.mark.fast_cases(8)
def test_a_prompt_given_in_two_pieces_has_the_logits_of_the_whole(node, cut):
    """The second piece's tokens see the images of the first, whose keys were kept."""
    model = make_model(node)
    perturb(fusion_parameters(model).values())
    per_image = model.fusion.tokens_per_image
    batch = make_batch(
        [[IMAGE, 11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26, 27]], per_image, left=True
    )
    expected = model(batch)
    visual = model.encode(batch)
    visual.kv_cache = {}
    cache = DynamicCache(config=model.llm.config)
    length = cut + per_image
    first = model(prefix(batch, length), visual, cache)
    rest = dataclasses.replace(
        batch,
        input_ids=batch.input_ids[:, length:],
        placeholder=batch.placeholder[:, length:],
        labels=batch.labels[:, length:],
    )
    second = model(rest, visual, cache)
    for row in range(2):
        torch.testing.assert_close(
            of_row(torch.cat([first, second], dim=1), batch, row),
            of_row(expected, batch, row),
            rtol=1e-4,
            atol=2e-5,
        )


@torch.no_grad()
def test_a_model_saved_by_transformers_gives_the_same_logits_as_before(tmp_path):
    saved = load_llm(VOCAB, config=LLMS["llama"]).eval()
    saved.save_pretrained(tmp_path)
    batch = make_batch(TEXT_ONLY)
    loaded = copy.deepcopy(load_llm(VOCAB, pretrained=str(tmp_path))).eval()
    assert torch.equal(plain_logits(loaded, batch), plain_logits(saved, batch))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(plain_logits(loaded, batch), plain_logits(theirs, batch))


def test_hyperattention_refuses_to_run_blind_under_another_attention():
    model = make_model("hyperattention-adaptive")
    batch = make_batch(ROWS)
    model(batch)
    model.llm.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="no longer the LLM's attention, which is eager"):
        model(batch)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_visual_keys_are_turned_by_the_frequencies_of_the_whole_row(kind):
    short, long = [1.0] * 8, [3.0] * 8
    rope = {
        "longrope": {"short_factor": short, "long_factor": long},
        "dynamic": {"factor": 4.0},
    }[kind]
    fields = llm_fields(
        head_dim=16,
        max_position_embeddings=16 if kind == "dynamic" else 64,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": 100.0,
            "original_max_position_embeddings": 16,
            **rope,
        },
    )
    model = make_model("hyperattention-adaptive", llm=fields)
    batch = make_batch([[11, 12, IMAGE, *range(13, 40)]], model.fusion.tokens_per_image)
    turned = []
    rotary_emb = model.llm.base_model.rotary_emb
    handle = rotary_emb.register_forward_hook(
        lambda module, args, kwargs, output: turned.append((kwargs, args, output)),
        with_kwargs=True,
    )
    model(batch)
    handle.remove()
    by_positions = []
    for kwargs, args, (cos, _) in turned:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        by_positions.append({int(p): row for p, row in zip(positions[0], cos[0], strict=True)})
    image = int(batch.image_positions[0, 0])
    # once for the pictures, once by the LLM itself
    assert len(by_positions) >= 2
    for rows in by_positions[1:]:
        torch.testing.assert_close(rows[image], by_positions[0][image])
