"""What lmms-eval's requests become, and how they are answered: all that needs no lmms-eval."""

import sys
import tomllib
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import owlfuse.evaluation.lmms
from helpers import REPO
from owlfuse.artifacts.load import load_exported
from owlfuse.core.errors import DataError
from owlfuse.evaluation.benchmarks.answering import LoadedModel
from owlfuse.evaluation.lmms.answers import Cuts, Options, Request, answer, batches
from owlfuse.evaluation.lmms.likelihoods import Likelihoods
from owlfuse.evaluation.lmms.prompts import PromptMaker
from owlfuse.serving.chat import Conversation

COLORS = ("red", "green", "blue")
ASKED = [
    ("What is in the image?", ["red"]),
    ("One: <image>\nAnother: <image>\nWhich word?", ["green", "blue"]),
    ("Say a word.", []),
    ("What is in the image? Answer the question.", ["blue", "red", "green"]),
    ("<image>\nWhich?", ["green"]),
]
"""Text and pictures: one, several, none, and pictures before the text or in it."""
ESCAPED = [(r"Say \<image> after <image>.", ["red"]), (r"What is \<image>?", [])]
"""The word <image>, beside a picture and without one."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The files of COLORS."""
    folder = tmp_path_factory.mktemp("pictures")
    for color in COLORS:
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
    return folder


@pytest.fixture(scope="module")
def loaded_models(make_model):
    """A model with hyperattention, and one whose pictures take several positions."""
    return [
        LoadedModel(make_model(fusion), "float32", torch.device("cpu"))
        for fusion in ("hyperattention-adaptive", "concat")
    ]


@pytest.fixture(params=[0, 1], ids=["hyperattention", "concat"])
def loaded(request, loaded_models):
    return loaded_models[request.param]


def prompts(pictures, asked=ASKED):
    """Prompts; a visual is a picture of PIL or a path."""
    made = []
    for number, (text, colors) in enumerate(asked):
        paths = [pictures / f"{color}.png" for color in colors]
        visuals = [Image.open(path) if i % 2 else str(path) for i, path in enumerate(paths)]
        made.append(PromptMaker().question(f"document {number}", text, visuals or None))
    return made


def answered(loaded, made, options, batch_size, seed=0, turns=None):
    requests = [
        Request(one.name, len(one.name), lambda one=one: one, options, turn)
        for one, turn in zip(made, turns or [0] * len(made))
    ]
    answers = {}
    for places in batches(requests, batch_size):
        answers.update(
            zip(
                places,
                answer(loaded, [requests[place] for place in places], seed, Cuts()),
                strict=True,
            )
        )
    return [answers[place] for place in range(len(made))]


def test_answers_are_those_of_the_chat_for_any_batch_size(loaded, pictures):
    made = prompts(pictures, ASKED + ESCAPED)
    expected = []
    for text, colors in ASKED + ESCAPED:
        conversation = Conversation(
            loaded.model, loaded.processor, max_new_tokens=6, do_sample=False
        )
        for color in colors:
            conversation.show(str(pictures / f"{color}.png"))
        expected.append(conversation.ask(text, lambda piece: None).strip())
    assert len(set(expected)) == len(expected)
    for batch_size in (1, 2, 5):
        assert answered(loaded, made, Options(max_new_tokens=6), batch_size) == expected


def test_the_word_image_in_a_prompt_or_answer_is_measured_as_a_word(loaded_models, pictures):
    measure = Likelihoods(loaded_models[1])
    for prompt in prompts(pictures, ESCAPED):
        encoded = measure.encode(prompt, "an <image> too")
        assert (
            int(encoded.placeholder.sum())
            == len(prompt.pictures) * measure.encoder.tokens_per_image
        )
        text = measure.encoder.tokenizer.decode(encoded.input_ids[~encoded.placeholder])
        assert text.count("<image>") == 2
        assert (
            measure.encoder.tokenizer.decode(encoded.labels[encoded.labels != -100]).strip()
            == "an <image> too"
        )


def reference(loaded, prompt, ids):
    """Of one answer's ids alone, by a loop in float64."""
    text = loaded.processor.apply_chat_template(prompt.messages, add_generation_prompt=True)
    inputs = loaded.processor(images=prompt.pictures, text=text)
    row = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    with torch.no_grad():
        logits = (
            loaded.model(input_ids=row, pixel_values=inputs.get("pixel_values"))
            .logits[0]
            .log_softmax(-1)
        )
    steps = list(zip(logits[-len(ids) - 1 : -1], ids, strict=True))
    return sum(float(step[token]) for step, token in steps), all(
        int(step.argmax()) == token for step, token in steps
    )


def test_a_log_likelihood_is_the_sum_over_the_answers_tokens_for_any_batch_size(loaded, pictures):
    made, words = (
        prompts(pictures),
        ["red", " no: it is not", "question", "a single word", "Answer"],
    )
    measure = Likelihoods(loaded)
    items = [measure.encode(prompt, word) for prompt, word in zip(made, words, strict=True)]
    # the chat template writes a space before an answer, which the model has to write too
    answers = [
        loaded.processor.tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]
        for word in words
    ]
    text = loaded.processor.apply_chat_template(made[0].messages, add_generation_prompt=True)
    greedy = loaded.generate(
        loaded.processor(images=made[0].pictures, text=text), max_new_tokens=3, do_sample=False
    )[0]
    begun = torch.cat([items[0].input_ids[: -len(answers[0])], greedy])
    labels = torch.cat([torch.full((len(begun) - len(greedy),), -100), greedy])
    placeholder = F.pad(items[0].placeholder[: -len(answers[0])], (0, len(greedy)))
    items.append(replace(items[0], input_ids=begun, labels=labels, placeholder=placeholder))
    made, answers = [*made, made[0]], [*answers, greedy.tolist()]
    found = [
        [
            pair
            for start in range(0, len(items), size)
            for pair in measure.measure(items[start : start + size])
        ]
        for size in (1, 4, 9)
    ]
    loaded.model.double()
    expected = [reference(loaded, prompt, ids) for prompt, ids in zip(made, answers, strict=True)]
    loaded.model.float()
    assert [same for _, same in expected] == [False] * 5 + [True]
    for pairs in found:
        assert [number for number, _ in pairs] == pytest.approx(
            [number for number, _ in expected], rel=1e-4
        )
        assert [same for _, same in pairs] == [same for _, same in expected]


def test_sampling_is_known_by_the_request_and_not_by_its_batch(loaded_models, pictures):
    loaded = loaded_models[0]
    made, options = (
        prompts(pictures),
        Options.of({"do_sample": True, "temperature": 1.5, "max_new_tokens": 4}, "task"),
    )
    once = answered(loaded, made, options, 1)
    assert answered(loaded, made[::-1], options, 4) == once[::-1]
    assert answered(loaded, made, options, 1, seed=1) != once
    assert answered(loaded, made, options, 1, turns=[1] * len(made)) != once


def test_an_answer_ends_before_the_first_of_until_and_where_the_model_has_no_more_positions(
    loaded_models, pictures, monkeypatch
):
    loaded = loaded_models[1]
    made = prompts(pictures)
    whole = answered(loaded, made, Options(max_new_tokens=12), 5)
    ended = answered(loaded, made, Options(max_new_tokens=12, until=("zzz", whole[0][2:4])), 5)
    assert ended[0] == whole[0][: whole[0].index(whole[0][2:4])].strip()
    assert all(text.startswith(short) for text, short in zip(whole, ended, strict=True))
    requests = [
        Request(one.name, 0, lambda one=one: one, Options(max_new_tokens=12)) for one in made
    ]
    used = Likelihoods(loaded)
    lengths = [len(used.encode(one, "a").input_ids) - 1 for one in made]
    monkeypatch.setattr(loaded, "max_positions", max(lengths) + 3)
    cuts = Cuts()
    texts = answer(loaded, requests, 0, cuts)
    alone = [answer(loaded, [request], 0, Cuts())[0] for request in requests]
    assert texts == alone
    assert cuts.positions >= 1
    assert "cut where the model has no more positions" in cuts.describe()[0]
    # a table of positions has no row behind the last one
    read = []
    hook = loaded.model.model.llm.register_forward_pre_hook(
        lambda llm, _, given: read.append(int(given["position_ids"].max())), with_kwargs=True
    )
    answer(loaded, requests, 0, Cuts())
    hook.remove()
    assert max(read) < loaded.max_positions
    assert len(texts[lengths.index(max(lengths))]) < len(whole[lengths.index(max(lengths))])
    monkeypatch.setattr(loaded, "max_positions", max(lengths))
    with pytest.raises(
        DataError, match=f"takes {max(lengths)} positions, and the model has {max(lengths)}"
    ):
        answer(loaded, requests, 0, Cuts())


@pytest.mark.parametrize(
    ("given", "sampled", "arguments"),
    [
        ({}, False, {"num_beams": 1}),
        (
            {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            False,
            {"num_beams": 1},
        ),
        ({"temperature": 0.0, "do_sample": True}, False, {"num_beams": 1}),
        ({"temperature": 0.7}, True, {"num_beams": 1, "temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False, "top_p": None}, False, {"num_beams": 1}),
        ({"do_sample": True, "top_k": 3}, True, {"num_beams": 1, "temperature": 1.0, "top_k": 3}),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, False, {"num_beams": 3}),
    ],
)
def test_a_temperature_decides_whether_an_answer_is_sampled(given, sampled, arguments):
    options = Options.of(given, "task")
    assert dict(options.arguments) == {**arguments, "do_sample": sampled}
    assert options.sampled == sampled


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"max_new_token": 3},
            "task: generation_kwargs: max_new_token: no such key; did you mean 'max_new_tokens'?",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"until": 3}, "until is 3, expected a text or a list of texts"),
        ({"stop_sequences": ["a", 3]}, "stop_sequences is ['a', 3], expected a text or a list"),
    ],
)
def test_a_wrong_generation_key_is_told(given, told):
    with pytest.raises(DataError) as error:
        Options.of(given, "task")
    assert told in str(error.value)


def test_pictures_stand_where_the_text_or_the_messages_put_them(pictures):
    red, blue = Image.open(pictures / "red.png"), Image.open(pictures / "blue.png")
    before = PromptMaker().question("one", "Which?", [[red], blue])
    inside = PromptMaker().question("two", "A <image>, a <image>?", [red, blue])
    parts = [
        {"type": "text", "text": "A "},
        {"type": "image", "url": red},
        {"type": "text", "text": "?"},
    ]
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]
    chat = PromptMaker().chat("three", turns)
    kinds = [
        [part["type"] for part in made.messages[-1]["content"]] for made in (before, inside, chat)
    ]
    assert kinds == [
        ["image", "image", "text"],
        ["text", "image", "text", "image", "text"],
        ["text", "image", "text"],
    ]
    assert [picture.getpixel((0, 0)) for picture in before.pictures] == [(255, 0, 0), (0, 0, 255)]
    assert chat.messages[0] == {
        "role": "system",
        "content": [{"type": "text", "text": "Be short."}],
    }


def test_what_cannot_be_shown_is_told_with_its_document(pictures, monkeypatch):
    maker, red = PromptMaker(), Image.open(pictures / "red.png")
    with pytest.raises(
        DataError, match="document 3: the text has 1 <image> and 2 pictures are shown with it"
    ):
        maker.question("document 3", "a <image>", [red, red])
    with pytest.raises(
        DataError,
        match="document 3: a visual of the type audio, and this model takes pictures and videos",
    ):
        maker.question("document 3", "a", [{"type": "audio", "array": [0.1]}])
    with pytest.raises(DataError, match="document 3: no image none.png in"):
        maker.question("document 3", "a", str(pictures / "none.png"))
    with pytest.raises(DataError, match="document 3: a part of the type audio"):
        maker.chat("document 3", [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])
    monkeypatch.setattr("owlfuse.evaluation.lmms.prompts.MAX_PIXELS", 1000)
    with pytest.raises(
        DataError, match="document 3: a picture has 1,200 pixels, over the limit of 1,000"
    ):
        maker.question("document 3", "a", red)


def test_a_video_is_as_many_pictures_as_frames_are_asked_for(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for shade in range(0, 240, 20):
            file.mux(
                stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), (shade, 0, 0))))
            )
        file.mux(stream.encode(None))
    made = PromptMaker(frames=3).question(
        "film", "Before <image> and after", [str(tmp_path / "film.mp4")]
    )
    assert [part["type"] for part in made.messages[0]["content"]] == [
        "text",
        "image",
        "image",
        "image",
        "text",
    ]
    reds = [picture.getpixel((16, 16))[0] for picture in made.pictures]
    assert reds == sorted(set(reds))


def test_another_dtype_leaves_the_rotary_frequencies_as_they_are(model):
    exported = load_exported(model)[0]
    known = {
        name: buffer.clone()
        for name, buffer in exported.named_buffers()
        if name.endswith("inv_freq")
    }
    assert known
    exported.to(torch.bfloat16)
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.bfloat16}
    for name, buffer in exported.named_buffers():
        if name in known:
            assert torch.equal(buffer, known[name])
    loaded = LoadedModel(model, "bfloat16", torch.device("cpu"))
    assert answered(
        loaded, [PromptMaker().question("one", "Which?", None)], Options(max_new_tokens=2), 1
    )


def test_the_door_is_declared_and_imports_no_lmms_eval():
    door = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"][
        "lmms_eval.models"
    ]
    assert door == {"owlfuse": "owlfuse.evaluation.lmms:manifests"}
    assert callable(owlfuse.evaluation.lmms.manifests)
    # this file has imported all of owlfuse.evaluation.lmms but its models
    assert "lmms_eval" not in sys.modules


def test_answers_that_do_not_end_within_max_new_tokens_are_counted(loaded_models, pictures):
    loaded = loaded_models[1]
    made = prompts(pictures)
    cuts = Cuts()
    requests = [
        Request(one.name, 0, lambda one=one: one, Options(max_new_tokens=2)) for one in made
    ]
    answer(loaded, requests, 0, cuts)
    assert (cuts.positions, cuts.tokens) == (0, len(made))
    assert "did not end within the task's max_new_tokens" in cuts.describe()[0]


def test_the_blank_line_that_lmms_eval_writes_where_a_task_says_nothing_ends_no_answer():
    options = Options.of({"until": ["\n\n"]}, "task")
    assert options.cut_at_end("First, 7.\n\nThe answer is 7.") == "First, 7.\n\nThe answer is 7."
    assert Options.of({"until": ["\n\n", "Q:"]}, "task").until == ("Q:",)


@pytest.mark.parametrize("part", [{"video_start": 1.0}, {"bbox": [0, 0, 1, 1]}])
def test_a_piece_of_a_visual_is_refused(pictures, part):
    visual = {"type": "image", "path": str(pictures / "red.png"), **part}
    with pytest.raises(DataError, match=f"a visual has '{next(iter(part))}'"):
        PromptMaker().question("one", "What?", visual)
    message = {"role": "user", "content": [{**visual, "url": str(pictures / "red.png")}]}
    with pytest.raises(DataError, match=f"a visual has '{next(iter(part))}'"):
        PromptMaker().chat("one", [message])


def test_a_picture_in_memory_is_turned_as_one_of_a_file_is(tmp_path):
    picture = Image.new("RGB", (30, 60), "red")
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    maker = PromptMaker()
    sizes = [
        maker.question("one", "What?", visual).pictures[0].size
        for visual in (str(tmp_path / "a.jpg"), Image.open(tmp_path / "a.jpg"))
    ]
    assert sizes == [(60, 30)] * 2
