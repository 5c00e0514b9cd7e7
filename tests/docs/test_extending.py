"""The example parts of the page on extending do what the page says of them."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from helpers import IMAGE_SIZE, REPO, ROWS, TINY_SHAPES, VOCAB, gradients, loss_of, make_batch
from owlfuse import load
from owlfuse.artifacts.hf.configuration import OwlfuseConfig
from owlfuse.config import trust
from owlfuse.config.build import build
from owlfuse.config.compose import compose, compose_root
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.media.images import open_image
from owlfuse.model.connectors.base import Connector
from owlfuse.model.multimodal import build_model

PARTS = {
    "vision": ["model/vision=color_grid"],
    "connector": ["model/connector=mean", "model/fusion=concat"],
    "fusion": ["model/fusion=pooled"],
    "llm": ["model/llm=shallow", "model.fusion.layers=[0,1]"],
    "adapter": ["model/adapter@model.adapter.llm=vectors"],
    "all together": ["experiment=parts"],
}


def test_the_readme_s_connector_is_one():
    block = (REPO / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(block, names)
    connector = names["MeanConnector"](6, 4, 9, (3, 3))
    assert isinstance(connector, Connector)
    assert connector(torch.randn(2, 9, 6)).shape == (2, connector.tokens, 4)


def model_of(*overrides):
    """The model of a configuration, at the size of the tests' pictures."""
    node = OmegaConf.to_container(
        compose([*overrides, f"model.vision.image_size={IMAGE_SIZE}"]).model, resolve=True
    )
    return build_model(node, VOCAB)[0].train()


@pytest.mark.parametrize("overrides", PARTS.values(), ids=PARTS)
@pytest.mark.fast_cases(2)
def test_every_trained_parameter_has_a_gradient_with_pictures_and_without(examples, overrides):
    model = model_of(*overrides)
    for rows in (ROWS, [row for row in ROWS if "image" not in row]):
        batch = make_batch(rows, model.fusion.tokens_per_image)
        found = gradients(model, loss_of(model(batch), batch))
        assert found
        assert [
            name
            for name, gradient in found.items()
            if gradient is None or not gradient.isfinite().all()
        ] == []


def test_the_vectors_policy_trains_vectors_of_its_part_alone(examples):
    model = model_of("model/adapter@model.adapter.llm=vectors")
    trained = {p.ndim for p in model.part("llm").parameters.values() if p.requires_grad}
    assert trained == {1}
    assert all(p.requires_grad for p in model.part("vision").parameters.values())
    with pytest.raises(ValueError, match=r"adapter.fusion: fusion has neither norms nor biases"):
        model_of("model/adapter@model.adapter.fusion=vectors", "model.fusion.gate=none")


def test_the_pooled_fusion_lets_the_text_after_an_image_see_it_and_nothing_before(examples):
    model = model_of("model/fusion=pooled").eval()
    batch = make_batch([[11, 12, "image", 13, 14]], model.fusion.tokens_per_image)
    with torch.no_grad():
        before = model(batch)
        batch.pixel_values = batch.pixel_values.flip(-1) * 2
        changed = (model(batch) - before).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False, False, True, True, True]


def test_the_shallow_llm_has_the_first_layers_and_says_when_there_are_fewer(examples):
    llm = model_of("experiment=parts", "model.llm.keep=3").llm
    assert len(llm.model.layers) == 3
    # as an exported folder is read
    assert type(llm.config)(**llm.config.to_dict()).num_hidden_layers == 3
    with pytest.raises(ValueError, match="llm: keep is 9, and the LLM has 4 layers"):
        model_of("experiment=parts", "model.llm.keep=9")


def test_an_export_asks_of_a_backbone_only_for_arguments_that_it_has(examples):
    """`pretrained` is timm's."""
    node = OmegaConf.to_container(compose(["experiment=parts"]).model, resolve=True)
    parts = {name: node[name] for name in ("vision", "connector", "fusion")}
    config = OwlfuseConfig(**parts, text_config={"model_type": "llama"})
    assert config.nodes()["vision"] == node["vision"]


def test_lion_steps_by_the_sign_of_the_gradient(examples):
    optim = build(compose(["optim=lion", "optim.warmup_steps=0", "optim.weight_decay=0"]).optim)
    model = model_of("experiment=parts")
    optimizer = optim.build(model, 10)["optimizer"]
    weight = model.connector.proj.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    torch.testing.assert_close(
        before - weight.detach(), 3e-4 * weight.grad.sign(), rtol=0, atol=1e-7
    )


def test_the_question_list_is_read_as_chats_and_its_mistakes_are_told(questions):
    source = build(
        compose(["experiment=parts", "data.sources.own.system=Be brief."]).data.sources.own
    )
    assert [len(source), source[2].images, source[2].metadata] == [
        4,
        ["blue.png"],
        {"author": "me"},
    ]
    assert [message["role"] for message in source[2].messages] == ["system", "user", "assistant"]
    assert open_image(source.image_root, source[2].images[0], "here", 10**6).getpixel((0, 0)) == (
        0,
        0,
        255,
    )
    (questions / "questions.json").write_text(
        json.dumps({"questions": [{"picture": "red.png", "question": "?"}]})
    )
    source = build(compose(["experiment=parts"]).data.sources.own)
    with pytest.raises(DataError, match="sample questions:0 has no 'answer'"):
        source[0]
    with pytest.raises(ConfigError, match="data.sources.own.sistem: no such key"):
        compose(["experiment=parts", "+data.sources.own.sistem=x"])


def test_counting_scores_the_first_number_of_an_answer(questions):
    task = build(
        compose_root(
            "eval", ["task=counting", "task.file=counts.json", "task.image_root=pictures"]
        ).task
    )
    asked, wrong = task.questions()
    assert (len(asked), wrong) == (4, [])
    assert asked[1].messages[0]["content"][-1]["text"] == "How many?\nAnswer with a number."
    lines = [{"answer": answer, "expected": 3} for answer in ("There are 3.", "4 or 5", "many")]
    for line in lines:
        line["score"] = task.score(line)
    assert task.metrics(lines) == {
        "accuracy": pytest.approx(1 / 3),
        "distance": pytest.approx((0 + 1 + 10) / 3),
    }


@pytest.mark.slow
def test_all_parts_together_train_and_are_evaluated_and_exported(questions, monkeypatch):
    def owlfuse(*words):
        environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
        ran = subprocess.run(
            [sys.executable, "-m", "owlfuse", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout

    small = [
        *TINY_SHAPES,
        "trainer.max_steps=4",
        "data.global_batch_size=8",
        "evaluation.max_questions=4",
        "name=first",
    ]
    owlfuse("train", "experiment=parts", *small)
    run = questions / "runs" / "parts" / "first"
    assert json.loads((run / "mixture.json").read_text())["sources"]["own"]["drawn"] > 0
    owlfuse("eval", str(run), "task=counting", "task.file=counts.json", "task.image_root=pictures")
    assert set(json.loads((run / "tasks" / "counting.json").read_text())["metrics"]) == {
        "accuracy",
        "distance",
    }
    owlfuse("chat", str(run), "--image", "pictures/red.png", "What color is it?")
    owlfuse("export", str(run), "out")
    out = (questions / "out").resolve()
    elsewhere = questions / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # where no yaml names the parts
    monkeypatch.setattr(trust, "accepted", set())  # what other tests have composed
    with pytest.raises(DataError, match="if you trust it, import parts.color_grid first"):
        load(out)
    for name in ("color_grid", "mean", "pooled", "shallow"):
        importlib.import_module(f"parts.{name}")
    assert type(load(out).fusion).__name__ == "Pooled"
