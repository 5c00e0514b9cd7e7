"""The processor of an export: whose options are used, and whose are refused."""

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from owlfuse.artifacts.hf.processing import OwlfuseImageProcessor, OwlfuseProcessor
from owlfuse.core.errors import DataError
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
        ({"do_rescale": False, "size": {"height": 8, "width": 8}}, "^do_rescale, size: pictures"),
        ({"videos": ["clip.mp4"]}, "^videos: the processor takes pictures and texts alone"),
        ({"audio": ["a.wav"]}, "^audio: the processor takes"),
        ({"return_special_tokens_mask": True}, "^return_special_tokens_mask: the processor does"),
        ({"return_offsets_mapping": True}, "^return_offsets_mapping: the processor does not"),
        ({"text_kwargs": {"sanitize_control_tokens": True}}, "^sanitize_control_tokens: the pro"),
        ({"max_length": 3}, "^max_length: has no effect without truncation=True or padding="),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(processor, options, message):
    with pytest.raises(TypeError, match=message):
        processor(images=Image.new("RGB", (4, 4)), text="<image> what?", **options)


def test_what_callers_pass_for_nothing_is_taken(processor):
    given = {
        "videos": None,
        "audio": [],
        "videos_kwargs": {},
        "common_kwargs": {"return_tensors": "pt"},
    }
    given |= {"verbose": False, "text_kwargs": {"return_tensors": "np"}}
    batch = processor(text="what?", **given, return_attention_mask=True, enable_thinking=False)
    assert set(batch) == {"input_ids", "attention_mask"}


def test_options_for_pictures_are_refused_by_the_image_processor_too(processor):
    with pytest.raises(TypeError, match="^size: pictures are prepared"):
        processor.image_processor(Image.new("RGB", (4, 4)), size={"height": 8, "width": 8})


def test_the_side_of_padding_is_left_however_the_tokenizer_is_read_and_can_be_chosen(
    processor, tmp_path
):
    processor.save_pretrained(tmp_path)
    read = OwlfuseProcessor.from_pretrained(tmp_path)
    # by which pipelines pad
    assert read.tokenizer.padding_side == "left"
    assert read(text=TEXTS)["attention_mask"][0, 0] == 0
    read.tokenizer.padding_side = "right"
    assert read(text=TEXTS)["attention_mask"][0, 0] == 1
    read = OwlfuseProcessor.from_pretrained(tmp_path, padding_side="right")
    assert read(text=TEXTS)["attention_mask"][0, 0] == 1


def test_a_picture_is_the_same_by_path_by_bytes_and_by_url(processor, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(path)
    data = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.png"
        for picture in (str(path), data, url):
            # transparent pixels on white
            assert processor.image_processor(picture)["pixel_values"].unique().tolist() == [1.0]
        server.shutdown()


def test_a_picture_of_pil_is_turned_upright_as_one_of_a_file_is(processor, tmp_path):
    picture = Image.new("RGB", (40, 40), "red")
    picture.paste("blue", (0, 0, 40, 20))
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    by_path = processor(images=str(tmp_path / "a.png"), text="<image>")["pixel_values"]
    with Image.open(tmp_path / "a.png") as opened:
        assert processor(images=opened, text="<image>")["pixel_values"].equal(by_path)
        assert opened.getexif()[274] == 6  # the user's own stays as it is


@pytest.mark.parametrize(
    ("texts", "counts", "fits"),
    [
        (["<image><image> same?", "<image> what?"], [1, 2], False),
        (["<image><image> same?", "<image> what?"], [2, 1], True),
        (["no picture", "<image> what?"], [1, 0], False),
        (["<image> a <image>"], [1, 1], True),
    ],
)
def test_lists_of_pictures_belong_to_their_texts(processor, texts, counts, fits):
    rows = [[Image.new("RGB", (4, 4))] * count for count in counts]
    if fits:
        assert len(processor(images=rows, text=texts)["pixel_values"]) == sum(counts)
    else:
        with pytest.raises(DataError, match="the lists of images"):
            processor(images=rows, text=texts)
