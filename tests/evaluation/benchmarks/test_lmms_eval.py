"""`lmms-eval --model owlfuse` itself, on tasks that lie in a folder: its answers and scores
against `owlfuse eval`'s."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from datasets import Dataset, Features, Image, Value

from helpers import REPO
from owlfuse.__main__ import main
from owlfuse.data.shapes.many import chat
from owlfuse.data.shapes.write import write_shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("lmms_eval") is None,
        reason="lmms-eval is not installed: pip install 'owlfuse[lmms-eval]'",
    ),
]
TASKS = Path(__file__).parent / "lmms_tasks"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the drawn data as a user has it, files of many pictures, of text and in
    POPE's columns, and the tasks."""
    folder = tmp_path_factory.mktemp("lmms")
    data = folder / "data"
    write_shapes(
        str(data / "shapes"),
        train_pictures=24,
        val_pictures=8,
        held_out_pictures=6,
        text_train=60,
        text_val=9,
    )
    chats = json.loads((data / "shapes" / "val.json").read_text())
    many = [
        chat(f"many-{number}", chats, number % 4 + 1, 1, Random(number)) for number in range(10)
    ]
    for one in many:
        one["image"] = [f"shapes/{image}" for image in one["image"]]
    (data / "many.json").write_text(json.dumps(many))
    texts = json.loads((data / "shapes" / "text_val.json").read_text())
    said = [("human", "instruction"), ("gpt", "output")]
    texts = [
        {"id": one["id"], "conversations": [{"from": who, "value": one[key]} for who, key in said]}
        for one in texts
    ]
    (data / "text.json").write_text(json.dumps(texts))
    pope = [
        {
            "question_id": one["id"],
            "question": one["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": "yes",
            "category": "random",
            "image": {"path": None, "bytes": (data / "shapes" / one["image"]).read_bytes()},
        }
        for one in chats
    ]
    columns = Features(
        {
            **dict.fromkeys(("question_id", "question", "answer", "category"), Value("string")),
            "image": Image(),
        }
    )
    Dataset.from_list(pope, features=columns).to_parquet(str(data / "pope.parquet"))
    shutil.copytree(REPO / "examples" / "lmms_eval", folder / "example")
    shutil.copytree(TASKS, folder / "tasks")
    shipped = Path(find_spec("lmms_eval").origin).parent / "tasks" / "pope" / "pope.yaml"
    yaml = folder / "tasks" / "lmms_pope.yaml"
    yaml.write_text(yaml.read_text().replace("include: POPE", f"include: {shipped}"))
    return folder


def lmms_eval(place, tasks, *words, launcher=(), code=0):
    """Runs it as a user does: the results by task, the samples by task, and all that it printed."""
    out = place / "_".join(["out", tasks[0], *words]).replace("/", "_")[:80]
    command = [
        *(launcher or [sys.executable]),
        "-m",
        "lmms_eval",
        "--tasks",
        ",".join(tasks),
        "--output_path",
        str(out),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(place / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, "--log_samples", *words],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, (done.stdout + done.stderr)[-6000:]
    if code:
        return done.stderr
    results = json.loads(next(out.rglob("*_results.json")).read_text())["results"]
    samples = {}
    for task in tasks:
        lines = [
            json.loads(line)
            for line in next(out.rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
        ]
        samples[task] = sorted(lines, key=lambda line: line["doc_id"])
    return results, samples


def ours(place, model, name, file, tokens):
    """`owlfuse eval` on the same questions: the score, and the answers in order."""
    words = [
        f"task.file='{place / 'data' / file}'",
        f"task.max_new_tokens={tokens}",
        f"out={place / 'ours'}",
        f"name={name}",
    ]
    assert main(["eval", str(model), "task=exact_match", *words, "workers=0", "batch_size=3"]) == 0
    lines = [
        json.loads(line)
        for line in (place / "ours" / name / "predictions.jsonl").read_text().splitlines()
    ]
    score = json.loads((place / "ours" / f"{name}.json").read_text())["metrics"]["exact_match"]
    return score, [line["answer"] for line in lines]


def test_its_tasks_give_the_answers_and_scores_of_owlfuse_eval(place, model):
    """Of one picture, of several, of none; in one batch of 7 and, as a chat, in batches of 2."""
    arguments = ["--model_args", f"pretrained={model}", "--include_path"]
    results, samples = lmms_eval(
        place,
        ["shapes_exact_match", "shapes_choice"],
        "--model",
        "owlfuse",
        *arguments,
        "example",
        "--batch_size",
        "7",
    )
    score, answers = ours(place, model, "shapes", "shapes/val.json", 32)
    assert [line["filtered_resps"] for line in samples["shapes_exact_match"]] == answers
    assert len(set(answers)) > 3
    assert results["shapes_exact_match"]["exact_match,none"] == score
    for line in samples["shapes_choice"]:
        losses = [float(number) for number, _ in line["filtered_resps"]]
        assert min(losses) > 0
        assert line["acc"] == (losses.index(min(losses)) == int(line["target"]))
    for kind, batch_size in (("owlfuse", "7"), ("owlfuse_chat", "2")):
        _, samples = lmms_eval(
            place,
            ["lmms_many", "lmms_text"],
            "--model",
            kind,
            *arguments,
            "tasks",
            "--batch_size",
            batch_size,
        )
        for name in ("many", "text"):
            _, answers = ours(place, model, name, f"{name}.json", 6)
            assert [line["filtered_resps"] for line in samples[f"lmms_{name}"]] == answers


def test_a_shipped_task_rounds_and_likelihoods_are_answered(place, model):
    words = [
        "--model",
        "owlfuse",
        "--model_args",
        f"pretrained={model}",
        "--include_path",
        "tasks",
        "--batch_size",
        "5",
    ]
    tasks = ["lmms_pope", "lmms_rounds", "lmms_nats"]
    results, samples = lmms_eval(
        place, tasks, *words, "--limit", "4", "--gen_kwargs", "max_new_tokens=4"
    )
    assert [len(samples[task]) for task in tasks] == [4, 4, 4]
    assert "pope_f1_score,none" in results["lmms_pope"]
    assert results["lmms_rounds"]["three,none"] == 1.0
    assert results["lmms_nats"]["nats,none"] < 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "pretrained={model},dtyp=saved",
            "owlfuse: error: --model_args: dtyp: no such argument; did you mean 'dtype'?",
        ),
        (
            "pretrained=nowhere",
            "owlfuse: error: nowhere: no model: it is not a folder; name a run, or what",
        ),
    ],
)
def test_what_is_wrong_is_told_in_a_line_and_ends_with_1(arguments, told, place, model):
    words = [
        "--model",
        "owlfuse",
        "--model_args",
        arguments.format(model=model),
        "--include_path",
        "tasks",
    ]
    printed = lmms_eval(place, ["lmms_text"], *words, code=1)
    assert printed.splitlines()[-1].startswith(told)
    assert "Traceback" not in printed


def test_two_processes_share_the_questions_and_agree_with_one(place, model):
    words = [
        "--model",
        "owlfuse",
        "--model_args",
        f"pretrained={model}",
        "--include_path",
        "example",
        "--batch_size",
        "4",
    ]
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launcher = [*accelerate, "--mixed_precision", "no", "--dynamo_backend", "no"]
    results, samples = lmms_eval(place, ["shapes_exact_match"], *words, launcher=launcher)
    score, answers = ours(place, model, "shapes", "shapes/val.json", 32)
    assert [line["filtered_resps"] for line in samples["shapes_exact_match"]] == answers
    assert results["shapes_exact_match"]["exact_match,none"] == score
