"""The report of runs whose numbers are known: tables, plots, and a page that needs nothing else
and reads well on a phone."""

from __future__ import annotations

import base64
import csv
import fcntl
import json
import os
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from xml.etree import ElementTree

import pytest
from omegaconf import OmegaConf
from PIL import Image

from owlfuse.core.errors import ConfigError, DataError
from owlfuse.evaluation.metrics import Answer, score
from owlfuse.studies.ablation.grid import Cell
from owlfuse.studies.ablation.page import thumbnail
from owlfuse.studies.ablation.report import report_command, write_report
from owlfuse.studies.ablation.results import SHARE_METRICS, load
from owlfuse.studies.ablation.run import find_unfinished
from reports import HASH, METRICS, NASTY, write_ablation

CELLS = {
    "first": 0.5,
    "second": 0.9,
    "a_third_with_a_name_that_is_much_longer_than_a_column-and_goes_on": 0.5,
}
PAPER = {"title": "Table <1>", "columns": ["GQA"], "rows": {"second": [57.6]}}
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PROBE = """<script>
const errors = [];
addEventListener('error', event => errors.push(event.message || 'a resource'), true);
addEventListener('load', () => {
  const pictures = [...document.images], room = document.documentElement.clientWidth;  // without a scroll bar
  const wide = [...document.querySelectorAll('main > *')].filter(one => one.getBoundingClientRect().right > room + 0.5);
  const measured = {
    width: innerWidth, overflow: document.documentElement.scrollWidth - room, wide: wide.map(one => one.tagName),
    pictures: pictures.length, loaded: pictures.filter(one => one.complete && one.naturalWidth > 0).length, errors,
    requests: performance.getEntriesByType('resource').map(one => one.name).filter(name => !name.startsWith('data:')),
    scrolls: [...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length,
  };
  parent.document.title = 'probed ' + JSON.stringify(measured);
});
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ablation of three cells and three seeds, of which one run failed and one is of other
    code; with its report."""
    path = write_ablation(tmp_path_factory.mktemp("work") / "runs" / "drawn", CELLS, paper=PAPER)
    shutil.rmtree(path / "first-seed2")
    (path / "first-seed2").mkdir()
    (path / "first-seed2" / "cell.json").write_text(
        json.dumps({"state": "failed", "error": f"no luck {NASTY}", "began": 1})
    )
    other = path / "second-seed1" / "results.json"
    other.write_text(
        json.dumps(json.loads(other.read_text()) | {"hash": {"code": "else", "config": "c0nf"}})
    )
    assert write_report(path) == ["first-seed2"]
    return path


def results_of(folder, cell, seed):
    return json.loads((folder / f"{cell}-seed{seed}" / "results.json").read_text())


# Numbers


def test_means_deviations_and_differences_are_over_the_runs_that_count(folder):
    rows = {row.name: row for row in load(folder).rows}
    third = next(name for name in CELLS if name.startswith("a_third"))
    values = [results_of(folder, third, seed)["metrics"]["val/exact_match"] for seed in (0, 1, 2)]
    score = rows[third].scores["val/exact_match"]
    assert score.mean == pytest.approx(statistics.mean(values))
    assert score.deviation == pytest.approx(statistics.stdev(values))
    assert score.interval[0] < score.mean < score.interval[1]
    # the baseline has seeds 0 and 1, the second cell 0 and 2: one pair
    second = rows["second"].scores["val/exact_match"]
    assert sorted(second.values) == [0, 2]
    pair = [
        results_of(folder, cell, 0)["metrics"]["val/exact_match"] for cell in ("second", "first")
    ]
    assert (second.seeds, second.difference) == (1, pytest.approx(pair[0] - pair[1]))
    assert 0 < second.difference_interval[0] < second.difference < second.difference_interval[1]
    assert rows["first"].scores["val/exact_match"].difference is None
    loss = rows["second"].scores["val/loss"]
    assert (loss.difference, loss.difference_interval) == (pytest.approx(pair[1] - pair[0]), None)


def test_answers_that_are_right_by_what_they_contain_have_the_intervals_of_exact_matches(tmp_path):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9})
    exact = load(path).rows[1].scores["val/exact_match"]
    for file in path.rglob("*.json"):
        file.write_text(file.read_text().replace("exact_match", "contains"))
    assert exact.difference_interval is not None
    assert load(path).rows[1].scores["val/contains"] == exact
    answers = [
        Answer("val", "i", None, "q", "4", "It is 4.", "", accepted) for accepted in ((), ("4",))
    ]
    # all that an evaluation scores answers by
    assert {name for answer in answers for name in score([answer])} == set(SHARE_METRICS)


def rewrite_answers(path, change):
    """Each line of a folder's answers.jsonl through `change`, as an evaluation writes them."""
    for file in path.rglob("answers.jsonl"):
        answers = [change(json.loads(line)) for line in file.read_text().splitlines()]
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        file.write_text("".join(lines))


def test_answers_to_one_picture_are_resampled_together_where_pictures_are_bytes_too(tmp_path):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9})
    by_path = load(path).rows[1].scores["val/exact_match"]

    def with_bytes(answer):
        # a chat for each question, so that the picture alone says what belongs together
        number = answer["question"].strip("Question ?")
        return {**answer, "image_hash": answer["image"], "image": None, "id": f"val:{number}#0"}

    rewrite_answers(path, with_bytes)
    assert load(path).rows[1].scores["val/exact_match"] == by_path


def test_an_answer_may_hold_any_character_that_ends_a_line_elsewhere(tmp_path):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9}, seeds=(0,))
    expected = load(path).rows[1].scores
    rewrite_answers(path, lambda answer: {**answer, "answer": "a\u2028b\u2029c\x85d"})
    assert load(path).rows[1].scores == expected
    file = path / "first-seed0" / "answers.jsonl"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(DataError, match=r"first-seed0/answers.jsonl: line 40: not JSON"):
        load(path)


def test_cells_that_answered_other_questions_have_a_difference_without_an_interval(tmp_path):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9})
    answers = path / "second-seed1" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
    score = load(path).rows[1].scores["val/exact_match"]
    assert score.difference is not None
    assert score.difference_interval is None
    write_report(path)
    table = (path / "report" / "table.md").read_text()
    assert "answered other questions than the baseline: second;" in table


def change(path, run, file, **fields):
    path = path / run / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


@pytest.mark.slow
def test_what_makes_runs_incomparable_is_said(tmp_path):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9}, seeds=(0, 1))
    write_report(path)
    table = path / "report" / "table.md"
    for text in ("runs at a time", "machines", "tokenizers", "of other data"):
        assert text not in table.read_text()
    change(path, "first-seed0", "cell.json", state="finished", jobs=4, machine="a laptop")
    change(path, "first-seed0", "results.json", tokenizer="abc")
    change(path, "first-seed1", "results.json", tokenizer="def")
    write_report(path)
    for text in (
        "1 or 4 runs at a time shared the machine",
        "trained on 2 machines, whose throughput and times do not compare: a laptop; a machine",
        "the runs have 2 tokenizers: losses and perplexities are per token",
    ):
        assert text in table.read_text()
    # the command of today says nothing of runs of before
    change(path, "", "ablation.json", jobs=8)
    change(path, "first-seed0", "cell.json", jobs=1)
    for run in ("first-seed1", "second-seed0", "second-seed1"):
        change(path, run, "cell.json", state="finished", jobs=1)
    write_report(path)
    assert "runs at a time" not in table.read_text()


def test_runs_of_changed_data_count_where_that_is_accepted_and_are_named(tmp_path):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9}, seeds=(0, 1))
    record = json.loads((path / "ablation.json").read_text())
    for cell in record["cells"]:
        cell["hash"] = {**HASH, "data": "new"}
        cell["config"]["accept_changed_data"] = True
    (path / "ablation.json").write_text(json.dumps(record))
    # one from before the change, and one that went on over it
    change(path, "first-seed0", "results.json", hash={**HASH, "data": "old"})
    went_on = {**HASH, "config": "other", "config_of_keys": HASH["config"], "data": "new"}
    change(path, "second-seed1", "results.json", hash=went_on)
    assert all(run.finished for run in load(path).runs)
    write_report(path)
    note = "as accept_changed_data=true accepts: first-seed0, second-seed1"
    assert note in (path / "report" / "table.md").read_text()
    for cell in record["cells"]:
        cell["config"]["accept_changed_data"] = False
    (path / "ablation.json").write_text(json.dumps(record))
    states = {run.key: run.state for run in load(path).runs}
    assert states["first-seed0"] == "of other data"
    assert states["second-seed1"] == "of other configuration"


@pytest.mark.slow
def test_a_report_can_be_written_before_anything_is_finished(tmp_path, capsys):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9}, seeds=(0,))
    for run in ("first-seed0", "second-seed0"):
        shutil.rmtree(path / run)
    (path / "first-seed0").mkdir()
    (path / "first-seed0" / "cell.json").write_text(json.dumps({"state": "running", "began": 1}))
    (path / "first-seed0" / "progress.json").write_text(
        json.dumps({"step": 7, "steps": 20, "cost": {}})
    )
    with (path / ".lock").open("w") as lock:  # as `owlfuse ablate` has it
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert write_report(path) == []
    assert "first-seed0: running, at step 7 of 20" in capsys.readouterr().out
    write_report(path)  # it was killed
    assert "first-seed0: interrupted, at step 7 of 20" in capsys.readouterr().out
    assert "second-seed0" in (path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("evaluated", "state", "status"),
    [
        ({"checkpoint": "last"}, "finished", "finished"),
        ({"checkpoint": "step_00000020.ckpt"}, "interrupted", "finished"),
        # stopped by a callback, and evaluated again
        ({"checkpoint": "step_00000007.ckpt", "steps": 7}, "finished", "finished"),
        ({"checkpoint": "best.ckpt"}, "finished", "of another checkpoint, .* eval .* which=last"),
        (
            {"checkpoint": "step_00000007.ckpt", "steps": 7},
            "interrupted",
            "interrupted, at step 9 of 20; its results are of step 7 and are not counted; ",
        ),
    ],
)
def test_results_of_other_weights_than_the_last_are_not_counted(evaluated, state, status, tmp_path):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5}, seeds=(0,))
    run = path / "first-seed0"
    (run / "results.json").write_text(json.dumps(results_of(path, "first", 0) | evaluated))
    (run / "cell.json").write_text(json.dumps({"state": state, "hash": HASH}))
    (run / "progress.json").write_text(json.dumps({"step": 9}))
    (row,) = load(path).rows
    assert re.match(status, row.runs[0].status)
    assert bool(row.finished) == (status == "finished")
    cell = Cell("first", {}, 0, [], OmegaConf.create({"trainer": {"max_steps": 20}}), HASH)
    # what was stopped goes on, and nothing else is trained again
    assert find_unfinished(path, [cell], archive=False) == ([cell] if "at step" in status else [])


def test_one_seed_is_said(tmp_path, capsys):
    write_report(write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9}, seeds=(0,)))
    assert "one seed: the intervals are for these training runs" in capsys.readouterr().out


# Tables


def test_tables_fit_a_terminal_of_a_hundred_columns_and_name_every_cell(folder, capsys):
    write_report(folder)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "first-seed2: failed, no luck" in " ".join(shown.split())
    assert "second-seed1: of other code" in shown
    assert "…" not in shown  # nothing is cut


def test_markdown_and_csv_have_every_cell_with_the_same_numbers(folder):
    lines = (folder / "report" / "table.md").read_text().splitlines()
    body = [line for line in lines if line.startswith("| ") and line.split("|")[1].strip() in CELLS]
    assert len(body) == len(CELLS) + 1  # and the paper's row
    with (folder / "report" / "table.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(CELLS)
    for line in body[:3]:
        cell, *_ = texts = [text.strip() for text in line.strip("|").split("|")]
        assert float(rows[cell]["val/exact_match mean"]) == pytest.approx(
            float(texts[2].split()[0]), abs=5e-4
        )
        assert rows[cell]["trained_parameters"] == "1234567.0"
        assert "1,234,567" in texts
    assert rows["first"]["val/exact_match difference"] == ""
    low, middle, high = (
        float(rows["second"][f"val/exact_match difference{part}"]) for part in (" low", "", " high")
    )
    assert low < middle < high


def test_the_papers_numbers_stand_beside_ours(folder):
    row = next(
        line
        for line in (folder / "report" / "table.md").read_text().splitlines()
        if line.startswith("| second | 57.6")
    )
    mean = load(folder).rows[1].scores["val/exact_match"].mean
    assert f"{mean:.3f}" in row


# Plots


@pytest.mark.parametrize("name", ["scores", "learning_curves", "score_against_cost"])
def test_a_plot_is_a_png_and_an_svg_that_differ_from_cell_to_cell_by_more_than_color(folder, name):
    with Image.open(folder / "report" / f"{name}.png") as picture:
        assert picture.width >= 600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # something is drawn
    tree = ElementTree.parse(folder / "report" / f"{name}.svg")
    links = [
        value for node in tree.iter() for key, value in node.attrib.items() if key.endswith("href")
    ]
    assert links
    assert all(link.startswith("#") for link in links)


def test_axes_have_labels_with_units_and_cells_their_own_marker(folder):
    from owlfuse.studies.ablation.plots import learning_curves, score_against_cost, scores

    results = load(folder)
    figures = [draw(results) for draw in (scores, learning_curves, score_against_cost)]
    labels = [axes.get_xlabel() for figure in figures for axes in figure.axes]
    assert all(labels)
    assert {"optimizer steps", "peak memory (MB)", "training throughput (tokens/s)"} <= set(labels)
    assert any("nats per token" in axes.get_ylabel() for axes in figures[1].axes)
    lines = figures[1].axes[0].lines
    assert len(lines) == 3
    for look in ("get_color", "get_marker", "get_linestyle"):
        assert len({getattr(line, look)() for line in lines}) == 3


# The page


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    VOID = ("meta", "link", "img", "br", "wbr", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well nested

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report" / "index.html").read_text())


def test_the_page_needs_nothing_else_and_runs_no_script(folder, page):
    sources = [
        value
        for _, found in page.tags
        for key, value in found.items()
        if key in ("src", "href", "srcset", "data")
    ]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed"}
    assert not any(key.startswith("on") for _, found in page.tags for key in found)
    style = re.search(r"<style>(.*)</style>", (folder / "report" / "index.html").read_text(), re.S)[
        1
    ]
    assert not re.search(r"url\(|@import", style)
    assert page.open == []


def test_the_page_has_all_cells_plots_answers_and_where_they_come_from(folder, page):
    for words in [
        *CELLS,
        *METRICS,
        "model.fusion.gate",
        "c0de",
        "a machine",
        "owlfuse ablate drawn",
        "no luck",
    ]:
        assert words in page.text
    assert NASTY in page.text  # as text: the answers', the question's and the error's
    assert page.text.count("✓ right") + page.text.count("✗ wrong") == 8 * len(CELLS)
    alts = [found["alt"] for tag, found in page.tags if tag == "img"]
    assert len(alts) == 3 + 8
    assert all(alts)
    assert "7 of 9 runs are finished" in page.text


def test_answers_stand_beside_each_other_to_the_same_question(folder):
    text = (folder / "report" / "index.html").read_text()
    asked = re.findall(r"<span>(Question \d+\?)</span></th>(.*?)</tr>", text)
    assert len({question for question, _ in asked}) == 8
    for question, line in asked:
        shown = re.findall(r"class='(right|wrong)'", line)
        for cell, kind in zip(CELLS, shown, strict=True):
            answers = [
                json.loads(one)
                for one in (folder / f"{cell}-seed0" / "answers.jsonl").read_text().splitlines()
            ]
            assert next(one["right"] for one in answers if one["question"] == question) == (
                kind == "right"
            )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_chromium(folder, tmp_path, width):
    """In a frame of that width, with a probe that the page itself does not have: nothing reaches
    over the side, every picture is there, and nothing is asked of a network."""
    probed = (folder / "report" / "index.html").read_text().replace("</head>", PROBE + "</head>")
    (tmp_path / "page.html").write_text(probed)
    (tmp_path / "frame.html").write_text(
        f"<iframe src='page.html' style='width:{width}px;height:900px;border:0'></iframe>"
    )
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
    ]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--disable-background-networking",
        "--virtual-time-budget=20000",
    ]
    command += ["--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/frame.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = re.search(r"<title>probed (.*?)</title>", done.stdout)
    assert found, done.stdout[:500] + done.stderr[-2000:]
    measured = json.loads(found[1])
    assert measured["width"] == width
    assert (measured["overflow"], measured["wide"]) == (0, [])
    assert measured["pictures"] == measured["loaded"] == 11
    assert measured["requests"] == measured["errors"] == []
    assert "CONSOLE" not in done.stderr
    if width == 390:
        assert measured["scrolls"] >= 2  # tables scroll by themselves


# The command


def test_report_takes_a_name_or_a_folder(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent.parent)
    report_command("drawn", [])
    report_command("runs/drawn", [])
    assert capsys.readouterr().out.count("the report is runs/drawn/report/index.html") == 2
    with pytest.raises(
        ConfigError,
        match="report drown: there is no runs/drown/ablation.json; did you mean 'drawn'",
    ):
        report_command("drown", [])


def test_differences_are_to_another_cell_where_one_is_named(tmp_path, monkeypatch, capsys):
    write_ablation(tmp_path / "runs" / "drawn", {"first": 0.5, "second": 0.9})
    monkeypatch.chdir(tmp_path)
    plain = load(tmp_path / "runs" / "drawn").rows[1].scores["val/exact_match"]
    report_command("drawn", ["baseline=second"])
    assert "baseline: second" in capsys.readouterr().out
    lines = (tmp_path / "runs" / "drawn" / "report" / "table.csv").read_text().splitlines()
    first = dict(zip(lines[0].split(","), lines[2].split(",")))
    assert first["cell"] == "first"
    assert float(first["val/exact_match difference"]) == pytest.approx(-plain.difference)
    assert float(first["val/exact_match difference low"]) == pytest.approx(
        -plain.difference_interval[1]
    )
    with pytest.raises(
        ConfigError,
        match=r"baseline=secnd: no such cell; did you mean 'second'\? \(there are: first, second\)",
    ):
        report_command("drawn", ["baseline=secnd"])
    with pytest.raises(ConfigError, match="baseline=: no such cell"):
        report_command("drawn", ["baseline="])


@pytest.mark.parametrize("kind", ["postscript", "pipe", "bomb", "broken", "missing"])
def test_a_file_that_no_run_would_read_as_a_picture_is_not_opened_for_the_page(tmp_path, kind):
    file = tmp_path / "a.png"
    if kind == "postscript":
        Image.new("RGB", (8, 8)).save(file, "eps")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "bomb":
        Image.new("1", (15_000, 10_000)).save(file)
    elif kind == "broken":
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + 100 * b"a")
    assert thumbnail(str(file)) is None


def test_a_picture_becomes_small_on_the_page_through_a_link_too(tmp_path):
    (tmp_path / "pool").mkdir()
    Image.new("RGB", (300, 200)).save(tmp_path / "pool" / "a.png")
    (tmp_path / "a.png").symlink_to(tmp_path / "pool" / "a.png")
    uri = thumbnail(str(tmp_path / "a.png"))
    with Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))) as small:
        assert small.size == (128, 85)


@pytest.mark.parametrize(
    ("key", "words"), [("sources", "trained on other"), ("validation", "measured on other")]
)
@pytest.mark.fast_cases(1)
def test_cells_that_left_out_other_samples_are_named(tmp_path, key, words):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9}, seeds=(0, 1))
    for run in ("first-seed0", "first-seed1", "second-seed0", "second-seed1"):
        cut = 7 if run == "second-seed1" else 3
        rows = {"val": {"skipped": 0, "truncated": cut}}
        content = {"sources": rows} if key == "sources" else {"validation": {"sources": rows}}
        (path / run / "mixture.json").write_text(json.dumps(content))
    write_report(path)
    table = path / "report" / "table.md"
    assert f"{words} samples than the baseline, since other ones were skipped or cut: second" in (
        table.read_text()
    )
    shutil.copy(path / "second-seed0" / "mixture.json", path / "second-seed1" / "mixture.json")
    write_report(path)
    assert words not in table.read_text()


def test_intervals_of_fewer_seeds_are_named(folder):
    table = (folder / "report" / "table.md").read_text()
    assert "differences over 1 of 2 seeds" in table
    assert "each interval is of one comparison: of 2, one in twenty" in table


def test_a_name_with_dollars_is_drawn_as_it_is(tmp_path):
    cells = {"costs $5": 0.5, "or $ and % in $": 0.9}
    path = write_ablation(tmp_path / "drawn", cells, seeds=(0,))
    write_report(path)
    assert (path / "report" / "index.html").exists()


def test_questions_about_one_picture_have_no_interval_and_those_about_one_video_belong_together(
    tmp_path,
):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9})
    by_picture = load(path).rows[1].scores["val/exact_match"]
    rewrite_answers(path, lambda answer: {**answer, "image": None, "video": answer["image"]})
    assert load(path).rows[1].scores["val/exact_match"] == by_picture
    rewrite_answers(path, lambda answer: {**answer, "video": "one.mp4"})
    score = load(path).rows[1].scores["val/exact_match"]
    assert score.difference == by_picture.difference
    assert (score.interval, score.difference_interval) == (None, None)
    write_report(path)
    assert "no intervals of val/exact_match: all its" in (path / "report/table.md").read_text()


def test_answers_that_did_not_end_are_counted_by_run(tmp_path):
    path = write_ablation(tmp_path / "drawn", {"first": 0.5, "second": 0.9}, seeds=(0,))
    counts = {"val": {"answers that did not end": 3}, "val_blank": {"answers that did not end": 1}}
    change(path, "second-seed0", "results.json", questions=counts)
    write_report(path)
    line = "answers that did not end within evaluation.max_new_tokens: second-seed0 4"
    assert line in (path / "report" / "table.md").read_text()
