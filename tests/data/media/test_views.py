"""Several pictures, tiled pictures and videos through the DataModule, from files to the model's
answer."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import FUSIONS, IMAGE_SIZE, model_node
from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.media.pictures import FIRST_PAGE, Pictures, visual_parts
from owlfuse.data.media.tiles import best_grid
from owlfuse.evaluation.metrics import answer_questions, questions_of
from owlfuse.evaluation.validation import Evaluation
from owlfuse.model.multimodal import build_model
from owlfuse.model.vision.backbone import Preprocessing

PREPROCESS = Preprocessing((IMAGE_SIZE, IMAGE_SIZE), (0.5,) * 3, (0.5,) * 3, "bilinear")
TOKENS = 2
SIZES = [(40, 40), (120, 40), (40, 160), (90, 60), (50, 50), (33, 100)]


def value_of(picture):
    """The level of grey of picture k, different for each."""
    return 20 + 30 * picture


def record(number, *turns, **fields):
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(turns)]
    return {"id": str(number), "conversations": turns, **fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six PNGs, each of one level of grey, and chats about them."""
    root = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        Image.new("RGB", size, (value_of(number),) * 3).save(root / f"{number}.png")
    names = [f"{number}.png" for number in range(len(SIZES))]
    records = [
        record(0, "<image>\nWhat color?", "red", image=names[0]),
        record(
            1, "Is <image> like <image> or <image>?", "no", image=[names[2], names[0], names[1]]
        ),
        record(
            2,
            "Say hello.",
            "hello",
            "And <image>?",
            "blue",
            "<image><image>\nBoth?",
            "yes",
            image=names[3:6],
        ),
        record(3, "Spell cat.", "c a t"),
        record(
            4,
            "<image>\nWhat?",
            "a",
            "And <image> now?",
            "b",
            "How many?",
            "2",
            image=[names[5], names[4]],
        ),
    ]
    (root / "chats.json").write_text(json.dumps(records))
    return root


def make(shapes, folder, file="chats.json", **options):
    source = {key: options.pop(key) for key in ("tile", "video") if key in options}
    sources = {"chats": LLaVA(str(folder / file), **source)}
    validation = {"chats": LLaVA(str(folder / file), **source)}
    data = ChatData(
        str(shapes / "tokenizer"),
        sources,
        validation,
        **{"global_batch_size": 5, "workers": 0, **options},
    )
    data.bind(PREPROCESS, TOKENS)
    return data


def batch_of(data, workers=0):
    data.workers = workers
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, max_steps=1, global_step=0)
    return next(iter(data.train_dataloader()))


def levels(pixels):
    """The level of grey of each image (N, 3, H, W), which has one."""
    assert (pixels == pixels[:, :1, :1, :1]).all()
    return ((pixels[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist()


def test_pictures_of_any_turn_stand_in_the_order_of_their_placeholders(shapes, folder):
    data = make(shapes, folder)
    batch = batch_of(data)
    shown = {"0": [0], "1": [2, 0, 1], "2": [3, 4, 5], "3": [], "4": [5, 4]}
    for row, name in enumerate(batch.ids):
        mine = [i for i in batch.image_index[row].tolist() if i >= 0]
        expected = shown[name.removeprefix("chats:")]
        assert (
            levels(batch.pixel_values[mine]) == [value_of(k) for k in expected]
            if mine
            else not expected
        )
        starts = batch.image_positions[row][: len(mine)].tolist()
        assert starts == sorted(starts)
        taken = batch.placeholder[row].nonzero()[:, 0].tolist()
        assert taken == [start + k for start in starts for k in range(TOKENS)]


def test_text_between_pictures_stays_where_it_is(shapes, folder):
    data = make(shapes, folder)
    encoded = data.load(data.sources["chats"][1], data.sources["chats"])
    text = data.tokenizer.decode(encoded.input_ids)
    double = "<image>" * TOKENS
    assert f"Is {double} like {double} or {double}?" in text


def views_expected(picture):
    rows, columns = best_grid(SIZES[picture], PREPROCESS.size)
    return 1 + rows * columns


def test_tiled_pictures_become_views_of_their_one_placeholder(shapes, folder):
    data = make(shapes, folder, tile=1.0)
    source = data.sources["chats"]
    plain = make(shapes, folder)
    for index, shown in enumerate([[0], [2, 0, 1], [3, 4, 5], [], [5, 4]]):
        encoded = data.load(source[index], source)
        views = [views_expected(k) for k in shown]
        values = [value_of(k) for k, count in zip(shown, views) for _ in range(count)]
        assert len(encoded.pixel_values) == len(encoded.image_positions) == sum(views)
        if shown:
            assert levels(torch.stack(encoded.pixel_values)) == values
        whole = plain.load(source[index], plain.sources["chats"])
        assert torch.equal(
            encoded.input_ids[~encoded.placeholder], whole.input_ids[~whole.placeholder]
        )
        assert torch.equal(encoded.labels[~encoded.placeholder], whole.labels[~whole.placeholder])
        # views of one picture stand without a gap, TOKENS positions each
        starts = iter(encoded.image_positions)
        for picture, count in enumerate(views):
            first = next(starts)
            offset = sum(views[:picture]) * TOKENS - picture * TOKENS
            assert first == whole.image_positions[picture] + offset
            assert [next(starts) for _ in range(count - 1)] == [
                first + TOKENS * k for k in range(1, count)
            ]


def test_the_first_view_is_the_whole_picture_and_tiles_go_row_by_row(shapes, tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32], pixels[:32, 32:], pixels[32:, :32], pixels[32:, 32:] = 40, 90, 140, 190
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "chats.json").write_text(
        json.dumps([record(0, "<image>\nWhat?", "a", image="a.png")])
    )
    data = make(shapes, tmp_path, tile=1.0)
    encoded = data.load(data.sources["chats"][0], data.sources["chats"])
    assert levels(torch.stack(encoded.pixel_values[1:])) == [40, 90, 140, 190]
    assert torch.equal(encoded.pixel_values[0], PREPROCESS(Image.fromarray(pixels)))


def test_which_samples_are_tiled_does_not_change_with_workers_or_repeats(shapes, folder):
    batches = [batch_of(make(shapes, folder, tile=0.5, seed=3), workers) for workers in (0, 0, 2)]
    for batch in batches[1:]:
        assert batch.ids == batches[0].ids
        assert torch.equal(batch.input_ids, batches[0].input_ids)
        assert torch.equal(batch.pixel_values, batches[0].pixel_values)
    counts = [
        len(batch_of(make(shapes, folder, tile=tile, seed=3)).pixel_values)
        for tile in (0.0, 0.5, 1.0)
    ]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("tile", [-0.1, 1.5, float("nan")])
def test_a_tile_that_is_no_share_is_an_error(folder, tile):
    with pytest.raises(DataError, match=r"chats.json: tile is .*, expected a share from 0 to 1"):
        LLaVA(str(folder / "chats.json"), tile=tile)


def test_a_sources_wrong_video_options_are_an_error_that_names_its_file(folder):
    with pytest.raises(
        DataError, match=r"chats.json: video: no such key: frmes; expected sampling, frames, fps"
    ):
        LLaVA(str(folder / "chats.json"), video={"frmes": 3})


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("tile", [0.0, 1.0])
@pytest.mark.fast_cases(4)
def test_a_rows_logits_do_not_depend_on_the_rows_beside_it(shapes, folder, name, tile):
    data = make(shapes, folder, tile=tile)
    model, _ = build_model(model_node(name), data.vocab_size)
    model.eval()
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    batch = batch_of(data)
    assert batch.placeholder.sum() == len(batch.pixel_values) * model.fusion.tokens_per_image
    with torch.no_grad():
        together = model(batch)
        for row in range(5):
            alone = alone_of(data, batch.ids[row])
            expected = model(alone)[0]
            mine = together[row][batch.attention_mask[row].bool()]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
            if alone.has_images:  # and the pictures matter
                alone.pixel_values = alone.pixel_values.flip(0).neg()
                assert (model(alone)[0] - expected).abs().max() > 1e-4


def alone_of(data, name):
    """A batch of one sample."""
    source = data.sources["chats"]
    index = next(i for i in range(len(source)) if source[i].id == name)
    loader = data.validation_loader("chats", batch_size=1)
    return list(loader)[index]


@pytest.mark.parametrize("name", ["concat", "modality_adaptive", "hyperattention-adaptive"])
@pytest.mark.parametrize("tile", [0.0, 1.0])
@pytest.mark.fast_cases(1)
def test_evaluation_answers_questions_about_several_pictures_alike_alone_and_in_a_batch(
    shapes, folder, name, tile
):
    data = make(shapes, folder, tile=tile)
    model, _ = build_model(model_node(name), data.vocab_size)
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    metrics, answers = Evaluation(batch_size=8, max_new_tokens=4, contact_sheet=0)(model, data)
    assert len(answers) == 9
    assert {"chats/loss", "chats/exact_match", "chats/exact_match_blank"} <= set(metrics)
    model.eval()
    questions = questions_of(data, "chats")
    alone = answer_questions(model, data, "chats", questions, 1, 4)
    assert [a.answer for a in alone] == [a.answer for a in answers]


def test_with_history_a_question_is_asked_behind_what_was_said_before_it(
    shapes, folder, monkeypatch
):
    """The prompt is what training has before the answer, to the token; without it (the default)
    no answer is given away."""
    data = make(shapes, folder)
    model, _ = build_model(model_node("concat"), data.vocab_size)
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    prompts = {}
    for history in (False, True):
        monkeypatch.setattr(
            data, "prompts", partial(noted, ChatData.prompts, data, prompts, history)
        )
        Evaluation(batch_size=1, max_new_tokens=2, contact_sheet=0, blank=False, history=history)(
            model, data
        )
    source = data.sources["chats"]
    whole = data.load(source[4], source).input_ids.tolist()
    behind, alone = prompts["chats:4#2", True], prompts["chats:4#2", False]
    assert behind == whole[: len(behind)]
    assert len(behind) > len(alone)
    assert prompts["chats:0#0", True] == prompts["chats:0#0", False]
    assert Evaluation().history is False


def noted(make_prompts, data, prompts, history, samples):
    """Notes the ids of each prompt, padding left out."""
    batch = make_prompts(data, samples)
    for name, ids, mask in zip(batch.ids, batch.input_ids, batch.attention_mask):
        prompts[name, history] = ids[mask.bool()].tolist()
    return batch


def test_placeholders_and_paths_are_matched_in_order_of_the_chat():
    parts = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "x"}, {"type": "image"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "user", "content": [{"type": "video"}]},
    ]
    sample = Sample("s:1", "s", messages, ["a", "b"], videos=["v", "w"])
    assert visual_parts(sample) == [("video", "v"), ("image", "a"), ("image", "b"), ("video", "w")]
    sample.videos = ["v"]
    with pytest.raises(DataError, match="sample s:1 has 2 <video> placeholders and 1 videos"):
        visual_parts(sample)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A clip of two seconds that goes from dark to light, a picture, and chats about both."""
    av = pytest.importorskip("av")
    root = tmp_path_factory.mktemp("clips")
    with av.open(str(root / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for index in range(20):
            picture = np.full((32, 32, 3), 10 * index + 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    Image.new("RGB", (32, 32), (250, 250, 250)).save(root / "b.png")
    records = [
        record(
            0,
            "See <video> and <image>\nWhat?",
            "a",
            "And <video>?",
            "b",
            video=["a.mp4", "a.mp4"],
            image="b.png",
        ),
        record(1, "A \\<video> tag of a page.", "yes"),
    ]
    (root / "chats.json").write_text(json.dumps(records))
    return root


@pytest.mark.parametrize("where", ["data", "source"])
def test_a_videos_frames_become_images_of_its_placeholder_in_order(shapes, clips, where):
    node = {"sampling": "uniform", "frames": 4}
    data = make(shapes, clips, **({"video": node} if where == "source" else {}))
    if where == "data":
        data = ChatData(str(shapes / "tokenizer"), data.sources, {}, video=node, workers=0)
        data.bind(PREPROCESS, TOKENS)
    source = data.sources["chats"]
    encoded = data.load(source[0], source)
    assert len(encoded.pixel_values) == len(encoded.image_positions) == 4 + 1 + 4
    found = [round(float((image.mean() * 0.5 + 0.5) * 255)) for image in encoded.pixel_values]
    frames = [20 + 10 * k for k in (2, 7, 12, 17)]
    np.testing.assert_allclose(found, [*frames, 250, *frames], atol=12)
    assert encoded.placeholder.sum() == 9 * TOKENS
    assert source[1].messages[0]["content"] == [
        {"type": "text", "text": "A <video> tag of a page."}
    ]


def test_questions_about_videos_are_answered(shapes, clips):
    data = make(shapes, clips, video={"frames": 2})
    model, _ = build_model(model_node("hyperattention-fused"), data.vocab_size)
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    metrics, answers = Evaluation(batch_size=8, max_new_tokens=2, contact_sheet=2)(model, data)
    assert [answer.id for answer in answers] == ["chats:0#0", "chats:0#1", "chats:1#0"]
    assert "chats/exact_match_blank" in metrics


def test_a_wrong_video_is_skipped_and_counted_as_any_wrong_sample(shapes, clips):
    (clips / "bad.json").write_text(
        json.dumps([record(0, "<video>\nWhat?", "a", video="gone.mp4"), record(1, "Say a.", "a")])
    )
    data = make(shapes, clips, file="bad.json", global_batch_size=2)
    data.sources["chats"].on_error = "skip"
    batch = batch_of(data)
    assert [skip[2] for skip in batch.skipped] == [
        f"sample chats:0: no video gone.mp4 in {clips} (record 1 of bad.json)"
    ]
    assert batch.ids == ["chats:1"]


def test_a_file_of_several_pages_is_counted_once_for_a_chat(tmp_path):
    pages = [Image.new("RGB", (32, 32), color) for color in ("red", "green")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    content = [{"type": "image"}, {"type": "image"}]
    sample = Sample("s", "source", [{"role": "user", "content": content}], ["a.tif", "a.tif"])
    source = SimpleNamespace(root=tmp_path, tile=0.0, video=None)
    preprocess = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert len(Pictures(preprocess)(sample, source)) == 2
    assert sample.notes == [FIRST_PAGE]
