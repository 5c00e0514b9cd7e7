"""What is computed at some places alone is what it would be everywhere: logits where a token is
supervised, and the visual copies where the pictures are."""

import dataclasses

import pytest
import torch

from helpers import (
    FUSIONS,
    IMAGE,
    IMAGE_SIZE,
    ROWS,
    each,
    gradients,
    llm_fields,
    make_batch,
    make_model,
    perturb,
)
from owlfuse.core.types import SUPERVISED_BLOCK, Encoded
from owlfuse.data.collate import Collator
from owlfuse.model.fusion.modality_adaptive import ByModality
from owlfuse.model.loss import batch_loss, token_loss

MANY = [*ROWS, *ROWS, [*range(11, 90), IMAGE, *range(11, 60)]]
CASES = {"mixed": ROWS, "many": MANY, "no images": [[11, 12, 13, 14], [21, 22]]}
LLMS = {
    "llama": llm_fields("llama"),
    "granite": llm_fields("granite", logits_scaling=3.0),
    "gemma3": llm_fields("gemma3_text", final_logit_softcapping=2.0),
}


def samples_of(rows, per_image):
    """The rows as samples, text supervised from the second token on."""
    found = []
    for number, row in enumerate(rows):
        one = make_batch([row], per_image)
        pictures = list(one.pixel_values) if one.has_images else []
        starts = [p for p in one.image_positions[0].tolist() if p < one.input_ids.shape[1]]
        found.append(
            Encoded(
                str(number),
                "",
                one.input_ids[0],
                one.labels[0],
                one.placeholder[0],
                pictures,
                starts,
            )
        )
    return found


def collated(rows, per_image, pack_to=None, side="right"):
    return Collator(0, (3, IMAGE_SIZE, IMAGE_SIZE), side, pack_to)(samples_of(rows, per_image))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(
            gradient, second[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_supervised_places_are_those_whose_next_token_is_and_fill_whole_blocks(rows, side):
    batch = collated(rows, 3, side=side)
    length = batch.input_ids.shape[1]
    wanted = [
        b * length + t
        for b, row in enumerate(batch.labels.tolist())
        for t, label in enumerate(row[1:])
        if label != -100
    ]
    found = batch.supervised.tolist()
    assert found[: len(wanted)] == wanted
    assert set(found[len(wanted) :]) <= {batch.labels.numel() - 1}
    assert len(found) % SUPERVISED_BLOCK == 0
    assert len(found) < len(wanted) + SUPERVISED_BLOCK
    assert batch.visual_count == 3 * sum(row.count(IMAGE) for row in rows)


@each(FUSIONS)
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
@pytest.mark.parametrize("pack_to", [None, 300], ids=["padded", "packed"])
@pytest.mark.fast_cases(9)
def test_the_loss_and_its_gradients_are_those_of_logits_and_copies_everywhere(node, rows, pack_to):
    model = make_model(node).train()
    perturb(model.parameters(), 0.1)
    batch = collated(rows, model.fusion.tokens_per_image, pack_to)
    everywhere = dataclasses.replace(batch, supervised=None, visual_count=None)
    loss, tokens = batch_loss(model, batch)
    slow, count = token_loss(model(everywhere), everywhere.labels)
    assert tokens == count == (batch.labels[:, 1:] != -100).sum()
    torch.testing.assert_close(loss, slow, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, loss / tokens), gradients(model, slow / count))


@pytest.mark.parametrize("llm", LLMS)
def test_logits_that_an_llm_scales_or_caps_stay_so(llm):
    model = make_model("concat", llm=LLMS[llm])
    batch = collated(MANY, model.fusion.tokens_per_image)
    whole = model(batch)
    found = model(batch, logits_to_keep=batch.supervised)
    torch.testing.assert_close(found, whole.flatten(0, 1)[batch.supervised], rtol=1e-5, atol=1e-6)
    plain = model.llm.get_output_embeddings()(
        model.llm.base_model(batch.input_ids).last_hidden_state
    )
    assert llm == "llama" or plain.std() > 1.5 * whole.std()  # they do scale or cap


def test_the_head_multiplies_no_more_places_than_are_supervised_and_is_whole_again_afterwards():
    model = make_model("concat")
    batch = collated(MANY, model.fusion.tokens_per_image)
    seen = []
    model.llm.lm_head.register_forward_hook(
        lambda module, args, out: seen.append(tuple(args[0].shape[:2]))
    )
    batch_loss(model, batch)
    model(batch)
    assert seen == [(1, len(batch.supervised)), tuple(batch.input_ids.shape)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_visual_copies_see_visual_places_alone_and_always_have_a_gradient(rows, checkpointing):
    model = make_model("modality_adaptive", gradient_checkpointing=checkpointing).train()
    perturb(model.parameters(), 0.1)
    batch = collated(rows, model.fusion.tokens_per_image)
    seen = []
    for module in model.llm.modules():
        if isinstance(module, ByModality):
            module.vision.register_forward_hook(
                lambda module, args, out: seen.append(args[0].shape[1])
            )
    loss, tokens = batch_loss(model, batch)
    assert set(seen) == {max(int(batch.placeholder.sum()), 1)}
    everywhere = dataclasses.replace(batch, visual_count=None)
    slow, _ = batch_loss(model, everywhere)
    found = gradients(model, loss / tokens)
    assert_same(found, gradients(model, slow / tokens))
    visual = [
        gradient
        for name, gradient in found.items()
        if ".vision." in name and name.startswith("llm.")
    ]
    assert len(visual) >= 4
    assert all((gradient != 0).any() == batch.has_images for gradient in visual)


def test_a_decoding_step_runs_no_visual_copy():
    model = make_model("modality_adaptive")
    batch = make_batch([[11, 12, 13]]).with_places()
    count = []
    for module in model.llm.modules():
        if isinstance(module, ByModality):
            module.vision.register_forward_hook(lambda module, args, out: count.append(1))
    with torch.no_grad():
        without = model(batch)
        assert not count
        torch.testing.assert_close(without, model(dataclasses.replace(batch, visual_count=None)))
    assert count
