"""Whole runs with LoRA's options and with an LLM in 4 bits: they go on bit for bit, are evaluated,
exported and started from."""

import shutil
from pathlib import Path

import pytest
import torch
from test_going_on import SMALL

from helpers import SHAPE_COUNTS, make_batch
from owlfuse.__main__ import main
from owlfuse.artifacts.load import load_exported, load_run
from owlfuse.artifacts.runs import checkpoints_of, last_checkpoint
from owlfuse.config.compose import compose
from owlfuse.core.checkpoint_files import remove_checkpoint
from owlfuse.data.shapes.write import write_shapes
from owlfuse.evaluation.validation import evaluate_run
from owlfuse.model.quantization import is_bitsandbytes_available
from owlfuse.training import train

pytestmark = pytest.mark.slow
LORA = ["model/adapter@model.adapter.llm=lora", "model.adapter.llm.dropout=0.1"]
CASES = {
    "dora": ["model.adapter.llm.use_dora=true", "model.adapter.llm.modules_to_save=[norm]"],
    "pissa": ["model.adapter.llm.init_lora_weights=pissa_niter_4"],
    "qlora": ["model.llm.quantization={compute_dtype: float32}"],
    "qlora-dora": ["model.llm.quantization={}", "model.adapter.llm.use_dora=true"],
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter_runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        yield path


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_and_is_exported(name, tmp_path):
    if name.startswith("qlora") and not is_bitsandbytes_available():
        pytest.skip("weights in 4 bits need pip install bitsandbytes (the extra qlora has it)")
    words = [*SMALL, *LORA, *CASES[name], "checkpoint.every=2"]
    run = train.run(compose([*words, f"name={name}"]))
    whole = torch.load(last_checkpoint(run), weights_only=True)
    kinds = {".lora_A.", ".lora_magnitude_vector."} if "dora" in name else {".lora_A."}
    assert all(any(kind in key for key in whole["state_dict"]) for kind in kinds)
    assert not any("base_layer" in key for key in whole["state_dict"])

    # from the checkpoint before the last one
    again = Path(shutil.copytree(run, run.with_name(f"{name}-again")))
    remove_checkpoint(checkpoints_of(again / "checkpoints")[0])
    train.run(compose([f"resume={again}"]))
    resumed = torch.load(last_checkpoint(again), weights_only=True)
    assert resumed["frozen"] == whole["frozen"]
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for key, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][key]), key

    evaluate_run(str(run), [])
    model = load_run(run).model
    batch = make_batch([[11, "image", 12, 13], [21, 22]], model.fusion.tokens_per_image)
    with torch.no_grad():
        expected = model(batch)
    # activations of layers in 4 bits are in bfloat16 by default, and those of an export are not
    tolerance = 0.1 if name == "qlora-dora" else 1e-4
    for options in (["merge=true"], []):
        out = tmp_path / ("merged" if options else "apart")
        assert main(["export", str(run), str(out), *options]) == 0
        with torch.no_grad():
            logits = load_exported(out)[0].model(batch)
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    started = train.run(
        compose([*SMALL, *LORA, *CASES[name], f"init_from={out}", f"name={name}-started"])
    )
    assert last_checkpoint(started) is not None
