"""LLaVA 1.5 folders as transformers writes them, in owlfuse and back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    MistralConfig,
    Qwen2Config,
)

import owlfuse
from owlfuse.__main__ import main
from owlfuse.artifacts.released.loading import load
from owlfuse.artifacts.released.saving import save
from owlfuse.core.errors import DataError
from released_inputs import reference_logits

IMAGE_TOKEN = 98
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
LLMS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=12),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
}


def write_original(folder, llm="llama", **options):
    """A random LLaVA with numbers far from those of an initialisation."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=42,
        patch_size=14,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LLMS[llm],
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=LLMS[llm].tie_word_embeddings,
        **options,
    )
    original = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    original.save_pretrained(folder)
    return original


def inputs(tokens_per_image):
    image = [IMAGE_TOKEN] * tokens_per_image
    rows = [[1, *image, 11, 12, 13, 14, 15], [1, 21, 22, *image, 23, 24, 25]]
    torch.manual_seed(1)
    return {"input_ids": torch.tensor(rows), "images": torch.randn(2, 3, 42, 42)}


def original_logits(original, io):
    with torch.no_grad():
        return original(input_ids=io["input_ids"], pixel_values=io["images"]).logits


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_logits_are_those_of_transformers(llm, strategy, tmp_path):
    original = write_original(tmp_path / "llava", llm, vision_feature_select_strategy=strategy)
    model = load(tmp_path / "llava")
    # which a short prompt does not show
    window = getattr(LLMS[llm], "sliding_window", None)
    assert getattr(model.llm.config, "sliding_window", None) == window
    io = inputs(tokens_per_image=9 if strategy == "default" else 10)
    expected = original_logits(original, io)
    torch.testing.assert_close(reference_logits(model, io), expected, rtol=0, atol=1e-4)
    blank = {**io, "images": torch.zeros_like(io["images"])}
    assert (reference_logits(model, blank) - expected).abs().max() > 1e-2, "pictures are seen"


SPELLINGS = {
    "the hub's": {
        "vision_tower.": "vision_tower.vision_model.",
    },
    "transformers 5": {
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_of_the_names_is_read_and_written_back(spelling, tmp_path):
    folder = tmp_path / "llava"
    original = write_original(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        if "vision_model" in name:
            name = name.replace("vision_model.", "")
        for beginning, other in SPELLINGS[spelling].items():
            if name.startswith(beginning):
                name = other + name.removeprefix(beginning)
                break
        renamed[name] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    io = inputs(tokens_per_image=9)
    logits = reference_logits(model, io)
    torch.testing.assert_close(logits, original_logits(original, io), rtol=0, atol=1e-4)
    save(model, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(renamed)
    for name, tensor in renamed.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("do_pad", [False, True])
def test_pictures_are_prepared_as_by_its_own_processor(do_pad, unified, tmp_path):
    """CLIP's, or LLaVA's with bars; in a file of its own, or, as transformers 5 saves the processor
    of a model, as a part of another."""
    folder = tmp_path / "llava"
    write_original(folder)
    sizes = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
    processor = LlavaImageProcessor(**sizes, do_pad=True) if do_pad else CLIPImageProcessor(**sizes)
    processor.save_pretrained(folder)
    if unified:
        file = folder / "preprocessor_config.json"
        content = {"image_processor": json.loads(file.read_text())}
        (folder / "processor_config.json").write_text(json.dumps(content))
        file.unlink()
    preprocessing = load(folder).vision.preprocessing
    rng = np.random.default_rng(0)
    # smooth, since the libraries differ in how they round single pixels; and of a size that crops
    # at a whole pixel, as CLIP's processor resizes first, or pads at one
    size = (84, 28) if do_pad else (100, 60)
    picture = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(size)
    pixels = preprocessing(picture)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    difference = (pixels - expected).abs()
    if do_pad:
        # LLaVA's pads first, so that colours are mixed at the edges of the bars, rows 14 and 28
        difference = torch.cat([difference[:, :11], difference[:, 17:25], difference[:, 31:]], 1)
    assert difference.max() < 0.05


def test_pictures_of_a_height_and_a_width_are_stretched(tmp_path):
    folder = tmp_path / "llava"
    write_original(folder)
    square = {"height": 42, "width": 42}
    processor = CLIPImageProcessor(size=square, crop_size=square, do_center_crop=True)
    processor.save_pretrained(folder)
    picture = Image.linear_gradient("L").convert("RGB").resize((100, 60))
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert (load(folder).vision.preprocessing(picture) - expected).abs().max() < 0.05


def test_of_two_files_of_a_processor_that_of_transformers_5_is_read(tmp_path):
    folder = tmp_path / "llava"
    write_original(folder)
    sizes = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    content = json.loads((folder / "preprocessor_config.json").read_text())
    saved = {"image_processor": content | {"image_mean": [0.5, 0.5, 0.5]}}
    (folder / "processor_config.json").write_text(json.dumps(saved))
    assert list(load(folder).vision.preprocessing.mean) == [0.5, 0.5, 0.5]


def test_windows_of_single_layers_are_kept(tmp_path, monkeypatch):
    types = ["sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 4, "layer_types": types}
    sizes = {**SIZES, "num_hidden_layers": 2}
    monkeypatch.setitem(LLMS, "qwen2", Qwen2Config(**sizes, **window, tie_word_embeddings=True))
    original = write_original(tmp_path / "llava", "qwen2")
    io = inputs(tokens_per_image=9)
    logits = reference_logits(load(tmp_path / "llava"), io)
    torch.testing.assert_close(logits, original_logits(original, io), rtol=0, atol=1e-4)


def test_embeddings_that_the_outer_configuration_ties_are_tied(tmp_path):
    original = write_original(tmp_path / "llava")
    original.config.tie_word_embeddings = True
    original.tie_weights()
    original.save_pretrained(tmp_path / "tied")
    assert "lm_head" not in " ".join(load_file(tmp_path / "tied" / "model.safetensors"))
    io = inputs(tokens_per_image=9)
    expected = original_logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "tied"), io)
    torch.testing.assert_close(
        reference_logits(load(tmp_path / "tied"), io), expected, rtol=0, atol=1e-4
    )


def test_the_command_imports_it_and_owlfuse_loads_it(tmp_path, capsys):
    original = write_original(tmp_path / "llava")
    assert main(["import", str(tmp_path / "llava"), str(tmp_path / "out")]) == 0
    model = owlfuse.load(tmp_path / "out")
    io = inputs(tokens_per_image=9)
    expected = original_logits(original, io)
    torch.testing.assert_close(reference_logits(model, io), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -1}, "vision_feature_layer is -1, expected -2"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is relu, expected gelu"),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "vision_config.model_type is siglip_vision_model, expected clip_vision_model",
        ),
        ({"text_config": {"model_type": "gemma"}}, "text_config.model_type is gemma, expected"),
    ],
)
def test_another_llava_is_refused_in_one_line(changes, message, tmp_path):
    folder = tmp_path / "llava"
    write_original(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DataError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
