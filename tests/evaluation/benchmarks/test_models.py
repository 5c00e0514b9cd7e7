"""Every kind of model that `owlfuse eval MODEL task=<name>` takes: runs and imported releases,
beside exports."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import REPO, TINY_SHAPES, llm_fields, model_node
from owlfuse.__main__ import main
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel
from owlfuse.config.compose import compose
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.model.multimodal import build_model
from owlfuse.training import train
from task_files import BENCHMARKS, small_tokenizer


def evaluate(model, out, task, *words):
    assert main(["eval", str(model), f"task={task}", *words, f"out={out}", "workers=0"]) == 0
    lines = [
        json.loads(line) for line in (out / task / "predictions.jsonl").read_text().splitlines()
    ]
    return json.loads((out / f"{task}.json").read_text()), lines


@pytest.mark.slow
def test_a_run_has_the_figures_that_its_own_evaluation_gave_it(tmp_path):
    """Perplexity and exact match of its validation file, by the two ways that owlfuse has."""
    sizes = [
        "model.vision.image_size=32",
        "data.workers=0",
        "data.global_batch_size=8",
        "trainer.max_steps=3",
    ]
    places = [
        f"data.folder={tmp_path / 'shapes'}",
        f"runs={tmp_path / 'runs'}",
        "name=one",
        "evaluation.blank=false",
    ]
    config = compose(
        ["experiment=shapes_owl3", *sizes, *places, *TINY_SHAPES, "evaluation.max_new_tokens=5"]
    )
    folder = train.run(config)
    known = json.loads((folder / "results.json").read_text())["metrics"]
    file = f"task.file={tmp_path / 'shapes' / 'val.json'}"
    measured, lines = evaluate(folder, folder / "tasks", "perplexity", file, "batch_size=3")
    assert measured["metrics"]["perplexity"] == pytest.approx(known["val/perplexity"], rel=1e-4)
    assert measured["settings"]["checkpoint"].startswith("step_")
    assert math.fsum(line["loss"] for line in lines) / measured["metrics"][
        "tokens"
    ] == pytest.approx(known["val/loss"], rel=1e-4)
    answered, _ = evaluate(folder, folder / "tasks", "exact_match", file, "task.max_new_tokens=5")
    expected = {
        name.removeprefix("val/"): value
        for name, value in known.items()
        if name.startswith("val/exact_match")
    }
    expected = {name: value for name, value in expected.items() if "held_out" not in name}
    assert answered["metrics"] == pytest.approx(expected)
    assert (folder / "tasks" / "exact_match.json").exists()


@pytest.mark.parametrize("family", ["owl1", "owl2", "owl3_adaptive"])
@pytest.mark.fast_cases(1)
def test_an_imported_release_answers_as_transformers_makes_it(family, tmp_path):
    released, out = tmp_path / "released", tmp_path / "model"
    shutil.copytree(REPO / "tests" / "goldens" / family, released)
    image = "<|image|>" if family.startswith("owl3") else None
    small_tokenizer(image, 5).save_pretrained(released)
    assert main(["import", str(released), str(out)]) == 0
    files = [f"task.{key}='{path}'" for key, path in BENCHMARKS["gqa"](tmp_path).items()]
    _, lines = evaluate(
        out, tmp_path / "results", "gqa", *files, "task.max_new_tokens=5", "batch_size=3"
    )
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(out).float(),
        AutoProcessor.from_pretrained(out),
    )
    pictures = {"201307251": "n161313", "201640614": "n235859", "202225914": "n161313"}
    for line in lines:
        picture = Image.open(tmp_path / "images" / f"{pictures[line['id']]}.jpg")
        inputs = processor(images=[picture], text=line["prompt"])
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)[
                0, inputs["input_ids"].shape[1] :
            ]
        assert processor.decode(ids, skip_special_tokens=True).strip() == line["answer"]
        assert processor.image_token in line["prompt"]
    chats = [f"task.{key}='{path}'" for key, path in BENCHMARKS["perplexity"](tmp_path).items()]
    measured, _ = evaluate(out, tmp_path / "results", "perplexity", *chats)
    assert 1 < measured["metrics"]["perplexity"] < 1e6


@pytest.mark.slow
def test_weights_of_16_bits_are_read_as_float32_or_as_they_are(tmp_path, capsys):
    """Only float32 promises that the batch makes no difference, and the table says so."""
    tokenizer = ChatEncoder(small_tokenizer(), 1).tokenizer
    made = build_model(model_node("hyperattention-adaptive", llm=llm_fields()), len(tokenizer))[
        0
    ].eval()
    out = export(TrainedModel(made.bfloat16(), tokenizer, None), tmp_path / "model")
    files = [f"task.{key}='{path}'" for key, path in BENCHMARKS["perplexity"](tmp_path).items()]
    whole, _ = evaluate(out, tmp_path / "results", "perplexity", *files)
    assert "may give another answer" not in capsys.readouterr().out
    saved, _ = evaluate(out, tmp_path / "results", "perplexity", *files, "dtype=saved")
    assert "may give another answer" in capsys.readouterr().out
    assert saved["settings"]["key"] != whole["settings"]["key"]
    assert saved["metrics"]["perplexity"] != whole["metrics"]["perplexity"]
    assert saved["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=0.05)
    answers = [f"task.{key}='{path}'" for key, path in BENCHMARKS["gqa"](tmp_path).items()]
    evaluate(out, tmp_path / "results", "gqa", *answers, "dtype=saved", "task.max_new_tokens=3")
