"""Benchmarks of a model whose processor cuts pictures into tiles."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from owlfuse.artifacts import load
from owlfuse.artifacts.load import load_processor
from owlfuse.core.errors import DataError
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.media.pictures import Pictures
from owlfuse.evaluation.benchmarks.answering import QuestionDataset
from owlfuse.evaluation.benchmarks.exact import ExactMatch
from owlfuse.evaluation.benchmarks.perplexity import ChatDataset, Perplexity

TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "Red."}]


@pytest.fixture
def processor(make_model):
    """Of a model whose pictures take positions among the text, as a user has it tile them."""
    processor = load_processor(make_model("concat"))
    processor.tile = True
    return processor


@pytest.fixture
def file(tmp_path):
    """A chat about a picture that becomes a global view and four tiles."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": TURNS}]))
    return path


def test_perplexity_is_of_the_chat_as_training_has_it(processor, file):
    dataset = ChatDataset(task := Perplexity(file=file), task.questions()[0], processor, None)
    _, _, encoded = dataset[0]
    source = LLaVA(str(file), tile=1.0)
    sample = source[0]
    (views,) = Pictures(processor.image_processor.preprocessing())(sample, source)
    encoder = ChatEncoder(processor.tokenizer, processor.tokens_per_image)
    expected = encoder.encode(sample, [len(views)])
    assert len(views) == 5
    assert torch.equal(encoded.input_ids, expected.input_ids)
    assert torch.equal(torch.stack(encoded.pixel_values), torch.stack(views))


def test_the_length_of_a_prompt_counts_every_tile(processor, file):
    task = ExactMatch(file=file)
    questions = task.questions()[0]
    _, text, pictures = QuestionDataset(task, questions, processor, None)[0]
    length = processor(images=pictures, text=text)["input_ids"].shape[1] + task.max_new_tokens
    assert QuestionDataset(task, questions, processor, length)[0]
    with pytest.raises(DataError, match=f"and the model has {length - 1}"):
        QuestionDataset(task, questions, processor, length - 1)[0]


def test_a_run_that_was_trained_with_tiles_says_that_it_is_shown_none(monkeypatch, caplog):
    sources = {"text": {}, "whole": {"tile": 0.0}, "cut": {"tile": 0.5}}
    monkeypatch.setattr(load, "read_run", lambda folder: {"data": {"sources": sources}})
    monkeypatch.setattr(load, "run_tokenizer", lambda folder, data: [])
    monkeypatch.setattr(load, "load_run_model", lambda *given: (nn.Identity(), {}))
    monkeypatch.setattr(load, "check_not_edited", lambda *given: None)
    load.load_run(Path("run"), checkpoint=Path("step_1.ckpt"))
    assert "run was trained with tiles (data.sources.cut.tile), and whole pictures" in caplog.text
    del sources["cut"]
    caplog.clear()
    load.load_run(Path("run"), checkpoint=Path("step_1.ckpt"))
    assert caplog.text == ""
