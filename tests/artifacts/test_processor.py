"""The processor of an export: whose options are used, and whose are refused."""

import pytest
from PIL import Image

from owlfuse.artifacts.hf.processing import OwlfuseImageProcessor, OwlfuseProcessor
from owlfuse.data.chat.tokenizer import prepare
from small_tokenizers import byte_level

TEXTS = ["a red dog", "two dogs and one cat sit on the grass"]


@pytest.fixture(scope="module")
def processor():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    images = OwlfuseImageProcessor(
        {"height": 4, "width": 4}, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "bicubic"
    )
    return OwlfuseProcessor(images, prepare(tokenizer), tokens_per_image=3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "max_length", "max_length": 40},
        {"padding": True, "truncation": True, "max_length": 8},
        {"padding": "max_length", "truncation": True, "max_length": 8},
        {"pad_to_multiple_of": 16, "truncation": True, "max_length": 30},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_rows_are_padded_on_the_side_that_is_asked_for_and_masked_there(processor, options, side):
    given = options if side is None else {**options, "padding_side": side}
    batch = processor(text=TEXTS, **given)
    lengths = [len(processor(text=text)["input_ids"][0]) for text in TEXTS]
    if options.get("truncation"):
        lengths = [min(length, options["max_length"]) for length in lengths]
    for mask, ids, length in zip(batch["attention_mask"], batch["input_ids"], lengths, strict=True):
        zeros = [0] * (len(ids) - length)
        ones = [1] * length
        assert mask.tolist() == (ones + zeros if side == "right" else zeros + ones)
    width = batch["input_ids"].shape[1]
    if options.get("padding") == "max_length":
        assert width == options["max_length"]
    if "pad_to_multiple_of" in options:
        assert width % 16 == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_kwargs": {"do_resize": False}}, "^do_resize: pictures are prepared as in train"),
        ({"videos": ["clip.mp4"]}, "^videos: the processor takes pictures and texts alone"),
        ({"audio": ["a.wav"]}, "^audio: the processor takes"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(processor, options, message):
    with pytest.raises(TypeError, match=message):
        processor(images=Image.new("RGB", (4, 4)), text="<image> what?", **options)


def test_options_for_pictures_are_refused_by_the_image_processor_too(processor):
    with pytest.raises(TypeError, match="^size: pictures are prepared"):
        processor.image_processor(Image.new("RGB", (4, 4)), size={"height": 8, "width": 8})
