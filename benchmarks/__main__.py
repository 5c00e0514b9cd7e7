"""`python -m benchmarks <benchmark>`, run in the repository with the environment's Python."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import data, decode, images, peak, step, train
from benchmarks.measure import card_name

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
BENCHMARKS: dict[str, tuple[Callable[..., Any], str]] = {
    "data": (data.bench_data, "drawing and decoding against datasets, torch and PIL"),
    "decode": (decode.bench_decode, "milliseconds per token against the number of images"),
    "images": (
        images.bench_images,
        "time and memory of steps and prefill against the number of images",
    ),
    "step": (
        step.bench_step,
        "real tokens per second of a training step against transformers' LLaVA",
    ),
    "modality_adaptive": (
        step.bench_modality_adaptive,
        "what the visual copies add to a training step",
    ),
    "peak": (
        peak.bench_peak,
        "the share of the machine's matrix rate that a training step reaches, and where the rest "
        "goes",
    ),
    "train": (
        train.bench_train,
        "memory and speed of training steps against the plan of a dry run",
    ),
}
REPEATS = {"decode": 3, "images": 5, "step": 7, "modality_adaptive": 9, "peak": 7}
"""Turns by default, of those that have the option."""


def main(argv: list[str] | None = None) -> int:
    """Runs a benchmark and returns its exit code."""
    # A benchmark takes its options by their names on the command line.
    options = vars(make_parser().parse_args(argv))
    name = options.pop("benchmark")
    out = options.pop("out")
    if out is None:
        folder = f"train_{options['fusion']}" if name == "train" else name
        out = Path(__file__).parent / card_name() / folder
    BENCHMARKS[name][0](out=out, **options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all benchmarks."""
    parser = argparse.ArgumentParser("python -m benchmarks")
    commands = parser.add_subparsers(metavar="<benchmark>", required=True, dest="benchmark")
    parsers = {}
    for name, (_, text) in BENCHMARKS.items():
        parsers[name] = commands.add_parser(
            name,
            help=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        text = "a folder that is written; by default benchmarks/<card>/<benchmark>"
        parsers[name].add_argument("--out", type=Path, metavar="DIR", help=text)
    for name, repeats in REPEATS.items():
        text = "turns, of which the median is taken"
        parsers[name].add_argument("--repeats", type=int, default=repeats, metavar="N", help=text)
    for name in ("decode", "images"):
        parsers[name].add_argument(
            "--images",
            type=counts,
            default="1,2,4,8,16,32,64",
            metavar="N,N",
            help="images of the row",
        )
    for name in ("images", "step", "modality_adaptive", "peak"):
        parsers[name].add_argument(
            "--precision", choices=("32-true", "bf16-mixed"), default="32-true", help=" "
        )
        parsers[name].add_argument(
            "--size",
            choices=("small", "0.4b", "quick"),
            default="small",
            help="two cores, a GPU, a moment",
        )
    for name in ("step", "modality_adaptive", "peak"):
        parsers[name].add_argument(
            "--pack-to", type=int, default=320, metavar="N", help="the most tokens of a row"
        )
    parsers["data"].add_argument(
        "--samples", type=int, default=1_000_000, metavar="N", help="positions drawn"
    )
    parsers["decode"].add_argument(
        "--tokens", type=int, default=32, metavar="N", help="tokens of an answer"
    )
    add_train_options(parsers["train"])
    return parser


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Adds what the step is made of."""
    text = "of the LLM, random weights"
    parser.add_argument("--size", choices=tuple(train.SIZES), default="1b", help=text)
    parser.add_argument(
        "--fusion", choices=tuple(train.FUSIONS), default="modality_adaptive", help=" "
    )
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="samples of a step")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a sample")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="of a sample")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps timed")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16-mixed", help=" ")
    text = "activations are computed again"
    parser.add_argument("--checkpointing", action="store_true", help=text)
    parser.add_argument("--compiled", action="store_true", help="layers are compiled")


def counts(text: str) -> list[int]:
    """Return [1, 2, 4] for `1,2,4`, for argparse."""
    # Ascending: slopes and ratios are from the first to the last.
    numbers = sorted({int(word) for word in text.split(",")})
    if numbers[0] < 1:
        raise ValueError(text)
    return numbers


if __name__ == "__main__":
    sys.exit(main())
