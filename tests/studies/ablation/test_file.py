"""`ablation.yaml`: what it may say, and the cells that come of it; mistakes are told in one line
before anything trains."""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import SHAPE_COUNTS, TINY_SHAPES
from owlfuse.config.compose import compose
from owlfuse.config.folders import find_folders
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.studies.ablation.file import Factor, override_literal, read_ablation
from owlfuse.studies.ablation.grid import (
    all_combinations,
    check_file_words,
    full_metrics,
    make_cells,
    make_record,
    mark_absent,
    split_metric,
    validation_sources,
)
from owlfuse.studies.ablation.run import ablate_command

GATES = """
question: Which gate?
base: shapes_owl3
overrides: [trainer.max_steps=7]
factors:
  fusion:
    owl1: [model/fusion=concat, model/connector=abstractor_owl1]
    owl3: [model/fusion=hyperattention, model/connector=linear]
  model.fusion.gate: [adaptive, static]
leave_out: [{fusion: owl1, gate: static}]
baseline: {fusion: owl3}
seeds: [0, 1]
metrics: [val/exact_match, val_held_out/exact_match, text/loss]
budget: {minutes: 40}
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        yield path


def write(name, text):
    path = Path("experiments") / name / "ablation.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_cells_are_the_product_without_what_is_left_out_and_the_baseline_stands_first():
    ablation = read_ablation("gates", write("gates", GATES))
    cells = make_cells(ablation, ["optim.lr=0.5", *TINY_SHAPES], "gates")
    names = ["owl3-adaptive", "owl3-adaptive", "owl1", "owl1", "owl3-static", "owl3-static"]
    assert [cell.name for cell in cells] == names
    assert [cell.seed for cell in cells] == [0, 1] * 3
    assert cells[2].levels == {"fusion": "owl1", "gate": "-"}  # concatenation has no gate
    assert cells[5].key == "owl3-static-seed1"
    static = cells[5].config
    assert (static.model.fusion.gate, static.seed, static.optim.lr, static.trainer.max_steps) == (
        "static",
        1,
        0.5,
        7,
    )
    assert (static.experiment, static.name) == ("gates", "owl3-static-seed1")
    assert cells[2].config.model.fusion._target_.endswith("Concat")
    assert len({cell.hash["config"] for cell in cells}) == 6
    assert len({cell.hash["code"] for cell in cells}) == 1
    assert (ablation.minutes, ablation.steps) == (40, None)
    metrics = full_metrics(ablation.metrics, validation_sources(cells))
    assert make_record(cells, ablation, metrics)["baseline"] == "owl3-adaptive"


def test_a_group_that_stands_elsewhere_is_set_also_where_one_level_is_left():
    text = """
base: shapes_owl3
factors:
  model/fusion: [hyperattention, concat]
  model/adapter@model.adapter.llm: [frozen, lora]
leave_out: [{fusion: concat, llm: frozen}]
metrics: [val/loss]
"""
    ablation = read_ablation("adapters", write("adapters", text))
    levels = {"fusion": "concat", "llm": "lora"}
    assert mark_absent(ablation, levels, all_combinations(ablation), []) == levels


@pytest.mark.parametrize("value", ["数据/a.jsonl", "it's", "a b", "plain/a-b.json"])
def test_a_level_is_a_value_in_hydras_grammar(value):
    override = f"runs={override_literal(value)}"
    assert compose([override]).runs == value


def test_metrics_go_by_the_names_of_results_json_or_by_their_source():
    sources = ["val", "val_held_out", "text"]
    found = full_metrics(
        ["val/exact_match_held_out/color", "val_held_out/loss", "val/exact_match_blank"], sources
    )
    assert found == {
        "val/exact_match_held_out/color": ("val_held_out", "exact_match/color"),
        "val/loss_held_out": ("val_held_out", "loss"),
        "val/exact_match_blank": ("val", "exact_match_blank"),
    }


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("val/exact_match", ("val", "exact_match")),
        ("val/exact_match_match", ("val_match", "exact_match")),
        ("val/loss_match", ("val_match", "loss")),
    ],
)
def test_a_source_may_be_named_by_the_end_of_a_metric(metric, expected):
    assert split_metric(metric, ["val", "val_match"]) == expected


@pytest.mark.slow
def test_the_hash_changes_with_what_is_learned_and_not_with_names_or_workers():
    ablation = read_ablation("gates", write("gates", GATES))
    ablation.seeds = [0]
    first, other, same = (
        make_cells(ablation, words, name, open_data=False)[0].hash["config"]
        for words, name in (
            ([], "a"),
            (["optim.lr=0.5"], "a"),
            (["data.workers=0", "checkpoint.every=3", "runs=else"], "b"),
        )
    )
    assert first == same != other


def ours():
    """Name -> file of the ablations that come with owlfuse."""
    folders = find_folders()
    files = {name: folders.ablation(name) for name in folders.ablation_names}
    return {name: file for name, file in files.items() if not file.is_relative_to(Path.cwd())}


def test_every_ablation_of_ours_can_be_read_and_has_a_readme():
    assert "fusion" in ours()
    for name, file in ours().items():
        assert (file.parent / "README.md").is_file()
        assert read_ablation(name, file).factors


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ours()))
def test_every_cell_of_every_ablation_of_ours_composes(name):
    ablation = read_ablation(name, ours()[name])
    ablation.seeds = ablation.seeds[:1]
    try:
        cells = make_cells(ablation, [], name, open_data=False)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert len(cells) >= 2
    full_metrics(ablation.metrics, validation_sources(cells))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "question:",
            "qestion:",
            ("wrong/ablation.yaml: qestion: no such key of an ablation; did you mean 'question'"),
        ),
        (
            "base: shapes_owl3",
            "base: shapes_owl4",
            ("cell owl3-adaptive: experiment=shapes_owl4: no such experiment"),
        ),
        (
            "base: shapes_owl3",
            "",
            "wrong/ablation.yaml: base: not set, and required by an ablation",
        ),
        (
            "model/fusion=concat",
            "model/fusion=conct",
            ("cell owl1: model/fusion=conct: no such option; did you mean 'concat'"),
        ),
        (
            "model/connector=linear",
            "'model.fusion.layers=[9]'",
            ("cell owl3-adaptive: .*model.fusion: .*9"),
        ),
        (
            "[adaptive, static]\nleave_out: [",
            "[adaptive, static, statik]\nleave_out: [{fusion: owl1, gate: statik}, ",
            "cell owl3-statik: .*gate.*statik",
        ),
        (
            "[adaptive, static]",
            "[adaptive, adaptive]",
            ("factors.model.fusion.gate: a value stands twice"),
        ),
        ("  fusion:\n", "  cell:\n", "factors.cell: the tables have a column of this name"),
        ("[adaptive, static]", "3", "factors.model.fusion.gate: expected levels"),
        (
            "gate: static}",
            "gate: statik}",
            ("leave_out.gate: statik: no such level; did you mean 'static'"),
        ),
        (
            "{fusion: owl3}",
            "{fusoin: owl3}",
            ("baseline.fusoin: no such factor; did you mean 'fusion'"),
        ),
        ("{fusion: owl3}", "{fusion: owl1, gate: static}", "baseline: owl1-static is left out"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds: expected a list of different whole numbers"),
        (
            "text/loss",
            "txt/loss",
            ("metrics: txt/loss: no such validation source; did you mean 'text'"),
        ),
        ("{minutes: 40}", "{minutes: -1}", "budget.minutes: expected a positive number"),
        (
            "{minutes: 40}",
            "{hours: 1}",
            r"budget.hours: no such key of a budget \(there are: minutes, steps\)",
        ),
        (
            "{minutes: 40}",
            "{steps: many}",
            r"budget.steps: 'many' is not a whole number \(int\) or null",
        ),
        (
            "budget:",
            "paper: {columns: [a, b], rows: {owl1: [1, 2], owl3: [3]}}\nbudget:",
            r"paper.rows.owl3: expected a number for each of the 2 columns, and it is \[3\]",
        ),
        (
            "budget:",
            "paper: {columns: [a], rows: {}, titel: x}\nbudget:",
            "paper.titel: no such key of a paper; did you mean 'title'",
        ),
        # Nothing of the file is built by Hydra itself.
        ("question:", "_target_: x\nquestion:", "_target_: no such key of an ablation"),
        ("seeds: [0, 1]", "seeds: [{_target_: x}]", r"seeds: \[.*\] is not a list\[int\]"),
        (
            "trainer.max_steps=7",
            "optim.lrr=7",
            ("cell owl3-adaptive: optim.lrr: no such key; did you mean 'optim.lr'"),
        ),
        ("question: Which", "question: Which: x", r"wrong/ablation.yaml:\d+: not YAML"),
        (
            "  model.fusion.gate: [adaptive, static]\nleave_out: [{fusion: owl1, gate: static}]",
            "  same: {a: [optim.lr=0.5], b: [optim.lr=5e-1]}",
            "its configuration is that of cell",
        ),
    ],
)
@pytest.mark.fast_cases(6)
def test_a_mistake_in_any_cell_is_told_in_one_line_before_the_first_one_trains(old, new, message):
    assert old in GATES
    write("wrong", GATES.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as error:
        ablate_command("wrong", ["dry_run=true", "seeds=[0]"])
    assert "\n" not in str(error.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jobs=0"], "command line: jobs=0: expected a number from 1"),
        (["jobs=two"], "command line: jobs: 'two' is not a whole number"),
        (["seeds=1"], r"command line: seeds: 1 is not a list\[int\]"),
        (["seed=1"], r"command line: seed=1: an ablation has no seed=; write seeds=\[0,1\]"),
        (
            ["launcher=basik"],
            "command line: launcher=basik: no such launcher; did you mean 'basic'",
        ),
        (
            ["launcher.partition=gpu"],
            "command line: launcher.partition: no such setting of the launcher basic",
        ),
        (
            ["launcher=submitit_slurm", "launcher.partion=gpu"],
            "launcher.partion: no such setting of the launcher submitit_slurm; did you mean 'parti",
        ),
        (
            ["launcher=joblib", "jobs=2"],
            r"launcher=joblib: no such launcher \(there are: basic, submitit_slurm\)",
        ),
        (["optim.lrr=1"], "cell owl3-adaptive: optim.lrr: no such key; did you mean 'optim.lr'"),
    ],
)
def test_a_mistake_on_the_command_line(words, message):
    write("gates", GATES)
    with pytest.raises(ConfigError, match=message):
        ablate_command("gates", words)
    with pytest.raises(ConfigError, match="ablate gatess: no such ablation; did you mean 'gates'"):
        ablate_command("gatess", [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_every_cell_is_checked_for_this_machine_before_the_first_trains(monkeypatch):
    last = "    owl3: [model/fusion=hyperattention, model/connector=linear]"
    write(
        "gates",
        GATES.replace(last, last.replace("]", ", trainer.accelerator=gpu]")).replace(
            "{fusion: owl3}", "{fusion: owl1}"
        ),
    )
    monkeypatch.setattr(
        "owlfuse.studies.ablation.run.launch_all", lambda *_: pytest.fail("a cell is trained")
    )
    with pytest.raises(
        ConfigError, match="cell owl3-adaptive: .*torch finds no GPU on this machine"
    ):
        ablate_command("gates", [*TINY_SHAPES, "seeds=[0]"])


def test_a_cluster_that_this_machine_is_not_part_of_is_refused(monkeypatch):
    write("gates", GATES)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="there is no srun on this machine"):
        ablate_command("gates", ["launcher=submitit_slurm"])


def test_an_ablation_without_evaluation_or_metrics_is_refused():
    write("gates", GATES)
    with pytest.raises(
        ConfigError,
        match="cell owl3-adaptive: evaluation is null, and the ablation reports val/exact_match, ",
    ):
        ablate_command("gates", ["evaluation=null"])
    without = GATES.replace("metrics: [val/exact_match, val_held_out/exact_match, text/loss]", "")
    write("gates", without.replace("trainer.max_steps=7", "evaluation=null"))
    with pytest.raises(ConfigError, match="metrics: not set, and required by an ablation"):
        ablate_command("gates", [])


@pytest.mark.slow
def test_a_dry_run_shows_the_cells_within_a_hundred_columns_and_writes_nothing(capsys):
    write("gates", GATES)
    before = sorted(Path().rglob("*"))
    ablate_command("gates", ["dry_run=true"])
    shown = capsys.readouterr().out
    for words in (
        "Which gate?",
        "owl3-static",
        "6 of 6 runs are left, 42 steps",
        "none is begun after 40 min",
    ):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("locked", "message"),
    [("", "held is being run by another process"), ("all-seed0/", "all-seed0 is being trained by")],
)
def test_anew_moves_no_run_away_that_another_process_has(locked, message):
    write("held", "base: shapes_owl1\nmetrics: [val/loss]\nfactors: {seed: {all: []}}\n")
    run = Path("runs/held/all-seed0")
    run.mkdir(parents=True, exist_ok=True)
    (run / "results.json").write_text('{"hash": {"code": "other"}}')
    with Path(f"runs/held/{locked}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=message):
            ablate_command("held", ["anew=true", *TINY_SHAPES])
    assert (run / "results.json").exists()


def test_a_metric_that_no_evaluation_has_is_refused_and_a_users_own_is_not():
    assert full_metrics(["val/exact_match_blank", "val/loss"], ["val"])
    with pytest.raises(ConfigError, match="metrics: val/accuracy: no such metric"):
        full_metrics(["val/accuracy"], ["val"])
    assert full_metrics(["val/accuracy"], ["val"], "mine.Evaluation")


@pytest.mark.parametrize("word", ["seed=5", "resume=runs/a"])
@pytest.mark.parametrize("place", ["overrides", "level"])
def test_a_file_does_not_set_what_each_cell_has_of_its_own(word, place):
    factor = Factor("a", None, {"x": [word if place == "level" else "optim.lr=1"]})
    overrides = [word] if place == "overrides" else []
    ablation = SimpleNamespace(name="mine", overrides=overrides, factors=[factor])
    with pytest.raises(ConfigError, match=f"mine: {word}: the ablation decides it"):
        check_file_words(ablation)
