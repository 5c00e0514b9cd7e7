"""Attention in both directions among an image's tokens: what it refuses, and where it is the plain
LLM's."""

import copy
import dataclasses

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from helpers import CONCAT, IMAGE, llm_fields, make_batch, make_model, of_row
from owlfuse.model.fusion.concat import Concat
from owlfuse.model.llm import load_llm

ROW = [11, 12, IMAGE, 13, IMAGE, IMAGE, 14]


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_an_images_tokens_see_each_other_and_nothing_else_that_is_later(window, left):
    model = make_model("concat-bidirectional", llm=llm_fields("mistral", sliding_window=window))
    per_image = model.fusion.tokens_per_image
    batch = make_batch([ROW, [21, 22, IMAGE, 23]], per_image, left)
    visual = model.encode(batch)
    before = model(batch, visual)
    for image in range(4):
        changed = visual.tokens.clone()
        # the last of its tokens alone
        changed[image, -1] += 1
        after = model(batch, dataclasses.replace(visual, tokens=changed))
        row, slot = (batch.image_index == image).nonzero()[0].tolist()
        start = int(batch.image_positions[row, slot])
        difference = (after - before)[row].abs().amax(-1)
        assert (difference[:start] == 0).all()
        assert (difference[start : start + per_image] > 1e-4).all()
        assert torch.equal(of_row(after, batch, 1 - row), of_row(before, batch, 1 - row))


@torch.no_grad()
def test_a_batch_of_text_alone_and_the_next_one_have_the_plain_masks():
    model = make_model("concat-bidirectional")
    plain = make_model("concat")
    plain.load_state_dict(model.state_dict())
    model(make_batch([ROW], model.fusion.tokens_per_image))
    text = make_batch([[11, 12, 13], [21, 22, 23]])
    assert torch.equal(model(text), plain(text))


def test_flash_attention_is_refused():
    llm = load_llm(97, config=llm_fields())
    # the setter wants the package of its kernel
    llm.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"bidirectional needs masks.*model\.llm\.attention=sdpa"):
        Concat(3, "bidirectional").attach(llm)


def test_an_unknown_attention_is_refused():
    with pytest.raises(
        ValueError, match="attention is 'both', expected one of causal, bidirectional"
    ):
        make_model({"_target_": CONCAT, "attention": "both"})


def test_an_llm_that_builds_no_masks_by_transformers_functions_is_refused():
    config = CONFIG_MAPPING["openai-gpt"](n_embd=16, n_head=2, n_layer=1, vocab_size=97)
    llm = AutoModelForCausalLM.from_config(config).eval()
    copied = copy.deepcopy(llm)
    Concat(2, "bidirectional").attach(llm)
    embeddings = torch.randn(1, 4, 16)
    numbers = torch.tensor([[-1, 0, 0, -1]])
    with pytest.raises(ValueError, match="no effect on OpenAIGPTLMHeadModel"):
        llm(inputs_embeds=embeddings, image_numbers=numbers)
    # nothing of that forward pass is left
    assert torch.equal(llm(inputs_embeds=embeddings)[0], copied(inputs_embeds=embeddings)[0])


@torch.no_grad()
def test_a_prompt_that_is_cut_inside_of_an_image_is_refused():
    model = make_model("concat-bidirectional")
    batch = make_batch([[11, IMAGE, 12]], model.fusion.tokens_per_image)
    visual = model.encode(batch)
    cache = DynamicCache(config=model.llm.config)

    def piece(first, last):
        fields = {}
        for name in ("input_ids", "placeholder", "labels"):
            fields[name] = getattr(batch, name)[:, first:last]
        mask = batch.attention_mask[:, :last]
        return dataclasses.replace(batch, attention_mask=mask, **fields)

    model(piece(0, 3), visual, cache)
    with pytest.raises(ValueError, match=r"5 tokens in one forward pass.*at position 3"):
        model(piece(3, 7), visual, cache)
