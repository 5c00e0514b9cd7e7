"""Released checkpoints in owlfuse: the goldens, and models of other sizes against slow code."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file

from owlfuse.artifacts.released.loading import load
from owlfuse.artifacts.released.nodes import family_of, nodes_of
from owlfuse.core.errors import DataError
from owlfuse.model.multimodal import assemble
from owlfuse.model.vision.backbone import TimmBackbone
from released_inputs import reference_logits, reference_loss
from released_models import IMAGE, KINDS, expect, expected_loss, inputs, visual_tokens, write

GOLDENS = Path(__file__).parents[2] / "goldens"
kinds = pytest.mark.parametrize("kind", KINDS)

ROWS = [
    [[11, 12, IMAGE, 13, 14], [21, IMAGE, 22, IMAGE, 23], [31, 32, 33]],
    [[31, 32], [IMAGE, IMAGE, 41], [11], [IMAGE, 12, 13, IMAGE, IMAGE]],
    [[21, 22, 23], [31]],
]
"""One image, several, none; side by side, at either end, text alone before rows with images; no
image at all."""


@kinds
def test_the_goldens_logits_and_loss_come_out(kind):
    model, io = load(GOLDENS / kind), load_file(GOLDENS / kind / "io.safetensors")
    logits = reference_logits(model, io)
    assert logits.shape == io["logits"].shape
    torch.testing.assert_close(logits[io["valid"]], io["logits"][io["valid"]], rtol=0, atol=1e-4)
    torch.testing.assert_close(reference_loss(model, io), io["loss"][0], rtol=0, atol=1e-5)
    assert not model.training


@kinds
@torch.no_grad()
def test_the_goldens_features_and_visual_tokens_come_out(kind):
    model, io = load(GOLDENS / kind), load_file(GOLDENS / kind / "io.safetensors")
    features = model.vision(io["images"])
    tokens = model.connector(features)
    if kind.startswith("owl3"):
        torch.testing.assert_close(tokens, io["projected_features"], rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(features, io["vision_features"], rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens, io["abstractor_tokens"], rtol=0, atol=1e-5)


@kinds
def test_the_goldens_tell_whether_the_images_are_seen(kind):
    model, io = load(GOLDENS / kind), load_file(GOLDENS / kind / "io.safetensors")
    moved = reference_logits(model, {**io, "images": io["images"].flip(-1)})
    assert (moved - io["logits"])[:2][io["valid"][:2]].abs().max() > 1e-2
    torch.testing.assert_close(
        moved[2][io["valid"][2]], io["logits"][2][io["valid"][2]], rtol=0, atol=1e-4
    )


@kinds
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
@pytest.mark.fast_cases(8)
def test_other_sizes_compute_what_slow_code_of_their_own_does(kind, seed, tmp_path):
    written = write(kind, seed)
    model = load(written.to(tmp_path, torch.float64 if seed == 3 else torch.float32))
    rows = ROWS[seed % 3]
    left = seed % 2 == 1
    io = inputs(written, rows, left, unused=seed != 1)
    expected = expect(written, rows, io)
    if len(io["images"]):
        size = model.vision.preprocessing.size[0]
        pixels = io["images"][..., :size, :size].to(next(model.parameters()).dtype)
        tokens = model.connector(model.vision(pixels)).double()
        torch.testing.assert_close(tokens, visual_tokens(written, io["images"]), rtol=0, atol=2e-5)
    logits = reference_logits(model, io)
    padding = [int((mask == 0).sum()) if left else 0 for mask in io["attention_mask"]]
    for row, got, pad in zip(expected, logits, padding):
        torch.testing.assert_close(
            got[pad : pad + len(row.ids)].double(), row.logits, rtol=0, atol=1e-4
        )
    assert logits.shape[1] == max(len(row.ids) + pad for row, pad in zip(expected, padding))
    torch.testing.assert_close(
        reference_loss(model, io).double(), expected_loss(expected), rtol=0, atol=1e-5
    )


@kinds
def test_the_nodes_are_plain_and_assemble_the_same_architecture(kind, tmp_path):
    model = load(write(kind, 5).to(tmp_path))
    nodes = json.loads(json.dumps(model.nodes))
    assert nodes == model.nodes
    again = assemble(nodes, model.llm.config.vocab_size).eval()
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    again.load_state_dict(model.state_dict())
    written = write(kind, 5)
    io = inputs(written, ROWS[0])
    again.released = model.released
    assert torch.equal(reference_logits(again, io), reference_logits(model, io))


@kinds
def test_the_sizes_drawn_cover_what_can_differ(kind):
    drawn = [write(kind, seed).config for seed in range(4)]
    text = [c.get("text_config", c) for c in drawn]
    for field in ("num_attention_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        assert len({t[field] for t in text}) > 1, field
    assert any(t["num_key_value_heads"] < t["num_attention_heads"] for t in text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_the_files_type_is_the_models_and_the_forward_runs_in_it(kind, dtype, tmp_path):
    written = write(kind, 0)
    model = load(written.to(tmp_path / "half", dtype))
    assert {t.dtype for t in model.state_dict().values()} == {dtype}
    assert model.nodes["llm"]["dtype"] == str(dtype).removeprefix("torch.")
    io = inputs(written, ROWS[0])
    logits = reference_logits(model, io)
    assert logits.dtype == dtype
    exact = reference_logits(load(written.to(tmp_path / "single")), io)
    valid = (
        io["attention_mask"].bool()
        if logits.shape[1] == io["attention_mask"].shape[1]
        else slice(None)
    )
    assert (logits - exact)[valid].abs().mean() < 0.05 * exact.std()


def test_a_file_of_several_types_is_loaded_in_the_one_of_most_numbers(tmp_path):
    written = write("owl1", 1)
    folder = written.to(tmp_path, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "norm" in name:
            tensors[name] = written.tensors[name]
    save_file(tensors, folder / "model.safetensors")
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_rotary_frequencies_are_real_and_those_of_the_configuration(tmp_path):
    model = load(write("owl3_fused", 2).to(tmp_path))
    rope = model.llm.model.rotary_emb
    text = model.released.config
    head = text["hidden_size"] // text["num_attention_heads"]
    expected = torch.tensor([text["rope_theta"] ** (-2 * j / head) for j in range(head // 2)])
    torch.testing.assert_close(rope.inv_freq, expected)


def test_rope_scaling_is_taken_from_the_configuration(tmp_path):
    written = write("owl2", 0)
    plain = load(written.to(tmp_path / "plain"))
    written.config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    scaled = load(written.to(tmp_path / "scaled"))
    ratio = plain.llm.model.rotary_emb.inv_freq / scaled.llm.model.rotary_emb.inv_freq
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0))


# Preprocessing


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [("owl1", 0.48145466, 0.26862954), ("owl2", 0.48145466, 0.26862954), ("owl3_static", 0.5, 0.5)],
)
def test_preprocessing_is_clips_or_siglips(kind, mean, std):
    made = load(GOLDENS / kind).vision.preprocessing
    assert (made.size, made.mean[0], made.std[0], made.interpolation) == (
        (56, 56),
        mean,
        std,
        "bicubic",
    )


def test_preprocessor_config_has_the_first_word(tmp_path):
    folder = write("owl2", 1).to(tmp_path)
    usual = load(folder).vision.preprocessing
    said = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
        "crop_size": usual.size[0],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    model = load(folder)
    made = model.vision.preprocessing
    assert (list(made.mean), list(made.std), made.interpolation) == (
        said["image_mean"],
        said["image_std"],
        "bilinear",
    )
    assert model.nodes["vision"]["kwargs"]["pretrained_cfg_overlay"]["mean"] == said["image_mean"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"do_normalize": False}, "do_normalize is false"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"resample": 5}, "resample is 5; supported are 0 .nearest"),
        ({"size": {"shortest_edge": 9999}}, "size is .* and crop_size .*: a picture would be"),
    ],
    ids=str,
)
def test_steps_of_a_preprocessor_that_would_be_left_out_are_refused(said, message, tmp_path):
    folder = write("owl2", 1).to(tmp_path)
    side = load(folder).vision.preprocessing.size[0]
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": side, **said}))
    with pytest.raises(DataError, match=f"preprocessor_config.json: {message}"):
        load(folder)


@pytest.mark.parametrize(
    "size", [{"height": 999, "width": 999}, {"height": 8, "width": 12}, "large"]
)
def test_a_preprocessor_of_other_pictures_is_an_error_that_names_it(size, tmp_path):
    folder = write("owl1", 1).to(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    with pytest.raises(DataError, match="preprocessor_config.json"):
        load(folder)


def test_a_size_that_the_patches_do_not_divide_is_cut_to_one_that_they_do(tmp_path):
    """384 pixels and patches of 14, as released: 27 x 27 patches, 378 pixels."""
    written = next(
        w
        for w in (write("owl3_static", s) for s in range(20))
        if w.image_size % w.config["vision_config"]["patch_size"]
    )
    patch = written.config["vision_config"]["patch_size"]
    model = load(written.to(tmp_path))
    assert model.vision.preprocessing.size == (written.image_size // patch * patch,) * 2
    io = inputs(written, ROWS[0])
    cut = {
        **io,
        "images": io["images"][
            ..., : model.vision.preprocessing.size[0], : model.vision.preprocessing.size[0]
        ],
    }
    assert torch.equal(reference_logits(model, io), reference_logits(model, cut))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 3e-4])
@pytest.mark.parametrize("kind", ["owl1", "owl3_fused"])
def test_every_norm_of_the_tower_has_the_configurations_epsilon(kind, eps, tmp_path):
    written = write(kind, 1)
    written.config["vision_config"]["layer_norm_eps"] = eps
    model = load(written.to(tmp_path))
    assert isinstance(model.vision, TimmBackbone)
    assert {m.eps for m in model.vision.modules() if isinstance(m, torch.nn.LayerNorm)} == {eps}


# Sizes of the released models, without weights


@pytest.mark.parametrize(
    ("config", "tokens", "parameters"),
    [
        ({"model_type": "mplug-owl"}, 65, 7.2e9),
        ({"model_type": "mplug_owl2"}, 65, 8.2e9),
    ],
)
def test_without_fields_the_released_codes_defaults_hold(config, tokens, parameters):
    family = family_of(Path("."), config)
    nodes = nodes_of(Path("/nowhere"), family, config, set(), "bfloat16")
    with init_empty_weights():
        model = assemble(nodes, nodes["llm"]["config"]["vocab_size"])
    assert model.fusion.tokens_per_image == tokens
    assert abs(sum(p.numel() for p in model.parameters()) - parameters) < 0.1e9


# Inputs


def test_an_owl3_whose_configuration_names_no_image_token_is_loaded_all_the_same(tmp_path):
    written = write("owl3_fused", 0)
    io = inputs(written, ROWS[0])
    del written.config["image_token_id"]
    model = load(written.to(tmp_path))
    assert model.released.image_token_id is None
    model.released.image_token_id = 7
    assert reference_logits(model, io).isfinite().all()


def test_owl2_rows_of_text_alone_may_come_without_their_unused_images():
    model, io = load(GOLDENS / "owl2"), load_file(GOLDENS / "owl2" / "io.safetensors")
    ids = torch.tensor([[31, 32, 33], [11, -200, 12]])
    without = reference_logits(model, {"input_ids": ids, "images": io["images"][1:2]})
    assert torch.equal(
        without, reference_logits(model, {"input_ids": ids, "images": io["images"][:2]})
    )


def test_padding_of_owl3_may_hold_its_image_token():
    model, io = (
        load(GOLDENS / "owl3_adaptive"),
        load_file(GOLDENS / "owl3_adaptive" / "io.safetensors"),
    )
    token = model.released.image_token_id
    mask = torch.ones_like(io["input_ids"])
    padded = {
        "input_ids": torch.cat([io["input_ids"], torch.full((3, 2), token)], 1),
        "images": io["images"],
    }
    padded["attention_mask"] = torch.cat([mask, torch.zeros(3, 2, dtype=torch.long)], 1)
    torch.testing.assert_close(
        reference_logits(model, padded)[:, :-2], io["logits"], rtol=0, atol=1e-4
    )
