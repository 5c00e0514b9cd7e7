"""Train, evaluate, export, chat and resume over tokenizers as families of LLMs have them: none
has <image> or a pad token."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from owlfuse.__main__ import main

sys.path.insert(0, str(Path(__file__).parent / "data"))
from family_templates import FAMILIES, family_tokenizer

pytestmark = pytest.mark.slow

EXPERIMENT = """# @package _global_
defaults:
  - /data/source@data.sources.train: llava
  - /data/source@data.validation.val: llava
  - override /data: chat
  - override /model/fusion: concat
  - override /model/connector: mlp
data:
  tokenizer: tokenizer
  workers: 0
  global_batch_size: 8
  max_length: 512
  sources: {train: {file: train.json, image_root: images}}
  validation: {val: {file: train.json, image_root: images}}
trainer: {max_steps: 100, val_check_interval: 100, log_every_n_steps: 10}
optim: {lr: 5.0e-3, warmup_steps: 1}
model:
  vision: {image_size: 32}
  llm: {config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, max_position_embeddings: 2048, tie_word_embeddings: true, initializer_range: 0.1}}
evaluation: {max_new_tokens: 24, decode_tokens: 0, contact_sheet: 0, batch_size: 8}
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    records = []
    for number, color in enumerate(["red", "blue"] * 4):
        Image.new("RGB", (24, 24), color).save(tmp_path / "images" / f"{color}.png")
        asked = {"from": "human", "value": "<image>\nWhat color is the circle?"}
        records.append(
            {
                "id": f"r{number}",
                "image": f"{color}.png",
                "conversations": [asked, {"from": "gpt", "value": f"It is {color}."}],
            }
        )
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "family.yaml").write_text(EXPERIMENT)
    return tmp_path


def exact_match(file):
    return json.loads(file.read_text())["metrics"][
        "exact_match" if "tasks" in file.parts else "val/exact_match"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_tokenizers_trains_evaluates_exports_chats_and_resumes(
    family, work, capsys, monkeypatch
):
    family_tokenizer(family).save_pretrained(work / "tokenizer")
    run = work / "runs" / "family" / "a"
    assert main(["train", "experiment=family", "name=a"]) == 0
    assert exact_match(run / "results.json") == 1.0
    (work / "tokenizer").rename(work / "elsewhere")  # a run has its own
    monkeypatch.chdir(work / "images")
    assert (
        main(
            [
                "eval",
                str(run),
                "task=exact_match",
                f"task.file={work}/train.json",
                f"task.image_root={work}/images",
            ]
        )
        == 0
    )
    assert exact_match(run / "tasks" / "exact_match.json") == 1.0
    assert main(["export", str(run), str(work / "out")]) == 0
    assert (
        main(
            [
                "eval",
                str(work / "out"),
                "task=exact_match",
                f"task.file={work}/train.json",
                f"task.image_root={work}/images",
            ]
        )
        == 0
    )
    assert exact_match(work / "out" / "tasks" / "exact_match.json") == 1.0
    for model in (run, work / "out"):
        capsys.readouterr()
        assert main(["chat", str(model), "--image", "blue.png", "What color is the circle?"]) == 0
        assert capsys.readouterr().out.strip().splitlines()[-1] == "It is blue."
    monkeypatch.chdir(work)
    assert main(["eval", str(run)]) == 0
    assert exact_match(run / "results.json") == 1.0
    assert main(["train", f"resume={run}", "trainer.max_steps=101"]) == 0
    assert json.loads((run / "results.json").read_text())["steps"] == 101


def test_another_tokenizer_at_the_place_of_the_first_is_not_taken(work, capsys):
    family_tokenizer("qwen").save_pretrained(work / "tokenizer")
    run = work / "runs" / "family" / "a"
    assert (
        main(
            [
                "train",
                "experiment=family",
                "name=a",
                "trainer.max_steps=2",
                "trainer.val_check_interval=2",
            ]
        )
        == 0
    )
    before = json.loads((run / "results.json").read_text())
    family_tokenizer("gemma", "unigram").save_pretrained(work / "tokenizer")
    assert main(["eval", str(run)]) == 0
    after = json.loads((run / "results.json").read_text())
    assert after["tokenizer"] == before["tokenizer"]
    assert after["metrics"]["val/loss"] == before["metrics"]["val/loss"]
    capsys.readouterr()
    assert main(["eval", str(run), "data.chat_template=vicuna"]) == 2
    assert "keeps the tokenizer" in capsys.readouterr().err
