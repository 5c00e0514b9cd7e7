"""backbone -> connector -> fusion -> LLM as one model."""

import dataclasses

import pytest
import torch
from torch import nn

from helpers import (
    CONNECTORS,
    DEEPSTACK,
    FUSIONS,
    LINEAR,
    ROWS,
    VIT,
    VIT_LEVELS,
    VOCAB,
    all_connectors,
    all_fusions,
    each,
    llm_fields,
    loss_of,
    make_batch,
    make_model,
    model_node,
    perturb,
    plain_llm,
    policy,
    visual_tokens,
)
from owlfuse.model.connectors.linear import LinearConnector
from owlfuse.model.multimodal import build_model, on_meta
from owlfuse.model.vision.base import Backbone

TEXT_ONLY = [[11, 12, 13, 14, 15], [21, 22, 23]]
RESNET = {
    "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
    "name": "test_resnet",
    "image_size": 32,
}


def small(node):
    """The node with a width of heads that a backbone of width 16 allows."""
    return {**node, "heads": 4} if "heads" in node else node


# The path of an image


@each(all_connectors())
@pytest.mark.parametrize("fusion", ["concat", "hyperattention-adaptive"])
@pytest.mark.fast_cases(7)
def test_an_image_takes_as_many_placeholders_as_the_fusion_says(node, fusion):
    model = make_model(fusion, connector=small(node))
    expected = 1 if fusion.startswith("hyper") else model.connector.tokens
    assert model.fusion.tokens_per_image == expected
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    visual = model.encode(batch)
    assert visual.tokens.shape == (5, model.connector.tokens, 32)
    assert batch.placeholder.sum() == 5 * expected
    assert model(batch).shape == (*batch.input_ids.shape, VOCAB)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_backbone_runs_once_over_all_images_of_a_batch_and_in_chunks_the_logits_are_the_same(
    chunk,
):
    model = make_model("modality_adaptive", vision={**VIT, "chunk": chunk})
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    whole = model(batch)
    seen = []
    model.vision.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.vision.chunk = None
    torch.testing.assert_close(model(batch), whole, rtol=1e-5, atol=1e-6)
    assert seen == [len(batch.pixel_values)]


def test_visual_tokens_are_the_connector_of_the_backbone_of_each_image():
    model = make_model(connector=CONNECTORS["abstractor"])
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    tokens = model.encode(batch).tokens
    for n in range(5):
        expected = model.connector(model.vision(batch.pixel_values[n : n + 1]))[0]
        torch.testing.assert_close(tokens[n], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_concat_puts_the_k_th_visual_token_at_the_k_th_placeholder():
    model = make_model("concat")
    batch = make_batch(ROWS, model.fusion.tokens_per_image, left=True)
    tokens = torch.randn(5, model.connector.tokens, 32)
    expected = model.llm.get_input_embeddings()(batch.input_ids).clone()
    queue = list(tokens.flatten(0, 1))
    for b, t in batch.placeholder.nonzero().tolist():
        expected[b, t] = queue.pop(0)
    assert not queue
    position_ids = torch.zeros_like(batch.input_ids)
    embeddings = model.llm.get_input_embeddings()(batch.input_ids)
    got, arguments = model.fusion(
        embeddings, visual_tokens(batch, tokens), batch, position_ids, model.llm
    )
    assert torch.equal(got, expected)
    assert arguments == {}


@each(all_fusions())
@torch.no_grad()
def test_visual_tokens_given_are_those_it_would_have_made(node):
    model = make_model(node)
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    given = model.encode(batch)
    batch_without_pixels = dataclasses.replace(
        batch, pixel_values=torch.full_like(batch.pixel_values, torch.nan)
    )
    assert torch.equal(model(batch_without_pixels, given), model(batch))


@each(all_fusions())
@torch.no_grad()
def test_padding_content_and_side_change_no_logit(node):
    model = make_model(node)
    perturb(model.llm.parameters(), 0.05)
    per_image = model.fusion.tokens_per_image
    right, left = make_batch(ROWS, per_image), make_batch(ROWS, per_image, left=True)
    padded = dataclasses.replace(
        right, input_ids=torch.where(right.attention_mask.bool(), right.input_ids, 77)
    )
    for other in (left, padded):
        got, expected = model(other), model(right)
        a, b = got[other.attention_mask.bool()], expected[right.attention_mask.bool()]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Without an image


def vision_for(fusion, vision):
    """Deepstack needs levels of one grid, which the stages of RESNET do not have."""
    return VIT_LEVELS if fusion["_target_"] == DEEPSTACK else vision


@each(all_fusions())
@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.fast_cases(7)
def test_the_blank_image_of_a_batch_without_images_changes_nothing(node, vision):
    """In training mode: logits are those of the LLM alone, whatever the blank image shows."""
    model = make_model(node, vision=vision_for(node, vision)).train()
    batch = make_batch(TEXT_ONLY)
    assert not batch.has_images
    expected = plain_llm(model, llm_fields())(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    ).logits
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    assert torch.equal(model.encode(batch).tokens, torch.zeros(1, model.connector.tokens, 32))
    valid = batch.attention_mask.bool()
    assert torch.equal(model(batch)[valid], expected[valid])
    bright = dataclasses.replace(batch, pixel_values=torch.full_like(batch.pixel_values, 3.0))
    assert torch.equal(model(bright), model(batch))
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())


@each(all_fusions())
def test_the_blank_image_gives_backbone_and_connector_gradients_of_zero(node):
    model = make_model(node, vision=vision_for(node, RESNET)).train()
    batch = make_batch(TEXT_ONLY)
    loss_of(model(batch), batch).backward()
    for name, parameter in [*model.vision.named_parameters(), *model.connector.named_parameters()]:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# Modes


def test_a_frozen_batch_norm_keeps_its_statistics_in_training_and_a_trained_one_does_not():
    frozen = make_model(vision=RESNET, adapter={"vision": policy("Frozen")}).train()
    trained = make_model(vision=RESNET).train()
    batch = make_batch(ROWS, trained.fusion.tokens_per_image)
    for model, moves in ((frozen, False), (trained, True)):
        before = model.vision.body.bn1.running_mean.clone()
        model(batch)
        assert torch.equal(model.vision.body.bn1.running_mean, before) == (not moves)
    assert frozen.llm.training
    assert any(m.training for m in trained.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(m.training for m in trained.eval().modules())


@each(all_fusions())
def test_the_parts_parameters_are_all_of_the_models_each_once(node):
    model = make_model(node)
    found = [
        id(p)
        for name in ("vision", "connector", "fusion", "llm")
        for p in model.part(name).parameters.values()
    ]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}


# On the meta device


@each(all_fusions())
@pytest.mark.parametrize("adapter", ["Full", "LoRA"])
@pytest.mark.fast_cases(7)
def test_on_meta_makes_no_weight_and_gives_the_same_table(node, adapter):
    config = model_node(
        node, adapter=dict.fromkeys(("vision", "connector", "fusion", "llm"), policy(adapter))
    )
    model, summaries = on_meta(config, VOCAB)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert summaries == build_model(config, VOCAB)[1]
    assert torch.get_default_device().type == "cpu"


BAD = {
    "layers the LLM does not have": (
        {"fusion": {**FUSIONS["hyperattention-fused"], "layers": [0, 3]}},
        r"fusion: .*3 layers",
    ),
    "heads that do not divide": (
        {"connector": {**CONNECTORS["abstractor"], "heads": 5}},
        r"connector: heads is 5.*16",
    ),
    "an unknown timm model": ({"vision": {**VIT, "name": "vit_huger"}}, r"vision: .*vit_huger"),
    "wrong timm kwargs": ({"vision": {**VIT, "kwargs": {"wibble": 1}}}, r"vision: .*wibble"),
    "an unknown model type": ({"llm": llm_fields("lama")}, r"llm: .*lama"),
    "a folder that is none": ({"pretrained": "/no/such"}, r"llm: pretrained: /no/such"),
    "an LLM built otherwise": (
        {"llm": {"model_type": "xlm", "emb_dim": 32, "n_heads": 4, "n_layers": 2}},
        r"llm: XLMWithLMHeadModel",
    ),
    "an mlp without layers": (
        {"connector": {**CONNECTORS["mlp"], "depth": 0}},
        r"connector: depth is 0",
    ),
    "more layers than there are": (
        {"adapter": {"llm": policy("LastN", n=7)}},
        r"adapter.llm: n is 7",
    ),
    "nothing to train": (
        {"adapter": dict.fromkeys(("vision", "connector", "fusion", "llm"), policy("Frozen"))},
        r"adapter: every part is frozen",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_on_meta_finds_what_does_not_fit_and_names_the_part_first(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        on_meta(model_node(**arguments), VOCAB)


@pytest.mark.parametrize(
    "connector", [LINEAR, CONNECTORS["abstractor"]], ids=["linear", "abstractor"]
)
def test_widths_and_counts_flow_from_backbone_to_llm(connector):
    model = make_model(connector=connector, llm=llm_fields(hidden_size=48, num_attention_heads=6))
    assert model.connector.proj.in_features == model.vision.width == 16
    assert model.connector.proj.out_features == 48
    assert model.connector.tokens == (model.vision.patches if connector is LINEAR else 5)


class Shrinking(Backbone):
    """A backbone of a user's that gives fewer tokens in training than it says."""

    width, patches, grid = 16, 4, (2, 2)

    def forward(self, pixels):
        return torch.zeros(len(pixels), 3 if self.training else 4, 16)


def test_a_backbone_that_gives_other_tokens_than_it_says_is_an_error_and_not_a_shift():
    model = make_model("concat")
    model.vision = Shrinking()
    model.connector = LinearConnector(16, 32, 4, (2, 2))
    batch = make_batch(ROWS, model.fusion.tokens_per_image)
    model.vision.eval()
    assert model.encode(batch).tokens.shape[1] == 4
    model.vision.train()
    with pytest.raises(ValueError, match="vision: Shrinking gives 3 tokens, and says 4"):
        model.encode(batch)
