"""What sharded runs leave behind is whole."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from helpers import SHAPE_COUNTS, TINY_SHAPES
from owlfuse.__main__ import main
from owlfuse.artifacts.load import load_run
from owlfuse.artifacts.runs import last_checkpoint
from owlfuse.config.compose import compose
from owlfuse.data.shapes.write import write_shapes
from owlfuse.training import train
from ranks import by_processes

SMALL = [
    *TINY_SHAPES,
    "data.workers=0",
    "data.global_batch_size=8",
    "evaluation.max_questions=2",
    "evaluation.max_new_tokens=2",
    "trainer.max_steps=4",
    "model/vision=convnet_group_norm",
    "optim=adamw",
    "optim.lr=5e-4",
    "logger.tensorboard=null",
]
LORA = [
    f"model/adapter@model.adapter.{policy}"
    for policy in ("llm=lora", "fusion=lora", "vision=frozen")
]
CASES = {
    "full": ["experiment=shapes_owl3"],
    "lora": ["experiment=shapes_owl2", *LORA],
}
TWO = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.micro_batch_size=4"]
LOWER = [
    "experiment=shapes_owl3",
    "trainer.precision=bf16-mixed",
    "evaluation.before=true",
    "optim.lr=1e-3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of one process in alone/, and of two in fsdp/."""
    path = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        data = f"data.folder={path / 'data/shapes'}"
        for name, overrides in CASES.items():
            train.run(compose([*SMALL, *overrides, data, "runs=alone", f"name={name}"]))
        two = [*TWO, "runs=fsdp"]
        cases = {**CASES, "lower": LOWER}
        by_processes(
            2,
            [[*SMALL, *overrides, *two, data, f"name={name}"] for name, overrides in cases.items()],
            path,
            "together",
        )
    return path


def run_of(folder, kind, name):
    (path,) = (folder / kind).glob(f"*/{name}")
    return path


def exported(folder, kind, name, out, *options):
    assert main(["export", str(run_of(folder, kind, name)), str(out), *options]) == 0
    return load_file(out / "model.safetensors")


def check_close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        # no softmax depends on it: its gradient is rounding, which Adam makes large
        if "key.bias" not in name:
            # statistics are no weights, and may be large
            relative = 1e-3 if "running_" in name else 0
            torch.testing.assert_close(
                mine[name],
                theirs[name],
                atol=1e-4,
                rtol=relative,
                msg=lambda text, n=name: f"{n}: {text}",
            )


@pytest.mark.slow
def test_a_sharded_run_in_bf16_is_evaluated_before_and_after(folder):
    metrics = json.loads((run_of(folder, "fsdp", "lower") / "results.json").read_text())["metrics"]
    assert 0 < metrics["val/loss"] < metrics["before/val/loss"] < 20


@pytest.mark.slow
def test_a_sharded_run_is_exported_as_that_of_one_process(folder, tmp_path):
    assert last_checkpoint(run_of(folder, "fsdp", "full")).is_dir()
    mine = exported(folder, "fsdp", "full", tmp_path / "two")
    check_close(mine, exported(folder, "alone", "full", tmp_path / "one"))
    whole = load_run(run_of(folder, "fsdp", "full")).model.state_dict()  # in memory
    assert all(
        torch.equal(whole[name.removeprefix("model.")], value) for name, value in mine.items()
    )


@pytest.mark.slow
def test_an_adapter_that_two_processes_trained_is_whole(folder, tmp_path):
    base = exported(folder, "fsdp", "lora", tmp_path / "two")
    alone = exported(folder, "alone", "lora", tmp_path / "one")
    check_close(base, alone)
    mine, theirs = (
        load_file(tmp_path / kind / "adapter/adapter_model.safetensors") for kind in ("two", "one")
    )
    check_close(mine, theirs)
    for name, value in mine.items():
        if ".lora_B." in name:  # zeros before training
            assert all(half.count_nonzero() for half in value.chunk(2)), (
                f"{name} has one rank's rows alone"
            )
    whole = load_run(run_of(folder, "fsdp", "lora")).model.state_dict()
    for name, value in mine.items():
        part, _, rest = name.removeprefix("base_model.model.model.").rpartition(".")
        assert torch.equal(whole[f"{part}.default.{rest}"], value)


@pytest.mark.slow
def test_the_adapter_of_two_processes_folded_in_is_the_sum(folder, tmp_path):
    base = exported(folder, "fsdp", "lora", tmp_path / "two")
    merged = exported(folder, "fsdp", "lora", tmp_path / "merged", "merge=true")
    check_close(merged, exported(folder, "alone", "lora", tmp_path / "one", "merge=true"))
    adapter = load_file(tmp_path / "two/adapter/adapter_model.safetensors")
    scale = json.loads((tmp_path / "two/adapter/adapter_config.json").read_text())
    changed = 0
    for name, value in merged.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:
            update = adapter[f"{key}B.weight"].double() @ adapter[f"{key}A.weight"].double()
            wanted = base[name].double() + update * scale["lora_alpha"] / scale["r"]
            torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=0)
            changed += not torch.equal(value, base[name])
        else:
            assert torch.equal(value, base[name]), name
    assert changed == len(adapter) // 2


@pytest.mark.slow
def test_two_processes_start_from_an_export_as_one_does(folder, tmp_path, monkeypatch):
    """LoRA folded in, position embeddings resampled, and weights frozen that no checkpoint has."""
    monkeypatch.chdir(tmp_path)
    exported(folder, "fsdp", "lora", tmp_path / "base")
    common = [
        *SMALL,
        *CASES["lora"],
        f"init_from={tmp_path / 'base'}",
        "model.vision.image_size=96",
        "trainer.max_steps=3",
    ]
    common += [
        f"data.folder={folder / 'data/shapes'}",
        "trainer.log_every_n_steps=1",
        "name=started",
    ]
    train.run(compose([*common, "runs=alone"]))
    by_processes(2, [[*common, *TWO, "runs=fsdp"]], tmp_path, "started")
    alone, together = (run_of(tmp_path, kind, "started") for kind in ("alone", "fsdp"))
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    check_close(
        exported(tmp_path, "fsdp", "started", tmp_path / "two"),
        exported(tmp_path, "alone", "started", tmp_path / "one"),
    )
    assert main(["eval", str(together)]) == 0


def losses(run):
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
