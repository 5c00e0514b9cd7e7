"""Chats over the length: an error, skipped, or cut by whole turns, and counted."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bad_pictures import noise
from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.truncation import first_turns
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.llava import LLaVA
from owlfuse.model.vision.backbone import Preprocessing

IMAGE, ANSWER = {"type": "image"}, [{"type": "text", "text": "red"}]


def chat(words, pictures=None, system=False, last=False):
    """A chat of questions with so many words and pictures each."""
    pictures = pictures or [0] * len(words)
    messages = (
        [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}] if system else []
    )
    for count, images in zip(words, pictures):
        messages.append(
            {
                "role": "user",
                "content": [IMAGE] * images + [{"type": "text", "text": "what " * count}],
            }
        )
        messages.append({"role": "assistant", "content": ANSWER})
    if last:
        messages.append({"role": "user", "content": [{"type": "text", "text": "And?"}]})
    return Sample("s:1", "s", messages, [f"{i}.png" for i in range(sum(pictures))])


@pytest.fixture(scope="module")
def tokenizer(shapes):
    return AutoTokenizer.from_pretrained(shapes / "tokenizer")


COUNTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=8)


@pytest.mark.slow
def test_as_many_whole_turns_are_kept_as_fit_with_their_images(tokenizer):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(COUNTS, st.booleans(), st.booleans(), st.integers(20, 120))
    def check(counts, system, last, limit):
        sample = chat(*zip(*counts), system, last)
        whole = ChatEncoder(tokenizer, 3, 10**6)
        lengths = [
            len(whole.encode(first_turns(sample, kept)).input_ids)
            for kept in range(1, len(counts) + 1)
        ]
        complete = len(whole.encode(sample).input_ids)
        encoder = ChatEncoder(tokenizer, 3, limit)
        kept = sum(length <= limit for length in lengths)
        if complete <= limit:
            assert torch.equal(
                encoder.encode(sample, on_length="truncate_turns").input_ids,
                whole.encode(sample).input_ids,
            )
        elif not kept:
            with pytest.raises(
                DataError, match=f"sample s:1 is {lengths[0]} tokens long with its first turn alone"
            ):
                encoder.encode(sample, on_length="truncate_turns")
        else:
            encoded = encoder.encode(sample, on_length="truncate_turns")
            assert torch.equal(encoded.input_ids, whole.encode(first_turns(sample, kept)).input_ids)
            # a question without an answer at the end is counted as one
            assert encoded.turns_removed == max(1, len(counts) - kept)
            assert len(encoded.image_positions) == sum(images for _, images in counts[:kept])

    check()


@pytest.mark.parametrize("learned", [0, 1, 2, 3])
def test_turns_of_which_nothing_is_learned_are_not_tried_alone(tokenizer, learned):
    sample = chat([3, 3, 3, 3])
    for message in sample.messages[1 : 2 * learned : 2]:
        message["supervised"] = False
    whole = ChatEncoder(tokenizer, 1, 10**6)
    expected = whole.encode(first_turns(sample, max(3, learned + 1)))
    length = len(expected.input_ids)
    if learned < 3:
        encoded = ChatEncoder(tokenizer, 1, length).encode(sample, on_length="truncate_turns")
        assert torch.equal(encoded.input_ids, expected.input_ids)
        assert encoded.turns_removed == 1
    least = len(whole.encode(first_turns(sample, learned + 1)).input_ids)
    part = "first turn alone" if not learned else f"first {learned + 1} turns, the last alone learn"
    with pytest.raises(DataError, match=f"sample s:1 is {least} tokens long with its {part}"):
        ChatEncoder(tokenizer, 1, least - 1).encode(sample, on_length="truncate_turns")


def test_a_chat_without_an_answered_question_cannot_be_cut(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m.role != 'assistant' else '<|assistant|>' }}"
        "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ '<|end|>' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )
    sample = chat([30])
    call = {"type": "function", "function": {"name": "zoom", "arguments": {}}}
    sample.messages[1]["tool_calls"] = [call]
    sample.messages.append({"role": "tool", "content": ANSWER})
    with pytest.raises(DataError, match="s:1 is [0-9]+ tokens long, over max_length of 20"):
        ChatEncoder(tokenizer, 1, 20).encode(sample, on_length="truncate_turns")


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_without_cutting_a_longer_chat_is_an_error_with_both_numbers(tokenizer, policy):
    with pytest.raises(
        DataError, match="sample s:1 is [0-9]+ tokens long, over max_length of 20"
    ) as raised:
        ChatEncoder(tokenizer, 1, 20).encode(chat([30]), on_length=policy)
    assert raised.value.leave_out == (policy == "skip")


@pytest.fixture
def file(tmp_path):
    """Eight chats of two questions each with a picture; the fourth has a long second question,
    the sixth a long first one."""
    noise().save(tmp_path / "a.png")
    records = []
    for number in range(8):
        asked = [
            "<image>\nWhat?" + " what" * 60 * (number == 5),
            "<image>\nAnd?" + " what" * 60 * (number == 3),
        ]
        conversations = [
            t
            for q in asked
            for t in ({"from": "human", "value": q}, {"from": "gpt", "value": "red"})
        ]
        records.append(
            {"id": f"r{number}", "image": ["a.png", "a.png"], "conversations": conversations}
        )
    (tmp_path / "long.json").write_text(json.dumps(records))
    return str(tmp_path / "long.json")


def only_batch(shapes, file, on_length, on_error="error", workers=0):
    source = LLaVA(file, on_error=on_error)
    data = ChatData(
        str(shapes / "tokenizer"),
        {"long": source},
        {},
        8,
        max_length=60,
        on_length=on_length,
        workers=workers,
    )
    data.bind(Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear"), 2)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, max_steps=1, global_step=0)
    (batch,) = data.train_dataloader()
    return batch


@pytest.mark.parametrize("on_length", ["error", {}, {"long": "error"}])
def test_error_leaves_it_to_the_policy_for_wrong_samples(shapes, file, on_length):
    with pytest.raises(DataError, match="sample long:r[35] is [0-9]+ tokens long"):
        only_batch(shapes, file, on_length)
    batch = only_batch(shapes, file, on_length, "skip")
    assert sorted(sample for _, sample, _ in batch.skipped) == ["long:3", "long:5"]


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_leaves_longer_samples_out_and_counts_them(shapes, file, workers):
    batch = only_batch(shapes, file, {"long": "skip"}, workers=workers)
    assert len(batch.ids) == 6
    assert sorted(sample for _, sample, _ in batch.skipped) == ["long:3", "long:5"]
    assert "over max_length of 60" in batch.skipped[0][2]


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_samples_are_delivered_with_the_images_of_what_is_left_and_counted(
    shapes, file, workers
):
    batch = only_batch(shapes, file, "truncate_turns", "skip", workers)
    assert batch.truncated == [("long", "long:r3", 1)]
    assert [sample for _, sample, _ in batch.skipped] == ["long:5"]
    assert "with its first turn alone" in batch.skipped[0][2]
    row = batch.ids.index("long:r3")
    assert (batch.image_index[row] >= 0).sum() == 1
    assert len(batch.pixel_values) == 6 * 2 + 1


def test_where_the_first_turn_does_not_fit_it_is_a_wrong_sample(shapes, file):
    with pytest.raises(
        DataError,
        match=(
            "sample long:r5 is [0-9]+ tokens long with its first turn alone, over max_length of 60"
        ),
    ):
        only_batch(shapes, file, "truncate_turns", "error")
