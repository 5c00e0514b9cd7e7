"""The main job on real files: a run's folder, the loss over the global batch, Ctrl-C and resume,
and what is refused."""

import csv
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import SHAPE_COUNTS, SMALL_RUN
from owlfuse.artifacts.runs import last_checkpoint, step_of
from owlfuse.config.compose import compose
from owlfuse.config.folders import find_folders
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.shapes.write import write_shapes
from owlfuse.model.multimodal import on_meta
from owlfuse.training import train
from single_draws import look_up

SMALL = [*SMALL_RUN, "evaluation.max_questions=8", "evaluation.max_new_tokens=3"]
EXPERIMENTS = sorted(name for name in find_folders().experiment_names if name.startswith("shapes_"))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working folder of its own, in which `data/` and `runs/` are made."""
    path = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        yield path


def run(*overrides):
    return train.run(compose([*SMALL, *overrides]))


def weights(folder):
    return torch.load(last_checkpoint(folder), weights_only=True)["state_dict"]


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return {
            int(row["step"]): float(row["train/loss"])
            for row in csv.DictReader(file)
            if row.get("train/loss")
        }


def logged(folder, name):
    """The values of a metric in metrics.csv, in order."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.fast_cases(1)
def test_an_experiment_leaves_all_that_explains_it(experiment):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_folder = run(
        f"experiment={experiment}",
        "name=a",
        "trainer.max_steps=3",
        "seed=5",
        "trainer.log_every_n_steps=1",
    )
    assert run_folder == Path("runs") / experiment / "a"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    results = json.loads((run_folder / "results.json").read_text())
    assert (results["experiment"], results["seed"], results["steps"]) == (experiment, 5, 3)
    wanted = {
        "experiment",
        "seed",
        "steps",
        "checkpoint",
        "metrics",
        "questions",
        "versions",
        "git",
        "wall_s",
        "cost",
        "hash",
    }
    assert set(results) == wanted | {"changes", "precision", "tokenizer"}
    metrics = results["metrics"]
    wanted = {
        "val/loss",
        "val/perplexity",
        "val/exact_match",
        "val/exact_match_held_out",
        "val/exact_match_blank",
    }
    assert wanted | {"text/exact_match"} <= set(metrics)
    assert any(name.startswith("val/exact_match/") for name in metrics)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]))
    mixture = json.loads((run_folder / "mixture.json").read_text())
    assert {name: source["drawn"] for name, source in mixture["sources"].items()} == {
        "shapes": 16,
        "text": 8,
    }
    assert len(losses(run_folder)) == 3
    assert list(run_folder.glob("events.out.tfevents*"))
    assert (run_folder / "checkpoints" / "best.ckpt").exists()
    with Image.open(run_folder / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    answers = [json.loads(line) for line in (run_folder / "answers.jsonl").read_text().splitlines()]
    val = [a for a in answers if a["source"] == "val"]
    assert metrics["val/exact_match"] == pytest.approx(sum(a["right"] for a in val) / len(val))


@pytest.mark.slow
def test_the_run_is_repeated_by_its_own_configuration():
    first = run("experiment=shapes_owl1", "name=repeat1", "trainer.max_steps=2")
    second = run("experiment=shapes_owl1", "name=repeat2", "trainer.max_steps=2")
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(first).values(), weights(second).values(), strict=True)
    )


@pytest.mark.slow
def test_accumulation_does_not_change_the_steps():
    """The loss is divided by the supervised tokens of the global batch, whatever the micro batches'
    lengths; the backbone has no batch norm here, which sees micro batches by its nature."""
    common = (
        "experiment=shapes_owl1",
        "trainer.max_steps=3",
        "model/vision=timm",
        "model.vision.name=test_vit",
    )
    common += ("model.vision.pretrained=false", "trainer.log_every_n_steps=1")
    whole = run(*common, "name=whole")
    parts = run(*common, "name=parts", "data.micro_batch_size=2")
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile needs a C++ compiler",
)
def test_a_compiled_run_has_the_losses_of_one_that_is_not_and_names_of_its_weights():
    common = (
        "experiment=shapes_owl3",
        "trainer.max_steps=3",
        "optim=adamw",
        "trainer.log_every_n_steps=1",
    )
    common += ("evaluation.max_questions=1",)
    plain = run(*common, "name=not_compiled")
    compiled = run(*common, "name=compiled", "model.compile=true")
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    assert list(weights(compiled)) == list(weights(plain))


@pytest.mark.slow
def test_packing_does_not_change_the_steps_and_says_what_padding_it_saves():
    """In two micro batches, whose rows may differ in number."""
    common = (
        "experiment=shapes_owl3",
        "trainer.max_steps=2",
        "model/vision=timm",
        "model.vision.name=test_vit",
    )
    common += (
        "model.vision.pretrained=false",
        "trainer.log_every_n_steps=1",
        "optim=adamw",
        "evaluation.max_questions=1",
    )
    unpacked = run(*common, "name=unpacked")
    before = logged(unpacked, "data/padding")
    assert logged(unpacked, "data/padding_unpacked") == before
    assert all(0 < share < 0.5 for share in before)
    packed = run(*common, "name=packed", "data.pack_to=512", "data.micro_batch_size=4")
    assert losses(packed) == pytest.approx(losses(unpacked), abs=1e-5)
    torch.testing.assert_close(weights(packed), weights(unpacked), atol=2e-5, rtol=1e-5)
    after, without = logged(packed, "data/padding"), logged(packed, "data/padding_unpacked")
    assert all(0 <= a < b for a, b in zip(after, without, strict=True))


def test_a_row_too_short_for_the_longest_sample_is_refused_in_one_line():
    with pytest.raises(
        ConfigError,
        match="shapes_owl1: pack_to is 256 and max_length 512: a row must hold the longest sample",
    ):
        run("experiment=shapes_owl1", "name=short_rows", "data.pack_to=256")
    assert not Path("runs/shapes_owl1/short_rows").exists()


def start(*overrides):
    command = [sys.executable, "-m", "owlfuse", "train", *SMALL, *overrides]
    # other threads, other last bits
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=threads
    )


@pytest.mark.slow
def test_after_ctrl_c_a_resumed_run_ends_as_one_that_was_never_stopped():
    common = [
        "experiment=shapes_owl3",
        "trainer.max_steps=40",
        "trainer.log_every_n_steps=1",
        "data.micro_batch_size=4",
    ]
    common += ["evaluation.max_questions=1", "data.workers=1"]
    process = start(*common, "name=stopped")
    metrics = Path("runs/shapes_owl3/stopped/metrics.csv")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not metrics.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130, output
    assert "go on with: owlfuse train resume=runs/shapes_owl3/stopped" in output
    assert "Traceback" not in output
    steps = step_of(last_checkpoint(Path("runs/shapes_owl3/stopped")))
    assert 0 < steps < 40

    resumed = train.run(compose(["resume=runs/shapes_owl3/stopped"]))
    assert json.loads((resumed / "results.json").read_text())["steps"] == 40
    whole = run(*common, "name=whole")
    assert losses(resumed) == losses(whole)
    torch.testing.assert_close(weights(resumed), weights(whole), atol=0, rtol=0)


@pytest.mark.slow
def test_a_finished_run_goes_on_when_it_is_given_more_steps():
    run_folder = run(
        "experiment=shapes_owl1",
        "name=longer",
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
    )
    first = losses(run_folder)
    train.run(compose([f"resume={run_folder}", "trainer.max_steps=5"]))
    assert json.loads((run_folder / "results.json").read_text())["steps"] == 5
    # 65 % of 40
    assert json.loads((run_folder / "mixture.json").read_text())["sources"]["shapes"]["drawn"] == 26
    after = losses(run_folder)
    assert sorted(after) == [0, 1, 2, 3, 4]
    assert {step: after[step] for step in first} == first


@pytest.mark.slow
def test_evaluating_a_run_again_gives_its_results_again():
    from owlfuse.evaluation.validation import evaluate_run

    run_folder = run("experiment=shapes_owl2", "name=again", "trainer.max_steps=2")
    before = json.loads((run_folder / "results.json").read_text())
    (run_folder / "results.json").unlink()
    evaluate_run(str(run_folder), ["evaluation.batch_size=3"])
    after = json.loads((run_folder / "results.json").read_text())
    assert after["steps"] == before["steps"]
    assert after["metrics"] == pytest.approx(before["metrics"], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.fusion.layers=[0,9]"],
            r"command line: model.fusion: layers \[0, 9\]: the LLM has 4 layers, 0 to 3",
        ),
        (["model.vision.name=resnet10x"], "command line: model.vision: resnet10x: Unknown model"),
        (["model.llm.config.num_attention_heads=5"], "command line: model.llm: config: "),
        (["model.llm.config.hidden_sise=64"], "hidden_sise"),
        (
            ["model.llm.pretrained=./nowhere", "model.llm.config=null"],
            "model.llm: pretrained: ./nowhere is no folder",
        ),
        (
            ["optim.part_lr.visoin=1.0"],
            "optim.part_lr.visoin: no such key; did you mean 'optim.part_lr.vision'",
        ),
        (
            ["data.micro_batch_size=3"],
            "global_batch_size is 8, which 1 ranks of micro_batch_size 3 do not divide",
        ),
        (["data.sources.text.weight=-1"], "source text has weight -1"),
        (
            [
                f"model/adapter@model.adapter.{part}=frozen"
                for part in ("vision", "connector", "fusion", "llm")
            ],
            "every part is frozen, so there is nothing to train",
        ),
    ],
)
@pytest.mark.fast_cases(4)
def test_what_does_not_fit_together_is_told_in_one_line_before_a_weight_is_made(
    overrides, message, monkeypatch
):
    monkeypatch.setattr(
        "owlfuse.training.train.MultimodalModule", lambda *args: pytest.fail("a module was made")
    )
    with pytest.raises(ConfigError, match=message) as error:
        run("experiment=shapes_owl3", "name=wrong", *overrides)
    assert "\n" not in str(error.value)
    assert not Path("runs/shapes_owl3/wrong").exists()


@pytest.mark.slow
def test_a_name_that_is_taken_is_not_written_over():
    run("experiment=shapes_owl1", "name=taken", "trainer.max_steps=1")
    with pytest.raises(ConfigError, match="the run runs/shapes_owl1/taken exists"):
        run("experiment=shapes_owl1", "name=taken", "trainer.max_steps=1")


@pytest.mark.slow
def test_a_wrong_sample_ends_the_command_in_one_line_that_names_it():
    records = json.loads(Path("data/shapes/train.json").read_text())
    records[7]["conversations"][0]["value"] += " <image>"
    Path("wrong.json").write_text(json.dumps(records))
    overrides = [
        "data.sources.shapes.file=wrong.json",
        "data.sources.shapes.image_root=data/shapes",
        "data.workers=1",
    ]
    process = start("experiment=shapes_owl1", "name=wrong", "trainer.max_steps=20", *overrides)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("owlfuse: error")]
    assert line == (
        "owlfuse: error: sample shapes:train-000007 has 2 <image> placeholders and 1 images "
        "(record 8 of wrong.json)"
    )
    assert "Traceback" not in output


@pytest.mark.slow
def test_skipped_samples_are_counted_in_mixture_json_over_a_resume_and_limited():
    records = json.loads(Path("data/shapes/train.json").read_text())
    for record in records[::4]:
        record["image"] = "none.png"
    Path("holes.json").write_text(json.dumps(records))
    overrides = [
        "experiment=shapes_owl1",
        "data.sources.shapes.file=holes.json",
        "data.sources.shapes.on_error=skip",
    ]
    overrides += [
        "data.sources.shapes.image_root=data/shapes",
        "trainer.max_steps=12",
        "model.vision.image_size=64",
    ]
    run_folder = run(*overrides, "name=skips", "trainer.max_steps=5")
    before = json.loads((run_folder / "mixture.json").read_text())["skipped"]
    train.run(compose([f"resume={run_folder}", "trainer.max_steps=12"]))
    mixture = json.loads((run_folder / "mixture.json").read_text())
    schedule = Mixture({"shapes": 48, "text": 120}, {"shapes": 0.65, "text": 0.35}, seed=0)
    drawn = [look_up(schedule, position) for position in range(12 * 8)]
    wrong = [(source, index) for source, index in drawn if source == "shapes" and index % 4 == 0]
    row = mixture["sources"]["shapes"]
    assert row["skipped"] == sum(skip["times"] for skip in mixture["skipped"]) == len(wrong) > 12
    assert row["skipped_samples"] == len(mixture["skipped"]) == len(set(wrong)) == 12
    assert 0 < len(before) < 12
    assert [skip["sample"] for skip in mixture["skipped"]][: len(before)] == [
        skip["sample"] for skip in before
    ]
    assert mixture["sources"]["shapes"]["truncated"] == 0
    assert "no image none.png" in mixture["skipped"][0]["reason"]
    with pytest.raises(
        DataError, match="source shapes had 4 wrong samples, over its max_skips of 3"
    ):
        run(*overrides, "name=limited", "data.sources.shapes.max_skips=3")


@pytest.mark.slow
def test_what_validation_leaves_out_and_how_much_is_padding_are_in_mixture_json_over_a_resume():
    records = json.loads(Path("data/shapes/val.json").read_text())
    records[2]["image"] = records[5]["image"] = "none.png"
    records[3]["id"] = records[1]["id"]
    records[1]["conversations"] += [
        {"from": "human", "value": "word " * 600},
        {"from": "gpt", "value": "no"},
    ]
    records[1]["kinds"] += ["words"]
    Path("val_holes.json").write_text(json.dumps(records))
    common = [
        "experiment=shapes_owl1",
        "name=val_skips",
        "data.validation.val.file=val_holes.json",
        "data.pack_to=512",
    ]
    common += [
        "data.validation.val.image_root=data/shapes",
        "data.validation.val.on_error=skip",
        "trainer.log_every_n_steps=1",
    ]
    common += [
        "data.validation_samples=4",
        "trainer.val_check_interval=2",
        "+data.on_length.val=truncate_turns",
    ]
    folder = run(*common, "trainer.max_steps=4")
    train.run(compose([f"resume={folder}", "trainer.max_steps=6"]))
    mixture = json.loads((folder / "mixture.json").read_text())
    found = mixture["validation"]
    assert sorted((skip["source"], skip["sample"]) for skip in found["skipped"]) == [
        ("val", "val:2"),
        ("val", "val:5"),
    ]
    assert "no image none.png" in found["skipped"][0]["reason"]
    assert found["truncated"] == [
        {"source": "val", "sample": f"val:{records[1]['id']}", "turns_removed": 1}
    ]
    rows = found["sources"]
    assert {
        name: (row["skipped"], row["truncated"]) for name, row in rows.items() if name == "val"
    } == {"val": (2, 1)}
    assert rows["text"]["samples"] > 0
    padding = mixture["padding"]
    assert 0 < padding["padding"] < padding["padding_unpacked"] < 1
    for name, share in padding.items():  # over six steps, of which a resumed run made two
        shares = logged(folder, f"data/{name}")
        assert len(shares) == 6
        assert min(shares) <= share <= max(shares)
    assert mixture["sources"]["shapes"]["duplicate_ids"]["count"] == 0


@pytest.mark.parametrize("experiment", sorted(find_folders().experiment_names))
@pytest.mark.fast_cases(2)
def test_every_experiment_composes_and_its_parts_fit_together(experiment):
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(compose([f"experiment={experiment}"]), resolve=True)
    try:
        model, summary = on_meta(config["model"], vocab_size=600)
    except ModuleNotFoundError as error:
        if "pip install 'owlfuse[" not in str(error):
            raise
        pytest.skip(str(error))
    assert sum(row.trained for row in summary) > 0
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.slow
def test_a_run_ends_with_the_schedule_where_a_source_stops_it(capsys):
    """48 pictures and 24 chats of text, 5.2 and 2.8 in a step: the text is used up in the ninth
    step."""
    folder = run(
        "experiment=shapes_owl1",
        "name=ends",
        "trainer.max_steps=500",
        "trainer.log_every_n_steps=1",
        "data.at_end={text: stop}",
    )
    assert "the data end (at_end) after 8 whole steps of 500" in capsys.readouterr().out
    assert max(losses(folder)) == 7
    mixture = json.loads((folder / "mixture.json").read_text())
    assert mixture["steps"] == 8
    assert (mixture["sources"]["text"]["at_end"], mixture["sources"]["shapes"]["at_end"]) == (
        "stop",
        "repeat",
    )
    assert sum(source["drawn"] for source in mixture["sources"].values()) == 64


@pytest.mark.slow
def test_weights_by_tokens_are_counted_once_and_trained_with(capsys):
    folder = run(
        "experiment=shapes_owl1",
        "name=tokens",
        "trainer.max_steps=2",
        "data.weights_by=tokens",
        "+data.weights_at={1: {text: 0.5}}",
    )
    mixture = json.loads((folder / "mixture.json").read_text())
    assert mixture["weights_by"] == "tokens"
    assert [phase["step"] for phase in mixture["phases"]] == [0, 1]
    assert len(list(Path("data/shapes/.owlfuse").glob("*.lengths.npz"))) == 2


ADVERTISING = [
    "Tip",
    "litlogger",
    "litmodels",
    "pypi.org",
    "TPU",
    "HPU",
    "GPU available",
    "num_workers",
    "persistent_workers",
]
ADVERTISING += [
    "bottleneck",
    "deprecated",
    "LeafSpec",
    "Trainer.fit",
    "Loading weights",
    "Epoch",
    "it/s",
    "\r",
    "\x1b",
]


@pytest.mark.slow
@pytest.mark.parametrize("bar", [True, False])
def test_a_redirected_log_says_parts_data_and_folder_and_nothing_of_others(bar):
    words = [
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "data.workers=1",
        f"trainer.enable_progress_bar={bar}",
    ]
    process = start(
        "experiment=shapes_owl3", f"name=quiet_{bar}", "evaluation.max_questions=1", *words
    )
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert not [word for word in ADVERTISING if word in output]
    lines = output.splitlines()
    table = next(index for index, line in enumerate(lines) if line.split()[:1] == ["part"])
    beginning = "\n".join(lines[: table + 8])
    assert lines[0].startswith(f"run: runs/shapes_owl3/quiet_{bar}, experiment shapes_owl3")
    for said in (
        "TimmBackbone",
        "LinearConnector",
        "HyperAttention",
        "llama",
        "owlfuse train resume=runs/shapes_owl3/quiet_",
    ):
        assert said in beginning
    for source, count in (
        ("shapes", SHAPE_COUNTS["train_pictures"]),
        ("val", SHAPE_COUNTS["val_pictures"]),
    ):
        assert any(
            line.strip().startswith(f"{source}: ") and f"{count} samples" in line
            for line in lines[:table]
        )
    assert any(line.startswith("trained 4 steps in ") for line in lines)
    assert sum(line.startswith("step 2 of 4: ") for line in lines) == bar


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_gives_the_cursor_back_and_its_last_line_says_how_to_go_on():
    pid, terminal = pty.fork()
    if pid == 0:
        words = [
            "experiment=shapes_owl3",
            "name=terminal",
            "trainer.max_steps=2000",
            "data.workers=1",
        ]
        os.execv(sys.executable, [sys.executable, "-m", "owlfuse", "train", *SMALL, *words])
    output, pressed = "", False
    with suppress(OSError):  # Linux's answer when the other end is closed
        while chunk := os.read(terminal, 65536):
            output += chunk.decode(errors="replace")
            if not pressed and "about " in output:  # a narrow terminal cuts off what comes later
                os.write(terminal, b"\x03")
                pressed = True
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")
    last = output.rstrip().splitlines()[-1]
    assert re.fullmatch(
        r"owlfuse: stopped at step \d+; go on with: owlfuse train resume=runs/shapes_owl3/terminal",
        last,
    )
