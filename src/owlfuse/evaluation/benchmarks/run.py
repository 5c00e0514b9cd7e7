"""`owlfuse eval MODEL task=<name>`: questions -> predictions.jsonl -> the table and
tasks/<name>.json."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from owlfuse.artifacts.runs import check_model, checkpoint_of, locked
from owlfuse.config.build import build, to_dict
from owlfuse.config.check import check_targets
from owlfuse.config.compose import origin_of
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.files import write_json
from owlfuse.core.progress import Progress, quiet_libraries
from owlfuse.core.terminal import visible
from owlfuse.data.notes import NotesLog
from owlfuse.data.workers import DataWorkers, ignore_signals
from owlfuse.evaluation.benchmarks.answering import (
    LoadedModel,
    QuestionBatch,
    QuestionDataset,
    answer,
)
from owlfuse.evaluation.benchmarks.base import Question, Task, sample_units
from owlfuse.evaluation.benchmarks.options import Options, compose_options
from owlfuse.evaluation.benchmarks.perplexity import ChatDataset, measure
from owlfuse.evaluation.benchmarks.predictions import Predictions
from owlfuse.evaluation.benchmarks.results import print_results, results_of, settings_of
from owlfuse.parallel.ranks import Ranks
from owlfuse.parallel.torchrun import TorchrunRanks


@quiet_libraries()
def evaluate_task(folder: str, words: list[str]) -> None:
    """Evaluates the model of a folder on a benchmark.

    Raises:
        ConfigError: no such task, a wrong option.
        DataError: no such model, a wrong file or record, more skips than may be.
    """
    start = time.monotonic()
    # all mistakes of the command before the model is loaded
    options, task = read_options(words)
    model_dir = check_model(folder)
    ranks = TorchrunRanks()
    questions, skipped = task.questions()
    if ranks.first:
        NotesLog().add(task.notes)
    # before the share of a rank, so that the sample is the same for any number of ranks
    questions = sample_units(questions, options.max_questions)
    # once: a run that still trains may write another one meanwhile
    checkpoint = checkpoint_of(model_dir, options.which)
    settings = settings_of(model_dir, checkpoint, task, options.dtype, options.thinking)
    out = Path(options.out).expanduser() if options.out else model_dir / "tasks"
    store = Predictions(out / str(options.name), settings["key"], ranks.rank)
    # by the first rank for all: of two commands each would lose what the other writes
    lock = locked(store.folder, "out", "choose another name= or out=")
    with lock if ranks.first else nullcontext():
        answered = answered_ids(store, task, questions)
        ranks.wait()  # each has read what is there, before one adds to it
        todo = [question for question in questions if question.id not in answered]
        if answered and ranks.first:
            print(
                visible(
                    f"{len(answered)} of {len(questions)} answers are in {store.folder} already"
                )
            )
        # the longest first, so that little is padded and too small a memory shows at once
        todo.sort(key=lambda question: question.size, reverse=True)
        try:
            answer_share(model_dir, checkpoint, task, ranks.share(todo), store, options, ranks)
            ranks.wait()
        except KeyboardInterrupt:
            count = len(answered_ids(store, task, questions))
            raise KeyboardInterrupt(
                f"stopped; {count} of {len(questions)} answers are in {store.folder}, and the same "
                "command goes on"
            ) from None
        if ranks.first:
            seconds = time.monotonic() - start
            finish(options, task, questions, skipped, store, settings, ranks, seconds)
        ranks.wait()


def answered_ids(store: Predictions, task: Task, questions: list[Question]) -> set[str]:
    """Returns the ids of the questions that have an answer; one that was skipped has none, nor one
    whose text or pictures have changed, of which the answer is marked as stale."""
    predictions, _ = store.read()
    ids = set()
    for question in questions:
        line = predictions.get(question.id)
        if line is None or "skipped" in line:
            continue
        if line.get("question") == task.question_hash(question):
            ids.add(question.id)
        else:
            store.stale.add((question.id, line.get("question")))
    return ids


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


def answer_share(
    model_dir: Path,
    checkpoint: Path | None,
    task: Task,
    questions: list[Question],
    store: Predictions,
    options: Options,
    ranks: TorchrunRanks,
) -> None:
    """Answers the questions of this rank; each batch is on the disk before the next begins."""
    if not questions:
        return
    model = LoadedModel(model_dir, options.dtype, ranks.device, options.thinking, checkpoint)
    dataset_class = QuestionDataset if task.generates else ChatDataset
    workers = DataWorkers()
    dataset = dataset_class(task, questions, model.processor, model.max_positions, options.thinking)
    loader = DataLoader(
        dataset,
        batch_size=options.batch_size,
        collate_fn=dataset.collate,
        num_workers=options.workers,
        # the terminal sends Ctrl-C to workers too, and this process ends them
        worker_init_fn=ignore_signals,
        # forked workers would copy a CUDA context
        multiprocessing_context=workers.context if options.workers else None,
    )
    skip_count = 0
    label = str(options.name) if ranks.count == 1 else f"{options.name}, rank 1 of {ranks.count}"
    progress_bar = Progress(label, len(questions), shown=ranks.first)
    with progress_bar as progress, workers.failures_told("the same command goes on"):
        for batch in loader:
            lines = [{"id": skip.question.id, "skipped": skip.reason} for skip in batch.skipped]
            predictions = predict(model, task, batch)
            for question, line in zip(batch.questions, predictions, strict=True):
                line["question"] = task.question_hash(question)
            lines += predictions
            # each batch at once, so that a stop loses one batch at most
            store.append(lines)
            # after the lines are on the disk: an evaluation that stops here goes on behind them
            if batch.skipped:
                skip_count += len(batch.skipped)
                task.check_skips(skip_count, batch.skipped[-1].reason)
            progress.advance(len(lines))


def predict(model: LoadedModel, task: Task, batch: QuestionBatch) -> list[dict[str, Any]]:
    """Returns the predictions of a batch. Raises DataError where it does not fit the GPU."""
    if not batch.questions:
        return []
    try:
        return answer(model, task, batch) if task.generates else measure(model, batch)
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"a batch of {len(batch.questions)} is more than the GPU's memory holds; go on by the "
            "same command with a smaller batch_size, or with dtype=saved where the weights are of "
            "16 bits"
        ) from error


def finish(
    options: Options,
    task: Task,
    questions: list[Question],
    wrong_records: list[tuple[str, str]],
    store: Predictions,
    settings: dict[str, Any],
    ranks: Ranks,
    seconds: float,
) -> None:
    """Joins the ranks' predictions, scores them, and prints and writes the results."""
    predictions, other_settings = store.read()
    lines = []
    for question in questions:
        line = predictions.pop(question.id)
        if "expected" in line:
            # the task's code may have changed since
            line["expected"] = question.expected
        if "skipped" not in line:
            line["group"] = question.group
        lines.append(line)
    answered = [line for line in lines if "skipped" not in line]
    skipped = list(wrong_records)
    skipped += [(line["id"], line["skipped"]) for line in lines if "skipped" in line]
    if skipped:
        task.check_skips(len(skipped), skipped[-1][1])
    if not answered:
        raise DataError(
            f"{task.file}: none of {len(questions)} questions could be answered; the last: "
            f"{skipped[-1][1]}"
        )
    # scored here and not when they were written: a mended rule applies to old answers
    for line in answered:
        line["score"] = task.score(line)
    metrics = task.metrics(answered)
    # the predictions of questions that were not asked this time, as by a smaller max_questions
    store.finish([*lines, *predictions.values()], other_settings)
    counts: dict[str, Any] = {
        "questions": len(questions),
        "answered": len(answered),
        "skipped": len(skipped),
    }
    groups = Counter(line["group"] for line in answered if line["group"])
    for group, count in sorted(groups.items()):
        counts[f"answered, {group}"] = count
    unfinished = sum(line.get("thought_unfinished", False) for line in answered)
    if unfinished:
        counts["thoughts that did not end"] = unfinished
    cut = sum(line.get("cut", False) for line in answered)
    if cut:
        counts["answers that did not end"] = cut
    of_pages = sum(line.get("several_pages", False) for line in answered)
    if of_pages:
        counts["about pictures of several pages"] = of_pages
    settings = {
        **settings,
        "batch_size": options.batch_size,
        "ranks": ranks.count,
        "max_questions": options.max_questions,
    }
    # beside the folder of predictions
    path = store.folder.with_name(f"{options.name}.json")
    results = results_of(str(options.name), metrics, counts, skipped, settings)
    # the time is not part of the results that are printed
    write_json(path, {**results, "wall_s": round(seconds, 1)})
    print_results(results)
    if unfinished:
        print(
            f"{unfinished} thoughts did not end, and their answers count as empty; raise "
            f"task.max_new_tokens, which is {task.max_new_tokens}"
        )
    if cut:
        print(
            f"{cut} of {len(answered)} answers did not end within task.max_new_tokens="
            f"{task.max_new_tokens}, and are scored as far as they came"
        )
    if of_pages:
        print(
            f"{of_pages} of {len(answered)} questions are about pictures of several pages or "
            "frames, of which the first is shown"
        )
    print(visible(f"{path}, and each answer in {store.folder / 'predictions.jsonl'}"))
