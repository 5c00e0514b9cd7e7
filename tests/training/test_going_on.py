"""Runs that go on: where they take up the data, which keys they take and which they refuse, and
data that changed."""

import csv
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from helpers import SHAPE_COUNTS, TINY_SHAPES
from owlfuse.artifacts.load import load_run
from owlfuse.artifacts.resume import Past, read_past
from owlfuse.artifacts.runs import last_checkpoint, step_of
from owlfuse.config.compose import compose
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.signals import signals_handled
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.data.shapes.write import write_shapes
from owlfuse.evaluation.validation import evaluate_run, results_code
from owlfuse.training import train
from owlfuse.training.module import MultimodalModule
from owlfuse.training.sample_counts import SampleCounts
from single_draws import look_up

BATCH, STEPS = 4, 4
SMALL = [
    "experiment=shapes_owl1",
    *TINY_SHAPES,
    "data.workers=0",
    f"data.global_batch_size={BATCH}",
    "data.validation_samples=2",
    "model.vision.image_size=32",
    "evaluation.max_questions=1",
    "evaluation.max_new_tokens=1",
    "evaluation.blank=false",
    "evaluation.contact_sheet=0",
    "evaluation.decode_tokens=0",
    "trainer.log_every_n_steps=1",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=2",
    "optim=adamw",
    "optim.warmup_steps=2",
]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("going_on")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SHAPE_COUNTS)
        yield path


@pytest.fixture(scope="module")
def first(folder):
    """A run of four steps of four samples."""
    return train.run(compose([*SMALL, "name=first", "data.weights_at={6: {text: 0.9}}"]))


@pytest.fixture
def copy(first, tmp_path):
    """The run again, to go on with."""
    return Path(shutil.copytree(first, tmp_path / "run"))


@pytest.fixture
def seen(monkeypatch):
    """The ids of each step's samples from now on, and its optimizer groups."""
    found = {}
    step = MultimodalModule.training_step
    ready = MultimodalModule.on_before_optimizer_step

    def record(module, batch, index):
        found.setdefault(module.global_step, ([], []))[0].extend(batch.ids)
        return step(module, batch, index)

    def record_groups(module, optimizer):
        groups = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        found[module.global_step][1].extend(groups)
        return ready(module, optimizer)

    monkeypatch.setattr(MultimodalModule, "training_step", record)
    monkeypatch.setattr(MultimodalModule, "on_before_optimizer_step", record_groups)
    return found


def go_on(run, *overrides):
    return train.run(compose([f"resume={run}", *overrides]))


def read(run, name):
    return json.loads((run / name).read_text())


def metrics(run, column):
    with (run / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file) if row.get(column)]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "steps"), [(2, 8), (8, 6), (4, 8), (1, 6)])
def test_another_global_batch_takes_up_the_very_next_sample(copy, seen, size, steps):
    """The schedule and its phase, which begins at step 6, are computed here from positions
    alone."""
    go_on(copy, f"data.global_batch_size={size}", f"trainer.max_steps={steps}")
    phase = BATCH * STEPS + (6 - STEPS) * size
    mixture = Mixture(
        {"shapes": 48, "text": 24},
        {"shapes": 0.65, "text": 0.35},
        seed=0,
        weights_at={phase: {"text": 0.9}},
    )
    names = [
        look_up(mixture, position)
        for position in range(BATCH * STEPS, BATCH * STEPS + (steps - STEPS) * size)
    ]
    drawn = [identity for _, (ids, _) in sorted(seen.items()) for identity in ids]
    assert [identity.partition(":")[0] for identity in drawn] == [name for name, _ in names]
    numbers = [f"shapes:train-{index:06}" for name, index in names if name == "shapes"]
    assert [identity for identity in drawn if identity.startswith("shapes:")] == numbers
    report = read(copy, "mixture.json")
    assert report["samples"] == BATCH * STEPS + (steps - STEPS) * size
    assert {name: row["drawn"] for name, row in report["sources"].items()} == mixture.counts(
        report["samples"]
    )
    assert [phase["step"] for phase in report["phases"]] == [0, 6]
    expected = [(0, 0, BATCH), *([(STEPS, BATCH * STEPS, size)] if size != BATCH else [])]
    assert [tuple(row.values()) for row in report["global_batch_sizes"]] == expected


@pytest.mark.slow
def test_the_global_batch_may_change_again_and_back(copy, seen):
    for size, steps in ((2, 6), (8, 7), (4, 8)):
        go_on(copy, f"data.global_batch_size={size}", f"trainer.max_steps={steps}")
    assert read(copy, "mixture.json")["samples"] == 16 + 2 * 2 + 8 + 4
    assert [len(ids) for _, (ids, _) in sorted(seen.items())] == [2, 2, 8, 4]
    changes = read(copy, "results.json")["changes"]
    assert [change["step"] for change in changes] == [4, 6, 7]
    assert [change["changes"]["data.global_batch_size"] for change in changes] == [
        [4, 2],
        [2, 8],
        [8, 4],
    ]


def forget(run):
    """Makes its checkpoints as they were before they kept the position and the configuration."""
    path = last_checkpoint(run)
    content = torch.load(path, weights_only=True)
    for key in ("run", "step_positions"):
        del content[key]
    torch.save(content, run / "checkpoints" / "last.ckpt")
    for other in (run / "checkpoints").glob("step_*"):
        other.unlink()


@pytest.mark.slow
def test_a_checkpoint_without_the_position_goes_on_where_it_was(copy, seen):
    forget(copy)
    go_on(copy, "data.global_batch_size=2", "trainer.max_steps=5")
    assert read(copy, "mixture.json")["samples"] == 18
    assert list(seen) == [4]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_positions_and_steps_are_each_others_inverse(size):
    positions = StepPositions.of(5).changed(4, size).changed(9, 2)
    for step in range(20):
        expected = sum(5 if s < 4 else size if s < 9 else 2 for s in range(step))
        assert positions.position(step) == expected
        assert positions.step(expected) == step
    assert positions.changed(0, 3).changes == [(0, 0, 3)]
    assert positions.changed(4, 5).changes == [(0, 0, 5)]


def cosine(step, peak, warmup, steps, least):
    """The rate at a step, after the formula of its docstring."""
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / (steps - warmup)
    return peak * (
        least
        + (1 - least)
        * 0.5
        * (1 + torch.cos(torch.tensor(share * torch.pi, dtype=torch.float64)).item())
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["optim.lr=1e-4"], {"lr": 1e-4}),
        (["optim.weight_decay=0.3"], {"weight_decay": 0.3}),
        (["optim.betas=[0.5,0.6]"], {"betas": (0.5, 0.6)}),
        (["optim.eps=1e-3"], {"eps": 1e-3}),
        (["optim.warmup_steps=7"], {"warmup": 7}),
        (["optim.min_lr_ratio=0.5"], {"least": 0.5}),
        (["optim.part_lr.connector=1e-5"], {"connector": 1e-5}),
        (
            ["optim.lr=1e-4", "optim.warmup_steps=0", "optim.part_lr.llm=3e-4"],
            {"lr": 1e-4, "warmup": 0, "llm": 3e-4},
        ),
        ([], {}),
    ],
)
def test_keys_of_the_optimizer_are_applied_to_schedule_and_groups(copy, seen, overrides, wanted):
    before = read(copy, "results.json")["hash"]["config"]
    go_on(copy, "trainer.max_steps=8", *overrides)
    usual = {
        "lr": 2e-3,
        "weight_decay": 0.05,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "warmup": 2,
        "least": 0.05,
    }
    wanted = usual | wanted
    for step in range(STEPS, 8):
        groups = [group for group in seen[step][1] if not group["name"].endswith("_no_decay")]
        for group in groups:
            peak = wanted.get(group["name"].partition("_")[0], wanted["lr"])
            assert group["lr"] == pytest.approx(
                cosine(step, peak, wanted["warmup"], 8, wanted["least"])
            ), step
            assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (
                wanted["weight_decay"],
                wanted["betas"],
                wanted["eps"],
            )
        vectors = [group for group in seen[step][1] if group["name"].endswith("_no_decay")]
        assert {group["weight_decay"] for group in vectors} == {0.0}
    results, saved = read(copy, "results.json"), OmegaConf.load(copy / "config.yaml")
    keys = {override.partition("=")[0] for override in overrides}
    (change,) = results["changes"]
    assert set(change["changes"]) == {*keys, "trainer.max_steps"}
    assert all(OmegaConf.select(saved, key) == change["changes"][key][1] for key in keys)
    assert results["hash"]["config"] != before
    text = (copy / "config.yaml").read_text()
    assert all(f"# until step 4: {key} was" in text for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "told"), [(12, True), (STEPS, False)])
def test_a_schedule_that_jumps_is_told_with_both_rates(copy, caplog, steps, told):
    with caplog.at_level(logging.WARNING, logger="owlfuse"):
        go_on(copy, f"trainer.max_steps={steps}")
    lines = [
        record.getMessage()
        for record in caplog.records
        if "learning rate at step" in record.getMessage()
    ]
    old, new = (cosine(STEPS, 2e-3, 2, last, 0.05) for last in (STEPS, steps))
    end = "(max_steps=12)"
    line = (
        f"the learning rate at step 4 is {old:.3g} by the schedule until now and {new:.3g} by "
        f"the one from here on {end}"
    )
    assert lines == ([line] if told else [])


REFUSED = [
    "seed=1",
    "data.seed=1",
    "data.max_length=100 data.weights_by=tokens",
    "data.sources.shapes.weight=0.5",
    "data.sources.shapes.tile=0.5",
    "data.temperature=2.0",
    "data.at_end=stop",
    "data.chat_template=chatml",
    "data.weights_by=tokens",
    "data.weights_at={2: {text: 0.9}}",
    "+data.weights_at.1.text=0.9",
    "data.folder=elsewhere",
    "data.validation_samples=3",
    "data.validation.val.records_per_chat=3",
    "model.vision.image_size=64",
    "model.llm.config.hidden_size=64",
    "model.vision.pretrained=true",
    "optim._target_=owlfuse.training.optim.MuonCosine",
    "optim.layer_decay.llm=0.9",
    "evaluation.before=true",
    "trainer.precision=bf16-true",
    "trainer._target_=lightning.pytorch.Trainer",
    "+model.adapter.llm.n=3",
    "model.adapter.llm._target_=owlfuse.model.adapters.Frozen",
]


@pytest.mark.parametrize("override", REFUSED)
@pytest.mark.fast_cases(3)
def test_a_key_that_cannot_change_is_refused_by_name_and_leaves_the_run_as_it_was(
    first, override, monkeypatch
):
    monkeypatch.setattr(
        "owlfuse.training.train.MultimodalModule", lambda *args: pytest.fail("a module was made")
    )
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    words = override.split(" ") if "{" not in override else [override]
    with pytest.raises(ConfigError) as error:
        go_on(first, *words)
    key = words[0].lstrip("+").partition("=")[0]
    assert key.partition(".")[0] in str(error.value)
    assert "\n" not in str(error.value)
    if "such key" not in str(error.value):
        assert "cannot change it" in str(error.value)
        assert "until step 4" in str(error.value)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "override", ["name=other", "runs=elsewhere", "optim=muon", "model/fusion=concat"]
)
def test_a_run_stays_in_its_folder_and_keeps_its_groups(first, override):
    with pytest.raises(
        ConfigError, match=rf"command line: {override}: a resumed run (stays|keeps)"
    ):
        compose([f"resume={first}", override])


@pytest.mark.parametrize(
    "override", ["data.weights_at={6: {text: 0.1}}", "data.max_length=600", "+data.on_length=skip"]
)
@pytest.mark.fast_cases(1)
def test_what_lies_ahead_may_change(copy, override):
    go_on(
        copy, "trainer.max_steps=5", override.lstrip("+") if "on_length" in override else override
    )
    assert read(copy, "results.json")["steps"] == 5


@pytest.mark.parametrize(
    "override", ["optim.lr=1", "trainer.max_steps=9", "model.vision.image_size=64", "seed=3"]
)
@pytest.mark.fast_cases(1)
def test_an_evaluation_refuses_keys_that_change_nothing_of_it(first, override):
    with pytest.raises(ConfigError, match="and a run that is evaluated cannot change it"):
        evaluate_run(str(first), [override])


def test_an_evaluation_has_no_plan(first):
    with pytest.raises(ConfigError, match="dry_run: an evaluation has no plan"):
        evaluate_run(str(first), ["dry_run=true"])


def test_an_evaluation_keeps_what_the_training_recorded(copy, monkeypatch):
    """Its time, of its results; its code, of the checkpoint, since a training whose evaluation was
    stopped leaves no results."""
    monkeypatch.setattr("owlfuse.evaluation.validation.code_hash", lambda config: "another")
    # a run that trains may write a checkpoint meanwhile, so that one is chosen only once
    monkeypatch.setattr(
        "owlfuse.artifacts.load.chosen_checkpoint", lambda *args: pytest.fail("chosen twice")
    )
    code = read(copy, "results.json")["hash"]["code"]
    (copy / "results.json").write_text(json.dumps({"wall_s": 123.0}))
    evaluate_run(str(copy), [])
    after = read(copy, "results.json")
    assert after["wall_s"] == 123.0
    assert after["hash"]["code"] == f"{code}, evaluated by another"


@pytest.mark.parametrize(
    ("recorded", "earlier", "code", "expected"),
    [
        ("a", "a", "b", "a, evaluated by b"),
        ("a", "a, evaluated by b", "c", "a, evaluated by c"),
        ("a", "a, evaluated by b", "a", "a"),
        ("a", None, "a", "a"),
        # a checkpoint from before the code was recorded
        (None, "a, evaluated by b", "b", "a, evaluated by b"),
        (None, "a, evaluated by b", "a", "a"),
        (None, None, "b", "unknown, evaluated by b"),
    ],
)
def test_results_name_the_code_that_trained_and_the_one_that_evaluates(
    recorded, earlier, code, expected
):
    past = Past(1, {}, StepPositions.of(1), code=recorded)
    results = {"hash": {"code": earlier}} if earlier else {}
    assert results_code(past, results, code) == expected


def another_answer(data):
    records = json.loads((data / "train.json").read_text())
    records[3]["conversations"][1]["value"] += "!"
    (data / "train.json").write_text(json.dumps(records))


def another_picture(data):
    """Of the same size."""
    names = json.loads((data / "train.json").read_text())
    one, other = (data / record["image"] for record in (names[0], names[5]))
    content = bytearray(one.read_bytes())
    assert one.read_bytes() != other.read_bytes()
    content[-20] ^= 1
    one.write_bytes(content)


def another_validation(data):
    records = json.loads((data / "val.json").read_text())
    (data / "val.json").write_text(json.dumps(records[:-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (another_answer, "data.sources.shapes"),
        (another_picture, "data.sources.shapes, its pictures"),
        (another_validation, "data.validation.val"),
    ],
)
def test_data_that_changed_are_refused_by_name_and_may_be_accepted(copy, tmp_path, change, name):
    """Data that only lie elsewhere are the same data."""
    data = Path(shutil.copytree("data/shapes", tmp_path / "data"))
    places = [
        f"data.sources.shapes.file={data}/train.json",
        f"data.sources.text.file={data}/text_train.json",
    ]
    places += [
        f"data.validation.{source}.file={data}/{file}.json"
        for source, file in (("val", "val"), ("text", "text_val"))
    ]
    go_on(copy, *places, "trainer.max_steps=5")
    assert read(copy, "results.json")["changes"][0]["changes"].keys() >= {"trainer.max_steps"}
    before = read(copy, "results.json")["hash"]
    change(data)
    with pytest.raises(
        DataError, match=rf"^{name} \(.*the contents are not those that the run had until step 5"
    ) as error:
        go_on(copy, "trainer.max_steps=6")
    assert "accept_changed_data=true" in str(error.value)
    go_on(copy, "trainer.max_steps=6", "accept_changed_data=true")
    after = read(copy, "results.json")
    assert after["hash"]["data"] != before["data"]
    assert f"{name} (contents)" in after["changes"][-1]["changes"]
    assert OmegaConf.load(copy / "config.yaml").accept_changed_data is False
    go_on(copy, "trainer.max_steps=7")  # accepted once


class Bad(RuntimeError):
    """What no one expects."""


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("moment", ["data", "forward", "backward", "after"])
def test_an_error_leaves_a_checkpoint_of_the_last_whole_step_and_mixture_json(
    monkeypatch, moment, accumulate, tmp_path
):
    """At the sixth micro batch, in whatever part of the step; the run then goes on as if it had
    never ended."""
    name = f"error-{moment}-{accumulate}"
    common = [
        *SMALL,
        "trainer.max_steps=8",
        "checkpoint.every=100",
        f"data.micro_batch_size={BATCH // accumulate}",
    ]
    count = []

    def fail(*args):
        count.append(1)
        if len(count) == 6 * accumulate:
            raise DataError("sample x is wrong") if moment == "data" else Bad("out of luck")

    hooks = {
        "data": (SampleCounts, "add"),
        "forward": (MultimodalModule, "training_step"),
        "backward": (MultimodalModule, "on_after_backward"),
        "after": (MultimodalModule, "on_train_batch_end"),
    }
    owner, hook = hooks[moment]
    with pytest.MonkeyPatch.context() as patch:
        plain = getattr(owner, hook)
        patch.setattr(owner, hook, lambda *args, **kwargs: (fail(), plain(*args, **kwargs))[1])
        with pytest.raises((Bad, DataError)):
            train.run(compose([*common, f"name={name}"]))
    run = Path(f"runs/shapes_owl1/{name}")
    step = 6 if moment == "after" else 5
    assert step_of(last_checkpoint(run)) == step
    report = read(run, "mixture.json")
    assert (report["steps"], report["samples"]) == (step, step * BATCH)
    assert report["ended_by"] in ("sample x is wrong", "out of luck")
    go_on(run)
    whole = Path(f"runs/shapes_owl1/whole-{accumulate}")
    if not whole.exists():
        train.run(compose([*common, f"name={whole.name}"]))
    a, b = (torch.load(last_checkpoint(folder), weights_only=True) for folder in (run, whole))
    assert all(torch.equal(tensor, b["state_dict"][key]) for key, tensor in a["state_dict"].items())


IN_4_BITS = ["+model.llm.quantization={}", "model/adapter@model.adapter.llm=lora"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["ema", "trainer.precision=bf16-true"],
            "averages weights in their own type, and those of",
        ),
        (["ema", *IN_4_BITS], "averages weights in their own type, and those in"),
        (["accumulate"], "would train the first samples again and again"),
    ],
)
@pytest.mark.fast_cases(1)
def test_callbacks_that_would_train_other_weights_or_samples_are_refused(words, message):
    targets = {"ema": "EMAWeightAveraging", "accumulate": "GradientAccumulationScheduler"}
    target = f"+callbacks.{words[0]}._target_=lightning.pytorch.callbacks.{targets[words[0]]}"
    scheduling = ["+callbacks.accumulate.scheduling={0: 4}"] if words[0] == "accumulate" else []
    with pytest.raises(ConfigError, match=message):
        train.run(compose([*SMALL, target, *scheduling, *words[1:], "name=refused-callback"]))


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("EarlyStopping", ["+callbacks.stop.monitor=val_loss"], "did you mean 'val/loss'"),
        ("ModelCheckpoint", ["+callbacks.stop.monitor=loss"], "monitor=loss is no metric"),
        (
            "EarlyStopping",
            ["+callbacks.stop.monitor=train/loss", "+trainer.limit_val_batches=0"],
            "looks after each validation, and this run has none",
        ),
    ],
)
def test_a_callback_that_waits_for_what_never_comes_is_refused(kind, words, message):
    target = f"+callbacks.stop._target_=lightning.pytorch.callbacks.{kind}"
    with pytest.raises(ConfigError, match=message):
        train.run(compose([*SMALL, target, *words, "name=refused-monitor"]))


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [True, False])
def test_a_validation_that_fails_leaves_no_checkpoint_with_the_average_in_the_weights_place(
    averaged, folder, monkeypatch, caplog
):
    def fail(*given):
        raise DataError("no such picture")

    monkeypatch.setattr(MultimodalModule, "validation_step", fail)
    target = "+callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging"
    words = [*SMALL, f"name=broken-{averaged}", *([target] if averaged else [])]
    with pytest.raises(DataError, match="no such picture"):
        train.run(compose(words))
    files = list(Path(f"runs/shapes_owl1/broken-{averaged}/checkpoints").glob("*.ckpt"))
    assert bool(files) is not averaged
    assert ("with the average in the weights' place" in caplog.text) is averaged


@pytest.mark.slow
def test_a_run_with_averaged_weights_goes_on_from_its_own(folder):
    common = [
        *SMALL,
        "optim.min_lr_ratio=1",  # the same rates whatever max_steps
        "model/adapter@model.adapter.llm=lora",
        "+callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging",
        "+callbacks.ema.decay=0.5",
    ]
    whole = train.run(compose([*common, "name=whole-ema"]))
    stopped = train.run(compose([*common, "name=stopped-ema", "trainer.max_steps=2"]))
    train.run(compose([f"resume={stopped}", f"trainer.max_steps={STEPS}"]))
    expected, actual = (
        torch.load(last_checkpoint(run), weights_only=True) for run in (whole, stopped)
    )
    for key in ("state_dict", "current_model_state"):
        assert expected[key].keys() == actual[key].keys()
        for name, value in expected[key].items():
            torch.testing.assert_close(actual[key][name], value, rtol=0, atol=0, msg=name)
    # the frozen LLM is in neither
    assert not any("llm" in name and "lora" not in name for name in expected["state_dict"])
    differ = [
        name
        for name, value in expected["state_dict"].items()
        if not torch.equal(value, expected["current_model_state"][name])
    ]
    assert differ


@pytest.mark.slow
def test_averaged_weights_are_evaluated_where_no_step_was_left_and_not_trained_without_the_callback(
    folder, monkeypatch
):
    ema = "lightning.pytorch.callbacks.EMAWeightAveraging"
    words = [f"+callbacks.ema._target_={ema}", "+callbacks.ema.decay=0.5", "optim.min_lr_ratio=1"]
    run = train.run(compose([*SMALL, *words, "name=ema-done"]))
    expected = json.loads((run / "results.json").read_text())["metrics"]
    go_on(run)
    assert json.loads((run / "results.json").read_text())["metrics"] == expected

    before = torch.load(last_checkpoint(run), weights_only=True)
    found = {}
    begin = MultimodalModule.on_train_start

    def record(module):
        found.update({name: value.clone() for name, value in module.state_dict().items()})
        begin(module)

    monkeypatch.setattr(MultimodalModule, "on_train_start", record)
    go_on(run, "callbacks.ema=null", f"trainer.max_steps={STEPS + 1}")
    for name, value in before["current_model_state"].items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_a_training_that_a_callback_ended_is_not_gone_on_with(folder):
    stopping = "lightning.pytorch.callbacks.EarlyStopping"
    words = [f"+callbacks.stop._target_={stopping}", "+callbacks.stop.monitor=val/loss"]
    # no loss is so low
    words += ["+callbacks.stop.patience=1", "+callbacks.stop.divergence_threshold=-100"]
    run = train.run(compose([*SMALL, *words, "name=ended"]))
    assert step_of(last_checkpoint(run)) == 2
    (run / "results.json").unlink()
    go_on(run)
    assert step_of(last_checkpoint(run)) == 2
    assert read(run, "results.json")["steps"] == 2
    go_on(run, "callbacks.stop=null")
    assert step_of(last_checkpoint(run)) == STEPS


@pytest.mark.slow
def test_the_patience_of_a_run_that_goes_on_is_the_one_that_is_asked_for(folder):
    stopping = "lightning.pytorch.callbacks.EarlyStopping"
    words = [f"+callbacks.stop._target_={stopping}", "+callbacks.stop.monitor=val/loss"]
    # no loss is so much lower than the first
    words += ["+callbacks.stop.patience=1", "+callbacks.stop.min_delta=100"]
    words += ["trainer.val_check_interval=1"]
    run = train.run(compose([*SMALL, *words, "name=patient"]))
    assert step_of(last_checkpoint(run)) < STEPS
    go_on(run, "callbacks.stop.patience=10")
    assert step_of(last_checkpoint(run)) == STEPS


@pytest.mark.slow
def test_other_code_is_recorded_and_told(copy, monkeypatch, caplog):
    monkeypatch.setattr(train, "code_hash", lambda plain: "of another day")
    go_on(copy, f"trainer.max_steps={STEPS + 1}")
    assert f"the code is another than until step {STEPS}" in caplog.text
    past = read_past(last_checkpoint(copy))
    assert past.changes[-1]["changes"]["code"][1] == past.code == "of another day"


def test_another_tokenizer_in_the_run_is_refused(copy):
    template = copy / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    for command in (lambda: go_on(copy), lambda: load_run(copy), lambda: evaluate_run(copy, [])):
        with pytest.raises(
            DataError, match=rf"tokenizer is another than it was until step {STEPS}"
        ):
            command()
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(DataError, match="tokenizer is missing"):
        load_run(copy)


@pytest.mark.slow
def test_after_a_change_of_what_is_validated_the_next_validation_is_the_best(copy, caplog):
    best = copy / "checkpoints" / "best.ckpt"
    content = torch.load(last_checkpoint(copy), weights_only=True)
    content["callbacks"]["Best"]["lowest"] = -1.0
    torch.save(content, last_checkpoint(copy))
    time = best.stat().st_mtime_ns
    other = Path(shutil.copytree(copy, copy.parent / "other"))
    go_on(copy, f"trainer.max_steps={STEPS + 2}")
    assert best.stat().st_mtime_ns == time
    go_on(other, f"trainer.max_steps={STEPS + 2}", "accept_changed_data=true")
    assert (other / "checkpoints" / "best.ckpt").stat().st_mtime_ns != time
    assert "the next validation writes best.ckpt" in caplog.text


@pytest.mark.parametrize("key", ["min_steps", "min_epochs"])
def test_steps_that_nothing_may_break_off_are_refused(key):
    with pytest.raises(ConfigError, match=f"trainer.{key} is 2, expected none"):
        compose([*SMALL, f"+trainer.{key}=2"])


@pytest.mark.slow
def test_a_run_whose_steps_are_done_keeps_what_its_training_cost(copy):
    before = json.loads((copy / "results.json").read_text())["cost"]
    (copy / "results.json").unlink()
    train.run(compose([f"resume={copy}"]))
    after = json.loads((copy / "results.json").read_text())["cost"]
    for name in ("tokens_per_s", "peak_memory_bytes", "trained_parameters"):
        assert after[name] == before[name], name


@pytest.mark.slow
def test_a_training_that_is_more_than_the_memory_holds_is_told_with_what_to_set(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MultimodalModule, "training_step", full)
    message = "GPU's memory holds, after step 0; set data.micro_batch_size or"
    with pytest.raises(DataError, match=message):
        train.run(compose([*SMALL, "name=memory"]))


@pytest.mark.slow
def test_no_checkpoint_is_made_of_weights_of_which_some_are_those_of_the_next_step(monkeypatch):
    step = torch.optim.AdamW.step
    count = []

    def broken(optimizer, closure=None):
        result = step(optimizer, closure)
        count.append(1)
        if len(count) == 3:
            raise Bad("in the middle of the update")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(Bad):
        train.run(compose([*SMALL, "name=broken-update", "checkpoint.every=1"]))
    assert step_of(last_checkpoint(Path("runs/shapes_owl1/broken-update"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_adds_no_validation_that_the_run_would_not_have_had(monkeypatch, number, step):
    name = f"signal-{number}-{step}"
    ready = MultimodalModule.on_before_optimizer_step

    def send(module, optimizer):
        if module.global_step == step - 1 and not sent:
            sent.append(os.kill(os.getpid(), number))
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # as `timeout` does
        return ready(module, optimizer)

    sent = []
    monkeypatch.setattr(MultimodalModule, "on_before_optimizer_step", send)
    # nohup, under which tests may run, has it ignored
    with pytest.raises(KeyboardInterrupt), signals_handled({signal.SIGHUP: signal.SIG_DFL}):
        train.run(compose([*SMALL, "trainer.max_steps=6", f"name={name}"]))
    run = Path(f"runs/shapes_owl1/{name}")
    assert step_of(last_checkpoint(run)) == step
    assert metrics(run, "val/loss") == (["1"] if step == 3 else ["1", "3"])
    go_on(run)
    assert metrics(run, "val/loss") == ["1", "3", "5"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.lr=0", "optim.lr: the learning rate of vision is 0"),
        ("optim.lr=-1", "optim.lr: the learning rate of vision is -1"),
        (
            "optim.part_lr.connector=0",
            "optim.part_lr.connector: the learning rate of connector is 0",
        ),
        ("optim.part_lr.llm=0", "optim.part_lr.llm: the learning rate of llm is 0"),
        ("optim.layer_decay.llm=0", "optim.lr: the learning rate of llm_-1 is 0"),
    ],
)
def test_a_rate_of_0_for_what_is_meant_to_train_is_refused_before_a_weight_is_made(
    override, key, monkeypatch
):
    monkeypatch.setattr(
        "owlfuse.training.train.MultimodalModule", lambda *args: pytest.fail("a module was made")
    )
    with pytest.raises(ConfigError, match=key):
        train.run(compose([*SMALL, "name=rate", override]))
    assert not Path("runs/shapes_owl1/rate").exists()


@pytest.mark.slow
def test_the_best_checkpoint_is_read_where_it_is_asked_for(copy):
    from owlfuse.artifacts.load import load_run

    path = copy / "checkpoints" / "best.ckpt"
    best = torch.load(path, weights_only=True)
    saved_best = shutil.copy(path, copy / "saved_best.ckpt")
    for which, content in (
        ("best", best),
        ("last", torch.load(last_checkpoint(copy), weights_only=True)),
    ):
        state = load_run(copy, which=which).model.state_dict()
        assert all(
            torch.equal(state[key.removeprefix("model.")], value)
            for key, value in content["state_dict"].items()
        )
        evaluate_run(str(copy), [f"which={which}"])
        results = read(copy, "results.json")
        assert results["steps"] == content["global_step"]
        assert results["checkpoint"] == (
            "best.ckpt" if which == "best" else f"step_{STEPS:08}.ckpt"
        )
    # a run that went on with other keys, whose best checkpoint is that of before
    evaluate_run(str(copy), ["which=best"])
    before = read(copy, "results.json")["hash"]["config"]
    rate = read_past(path).config["optim"]["lr"]
    train.run(compose([f"resume={copy}", f"trainer.max_steps={STEPS + 2}", f"optim.lr={2 * rate}"]))
    assert read(copy, "results.json")["hash"]["config"] != before
    shutil.copy(saved_best, path)
    evaluate_run(str(copy), ["which=best", "evaluation.batch_size=2"])
    assert read(copy, "results.json")["hash"]["config"] == before
    with pytest.raises(ConfigError, match="optim.lr: it is"):
        evaluate_run(str(copy), ["which=best", f"optim.lr={3 * rate}"])
    path.unlink()
    with pytest.raises(ConfigError, match=r"which=best: .* has no best.ckpt"):
        load_run(copy, which="best")
    with pytest.raises(ConfigError, match="which=beste: expected last or best"):
        evaluate_run(str(copy), ["which=beste"])
