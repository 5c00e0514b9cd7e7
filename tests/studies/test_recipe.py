"""`owlfuse recipe` on real files: what a recipe says, stages in order, weights passed on, kills,
and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from helpers import SHAPE_COUNTS, SHORT_ANSWERS, SMALL_DATA
from owlfuse.artifacts.load import load_run
from owlfuse.config.compose import compose
from owlfuse.config.folders import find_folders
from owlfuse.config.recipes import read_stages
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.studies.recipe.run import recipe_command, run_stage, write_record
from owlfuse.studies.recipe.stages import make_stages

SMALL = [
    *SMALL_DATA,
    *SHORT_ANSWERS,
    "data.validation_samples=8",
    "evaluation.contact_sheet=0",
    "trainer.log_every_n_steps=1",
    "optim.warmup_steps=0",
]
TINY = """
base:
  defaults:
    - override /model/connector: abstractor_owl2
    - override /model/fusion: modality_adaptive
    - override /model/vision: timm
  model:
    vision: {name: vit_tiny_patch16_224, pretrained: false, image_size: 32, kwargs: {embed_dim: 16, depth: 2, num_heads: 2}}
  trainer: {max_steps: 2}
stages:
  - name: first
    trains: {vision: full, connector: full, fusion: full}
    data: {sources: {text: {weight: 0.0}}}
  - name: second
    trains: {llm: lora}
    model:
      vision: {image_size: 64}
      adapter: {llm: {r: 2, dropout: 0.0}}
  - name: third
    trains: {llm: full}
    model:
      vision: {image_size: 64}
"""
EMBEDDED = ["owl1", "owl2", "owl3"]
PAPERS = ["owl1_paper", "owl2_paper", "owl3_paper"]
TRAINED = {  # part x policy by stage, as the papers have it
    "owl1": ["llm: Full", "vision: Full, connector: Full", "llm: LoRA"],
    "owl2": [
        "llm: Full",
        "vision: Full, connector: Full, fusion: Full",
        "vision: Full, connector: Full, fusion: Full, llm: Full",
    ],
    "owl3": [
        "llm: Full",
        "vision: Full, connector: Full, fusion: Full",
        *["connector: Full, llm: Full"] * 2,
    ],
    "owl1_paper": ["vision: Full, connector: Full", "llm: LoRA"],
    "owl2_paper": [
        "vision: Full, connector: Full, fusion: Full",
        "vision: Full, connector: Full, fusion: Full, llm: Full",
    ],
    "owl3_paper": ["connector: Full, fusion: Full", *["connector: Full, llm: Full"] * 2],
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working folder of its own with the recipe `tiny`, in which `data/` and `runs/` are made."""
    path = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        write_recipe("tiny", TINY)
        yield path


def write_recipe(name, text):
    path = Path("experiments") / name / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def weights(stage):
    """All of a stage's weights, frozen ones among them, which its checkpoint leaves out."""
    return {
        f"model.{name}": value for name, value in load_run(Path(stage)).model.state_dict().items()
    }


def plain(weights):
    """Without LoRA's names."""
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in weights.items()
        if "lora_" not in name
    }


def losses(stage):
    with (stage / "metrics.csv").open() as file:
        return {
            int(row["step"]): float(row["train/loss"])
            for row in csv.DictReader(file)
            if row.get("train/loss")
        }


# What a recipe is


def test_every_recipe_is_known_to_these_tests():
    ours = [name for name in find_folders().recipe_names if name != "tiny"]
    assert sorted(ours) == sorted([*EMBEDDED, *PAPERS])
    for name in ours:
        assert (find_folders().recipe(name).parent / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*EMBEDDED, *PAPERS])
def test_a_recipe_composes_and_trains_in_each_stage_what_its_paper_says(recipe):
    stages = make_stages(recipe, [])
    trained = [
        ", ".join(f"{s.part}: {s.policy}" for s in stage.parts if s.trained) for stage in stages
    ]
    assert trained == TRAINED[recipe]


@pytest.mark.slow
def test_dry_run_prints_what_each_stage_trains_and_writes_nothing(capsys):
    before = sorted(Path().rglob("*"))
    recipe_command("owl2_paper", ["dry_run=true", "plan.gpus=8"])
    table = capsys.readouterr().out
    for words in (
        "to spare",
        "FSDP",
        "42,500",
        "8,192",
        "224 px",
        "448 px",
        "fusion: Full, 1.1 B",
        "llm: 6.7 B",
        "by size",
        "x 0.9 a layer",
    ):
        assert words in table
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_every_stage_is_checked_for_this_machine_before_the_first_trains(monkeypatch):
    monkeypatch.setattr(
        "owlfuse.studies.recipe.run.run_stage", lambda *_: pytest.fail("a stage is trained")
    )
    with pytest.raises(ConfigError, match="stage third: .*torch finds no GPU on this machine"):
        recipe_command("tiny", [*SMALL, "name=no_gpu", "stages.third.trainer.accelerator=gpu"])
    assert not Path("runs/tiny/no_gpu").exists()


def test_a_stage_is_an_experiment_too():
    config = compose(["experiment=tiny/second", "seed=4"])
    assert (config.model.vision.image_size, config.model.adapter.llm.r, config.seed) == (64, 2, 4)
    assert config.model.adapter.vision._target_ == "owlfuse.model.adapters.Frozen"
    assert config.model.fusion._target_.endswith("ModalityAdaptive")
    assert "tiny/second" not in find_folders().experiment_names


@pytest.mark.slow
def test_overrides_are_for_all_stages_or_for_one():
    words = [
        "optim.lr=0.5",
        "stages.second.optim.lr=0.25",
        "stages.third.model/adapter@model.adapter.connector=last_n",
    ]
    words += ["stages.third.model.adapter.connector.n=1", "stages.second.seed=7"]
    stages = make_stages("tiny", words)
    assert [stage.config.optim.lr for stage in stages] == [0.5, 0.25, 0.5]
    assert [stage.config.seed for stage in stages] == [0, 7, 0]
    assert [str(stage.folder) for stage in stages] == [
        f"runs/tiny/seed0/{name}" for name in ("first", "second", "third")
    ]
    assert stages[2].config.model.adapter.connector._target_.endswith("LastN")


# What is refused, in one line, before anything is trained


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "trains: {llm: full}",
            "trains: {lm: full}",
            "wrong/recipe.yaml: stage third: trains.lm: no such part; did ",
        ),
        (
            "trains: {llm: full}",
            "trains: {llm: fulll}",
            ("stage third: .*wrong/recipe.yaml: model/adapter=fulll: no such"),
        ),
        (
            "trains: {llm: full}",
            "trains: {llm: full}\n    optim: {lrr: 1}",
            ("stage third: .*/recipe.yaml: optim.lrr: no such"),
        ),
        (
            "{image_size: 64}",
            "{image_size: 64}\n      connector: {queries: 4}",
            (
                "stage third: model.connector.queries is 4, and 8 in stage second, whose weights "
                "it "
                "starts from; set it in the base"
            ),
        ),
        ("trains: {llm: full}", "trains: {}", "stage third: .*every part is frozen"),
        (
            "{image_size: 64}",
            "{image_size: 70}",
            ("stage third: .*model.vision: image_size is 70, which .* do not divide"),
        ),
        ("- name: third", "- name: first", "stage first: the name stands twice"),
        (
            "- name: third",
            "- name: third\n    defaults: adamw",
            "stage third: defaults: expected a",
        ),
        (
            "- name: third",
            "- name: third\n    init_from: out",
            "stage third: init_from is out, and it starts from the weights of the stage before",
        ),
        ("- name: third", "- nam: third", "stage 3: expected a name of letters"),
        ("stages:", "stage:", "wrong/recipe.yaml: stages: expected a list of stages"),
        ("base:", "bass:", "wrong/recipe.yaml: bass: no such key of a recipe; did you mean 'base'"),
        ("- name: third", "- name: third: x", r"wrong/recipe.yaml:\d+: not YAML"),
    ],
)
@pytest.mark.fast_cases(1)
def test_a_mistake_in_the_last_stage_is_told_before_the_first_one_trains(old, new, message):
    write_recipe("wrong", new.join(TINY.rsplit(old, 1)))
    with pytest.raises(ConfigError, match=message) as error:
        recipe_command("wrong", SMALL)
    assert "\n" not in str(error.value)
    assert not Path("runs/wrong").exists()


@pytest.mark.parametrize(
    "content", ["base: \u00e9".encode("latin-1"), "base: 1".encode("utf-16"), b"base: \x1b"]
)
def test_a_recipe_that_is_no_text_in_utf_8_is_one_line(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe.yaml: not YAML in UTF-8: ") as error:
        read_stages(tmp_path / "recipe.yaml")
    assert str(error.value).isprintable()


def test_a_base_that_is_no_mapping_and_an_empty_list_of_defaults(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("base: [1]\nstages: [{name: a}]\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml: base: expected keys .* it is \[1\]"):
        read_stages(file)
    file.write_text("base: {defaults: }\nstages: [{name: a, defaults: }, {name: b, trains: {}}]\n")
    stages = read_stages(file)
    assert stages["a"] == {"defaults": []}
    assert len(stages["b"]["defaults"]) == 4


def test_data_missing_in_the_last_stage_are_told_before_the_first_one_trains():
    with pytest.raises((DataError, FileNotFoundError), match="nowhere.json"):
        recipe_command(
            "tiny", [*SMALL, "name=hole", "stages.third.data.sources.text.file=nowhere.json"]
        )
    assert not Path("runs/tiny/hole").exists()


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("tinny", [], "command line: recipe tinny: no such recipe; did you mean 'tiny'"),
        ("tiny", ["stages.secnod.optim.lr=1"], "no stage secnod; did you mean 'second'"),
        ("tiny", ["optim.lrr=1"], "command line: optim.lrr: no such key; did you mean 'optim.lr'"),
        (
            "tiny",
            ["resume=x"],
            "command line: resume=x: a recipe has no resume=; its stages are first, second, third",
        ),
        (
            "tiny",
            ["stages.second.experiment=shapes_owl3"],
            "stages.second.experiment=shapes_owl3: a stage has no experiment of its own",
        ),
        (
            "tiny",
            ["stages.second.runs=elsewhere"],
            "stages.second.runs=elsewhere: a stage has no runs of its own; leave out stages.second.",
        ),
        ("tiny", ["dry_run=yes"], "command line: dry_run=yes: true or false"),
    ],
)
def test_a_mistake_on_the_command_line(recipe, words, message):
    with pytest.raises(ConfigError, match=message):
        recipe_command(recipe, words)


# Stages


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EMBEDDED)
def test_a_recipe_of_two_steps_a_stage_leaves_a_whole_run_of_each(recipe, capsys):
    recipe_command(recipe, [*SMALL, "trainer.max_steps=2", "name=smoke", "seed=3"])
    stages = [stage.name for stage in make_stages(recipe, [])]
    for name in stages:
        run = Path("runs") / recipe / "smoke" / name
        results = json.loads((run / "results.json").read_text())
        assert (results["experiment"], results["seed"], results["steps"]) == (recipe, 3, 2)
        for file in (
            "config.yaml",
            "metrics.csv",
            "mixture.json",
            "export/config.json",
            "export/model.safetensors",
        ):
            assert (run / file).is_file(), file
    capsys.readouterr()
    recipe_command(recipe, [*SMALL, "trainer.max_steps=2", "name=smoke", "seed=3"])
    output = capsys.readouterr().out
    assert all(f"stage {name} is finished" in output for name in stages)


@pytest.mark.slow
def test_each_stage_starts_from_the_weights_of_the_one_before_and_position_embeddings_are_resampled():
    """With a learning rate of next to nothing in the later stages, they end where they began."""
    # which moves no float32
    still = [f"stages.{name}.optim.lr=1e-60" for name in ("second", "third")]
    recipe_command("tiny", [*SMALL, "name=pass", *still])
    first, second, third = (
        plain(weights(Path("runs/tiny/pass") / name)) for name in ("first", "second", "third")
    )
    assert set(first) == set(second) == set(third)
    table, places = "model.vision.body.pos_embed", "model.connector.image_positions"
    old, new = first.pop(table), second[table]
    first.pop(places)
    assert old.shape[1] == 1 + 2 * 2
    assert torch.allclose(new, resample_abs_pos_embed(old, [4, 4], [2, 2], num_prefix_tokens=1))
    assert second[places].shape[0] == 1 + 4 * 4
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert all(torch.equal(tensor, third[name]) for name, tensor in second.items())


RAN = [*SMALL, "name=ran", "stages.third.optim.lr=1e-60"]


@pytest.fixture(scope="module")
def ran(folder):
    """A run of the recipe `tiny`, whose last stage ends as it begins."""
    recipe_command("tiny", RAN)
    return Path("runs/tiny/ran")


@pytest.mark.slow
def test_lora_of_a_stage_is_in_the_weights_of_the_next_and_frozen_parts_stay(ran):
    first, second, third = (weights(ran / name) for name in ("first", "second", "third"))
    name = "model.llm.model.layers.0.self_attn.q_proj"
    a, b = (second[f"{name}.lora_{half}.default.weight"] for half in "AB")
    merged = second[f"{name}.base_layer.weight"] + b @ a * (16 / 2)
    assert torch.allclose(third[f"{name}.weight"], merged, atol=1e-6)
    assert not torch.equal(third[f"{name}.weight"], first[f"{name}.weight"])
    vision = [key for key in first if key.startswith("model.vision.body.blocks")]
    assert vision
    assert all(torch.equal(first[key], third[key]) for key in vision)


@pytest.mark.slow
def test_a_stage_that_was_begun_otherwise_is_not_gone_on_with(ran):
    with pytest.raises(
        ConfigError,
        match=r"stages.yaml: stage first was begun with optim.lr 0.002, and it is 0.001 now; choose",
    ):
        write_record(make_stages("tiny", [*RAN, "optim.lr=0.001"]))
    # changes nothing that is learned
    write_record(make_stages("tiny", [*RAN, "data.micro_batch_size=4"]))
    recipe_command("tiny", RAN)


@pytest.mark.slow
def test_a_finished_stage_is_not_taken_where_the_one_before_was_trained_anew(ran):
    copy = ran.with_name("anew")
    shutil.copytree(ran, copy)
    record = copy / "stages.yaml"
    record.write_text(record.read_text().replace("ran/", "anew/"))
    shutil.rmtree(copy / "first")
    words = [*RAN, "stages.first.optim.lr=0.001", "name=anew"]
    with pytest.raises(DataError, match=r"stage second is finished, and was trained from other"):
        recipe_command("tiny", words)
    assert (copy / "first" / "export" / "config.json").exists()
    with pytest.raises(DataError, match=r"stage second is finished, and was trained from other"):
        recipe_command("tiny", words)


def start(*words):
    command = [sys.executable, "-m", "owlfuse", "recipe", "tiny", *SMALL, *words]
    # other threads, other last bits
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=threads
    )


@pytest.mark.slow
def test_after_sigkill_the_same_command_goes_on_at_the_stage_and_step_and_ends_alike():
    common = ["stages.second.trainer.max_steps=40", "trainer.val_check_interval=8"]
    process = start(*common, "name=killed")
    root = Path("runs/tiny/killed")
    deadline = time.monotonic() + 600
    while (
        time.monotonic() < deadline
        and not list(root.glob("second/checkpoints/step_*.ckpt"))
        and process.poll() is None
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (root / "second" / "results.json").exists()
    before = (root / "first" / "results.json").stat().st_mtime_ns

    process = start(*common, "name=killed")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "stage first is finished" in output
    assert (root / "first" / "results.json").stat().st_mtime_ns == before
    assert not list(root.glob("second.*"))  # gone on with, not begun anew
    recipe_command("tiny", [*SMALL, *common, "name=whole"])
    for name in ("second", "third"):
        whole = weights(Path("runs/tiny/whole") / name)
        assert all(
            torch.equal(tensor, weights(root / name)[key]) for key, tensor in whole.items()
        ), name
        assert losses(root / name) == losses(Path("runs/tiny/whole") / name)


@pytest.mark.slow
def test_a_stage_that_was_stopped_between_its_last_step_and_its_export_is_exported(ran, capsys):
    before = weights(ran / "third")
    shutil.rmtree(ran / "third" / "export")
    (ran / "third" / "results.json").unlink()
    recipe_command("tiny", RAN)
    assert (ran / "third" / "export" / "config.json").exists()
    assert (ran / "third" / "results.json").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(ran / "third").items())
    assert not list(ran.glob("third.*"))


@pytest.mark.slow
def test_a_stage_that_was_stopped_before_its_first_checkpoint_begins_anew_and_keeps_what_was_there(
    ran,
):
    for path in ("checkpoints", "export"):
        shutil.rmtree(ran / "third" / path)
    recipe_command("tiny", RAN)
    assert (ran / "third" / "export" / "config.json").exists()
    assert len(list(ran.glob("third.*/metrics.csv"))) == 1


@pytest.mark.parametrize("left", ["step_00000002.ckpt.part", "best.ckpt"])
@pytest.mark.fast_cases(1)
def test_a_stage_without_a_checkpoint_that_can_go_on_begins_anew(left, monkeypatch):
    (stage, *_) = make_stages("tiny", [*SMALL, f"name=without_{left[:4]}"])
    (stage.folder / "checkpoints").mkdir(parents=True)
    (stage.folder / "checkpoints" / left).touch()
    begun = begun_by(stage, monkeypatch)
    assert begun.resume is None
    assert len(list(stage.folder.parent.glob("first.*/checkpoints"))) == 1


@pytest.mark.slow
def test_a_stage_that_goes_on_has_what_the_file_and_the_command_have_now(ran, monkeypatch):
    """Its checkpoint has the keys as they were; these may change."""
    changed = ["data.micro_batch_size=2", "evaluation.batch_size=3", "+trainer.num_nodes=1"]
    (stage, *_) = make_stages("tiny", [*RAN, *changed])
    shutil.rmtree(stage.weights)
    begun = begun_by(stage, monkeypatch)
    assert begun.resume == str(stage.folder)
    assert (begun.data.micro_batch_size, begun.evaluation.batch_size) == (2, 3)
    assert begun.trainer.num_nodes == 1


def begun_by(stage, monkeypatch):
    """The configuration with which a stage would be trained."""
    configs = []

    def stop(config):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("owlfuse.training.train.run", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, None)
    return configs[0]


@pytest.mark.slow
def test_under_torchrun_every_rank_goes_through_the_same_stages_and_one_writes():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [
        "-m",
        "owlfuse",
        "recipe",
        "tiny",
        *SMALL,
        "name=ranks",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        done.stdout.count("tiny: the stages")
        == done.stdout.count("tiny: what the stages reached")
        == 1
    )
    recipe_command("tiny", [*SMALL, "name=one"])
    for name in ("first", "second", "third"):
        alone = weights(Path("runs/tiny/one") / name)
        for key, tensor in weights(Path("runs/tiny/ranks") / name).items():
            if "key.bias" in key:  # no softmax depends on it: its gradient is rounding alone
                continue
            # of a gradient of rounding alone Adam makes a whole step
            apart = (tensor - alone[key]).abs() > 1e-4
            assert apart.double().mean() < 1e-3, (name, key)


@pytest.mark.slow
def test_a_stage_may_hold_the_llm_in_4_bits_between_others_that_do_not():
    write_recipe("tiny", TINY)
    key = "stages.second.model.llm.quantization"
    stages = make_stages("tiny", [*SMALL, key + "={compute_dtype: float32}"])
    settings = [stage.config.model.llm.get("quantization") for stage in stages]
    assert settings[0] is settings[2] is None
    assert settings[1].compute_dtype == "float32"
