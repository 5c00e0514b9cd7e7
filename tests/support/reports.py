"""An ablation's folder as `owlfuse ablate` leaves it, written by hand: results, answers and
metrics without training."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from PIL import Image

METRICS = {"val/exact_match": ["val", "exact_match"], "val/loss": ["val", "loss"]}
HASH = {"code": "c0de", "config": "c0nf"}
NASTY = "<script>alert('x')</script> & <img src=http://example.org/a.png>"


def write_ablation(
    folder: Path, cells: dict[str, float], seeds=(0, 1, 2), questions: int = 40, **record
) -> Path:
    """Cells by name with the share of answers that are right; the first one is the baseline.

    Every run is finished.
    """
    pictures = [picture(folder / "pictures" / f"{n}.png", n) for n in range(questions // 4)]
    keys = []
    for c, (cell, share) in enumerate(cells.items()):
        for seed in seeds:
            key = f"{cell}-seed{seed}"
            config = {
                "model": {"fusion": {"_target_": f"some.{cell}", "gate": c}},
                "seed": seed,
                "name": key,
            }
            keys.append(
                {
                    "key": key,
                    "cell": cell,
                    "levels": {"fusion": cell},
                    "seed": seed,
                    "words": [],
                    "hash": HASH,
                    "steps": 20,
                    "config": config,
                }
            )
            write_run(
                folder / key, seed, share, pictures, questions, random.Random(f"{cell} {seed}")
            )
    content = {
        "name": "drawn",
        "question": f"Which one? {NASTY}",
        "base": "shapes_owl3",
        "factors": {"fusion": list(cells)},
    }
    content |= {
        "baseline": next(iter(cells)),
        "seeds": list(seeds),
        "metrics": METRICS,
        "paper": None,
        "cells": keys,
    }
    (folder / "ablation.json").write_text(
        json.dumps(content | {"machine": "a machine", "words": []} | record)
    )
    return folder


def picture(path: Path, number: int) -> str:
    """A small file of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (number * 20 % 256, 80, 160)).save(path)
    return str(path)


def write_run(
    run: Path, seed: int, share: float, pictures: list[str], questions: int, draw: random.Random
) -> None:
    """results.json, answers.jsonl and metrics.csv of one run, which agree with each other."""
    run.mkdir(parents=True)
    answers = []
    for q in range(questions):
        right = draw.random() < share
        answer = {
            "source": "val",
            "id": f"val:{q // 4}#{q % 4}",
            "image": pictures[q // 4],
            "question": (f"Question {q}?"),
            "expected": "yes",
            "answer": "yes" if right else NASTY,
            "kind": "presence",
            "right": right,
        }
        answers.append(answer)
    (run / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    right = sum(answer["right"] for answer in answers) / questions
    cost = {
        "trained_parameters": 1234567,
        "tokens_per_s": 4000.0 + seed,
        "peak_memory_bytes": 150_000_000,
    }
    cost |= {"peak_memory_of": "resident", "ms_per_generated_token": 2.5}
    results = {
        "experiment": "drawn",
        "seed": seed,
        "steps": 20,
        "metrics": {"val/exact_match": right, "val/loss": 2 - right},
        "cost": cost,
        "hash": HASH,
        "versions": {"torch": "2"},
        "git": "abc",
        "wall_s": 30.0,
    }
    (run / "results.json").write_text(json.dumps(results))
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train/loss", "val/loss"])
        for step in range(20):
            writer.writerow(
                [
                    step,
                    3 / (step + 1) + draw.random() / 10,
                    2.5 - step / 20 if step % 5 == 4 else "",
                ]
            )
