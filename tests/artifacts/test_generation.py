"""transformers' generate on every fusion, against whole rows without a cache."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, TextStreamer

from helpers import (
    PLACEHOLDER,
    ROWS,
    VOCAB,
    all_fusions,
    alone,
    each,
    images_of,
    llm_fields,
    make_batch,
    make_model,
    perturb,
)
from helpers import fusion_parameters as fusion_of
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.core.errors import DataError
from owlfuse.model.fusion.cross_attention import CrossAttentionBlock
from owlfuse.model.fusion.hyperattention import VisualAttention
from owlfuse.model.llm import balancing_coefficient, cache_argument

END = VOCAB - 1
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LATER = [[11, "image", 12, 13, 14, "image", 15, "image", 16]]
"""A chat with images in its later turns."""


def wrapped(node, family="llama"):
    model = make_model(node, llm=llm_fields(family))
    perturb(fusion_of(model).values())
    # answers of one length compare whole
    settings = {"eos_token_id": END, "pad_token_id": 0, "suppress_tokens": [END]}
    return OwlfuseForConditionalGeneration.wrap(model, PLACEHOLDER, settings).eval()


def inputs(model, rows, left=True):
    batch = make_batch(rows, model.config.tokens_per_image, left=left)
    pixels = batch.pixel_values if batch.has_images else None
    return batch, {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": pixels,
    }


def answers(model, rows, **options):
    batch, given = inputs(model, rows)
    return batch, model.generate(**given, max_new_tokens=6, **options)[
        :, batch.input_ids.shape[1] :
    ]


@torch.no_grad()
def slow_greedy(model, batch, rows, row):
    """One row without padding, cache or kept images: the whole row again for every token."""
    plain, ids = model.model, []
    for _ in range(6):
        whole = alone(batch, 0, [[*rows[row], *ids]], model.config.tokens_per_image)
        if whole.has_images:
            whole.pixel_values = batch.pixel_values[images_of(batch, row)]
        logits = plain(whole)[0, -1]
        logits[END] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids


@each(all_fusions())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fast_cases(6)
def test_greedy_in_a_left_padded_batch_is_that_of_each_row_alone_without_a_cache(node, family):
    model = wrapped(node, family)
    rows = [*ROWS, *LATER]
    batch, got = answers(model, rows, do_sample=False)
    assert got.tolist() == [slow_greedy(model, batch, rows, row) for row in range(len(rows))]


@each(all_fusions())
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.fast_cases(6)
def test_logits_with_a_cache_are_those_without(node, cache):
    model = wrapped(node)
    options = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "max_new_tokens": 6,
    }
    _, given = inputs(model, ROWS)
    cached, uncached = (
        model.generate(**given, **options, cache_implementation=cache),
        model.generate(**given, **options, use_cache=False),
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=1e-4
    )


@each(all_fusions())
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
@pytest.mark.fast_cases(5)
def test_the_backbone_sees_each_image_once_and_keys_are_projected_once(node, options, monkeypatch):
    model = wrapped(node)
    seen, projected = [], []
    vision, project = model.model.vision.forward, VisualAttention.keys_values
    monkeypatch.setattr(
        model.model.vision, "forward", lambda pixels: seen.append(len(pixels)) or vision(pixels)
    )
    monkeypatch.setattr(
        VisualAttention, "keys_values", lambda self, *a: projected.append(self) or project(self, *a)
    )
    for block in model.model.fusion.owned(model.model.llm):
        if isinstance(block, CrossAttentionBlock):
            block.k_proj.register_forward_hook(lambda module, args, out: projected.append(module))
    batch, _ = answers(model, ROWS, **options)
    assert seen == [len(batch.pixel_values)]
    assert len(projected) == len(node.get("layers", []))


@torch.no_grad()
def best_pair(model, row, pixels):
    """The likeliest two tokens after a row, of all there are."""
    first = model.model(with_pixels([row], pixels, model))[0, -1]
    first[END] = -torch.inf
    first = first.log_softmax(-1)
    second = torch.stack(
        [model.model(with_pixels([[*row, token]], pixels, model))[0, -1] for token in range(VOCAB)]
    )
    second[:, END] = -torch.inf
    joint = first[:, None] + second.log_softmax(-1)
    return list(divmod(int(joint.argmax()), VOCAB))


def with_pixels(rows, pixels, model):
    batch = make_batch(rows, model.config.tokens_per_image)
    if batch.has_images:
        batch.pixel_values = pixels
    return batch


@each(all_fusions())
@pytest.mark.fast_cases(2)
def test_as_many_beams_as_tokens_find_the_likeliest_pair_of_each_row(node):
    model = wrapped(node)
    rows = [[11, 12, "image", 13], [21, 22], ["image", 23, "image", 24]]
    batch, given = inputs(model, rows)
    found = model.generate(**given, num_beams=VOCAB, do_sample=False, max_new_tokens=2)[:, -2:]
    for row, ids in enumerate(rows):
        assert found[row].tolist() == best_pair(
            model, ids, batch.pixel_values[images_of(batch, row)]
        )


@each(all_fusions())
def test_generation_goes_on_from_a_cache_of_the_prompts_beginning(node):
    model = wrapped(node)
    batch, given = inputs(model, LATER)
    cache = DynamicCache(config=model.model.llm.config)
    visual = model.encode(given["input_ids"], given["pixel_values"])
    # inside of the last image, or at its start where its tokens see each other
    last_image = int(batch.image_positions[0, -1])
    sees_both_ways = node.get("attention") == "bidirectional"
    begun = last_image if sees_both_ways else given["input_ids"].shape[1] - 3
    with torch.no_grad():
        model(given["input_ids"][:, :begun], visual=visual, cache=cache)
    expected = model.generate(**given, do_sample=False, max_new_tokens=6)
    argument = {cache_argument(model.model.llm): cache}
    assert torch.equal(
        model.generate(**given, **argument, do_sample=False, max_new_tokens=6), expected
    )
    with pytest.raises(ValueError, match="give `visual` too"):
        model(given["input_ids"][:, -1:], cache=cache)


@each(all_fusions())
@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 3, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.fast_cases(4)
def test_other_ways_of_decoding_give_the_same_answer(node, options):
    model = wrapped(node)
    _, given = inputs(model, LATER)
    expected = model.generate(**given, do_sample=False, max_new_tokens=6)
    # a chunk that ends inside of an image
    if node.get("attention") == "bidirectional" and "prefill_chunk_size" in options:
        with pytest.raises(ValueError, match="needs an image's .* tokens in one forward pass"):
            model.generate(**given, **options, do_sample=False, max_new_tokens=6)
        return
    answer = model.generate(**given, **options, do_sample=False, max_new_tokens=6)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("name", ["concat", "hyperattention-adaptive"])
def test_an_answer_that_outgrows_longropes_short_factors_is_that_without_a_cache(name):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
    }
    fields = llm_fields(
        "phi3",
        head_dim=16,
        num_attention_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope,
    )
    model = make_model(name, llm=fields)
    perturb(fusion_of(model).values())
    settings = {"eos_token_id": END, "pad_token_id": 0, "suppress_tokens": [END]}
    export = OwlfuseForConditionalGeneration.wrap(model, PLACEHOLDER, settings).eval()
    batch, given = inputs(export, [[11, 12, "image", 13], [14, "image", 15, 16]])
    assert batch.input_ids.shape[1] < 16
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 16}
    cached, uncached = (
        export.generate(**given, **options, do_sample=False, use_cache=use) for use in (True, False)
    )
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=1e-4
    )


def test_a_mask_of_another_shape_is_refused():
    model = wrapped(all_fusions()["concat"])
    batch, given = inputs(model, ROWS[:1])
    longer = torch.ones(1, batch.input_ids.shape[1] + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(1, .* and input_ids \(1"):
        model(**{**given, "attention_mask": longer})
    mask = batch.attention_mask[:, None, None].bool()
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(1, 1, 1, .*\(rows, pos"):
        model(**{**given, "attention_mask": mask})


def test_sampling_is_repeated_by_the_seed():
    model = wrapped(all_fusions()["concat"])
    first, second, other = (
        (torch.manual_seed(seed), answers(model, ROWS, do_sample=True)[1])[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@each(all_fusions())
def test_a_streamer_gets_every_token_as_it_comes(node):
    class Collect(TextStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.got.append("end")

    model, streamer = wrapped(node), Collect()
    _, given = inputs(model, ROWS[:1])
    whole = model.generate(**given, do_sample=False, max_new_tokens=6, streamer=streamer)[
        0
    ].tolist()
    prompt, *tokens, end = streamer.got
    assert [*prompt, *(t for (t,) in tokens)] == whole
    assert end == "end"


def test_an_image_token_in_an_answer_is_text():
    model = wrapped(all_fusions()["concat"])
    batch, given = inputs(model, ROWS[:1])
    visual = model.encode(batch.input_ids, given["pixel_values"])
    longer = torch.cat([batch.input_ids, torch.full((1, 1), PLACEHOLDER)], dim=1)
    with torch.no_grad():
        logits = model(longer, visual=visual).logits
    assert torch.isfinite(logits).all()
    assert model.placeholder(visual, longer.shape[1])[0].tolist() == [
        *batch.placeholder[0].tolist(),
        False,
    ]


@each(all_fusions())
def test_logits_and_loss_are_the_models_own(node):
    model = wrapped(node)
    batch = make_batch(ROWS, model.config.tokens_per_image)
    with torch.no_grad():
        out = model(batch.input_ids, batch.attention_mask, batch.pixel_values, labels=batch.labels)
        # as the model is called inside, where a fusion knows how many positions are visual
        expected = model.model(replace(batch, visual_count=int(batch.placeholder.sum())))
        kept = model(
            batch.input_ids, batch.attention_mask, batch.pixel_values, logits_to_keep=2
        ).logits
        places = torch.tensor([0, -1, 3])
        chosen = model(
            batch.input_ids, batch.attention_mask, batch.pixel_values, logits_to_keep=places
        ).logits
    assert torch.equal(out.logits, expected)
    torch.testing.assert_close(kept, expected[:, -2:])
    torch.testing.assert_close(chosen, expected[:, places])
    loss = torch.nn.functional.cross_entropy(
        expected[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, loss)


def test_micro_batches_are_divided_by_what_the_trainer_of_transformers_counts():
    model = wrapped(all_fusions()["concat"])
    batch = make_batch(ROWS, model.config.tokens_per_image)
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": batch.pixel_values,
        "labels": batch.labels,
    }
    supervised = int((batch.labels[:, 1:] != -100).sum())
    with torch.no_grad():
        loss = model(**given).loss
        share = model(**given, num_items_in_batch=torch.tensor(4 * supervised)).loss
    torch.testing.assert_close(share, loss / 4)


def test_another_number_of_tokens_is_kept_by_an_export(tmp_path):
    model = wrapped(all_fusions()["concat"])
    _, given = inputs(model, ROWS)
    with torch.no_grad():
        before = model(**given).logits
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
        after = model(**given).logits
    assert after.shape[-1] == VOCAB + 3
    torch.testing.assert_close(after[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    read = OwlfuseForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(**given).logits, after)


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds", "output_hidden_states"])
def test_an_argument_without_effect_is_refused(name):
    model = wrapped(all_fusions()["concat"])
    _, given = inputs(model, ROWS[:1])
    with pytest.raises(TypeError, match=f"^{name}: owlfuse's models have no such argument"):
        model(**given, **{name: torch.zeros(1, 2)})


@pytest.mark.parametrize(
    ("images", "message"), [(0, "0 images were given"), (1, "1 images"), (4, "4 images")]
)
def test_another_number_of_images_than_placeholders_is_told_with_both_numbers(images, message):
    model = wrapped(all_fusions()["concat"])
    batch, _ = inputs(model, [ROWS[1]])
    pixels = torch.zeros(images, 3, 32, 32) if images else None
    with pytest.raises(
        DataError, match=f"{2 * model.config.tokens_per_image} image positions, .*{message}"
    ):
        model.generate(batch.input_ids, pixel_values=pixels, max_new_tokens=2)


@each(all_fusions())
def test_positions_of_images_are_not_learned_whatever_the_labels_say(node):
    """TRL's collator masks padding alone."""
    model = wrapped(node)
    batch, given = inputs(model, ROWS, left=False)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    without = labels.masked_fill(batch.placeholder, -100)
    assert not torch.equal(labels, without)
    with torch.no_grad():
        expected = model(**given, labels=without)
        out = model(**given, labels=labels)
        torch.testing.assert_close(out.loss, expected.loss)
        # as transformers' Trainer counts: all labels, here of two such micro batches
        counted = int((labels[:, 1:] != -100).sum())
        torch.testing.assert_close(
            model(**given, labels=labels, num_items_in_batch=2 * counted).loss, expected.loss / 2
        )


@each(all_fusions())
@pytest.mark.parametrize("masked", [True, False])
def test_new_ids_alone_behind_a_cache_are_refused(node, masked):
    """Their pictures would be looked for at places of the whole row."""
    model = wrapped(node)
    _, given = inputs(model, LATER)
    ids = given["input_ids"]
    cache = DynamicCache(config=model.model.llm.config)
    visual = model.encode(ids, given["pixel_values"])
    with torch.no_grad():
        model(ids[:, :-2], visual=visual, cache=cache)
    later = {"input_ids": ids[:, -2:]}
    if masked:
        later["attention_mask"] = torch.ones_like(ids)
    with pytest.raises(ValueError, match="give the whole chat's input_ids"):
        model.generate(**later, **{cache_argument(model.model.llm): cache}, max_new_tokens=2)


def test_the_balancing_loss_of_a_mixture_of_experts_is_in_the_loss_of_training():
    model = wrapped(all_fusions()["concat"], "mixtral")
    _, given = inputs(model, ROWS, left=False)
    labels = given["input_ids"].clone()
    with torch.no_grad():
        plain = model.eval()(**given, labels=labels).loss
        trained = model.train()(**given, labels=labels).loss
    expected = balancing_coefficient(model.model.llm) * model.model.balancing_loss
    assert expected > 0
    torch.testing.assert_close(trained - plain, expected, rtol=1e-4, atol=1e-6)
