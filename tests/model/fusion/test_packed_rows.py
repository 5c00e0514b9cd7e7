"""Samples that share a row: each as if it had a row of its own, for every fusion on every LLM."""

import dataclasses

import pytest
import torch

from helpers import (
    FUSIONS,
    IMAGE,
    IMAGE_SIZE,
    VARIANTS,
    all_fusions,
    each,
    expand,
    gradients,
    llm_fields,
    make_model,
    perturb,
)
from owlfuse.core.types import Encoded
from owlfuse.data.collate import Collator
from owlfuse.model.fusion.hyperattention import HyperAttention
from owlfuse.model.llm import load_llm, mask_argument
from owlfuse.model.loss import token_loss

SAMPLES = {
    "mixed": [
        [11, 12, 13, IMAGE, 14, 15],
        [21, IMAGE, 22, IMAGE, 23, 24, 25, 26, 27],
        [31, 32, 33, 34, 35, 36, 37],
        [IMAGE, IMAGE, 41, 42],
        [51],
        [52],
        [IMAGE],
        [61, 62, 63],
    ],
    "no images": [[11, 12, 13, 14, 15, 16, 17, 18], [21, 22, 23], [31], [41, 42, 43, 44, 45]],
}
MIXED_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
LLMS = {
    "llama": llm_fields("llama"),
    "mistral-window": llm_fields("mistral", sliding_window=3),
    "qwen2": llm_fields("qwen2"),
    "qwen3": llm_fields("qwen3"),
    "qwen3-windows": llm_fields(
        "qwen3", use_sliding_window=True, sliding_window=3, layer_types=MIXED_WINDOWS
    ),
}


def encoded(rows, per_image, vary=0):
    """Rows of ids and images as samples with pictures, text supervised from the very first token
    on. Of the sample of index `vary - 1` ids and pictures are others."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for k, row in enumerate(rows):
        ids, holds, starts = expand(row, per_image)
        pictures = [torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for _ in starts]
        if k == vary - 1:
            ids, pictures = (
                [i if hold else i + 7 for i, hold in zip(ids, holds)],
                [-picture for picture in pictures],
            )
        ids, placeholder = torch.tensor(ids), torch.tensor(holds)
        samples.append(
            Encoded(
                str(k), "", ids, ids.masked_fill(placeholder, -100), placeholder, pictures, starts
            )
        )
    return samples


def collate(rows, per_image, pack_to=None, vary=0):
    return Collator(0, (3, IMAGE_SIZE, IMAGE_SIZE), pack_to=pack_to)(encoded(rows, per_image, vary))


def in_float64(batch):
    return dataclasses.replace(batch, pixel_values=batch.pixel_values.double())


def room(rows, per_image):
    """A length at which some rows hold several samples and one is padded."""
    return max(len(expand(row, per_image)[0]) for row in rows) + 2


def by_sample(values, batch):
    """`values` (B, T, ...) of each sample by its id, read off the segment ids where rows are
    packed."""
    segments = batch.attention_mask if batch.segment_ids is None else batch.segment_ids
    pieces = [
        row[ids == k] for row, ids in zip(values, segments) for k in range(1, int(ids.max()) + 1)
    ]
    assert len(pieces) == len(batch.ids)
    return dict(zip(batch.ids, pieces))


@each({**FUSIONS, **VARIANTS})
@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.fast_cases(13)
def test_packed_rows_have_the_loss_and_the_gradients_of_unpacked_ones(node, llm, samples):
    model = make_model(node, llm=LLMS[llm]).double()
    perturb(model.parameters(), 0.1)
    per_image = model.fusion.tokens_per_image
    rows = SAMPLES[samples]
    batches = [
        in_float64(collate(rows, per_image, pack_to))
        for pack_to in (None, room(rows, per_image), 10_000)
    ]
    assert (
        len(rows)
        == len(batches[0].input_ids)
        > len(batches[1].input_ids)
        > len(batches[2].input_ids)
        == 1
    )
    assert (batches[1].attention_mask == 0).any()
    logits = [model(batch) for batch in batches]
    losses, counts = zip(*(token_loss(out, batch.labels) for out, batch in zip(logits, batches)))
    expected = gradients(model, losses[0] / counts[0])
    expected_logits = by_sample(logits[0].detach(), batches[0])
    for out, batch, loss, count in zip(logits[1:], batches[1:], losses[1:], counts[1:]):
        assert count == counts[0]
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-5)
        for name, own in by_sample(out.detach(), batch).items():
            torch.testing.assert_close(own, expected_logits[name], rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model, loss / count).items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@each(all_fusions())
@pytest.mark.parametrize("llm", ["llama", "mistral-window"])
@torch.no_grad()
@pytest.mark.fast_cases(7)
def test_a_sample_is_not_changed_by_its_neighbours_ids_or_pictures(node, llm):
    model = make_model(node, llm=LLMS[llm])
    perturb(model.parameters(), 0.1)
    per_image = model.fusion.tokens_per_image
    rows = SAMPLES["mixed"]
    before = by_sample(model(collate(rows, per_image, 10_000)), collate(rows, per_image, 10_000))
    for changed in (0, 1, 3):
        batch = collate(rows, per_image, 10_000, vary=changed + 1)
        after = by_sample(model(batch), batch)
        for name in before:
            if name == str(changed):
                assert (before[name] - after[name]).abs().max() > 1e-3
            else:
                assert torch.equal(before[name], after[name]), name


@torch.no_grad()
def test_an_image_has_the_position_of_its_placeholder_in_its_own_sample():
    model = make_model("hyperattention-fused")
    batch = collate([[11, 12, IMAGE, 13], [21, IMAGE]], 1, 10_000)
    visual = model.encode(batch)
    embeddings = model.llm.get_input_embeddings()(batch.input_ids)
    assert isinstance(model.fusion, HyperAttention)
    _, arguments = model.fusion(embeddings, visual, batch, batch.positions(), model.llm)
    cos, _ = arguments["visual"].rotations[None]
    expected, _ = model.llm.base_model.rotary_emb(embeddings, torch.tensor([[2, 1]]))
    torch.testing.assert_close(cos[:, :: visual.tokens.shape[1]], expected)
    assert arguments["visual"].visible[0].tolist() == [[False, False]] * 2 + [[True, False]] * 2 + [
        [False, False],
        [False, True],
    ]


def test_positions_start_anew_at_each_sample_and_are_zero_at_padding():
    batch = collate([[11, 12, 13], [21], [22], [31, 32], [41, 42, 43, 44], [51, 52]], 1, 7)
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2], [1, 2, 3, 3, 4, 4, 0]]
    assert batch.positions().tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 0, 0, 1, 0, 1, 0]]
    assert batch.labels.tolist() == [
        [-100, 12, 13, -100, 42, 43, 44],
        [-100, -100, -100, 32, -100, 52, -100],
    ]


def test_gradient_checkpointing_keeps_the_samples_apart_too():
    rows = SAMPLES["mixed"]
    for fusion in ("modality_adaptive", "hyperattention-adaptive"):
        model = make_model(fusion, gradient_checkpointing=True).train()
        perturb(model.parameters(), 0.1)
        packed, unpacked = (
            collate(rows, model.fusion.tokens_per_image, pack_to) for pack_to in (10_000, None)
        )
        expected = gradients(model, token_loss(model(unpacked), unpacked.labels)[0] / 100)
        for name, gradient in gradients(
            model, token_loss(model(packed), packed.labels)[0] / 100
        ).items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_packed_rows_with_a_cache_or_flash_attention_are_an_error():
    packed, unpacked = (collate(SAMPLES["no images"], 1, pack_to) for pack_to in (10_000, None))
    llm = load_llm(97, config=LLMS["llama"])
    assert mask_argument(llm, unpacked, object()) is unpacked.attention_mask
    with pytest.raises(ValueError, match="cannot go on from a cache"):
        mask_argument(llm, packed, object())
    llm.config._attn_implementation = "owlfuse_hyperattention_flash_attention_2"
    with pytest.raises(ValueError, match="set model.llm.attention=sdpa, or data.pack_to=null"):
        mask_argument(llm, packed)
