"""Runs by two real processes follow the losses of one, and end with its weights: every fusion
under ddp, fsdp and tp."""

import csv
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers import SHAPE_COUNTS, TINY_SHAPES
from owlfuse.artifacts.runs import last_checkpoint
from owlfuse.config.compose import compose
from owlfuse.core.errors import ConfigError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.training import train
from ranks import by_processes

SMALL_VIT = [
    "model/vision=timm",
    "model.vision.name=vit_tiny_patch16_224",
    "model.vision.pretrained=false",
    "model.vision.image_size=32",
    "model.vision.kwargs={embed_dim: 32, depth: 2, num_heads: 2}",
]
"""Without batch norms, and without norms of a few places, where rounding decides."""
SMALL = [
    *TINY_SHAPES,
    *SMALL_VIT,
    "data.workers=0",
    "evaluation.max_questions=2",
    "evaluation.max_new_tokens=2",
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=20",
    "optim=adamw",
    "optim.lr=5e-4",
    "logger.tensorboard=null",
    "data.validation_samples=8",
    "model.llm.config.hidden_size=64",
    "model.llm.config.intermediate_size=96",
    "model.llm.config.num_hidden_layers=2",
]
"""The models are small: most of the time would go into their products, and a process more does
not change how they add up."""
OWL3 = ["experiment=shapes_owl3", "model.fusion.layers=[0,1]"]
TWO = ["trainer.accelerator=cpu", "trainer.devices=2"]
SPLIT = {
    "ddp": (["trainer=ddp", *TWO], 2),
    "fsdp": (["trainer=fsdp", *TWO], 2),
    "tp": (["trainer=tp", *TWO], 1),
}
"""How two processes share the work, and how many have rows of their own."""
FOUR = ["trainer.accelerator=cpu", "trainer.devices=4", "trainer.strategy.tensor=2"]
MESH = {"fsdp_tp": (["trainer=fsdp_tp", *FOUR], 2)}
LORA = [
    f"model/adapter@model.adapter.{policy}"
    for policy in ("fusion=lora", "llm=lora", "vision=frozen")
]
SCARCE = [
    "data.sources.shapes.weight=0.1",
    "data.sources.text.weight=0.9",
    "data.sources.text.records_per_chat=8",
]
"""Some steps have a picture on one rank, some on none, and the ranks' lengths are very unequal."""
EXPERT = "[key,value,query,output,mlp]"
CASES = {
    "owl1-muon": ["experiment=shapes_owl1", "optim=muon", "optim.lr=4e-3"],
    "owl3": OWL3,
    "owl2-lora": ["experiment=shapes_owl2", *LORA],
    "owl1-scarce": ["experiment=shapes_owl1", *SCARCE],
    "owl2-scarce": ["experiment=shapes_owl2", *SCARCE],
    "owl3-static-scarce": [*OWL3, "model.fusion.gate=static", *SCARCE],
    "concat-bidirectional": [
        "experiment=shapes_owl1",
        "model.fusion.attention=bidirectional",
    ],
    "expert": ["experiment=shapes_owl2", f"model.fusion.copies={EXPERT}"],
    "cross-attention": [
        "experiment=shapes_owl3",
        "model/fusion=cross_attention",
        "model.fusion.layers=[0,1]",
        "model.fusion.gate=none",
        "model.fusion.mlp=true",
        "model.fusion.qk_norm=true",
    ],
    "deepstack": [
        "experiment=shapes_owl3",
        "model/fusion=deepstack",
        "model.vision.levels=[0]",
        "model.vision.join=separate",
    ],
}
ACCUMULATIONS = {case: (1, 4) if case.endswith("scarce") else (4,) for case in CASES}
"""A run takes half a minute."""
ON_A_MESH = ("owl1-muon", "owl2-lora", "owl3", "expert", "cross-attention", "deepstack")
"""Every fusion, adapter and optimizer is among them."""


def overrides(case, accumulation, ranks):
    """Micro batches have two pictures or so at least."""
    size = 8 * (2 if accumulation > 1 else 1)
    rows = [
        f"data.global_batch_size={size}",
        f"data.micro_batch_size={size // accumulation // ranks}",
    ]
    return [*SMALL, *CASES[case], *rows]


def train_both(folder, chosen, splits, processes):
    """Trains the chosen runs by one process and by several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        for case, accumulation in sorted(
            {(case, accumulation) for case, _, accumulation in chosen}
        ):
            name = f"name={case}-{accumulation}"
            train.run(compose([*overrides(case, accumulation, 1), "runs=alone", name]))
        together = []
        for case, split, accumulation in chosen:
            trainer, ranks = splits[split]
            name = f"name={case}-{accumulation}"
            together.append(
                [*overrides(case, accumulation, ranks), *trainer, f"runs={split}", name]
            )
        by_processes(processes, together, folder, "together")


def run_of(folder, kind, name):
    (path,) = (folder / kind).glob(f"*/{name}")
    return path


def column(run, name):
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(run, scratch):
    path = last_checkpoint(run)
    if path.is_dir():
        dcp_to_torch_save(path, scratch / "whole.pt")
        path = scratch / "whole.pt"
    return torch.load(path, weights_only=True)["state_dict"]


def check(folder, scratch, case, split, accumulation):
    """The losses of 20 steps agree within 1e-5, and the weights after them and the evaluation
    within 1e-4."""
    name = f"{case}-{accumulation}"
    one, two = run_of(folder, "alone", name), run_of(folder, split, name)
    assert len(column(two, "train/loss")) == 20
    assert column(two, "train/loss") == pytest.approx(column(one, "train/loss"), abs=1e-5)
    mine, theirs = weights(two, scratch), weights(one, scratch)
    assert mine.keys() == theirs.keys()
    for key in mine:
        # no softmax depends on it: its gradient is rounding, which Adam makes large
        if "key.bias" not in key:
            message = partial("{}: {}".format, key)
            torch.testing.assert_close(mine[key], theirs[key], atol=1e-4, rtol=0, msg=message)
    assert val_loss(two) == pytest.approx(val_loss(one), abs=1e-4)
    assert (two / "answers.jsonl").exists()


def val_loss(run):
    return json.loads((run / "results.json").read_text())["metrics"]["val/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_split_follows_one_process(tmp_path, case):
    chosen = [(case, split, steps) for split in SPLIT for steps in ACCUMULATIONS[case]]
    train_both(tmp_path, chosen, SPLIT, 2)
    for one in chosen:
        check(tmp_path, tmp_path, *one)
    if case == "owl3-static-scarce":
        without = column(run_of(tmp_path, "fsdp", f"{case}-1"), "data/ranks_without_images")
        assert {1, 2} <= set(without)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_A_MESH)
def test_four_processes_of_a_mesh_follow_one(tmp_path, case):
    chosen = [(case, "fsdp_tp", steps) for steps in ACCUMULATIONS[case]]
    train_both(tmp_path, chosen, MESH, 4)
    for one in chosen:
        check(tmp_path, tmp_path, *one)


ENDS_AT_ONCE = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from owlfuse.parallel.strategies import delay_exit
delay_exit()
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
model = nn.Sequential(*[fully_shard(nn.Linear(64, 64), mesh=mesh) for _ in range(4)])
for _ in range(5):
    model(torch.randn(4, 64)).sum().backward()
dist.all_reduce(torch.ones(3))
"""


@pytest.mark.slow
def test_processes_that_end_right_after_a_collective_end_well(tmp_path):
    """Without the wait one in eight was aborted by the interpreter's end."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS_AT_ONCE)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    for _ in range(12):
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer=tp", "trainer.devices=8"],
            "num_attention_heads of the LLM is 4, which 8 tensor ranks",
        ),
        (
            ["trainer=fsdp_tp", "trainer.devices=2", "trainer.strategy.data=3"],
            "3 data x 4 tensor ranks are 12 processes",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_told_before_a_weight_is_made(
    tmp_path, monkeypatch, overrides, message
):
    monkeypatch.chdir(tmp_path)
    write_shapes("data/shapes", **SHAPE_COUNTS)
    with pytest.raises(ConfigError, match=message):
        train.run(compose([*SMALL, *OWL3, "trainer.accelerator=cpu", *overrides]))
