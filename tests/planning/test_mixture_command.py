"""`owlfuse mixture`: its numbers are those of the samples that training would load."""

import json
from collections import Counter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from owlfuse.__main__ import main
from owlfuse.config.build import build
from owlfuse.config.compose import compose
from owlfuse.core.errors import DataError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.model.multimodal import on_meta
from owlfuse.planning.mixture import mixture_command
from single_draws import look_up

SIZES = {
    "train_pictures": 48,
    "val_pictures": 6,
    "held_out_pictures": 6,
    "text_train": 120,
    "text_val": 8,
}
SMALL = [f"+data.prepare.{key}={value}" for key, value in SIZES.items()]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working folder with shapes, of which one text is too long and another has no answer."""
    path = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write_shapes("data/shapes", **SIZES)
        records = json.loads(Path("data/shapes/text_train.json").read_text())[:20]
        records[2]["output"] = "word " * 600
        del records[5]["output"]
        Path("text.json").write_text(json.dumps(records))
        yield path


def words(*more):
    text = [
        "data.sources.text.file=text.json",
        "data.sources.text.records_per_chat=1",
        "data.sources.text.on_error=skip",
    ]
    return ["experiment=shapes_owl2", *SMALL, *text, "data.global_batch_size=8", *more]


def loaded(overrides, steps):
    """Samples drawn and supervised tokens by source, and the lengths, by loading each sample."""
    config = compose(overrides)
    plan, _ = on_meta(OmegaConf.to_container(config.model), 1024)
    data = build(config.data)
    data.bind(plan.vision.preprocessing, plan.fusion.tokens_per_image)
    drawn, supervised, lengths, skips = {}, {}, [], []
    for position in range(steps * 8):
        name, index = look_up(data.mixture, position)
        source = data.sources[name]
        drawn[name] = drawn.get(name, 0) + 1
        try:
            encoded = data.encoder.encode(source[index])
        except DataError as error:
            skips.append((name, f"{name}:{index}", str(source.with_location(error, index))))
        else:
            supervised[name] = supervised.get(name, 0) + int((encoded.labels != -100).sum())
            lengths.append(len(encoded.input_ids))
    return drawn, supervised, lengths, skips


@pytest.mark.slow
def test_it_tells_what_loading_every_sample_tells(capsys):
    report = mixture_command(words("steps=20"))
    drawn, supervised, lengths, skips = loaded(words(), 20)
    assert {name: row["drawn"] for name, row in report["sources"].items()} == drawn
    assert {name: row["supervised_tokens"] for name, row in report["sources"].items()} == supervised
    found = {
        (skip["source"], skip["sample"], skip["reason"]): skip["times"]
        for skip in report["skipped"]
    }
    assert found == Counter(skips)
    assert any("over max_length of 512" in reason for _, _, reason in skips)
    assert report["sources"]["text"]["passes"] == drawn["text"] / 20
    for row in report["histogram"]:
        assert row["samples"] == sum(row["from"] <= length <= row["to"] for length in lengths)
    assert sum(row["samples"] for row in report["histogram"]) == len(lengths)
    assert json.loads(Path("runs/mixture/shapes_owl2/mixture.json").read_text()) == report
    printed = capsys.readouterr().out
    for text in ("shapes", "text", "65.00 %", "has no 'output'", "mixture.json is in"):
        assert text in printed


def test_out_names_the_folder_and_phases_and_ends_are_told(tmp_path, capsys):
    more = [
        "steps=50",
        f"out={tmp_path}/here",
        "data.at_end={shapes: stop}",
        "+data.weights_at={2: {text: 1.95}}",
    ]
    report = mixture_command(words(*more))
    assert (tmp_path / "here/mixture.json").exists()
    printed = " ".join(capsys.readouterr().out.split())
    data = build(compose(words(*more[2:])).data)
    available = data.mixture.available(400)
    rest = available % 8
    assert rest
    assert report["samples"] == available - rest < 400
    assert sum(row["drawn"] for row in report["sources"].values()) == report["samples"]
    left = {name: row["left_of_last_pass"] for name, row in report["sources"].items()}
    assert (
        f"after {available} samples of 400, the last {rest} of which make no whole global batch"
    ) in printed
    assert (
        f"never drawn of each source's last pass: shapes {left['shapes']}, text {left['text']}"
        in printed
    )
    share = (16 * 0.35 + (report["samples"] - 16) * 0.75) / report["samples"]
    assert report["sources"]["text"]["asked_share"] == pytest.approx(share)


def test_a_wrong_sample_of_a_source_that_stops_is_told_with_its_step(capsys):
    mixture_command([*words("steps=20"), "data.sources.text.on_error=error"])
    assert "source text has on_error=error and a wrong sample at step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "records", "expected"),
    [
        ("max_skips=1", 20, "more wrong samples than its max_skips of 1"),
        ("max_skips=2", 20, None),
        ("max_skips=2", [2, 5], "no sample left"),
    ],
)
def test_skips_that_end_the_run_are_told_with_their_step(tmp_path, option, records, expected):
    """Two of the twenty records are wrong, and each is drawn several times."""
    records = list(range(records)) if isinstance(records, int) else records
    text = json.loads(Path("text.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps([text[number] for number in records]))
    overrides = words(f"data.sources.text.file={tmp_path}/text.json", f"data.sources.text.{option}")
    notes = mixture_command([*overrides, "steps=20"])["notes"]
    ending = [note for note in notes if "ends the run" in note]
    drawn = set()
    mixture = build(compose(overrides).data).mixture
    for position in range(20 * 8):
        name, index = look_up(mixture, position)
        if name == "text" and records[index] in (2, 5):
            drawn.add(index)
        if len(drawn) == 2:
            break
    assert ending == [
        f"source text has {expected} at step {position // 8}, which ends the run"
    ] * bool(expected)


@pytest.mark.slow
def test_a_chat_that_is_left_out_for_its_length_ends_no_run(capsys):
    ends = [*words("data.on_length=skip"), "data.sources.text.on_error=error"]
    report = mixture_command([*ends, "steps=20"])
    assert all("over max_length of 512" in skip["reason"] for skip in report["skipped"])
    assert report["skipped"]
    config = compose(ends)
    plan, _ = on_meta(OmegaConf.to_container(config.model), 1024)
    data = build(config.data)
    data.bind(plan.vision.preprocessing, plan.fusion.tokens_per_image)
    steps = []
    for position in range(20 * 8):
        name, index = look_up(data.mixture, position)
        try:
            data.encoder.encode(data.sources[name][index], on_length="skip")
        except DataError as error:
            if not error.leave_out:
                steps.append(position // 8)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"and a wrong sample at step {steps[0]}, which ends the run" in printed


def test_ids_that_several_samples_bear_are_told(capsys):
    records = json.loads(Path("text.json").read_text())
    for number in (1, 7, 9):
        records[number]["id"] = "twin"
    Path("twins.json").write_text(json.dumps(records))
    report = mixture_command([*words("steps=40"), "data.sources.text.file=twins.json"])
    found = {"count": 2, "looked_at": 20, "first": {"id": "twin", "samples": [1, 7]}}
    assert report["sources"]["text"]["duplicate_ids"] == found
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "source text: 2 records bear the id of another, of 20 samples that were compared" in printed
    )
    assert "the first is twin, of samples 2 and 8 as" in printed


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("steps=many", "command line: steps=many: expected a number of steps from 1 on"),
        ("data.at_end=twice", "at_end of source shapes is twice, expected repeat, stop, once"),
    ],
)
def test_a_mistake_is_one_line(word, line, capsys):
    assert main(["mixture", *words(word)]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_by_tokens_the_realised_shares_stand_beside_the_asked_ones(capsys):
    report = mixture_command(words("steps=40", "data.weights_by=tokens"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "weights by tokens" in printed
    for name, row in report["sources"].items():
        assert row["asked_share"] == pytest.approx({"shapes": 0.65, "text": 0.35}[name])
        assert row["supervised_share"] == pytest.approx(row["asked_share"], abs=0.02)
        assert row["drawn_share"] != pytest.approx(row["asked_share"], abs=0.05)
        assert f"{100 * row['supervised_share']:.2f} %" in printed


def test_a_schedule_without_a_whole_global_batch_is_told(capsys):
    more = ["data.at_end={text: stop}", "data.global_batch_size=800"]
    report = mixture_command(words("steps=3", *more))
    assert (report["steps"], report["samples"], report["histogram"][0]["samples"]) == (0, 0, 0)
    printed = " ".join(capsys.readouterr().out.split())
    assert "of 2,400, the last" in printed
    assert "make no whole global batch" in printed
