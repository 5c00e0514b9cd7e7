"""Activation checkpointing of each part, and compiled layers: less memory or time, the same
losses and gradients."""

import shutil
from functools import partial

import pytest
import torch

from helpers import (
    CONNECTORS,
    FUSIONS,
    HYPERATTENTION,
    ROWS,
    VIT,
    VOCAB,
    each,
    gradients,
    loss_of,
    make_batch,
    model_node,
    policy,
    yaml_nodes,
)
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import use_template
from owlfuse.evaluation.generation import generate_greedy
from owlfuse.model.multimodal import build_model
from owlfuse.planning.step import measure_batch
from small_tokenizers import byte_level

OPTION = "gradient_checkpointing"
ABSTRACTOR = CONNECTORS["abstractor"]
CONVNEXT = {
    "_target_": VIT["_target_"],
    "name": "convnext_atto",
    "image_size": 32,
    "output": "penultimate",
}
RESNET = {"_target_": VIT["_target_"], "name": "resnet10t", "image_size": 32}


def twins(nodes, changed):
    """Two models of the same weights in training mode."""
    first, second = build_model(nodes, VOCAB)[0].train(), build_model(changed, VOCAB)[0].train()
    second.load_state_dict(first.state_dict())
    return first, second


def assert_same_gradients(first, second, batch, exactly=True):
    losses = [loss_of(model(batch), batch) for model in (first, second)]
    pairs = [gradients(model, loss) for model, loss in zip((first, second), losses, strict=True)]
    torch.testing.assert_close(
        losses[1], losses[0], rtol=0 if exactly else 1e-5, atol=0 if exactly else 1e-5
    )
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in pairs[0].values())
    for name, gradient in pairs[0].items():
        tolerance = 0.0 if exactly else 1e-4 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(pairs[1][name], gradient, rtol=0, atol=tolerance, msg=name)


@each(FUSIONS)
@pytest.mark.parametrize("rows", [ROWS, [ROWS[2]]], ids=["images", "no_image"])
@pytest.mark.fast_cases(2)
def test_checkpointing_of_every_part_changes_no_gradient_and_keeps_less(node, rows):
    again = {OPTION: True}
    nodes = model_node(node, connector=ABSTRACTOR)
    changed = model_node(node, connector={**ABSTRACTOR, **again}, vision={**VIT, **again}, **again)
    first, second = twins(nodes, changed)
    batch = make_batch(rows, first.fusion.tokens_per_image)
    assert_same_gradients(first, second, batch)
    assert measure_batch(second, batch).saved < measure_batch(first, batch).saved / 2


PARTS = {
    "vit": ({"vision": VIT}, "vision"),
    "vit_penultimate": ({"vision": {**VIT, "output": "penultimate"}}, "vision"),
    "vit_in_chunks": ({"vision": {**VIT, "chunk": 2}}, "vision"),
    "convnext": ({"vision": CONVNEXT}, "vision"),
    "abstractor": ({"connector": ABSTRACTOR}, "connector"),
    "resampler": ({"connector": yaml_nodes("connector")["resampler"]}, "connector"),
    "qformer": ({"connector": yaml_nodes("connector")["qformer"]}, "connector"),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.fast_cases(3)
def test_checkpointing_of_one_part_keeps_less_for_the_same_gradients(name):
    arguments, part = PARTS[name]
    changed = {**arguments, part: {**arguments[part], OPTION: True}}
    first, second = twins(model_node(**arguments), model_node(**changed))
    batch = make_batch(ROWS, first.fusion.tokens_per_image)
    assert_same_gradients(first, second, batch)
    before, after = measure_batch(first, batch), measure_batch(second, batch)
    assert after.backward > before.backward  # what is computed again
    assert after.saved < before.saved or "chunk" in arguments.get("vision", {})


def test_a_frozen_part_with_checkpointing_is_not_computed_again():
    frozen = {"vision": policy("Frozen")}
    first, second = twins(
        model_node(adapter=frozen), model_node(adapter=frozen, vision={**VIT, OPTION: True})
    )
    batch = make_batch(ROWS, first.fusion.tokens_per_image)
    assert measure_batch(second, batch).backward == measure_batch(first, batch).backward


def test_evaluation_with_checkpointing_is_as_without():
    first, second = twins(
        model_node(connector=ABSTRACTOR),
        model_node(connector={**ABSTRACTOR, OPTION: True}, vision=VIT),
    )
    batch = make_batch(ROWS, first.fusion.tokens_per_image)
    with torch.no_grad():
        assert torch.equal(first.eval()(batch), second.eval()(batch))


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (RESNET, "vision: gradient_checkpointing: ResNet has batch norms"),
        ({**VIT, "name": "vgg11", "kwargs": {}}, "does not"),
    ],
)
def test_a_backbone_that_cannot_be_checkpointed_is_refused(vision, message):
    with pytest.raises(ValueError, match=message):
        build_model(model_node(vision={**vision, OPTION: True}), VOCAB)


HYPER = {"_target_": HYPERATTENTION, "layers": [0, 2], "gate": "adaptive"}
COMPILED = {
    "concat": model_node("concat"),
    "modality_adaptive": model_node("modality_adaptive"),
    "hyperattention": model_node(HYPER),
    "lora": model_node("modality_adaptive", adapter={"llm": policy("LoRA", r=2)}),
    "checkpointed": model_node("modality_adaptive", vision={**VIT, OPTION: True}, **{OPTION: True}),
    "bidirectional": model_node("concat-bidirectional"),
    "cross": model_node("cross_attention-before-mlp"),
    "cross-checkpointed": model_node("cross_attention-before-mlp", **{OPTION: True}),
    "parallel-checkpointed": model_node("cross_attention-parallel", **{OPTION: True}),
    "deepstack": model_node("deepstack", **{OPTION: True}),
}
TO_MACHINE_CODE = ("hyperattention", "checkpointed")
"""Of these the kernels are made too, which takes minutes. Whether a layer can be captured, with its
gradients, does not depend on them."""


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile needs a C++ compiler",
)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_give_the_same_losses_and_gradients(name, monkeypatch):
    node = COMPILED[name]
    if name not in TO_MACHINE_CODE:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    first, second = twins(node, {**node, "compile": True})
    assert list(dict(first.named_parameters())) == list(dict(second.named_parameters()))
    for rows in (ROWS, [ROWS[2]] * 2):  # with images, and of another length without
        assert_same_gradients(
            first, second, make_batch(rows, first.fusion.tokens_per_image), exactly=False
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_compile_marks_decoder_layers_and_blocks_and_nothing_runs_yet():
    model = build_model({**model_node("concat"), "compile": True}, VOCAB)[0]
    compiled = {
        name for name, module in model.named_modules() if module._compiled_call_impl is not None
    }
    assert compiled == {f"llm.model.layers.{i}" for i in range(3)} | {
        f"vision.body.blocks.{i}" for i in range(3)
    }
    plain = build_model(model_node("concat"), VOCAB)[0]
    assert all(module._compiled_call_impl is None for module in plain.modules())


def test_answers_are_generated_without_compiling_anything():
    """Layers would be compiled anew for a cache and for each of the first lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build_model({**model_node("concat"), "compile": True}, VOCAB)[0].eval()
    encoder = ChatEncoder(use_template(byte_level(), "chatml"), model.fusion.tokens_per_image)
    generate_greedy(model, make_batch(ROWS, model.fusion.tokens_per_image, left=True), 3, encoder)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
