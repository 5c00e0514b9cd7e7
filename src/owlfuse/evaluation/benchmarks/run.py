"""`owlfuse eval MODEL task=<name>`: questions -> predictions.jsonl -> the table and
tasks/<name>.json."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from owlfuse.config.build import build, to_dict
from owlfuse.config.check import check_targets
from owlfuse.config.compose import origin_of
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.files import write_json
from owlfuse.core.progress import Progress, quiet_libraries
from owlfuse.core.terminal import visible
from owlfuse.data.workers import DataWorkers, ignore_signals
from owlfuse.evaluation.benchmarks.answering import Prompts, Talker, Work, answer
from owlfuse.evaluation.benchmarks.base import Question, Task, spread
from owlfuse.evaluation.benchmarks.options import Options, check_model, compose_options
from owlfuse.evaluation.benchmarks.perplexity import Chats, measure
from owlfuse.evaluation.benchmarks.predictions import Predictions
from owlfuse.evaluation.benchmarks.results import Settings, print_results, results_of
from owlfuse.parallel.torchrun import Ranks


@quiet_libraries()
def evaluate_task(folder: str, words: list[str]) -> None:
    """Evaluates the model of a folder on a benchmark.

    Raises:
        ConfigError: no such model or task, a wrong option.
        DataError: a wrong file or record, more skips than may be.
    """
    began = time.monotonic()
    options, task = read_options(words)
    place = check_model(folder)
    ranks = Ranks()
    questions, wrong = task.questions()
    questions = spread(questions, options.max_questions)
    settings = Settings.of(place, task, options.dtype, options.thinking, options.which)
    out = Path(options.out).expanduser() if options.out else place / "tasks"
    store = Predictions(out / str(options.name), settings.key, ranks.rank)
    done, _ = store.read()
    ranks.wait()  # each has read what is there, before one adds to it
    todo = [
        question
        for question in questions
        if question.id not in done or "skipped" in done[question.id]
    ]
    try:
        answer_share(place, task, ranks.share(longest_first(todo)), store, options, ranks)
        ranks.wait()
    except KeyboardInterrupt:
        kept, _ = store.read()
        count = sum(
            "skipped" not in kept.get(question.id, {"skipped": ""}) for question in questions
        )
        told = (
            f"{count} of {len(questions)} answers are in {store.folder}, and the same command "
            "goes on"
        )
        raise KeyboardInterrupt(f"stopped; {told}") from None
    if ranks.first:
        finish(options, task, questions, wrong, store, settings, ranks, time.monotonic() - began)
    ranks.wait()


def read_options(words: list[str]) -> tuple[Options, Task]:
    """eval.yaml with the overrides, and the benchmark. Raises ConfigError."""
    options, config = compose_options(words)
    check_targets(to_dict(config), lambda path: origin_of(config, path))
    task = build(config.task)
    if not isinstance(task, Task):
        raise ConfigError(
            f"{origin_of(config, 'task._target_')}: task._target_: {config.task._target_} is no "
            "Task"
        )
    return options, task


def longest_first(questions: list[Question]) -> list[Question]:
    """Questions of a length beside each other, so that little is padded; a memory that is too
    small shows at once."""
    return sorted(questions, key=lambda question: question.size, reverse=True)


def answer_share(
    place: Path,
    task: Task,
    questions: list[Question],
    store: Predictions,
    options: Options,
    ranks: Ranks,
) -> None:
    """Answers the questions of this rank; each batch is on the disk before the next begins."""
    if not questions:
        return
    device = torch.device(f"cuda:{ranks.local}" if torch.cuda.is_available() else "cpu")
    talker = Talker(place, options.dtype, device, options.thinking, options.which)
    kind = Prompts if task.generates else Chats
    prompts = kind(task, questions, talker.processor, talker.longest, options.thinking)
    loader = DataLoader(
        prompts,
        batch_size=options.batch_size,
        collate_fn=prompts.collate,
        num_workers=options.workers,
        worker_init_fn=ignore_signals,
        multiprocessing_context=DataWorkers().context if options.workers else None,
    )
    skipped = 0
    label = str(options.name) if ranks.count == 1 else f"{options.name}, rank 1 of {ranks.count}"
    with Progress(label, len(questions), shown=ranks.first) as progress:
        for work in loader:
            lines = [{"id": wrong.question.id, "skipped": wrong.reason} for wrong in work.wrong]
            lines += lines_of(talker, task, work)
            store.append(lines)
            if work.wrong:
                skipped += len(work.wrong)
                task.check_skips(skipped, work.wrong[-1].reason)
            progress.advance(len(lines))


def lines_of(talker: Talker, task: Task, work: Work) -> list[dict[str, Any]]:
    """The predictions of a batch. Raises DataError where the GPU's memory is too small for it."""
    if not work.questions:
        return []
    try:
        return answer(talker, task, work) if task.generates else measure(talker, task, work)
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"a batch of {len(work.questions)} is more than the GPU's memory holds; go on by the "
            "same command with a smaller "
            "batch_size, or with dtype=saved where the weights are of 16 bits"
        ) from error


def finish(
    options: Options,
    task: Task,
    questions: list[Question],
    wrong: list[tuple[str, str]],
    store: Predictions,
    settings: Settings,
    ranks: Ranks,
    seconds: float,
) -> None:
    """Joins the ranks' predictions, scores them, and tells."""
    done, others = store.read()
    asked = {question.id for question in questions}
    lines = [done[question.id] for question in questions]
    answered = [line for line in lines if "skipped" not in line]
    skipped = wrong + [(line["id"], line["skipped"]) for line in lines if "skipped" in line]
    if not answered or len(skipped) > task.max_skips:
        task.check_skips(len(skipped) if answered else task.max_skips + 1, skipped[-1][1])
    for line in answered:
        line["score"] = task.score(line)
    metrics = task.metrics(answered)
    store.finish(
        [*lines, *(line for identity, line in done.items() if identity not in asked)], others
    )
    counts: dict[str, Any] = {
        "questions": len(questions),
        "answered": len(answered),
        "skipped": len(skipped),
    }
    groups = Counter(
        question.group
        for question in questions
        if question.group and "skipped" not in done[question.id]
    )
    counts |= {f"answered, {group}": number for group, number in sorted(groups.items())}
    how = {
        "batch_size": options.batch_size,
        "ranks": ranks.count,
        "max_questions": options.max_questions,
    }
    path = store.folder.with_name(f"{options.name}.json")
    results = results_of(str(options.name), metrics, counts, skipped, settings, how)
    write_json(path, {**results, "wall_s": round(seconds, 1)})
    print_results(results)
    print(visible(f"{path}, and each answer in {store.folder / 'predictions.jsonl'}"))
