"""Chats become ids and labels: what is supervised, how placeholders grow, and what is refused."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoTokenizer

from owlfuse.core.errors import DataError
from owlfuse.core.packages import MissingPackage
from owlfuse.core.types import Sample
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import load_tokenizer
from owlfuse.evaluation.questions import question_samples

CHATML = (
    "{% for message in messages %}{{ '<|user|>' if message.role == 'user' else '<|system|>' if "
    "message.role == 'system' "
    "else '<|assistant|>' }}\n{{ message.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {{ message.content }} "
    "{% else %}ASSISTANT: {{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def text(*parts):
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


def chat(*turns, images=()):
    roles = ("user", "assistant")
    messages = [
        {"role": roles[i % 2], "content": text(*([t] if isinstance(t, str) else t))}
        for i, t in enumerate(turns)
    ]
    return Sample("s:1", "s", messages, list(images))


@pytest.fixture
def tokenizer(shapes):
    return AutoTokenizer.from_pretrained(shapes / "tokenizer")


def supervised_turns(encoder, encoded):
    """The decoded text of each run of supervised tokens."""
    turns, run = [], []
    for label in [*encoded.labels.tolist(), -100]:
        if label != -100:
            run.append(label)
        elif run:
            turns.append(encoder.tokenizer.decode(run))
            run = []
    return turns


@pytest.mark.parametrize("template", [None, CHATML, VICUNA])
def test_each_assistant_turn_and_its_end_mark_are_supervised_and_nothing_else(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    encoder = ChatEncoder(tokenizer, 1)
    sample = chat(
        (None, "\nWhat color is the star?"),
        "red",
        "Is there a red star?",
        "yes, one",
        "Spell cat.",
        "c a t",
        images=["a"],
    )
    turns = supervised_turns(encoder, encoder.encode(sample))
    assert [turn.strip() for turn in turns] == ["red<|end|>", "yes, one<|end|>", "c a t<|end|>"]


def test_answers_that_equal_the_question_are_told_apart(tokenizer):
    encoder = ChatEncoder(tokenizer, 1)
    encoded = encoder.encode(chat("red", "red", "red", "red"))
    assert supervised_turns(encoder, encoded) == ["red<|end|>", "red<|end|>"]
    assert (encoded.labels != -100).sum() == 4


def test_labels_are_the_ids_where_they_are_supervised(tokenizer):
    encoded = ChatEncoder(tokenizer, 1).encode(chat("What is 2 + 3?", "5"))
    mask = encoded.labels != -100
    assert torch.equal(encoded.labels[mask], encoded.input_ids[mask])


@pytest.mark.parametrize("tokens_per_image", [1, 5])
def test_each_placeholder_grows_to_the_tokens_per_image(tokenizer, tokens_per_image):
    sample = chat((None, "\nWhat is here? ", None, " and here?"), "red", images=["a", "b"])
    encoded = ChatEncoder(tokenizer, tokens_per_image).encode(sample)
    plain = ChatEncoder(tokenizer, 1).encode(sample)
    assert encoded.placeholder.sum() == 2 * tokens_per_image
    for position in encoded.image_positions:
        assert encoded.placeholder[position : position + tokens_per_image].all()
        assert not encoded.placeholder[position - 1]
    assert torch.equal(encoded.input_ids[~encoded.placeholder], plain.input_ids[~plain.placeholder])


def test_a_prompt_is_the_chat_up_to_its_answer(tokenizer):
    encoder = ChatEncoder(tokenizer, 3)
    whole = encoder.encode(chat((None, "\nWhat?"), "red", images=["a"]))
    prompt = encoder.encode_prompt(
        Sample("s:1", "s", [{"role": "user", "content": text(None, "\nWhat?")}], ["a"])
    )
    assert torch.equal(whole.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert (whole.labels[: len(prompt.input_ids)] == -100).all()
    assert whole.labels[len(prompt.input_ids)] != -100


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            chat((None, "What?", None), "red", images=["a"]),
            "sample s:1 has 2 <image> placeholders and 1 images",
        ),
        (chat("What?", "red", images=["a"]), "sample s:1 has 0 <image> placeholders and 1 images"),
        (
            chat("Say <|end|> now", "red"),
            r"sample s:1 holds the tokenizer's control token <\|end\|>",
        ),
        (chat("What?", "  "), "sample s:1: turn 2 is an empty answer"),
        (chat("What?"), "sample s:1 has no assistant turn"),
        (Sample("s:1", "s", []), "sample s:1 has no messages"),
        (chat("what " * 300, "red"), "sample s:1 is 6.. tokens long, over max_length of 64"),
    ],
)
def test_a_wrong_sample_is_named_with_what_was_found(tokenizer, sample, message):
    with pytest.raises(DataError, match=message):
        ChatEncoder(tokenizer, 1, max_length=64).encode(sample)


def test_a_template_that_changes_earlier_turns_is_an_error_and_not_a_wrong_mask(tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token if m.role "
        "== 'assistant' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="before turn 4 otherwise alone than in the whole"):
        ChatEncoder(tokenizer, 1).encode(chat("a", "b", "c", "d"))


BARE = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"


def test_a_token_across_the_border_of_an_answer_is_split_as_generation_splits_it(tokenizer):
    tokenizer.chat_template = BARE
    encoder = ChatEncoder(tokenizer, 1)
    whole = tokenizer("What color is it?", add_special_tokens=False)["input_ids"]
    encoded = encoder.encode(chat("What col", "or is it?"))
    assert encoded.input_ids.tolist() != whole
    assert tokenizer.decode(encoded.input_ids) == "What color is it?<|end|>"
    assert supervised_turns(encoder, encoded) == ["or is it?<|end|>"]


def test_a_token_across_the_border_that_cannot_be_split_is_an_error(tokenizer, monkeypatch):
    tokenizer.chat_template = BARE
    monkeypatch.setattr("owlfuse.data.chat.supervision.ANCHORS", ())
    with pytest.raises(DataError, match="stands across the border of an answer"):
        ChatEncoder(tokenizer, 1).encode(chat("What col", "or is it?"))


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ChatEncoder(tokenizer, 1)


def test_questions_of_a_chat_are_asked_one_by_one_each_with_the_picture():
    sample = chat((None, "\nWhat color?"), "red", "How many?", "2", images=["a.png"])
    sample.metadata["kinds"] = ["color", "count"]
    questions = question_samples(sample)
    assert [(answer, kind) for _, answer, kind in questions] == [("red", "color"), ("2", "count")]
    for question, _, _ in questions:
        assert len(question.messages) == 1
        assert question.messages[0]["content"][0] == {"type": "image"}
        assert question.images == ["a.png"]


def test_pictures_that_came_before_a_question_stand_before_it_and_its_own_stay_in_its_text():
    sample = chat(
        (None, "\nWhat?"),
        "red",
        ("Is ", None, " like ", None, "?"),
        "no",
        "How many?",
        "3",
        images=["a", "b", "c"],
    )
    first, second, third = (question for question, _, _ in question_samples(sample))
    image = {"type": "image"}
    assert first.messages[0]["content"] == text(None, "\nWhat?")
    assert second.messages[0]["content"] == [image, *text("\nIs ", None, " like ", None, "?")]
    assert third.messages[0]["content"] == [image, image, image, *text("\nHow many?")]
    assert [len(question.images) for question in (first, second, third)] == [1, 3, 3]


def test_a_question_has_the_pictures_of_the_system_turn_and_videos_too():
    sample = chat(({"type": "video"},), "red", ("Is ", None, "?"), "no", images=["a", "b"])
    sample.messages[0]["content"] = [{"type": "video"}, {"type": "text", "text": "?"}]
    sample.messages.insert(0, {"role": "system", "content": text("Like ", None)})
    sample.videos = ["v"]
    first, second = (question for question, _, _ in question_samples(sample))
    assert (first.images, first.videos) == (["a"], ["v"])
    assert (second.images, second.videos) == (["a", "b"], ["v"])
    assert [part["type"] for part in second.messages[1]["content"]] == [
        "video",
        "text",
        "image",
        "text",
    ]


def test_each_placeholder_grows_by_its_count_of_views(tokenizer):
    encoder = ChatEncoder(tokenizer, 2)
    sample = chat((None, "\nWhat?"), "red", ("Is ", None, "?"), "no", images=["a", "b"])
    plain, grown = encoder.encode(sample), encoder.encode(sample, [3, 1])
    assert len(grown.input_ids) == len(plain.input_ids) + 4
    first, second = plain.image_positions
    assert grown.image_positions == [first, first + 2, first + 4, second + 4]
    assert torch.equal(grown.labels[~grown.placeholder], plain.labels[~plain.placeholder])
    assert (grown.labels[grown.placeholder] == -100).all()
    prompt = Sample("s:1", "s", sample.messages[:1], ["a"])
    assert len(encoder.encode_prompt(prompt, [3]).image_positions) == 3
    with pytest.raises(DataError, match="over max_length of 16"):
        ChatEncoder(tokenizer, 2, max_length=16).encode(sample, [7, 1])


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"model": {"type": "BPE", "vocab": 1}}',
        '{"added_tokens": [], "model": {"type": "BPE", "vocab": 1}}',
    ],
)
def test_a_damaged_tokenizer_is_one_line_with_its_folder(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=rf"^tokenizer: {tmp_path}: .") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="it is installed")
def test_a_sentencepiece_model_alone_asks_for_the_package_that_reads_it(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(MissingPackage, match="needs the package sentencepiece"):
        load_tokenizer(str(tmp_path))
