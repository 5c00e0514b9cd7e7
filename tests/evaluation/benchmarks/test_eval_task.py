"""`owlfuse eval MODEL task=<name>` on small files in each benchmark's format."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from owlfuse.__main__ import main
from owlfuse.evaluation.benchmarks import run
from owlfuse.evaluation.benchmarks.answering import answer
from owlfuse.evaluation.benchmarks.results import settings_of
from task_files import BENCHMARKS


def evaluate(model, out, task, words, *options):
    """The results file and the predictions by their ids."""
    assert (
        main(["eval", str(model), f"task={task}", *words, f"out={out}", "workers=0", *options]) == 0
    )
    lines = [
        json.loads(line) for line in (out / task / "predictions.jsonl").read_text().splitlines()
    ]
    return json.loads((out / f"{task}.json").read_text()), {line["id"]: line for line in lines}


COUNTS = {
    "vqav2": 4,
    "textvqa": 2,
    "gqa": 3,
    "docvqa": 2,
    "pope": 9,
    "scienceqa": 2,
    "mmbench": 9,
    "captions": 3,
}


SHORT = "task.max_new_tokens=6"


@pytest.mark.parametrize("task", BENCHMARKS)
@pytest.mark.fast_cases(1)
def test_every_task_answers_and_scores_alike_for_any_batch_size(
    task, model, files, tmp_path, capsys
):
    words = [*files(task), *([SHORT] if task != "perplexity" else [])]
    small, one = evaluate(model, tmp_path / "1", task, words, "batch_size=1")
    large, many = evaluate(model, tmp_path / "5", task, words, "batch_size=5")
    printed = capsys.readouterr().out
    assert list(one) == list(many)
    assert (
        len(one)
        == small["counts"]["answered"]
        == COUNTS.get(task, 3 if task == "exact_match" else 2)
    )
    for key, line in one.items():
        assert line["prompt"] == many[key]["prompt"] != ""
        assert line["score"] == pytest.approx(many[key]["score"], rel=1e-5)
        assert line.get("answer") == many[key].get("answer")
    assert small["metrics"] == pytest.approx(large["metrics"], rel=1e-5)
    if task != "perplexity":
        # a model that says one thing would show nothing
        assert len({line["answer"] for line in one.values()}) > 1
    assert set(small["versions"]) >= {"owlfuse", "torch", "transformers"}
    assert small["settings"]["key"] == large["settings"]["key"]
    for shown in ("batch_size", "float32", "max_new_tokens", *small["metrics"]):
        assert shown in printed


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gqa", "perplexity"])
def test_visual_tokens_among_the_text_are_padded_alike_too(task, make_model, files, tmp_path):
    """With concat a picture takes many positions, and rows of a batch differ in length by it."""
    words = files(task)
    _, one = evaluate(make_model("concat"), tmp_path / "1", task, words, "batch_size=1")
    _, many = evaluate(make_model("concat"), tmp_path / "3", task, words, "batch_size=3")
    assert [line.get("answer") for line in one.values()] == [
        line.get("answer") for line in many.values()
    ]
    assert [line["score"] for line in one.values()] == pytest.approx(
        [line["score"] for line in many.values()], rel=1e-5
    )


WORDS = {
    "gqa": (
        "questions.json",
        lambda text: {
            "1": {
                "question": text,
                "imageId": "a",
                "answer": "yes",
                "types": {"structural": "query"},
            }
        },
        "",
    ),
    "docvqa": (
        "d.json",
        lambda text: {
            "data": [{"questionId": 1, "question": text, "image": "a.jpg", "answers": ["x"]}]
        },
        "",
    ),
    "exact_match": ("c.json", lambda text: chats(text, {"image": "a.jpg"}), ""),
    "exact_match messages": (
        "c.json",
        lambda text: chats(text, {"image": "a.jpg"}),
        "format=messages",
    ),
    "perplexity": ("c.json", lambda text: chats(text, {"image": "a.jpg"}), ""),
}


def chats(text, fields):
    turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "A word."}]
    return [{"id": "1", "conversations": turns, **fields}]


@pytest.mark.parametrize("task", WORDS)
@pytest.mark.fast_cases(1)
def test_the_escaped_word_image_is_a_word_in_every_benchmark(task, model, tmp_path, capsys):
    """Unescaped it is a picture, of which there is one."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.jpg")
    name, content, option = WORDS[task]
    file = tmp_path / name
    words = [
        f"task.file={file}",
        f"task.image_root={tmp_path}",
        *([f"task.{option}"] if option else []),
    ]
    words += [] if task == "perplexity" else [SHORT]
    file.write_text(json.dumps(content(r"Who wrote \<image>?")))
    _, lines = evaluate(model, tmp_path / "out", task.partition(" ")[0], words)
    (line,) = lines.values()
    assert line["prompt"].count("<image>") == 2
    assert "Who wrote <image>?" in line["prompt"]
    file.write_text(json.dumps(content("Who wrote <image> and <image>?")))
    assert (
        main(
            [
                "eval",
                str(model),
                f"task={task.partition(' ')[0]}",
                *words,
                f"out={tmp_path / '2'}",
                "workers=0",
            ]
        )
        == 1
    )
    assert "<image>" in capsys.readouterr().err


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_goes_on_where_it_was(
    model, files, tmp_path, monkeypatch, capsys
):
    words, out = [*files("mmbench"), SHORT, "batch_size=2"], tmp_path / "out"
    whole, expected = evaluate(model, tmp_path / "whole", "mmbench", words)
    asked = []
    usual_answer = answer

    def stopping(talker, task, work):
        asked.extend(question.id for question in work.questions)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return usual_answer(talker, task, work)

    monkeypatch.setattr(run, "answer", stopping)
    assert main(["eval", str(model), "task=mmbench", *words, f"out={out}", "workers=0"]) == 130
    told = capsys.readouterr().err
    assert "4 of 9 answers are in" in told
    assert "the same command goes on" in told
    kept = asked[:4]
    with (out / "mmbench" / "predictions.jsonl").open("a") as file:
        file.write('{"settings": "cut in the mid')
    asked.clear()
    monkeypatch.setattr(
        run,
        "answer",
        lambda *given: asked.extend(q.id for q in given[2].questions) or usual_answer(*given),
    )
    results, found = evaluate(model, out, "mmbench", words)
    assert sorted(asked + kept) == sorted(expected)
    assert list(found) == list(expected)
    assert [line["answer"] for line in found.values()] == [
        line["answer"] for line in expected.values()
    ]
    assert results["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_answers_of_other_settings_are_neither_taken_nor_lost(model, files, tmp_path, monkeypatch):
    words, out = files("gqa"), tmp_path / "out"
    first, _ = evaluate(model, out, "gqa", words, SHORT)
    second, _ = evaluate(
        model, out, "gqa", words, SHORT, "task.prompt='{question} Say it shortly.'"
    )
    assert first["settings"]["key"] != second["settings"]["key"]
    monkeypatch.setattr(run, "LoadedModel", None)  # everything is there: no model is loaded
    again, _ = evaluate(model, out, "gqa", words, SHORT, "batch_size=1")
    assert again["metrics"] == first["metrics"]
    keys = [
        json.loads(line)["settings"]
        for line in (out / "gqa" / "predictions.jsonl").read_text().splitlines()
    ]
    assert sorted(keys) == sorted([first["settings"]["key"]] * 3 + [second["settings"]["key"]] * 3)


def test_the_key_of_answers_changes_with_the_code_that_makes_them(model, files, monkeypatch):
    """Of the user's own parts too, whose modules a configuration names."""
    _, task = run.read_options(["task=gqa", *files("gqa")])
    key = settings_of(model, None, task, "float32", False)["key"]
    assert settings_of(model, None, task, "float32", False)["key"] == key
    monkeypatch.setattr("owlfuse.evaluation.benchmarks.results.code_hash", lambda *_: "other")
    assert settings_of(model, None, task, "float32", False)["key"] != key


def test_what_is_answered_depends_on_the_picture(model, files, tmp_path):
    words = files("gqa")
    _, seen = evaluate(model, tmp_path / "seen", "gqa", words)
    # what is expected is read again, whatever the answers of before were compared with
    path = tmp_path / "seen" / "gqa" / "predictions.jsonl"
    expected = seen["201640614"]["expected"]
    path.write_text(path.read_text().replace(f'"expected": "{expected}"', '"expected": "other"'))
    for path in tmp_path.glob("gqa files/images/*.jpg"):
        path.write_bytes((tmp_path / "gqa files/images/n235859.jpg").read_bytes())
    # into the folder of the earlier answers, which are none to these pictures
    _, other = evaluate(model, tmp_path / "seen", "gqa", words)
    assert other["201640614"]["expected"] == expected
    assert [line["answer"] for line in seen.values()] != [line["answer"] for line in other.values()]


def test_a_few_questions_are_spread_over_the_file_and_taken_up_by_the_whole(
    model, files, tmp_path, monkeypatch
):
    words, out = [*files("mmbench"), SHORT], tmp_path / "out"
    few, found = evaluate(model, out, "mmbench", words, "max_questions=2")
    assert list(found) == ["241#0", "241#1", "252#0", "252#1", "252#2", "252#3"]
    assert few["counts"]["questions"] == 6
    asked = []
    usual_answer = answer
    monkeypatch.setattr(
        run,
        "answer",
        lambda *given: asked.extend(q.id for q in given[2].questions) or usual_answer(*given),
    )
    whole, _ = evaluate(model, out, "mmbench", words)
    assert asked == ["253#0", "253#1", "253#2"]
    assert whole["counts"]["questions"] == 9


@pytest.mark.slow
def test_a_missing_picture_stops_or_is_skipped_and_tried_again(model, files, tmp_path, capsys):
    words, out = [*files("gqa"), SHORT], tmp_path / "out"
    picture = tmp_path / "gqa files" / "images" / "n235859.jpg"
    content = picture.read_bytes()
    picture.unlink()
    command = ["eval", str(model), "task=gqa", *words, f"out={out}"]
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("owlfuse: error: ")
    assert "testdev_balanced_questions.json: record 2: sample 201640614: no image" in error
    results, found = evaluate(model, out, "gqa", words, "task.on_error=skip")
    counts = results["counts"]
    assert (counts["questions"], counts["answered"], counts["skipped"]) == (3, 2, 1)
    assert results["skipped"][0]["record"] == "201640614"
    assert "no image n235859.jpg" in found["201640614"]["skipped"]
    assert "skipped 201640614: " in capsys.readouterr().out
    assert main([*command, "task.on_error=skip", "task.max_skips=0", "workers=0"]) == 1
    assert "1 wrong records, and max_skips is 0" in capsys.readouterr().err
    picture.write_bytes(content)
    results, _ = evaluate(model, out, "gqa", words, "task.on_error=skip")
    counts = results["counts"]
    assert (counts["questions"], counts["answered"], counts["skipped"]) == (3, 3, 0)


def test_nothing_to_score_is_told_as_such(model, files, tmp_path, capsys):
    words = [*files("gqa"), SHORT, "task.on_error=skip"]
    for picture in tmp_path.glob("gqa files/images/*"):
        picture.unlink()
    assert main(["eval", str(model), "task=gqa", *words, f"out={tmp_path}", "workers=0"]) == 1
    assert "none of 3 questions could be answered; the last: " in capsys.readouterr().err


def test_a_prompt_that_is_too_long_for_the_model_is_told_and_not_cut(
    model, files, tmp_path, capsys
):
    long = "word " * 2100
    words = [*files("gqa"), f"task.prompt='{{question}}{long}'"]
    assert main(["eval", str(model), "task=gqa", *words, f"out={tmp_path}", "workers=0"]) == 1
    assert "and the model has 2048" in capsys.readouterr().err


@pytest.mark.slow
def test_thoughts_that_did_not_end_are_counted_and_told(
    model, files, tmp_path, monkeypatch, capsys
):
    words = [*files("gqa"), SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(
            "owlfuse.data.chat.answer_format.AnswerFormat.is_unfinished_thought",
            lambda *given: True,
        )
        results, lines = evaluate(model, tmp_path, "gqa", words, "thinking=true")
    assert [line["answer"] for line in lines.values()] == [""] * 3
    assert results["counts"]["thoughts that did not end"] == 3
    assert "3 thoughts did not end, and their answers count as empty" in capsys.readouterr().out
    results, lines = evaluate(model, tmp_path / "without", "gqa", words)
    assert "thoughts that did not end" not in results["counts"]
    # a random model does not end its answers within a few tokens
    cut = sum(line.get("cut", False) for line in lines.values())
    assert results["counts"].get("answers that did not end", 0) == cut > 0
    assert f"{cut} of 3 answers did not end within task.max_new_tokens=" in capsys.readouterr().out


def test_two_benchmarks_in_one_command_are_refused(model, files, tmp_path, capsys):
    words = [*files("gqa"), "task=pope", f"out={tmp_path}"]
    assert main(["eval", str(model), "task=gqa", *words]) == 2
    assert "task= is given 2 times, and one benchmark is evaluated" in capsys.readouterr().err


def test_two_commands_do_not_write_one_folder(model, files, tmp_path, monkeypatch, capsys):
    def held(path):
        raise BlockingIOError

    monkeypatch.setattr("owlfuse.artifacts.runs.open_locked", held)
    command = ["eval", str(model), "task=gqa", *files("gqa"), f"out={tmp_path}", "workers=0"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'gqa'} is in use by another process; wait until it ends, or" in error
    assert not (tmp_path / "gqa" / "predictions.jsonl").exists()


def test_a_batch_that_is_too_large_for_the_gpu_is_told(model, files, tmp_path, monkeypatch, capsys):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(run, "answer", full)
    assert (
        main(["eval", str(model), "task=gqa", *files("gqa"), f"out={tmp_path}", "workers=0"]) == 1
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "owlfuse: error: a batch of 3 is more than the GPU's memory holds; go on by the same "
        "command"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["task=gqq"], "command line: task=gqq: no such option; did you mean 'gqa'?"),
        (["task=gqa"], "task.file: needs a value; set it with task.file=<value>"),
        (
            ["task=gqa", "task.file=x", "task.promt=y"],
            "command line: task.promt: no such key; did you mean 'task.prompt'?",
        ),
        (
            ["task=gqa", "task.file=x", "batch_size=0"],
            "batch_size and max_questions are at least 1",
        ),
        (
            ["task=gqa", "task.file=x", "dtype=half"],
            "dtype: 'half' is not one of 'float32', 'saved'",
        ),
        (
            ["task=gqa", "task.file=x", "task.on_error=skp"],
            "task.on_error: 'skp' is not one of 'error', 'skip'",
        ),
        (["task=gqa", "task.file=x", "task.prompt=y"], "task.prompt: 'y' has no {question}"),
        (
            ["task=gqa", "task.file=x", "+task.max_pixels=200000000"],
            "task.max_pixels is 200,000,000, expected a number from 1 to 178,956,970",
        ),
        (["task=gqa", "task.file=x", "task.max_new_tokens=0"], "max_new_tokens is 0, expected at"),
        (["task=gqa", "task.file=x", "task.max_skips=-1"], "max_skips is -1, expected at least 0"),
    ],
)
def test_a_wrong_command_is_told_in_a_line_before_anything_is_loaded(
    words, expected, model, capsys, monkeypatch
):
    monkeypatch.setattr(run, "LoadedModel", None)
    assert main(["eval", str(model), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error


def test_a_folder_without_a_model_is_told(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "task=gqa", "task.file=x"]) == 2
    error = capsys.readouterr().err
    assert "it has neither a run's config.yaml nor an export's config.json" in error


@pytest.mark.slow
def test_two_ranks_share_the_questions_and_agree_with_one(model, files, tmp_path):
    words, out = [*files("pope"), SHORT, "batch_size=2"], tmp_path / "two"
    one, expected = evaluate(model, tmp_path / "one", "pope", words)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "owlfuse",
    ]
    command = [*torchrun, "eval", str(model), "task=pope", *words, f"out={out}", "workers=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    results = json.loads((out / "pope.json").read_text())
    lines = [
        json.loads(line) for line in (out / "pope" / "predictions.jsonl").read_text().splitlines()
    ]
    assert [line["id"] for line in lines] == list(expected)
    assert [line["answer"] for line in lines] == [line["answer"] for line in expected.values()]
    assert results["metrics"] == pytest.approx(one["metrics"])
    assert results["settings"]["ranks"] == 2
    assert not list((out / "pope").glob("predictions.rank*"))


def test_what_the_records_of_chats_say_unused_is_told_and_pictures_of_pages_are_counted(
    model, tmp_path, capsys, caplog
):
    pages = [Image.new("RGB", (32, 32), color) for color in ("red", "green")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    record = {"id": "1", "image": "a.tif", "conversations": turns, "acceptable_answers": ["red"]}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    words = [f"task.file={tmp_path / 'a.json'}", SHORT]
    results, lines = evaluate(model, tmp_path / "out", "exact_match", words)
    assert "not used: a record's 'acceptable_answers'" in caplog.text
    assert results["counts"]["about pictures of several pages"] == 1
    assert [line["several_pages"] for line in lines.values()] == [True]
    assert "1 of 1 questions are about pictures of several pages" in capsys.readouterr().out
