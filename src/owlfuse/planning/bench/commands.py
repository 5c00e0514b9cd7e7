"""`owlfuse bench <what>` on the command line. Heavy imports stay inside."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from owlfuse.core.terminal import LAYOUT

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
SIDE_BY_SIDE = {
    "step": "real tokens per second of a training step against transformers' LLaVA",
    "modality_adaptive": "what the visual copies add to a training step",
    "peak": (
        "the share of the machine's matrix rate that a training step reaches, and where the "
        "rest goes"
    ),
}


def run_bench(arguments: argparse.Namespace) -> None:
    """Runs a benchmark."""
    # A benchmark takes its options by their names on the command line.
    options = vars(arguments).copy()
    for name in ("command", "trust", "bench", "out", "overrides"):  # of every command
        options.pop(name, None)
    out = Path(arguments.out or f"benchmarks/{arguments.bench}")
    bench_function(arguments.bench)(out=out, **options)


def bench_function(bench: str) -> Callable[..., dict[str, Any]]:
    """Return the function that measures it, with its imports."""
    # transformers, datasets and matplotlib take seconds, which `--help` should not cost.
    function: Callable[..., dict[str, Any]]
    if bench == "data":
        from owlfuse.planning.bench.data import bench_data as function
    elif bench == "train":
        from owlfuse.planning.bench.train import bench_train as function
    elif bench == "decode":
        from owlfuse.planning.bench.decode import bench_decode as function
    elif bench == "images":
        from owlfuse.planning.bench.images import bench_images as function
    elif bench == "step":
        from owlfuse.planning.bench.step import bench_step as function
    elif bench == "modality_adaptive":
        from owlfuse.planning.bench.step import bench_modality_adaptive as function
    else:
        from owlfuse.planning.bench.peak import bench_peak as function
    return function


def add_bench(commands: Any) -> None:
    """Adds the parsers of the benchmarks."""
    bench = commands.add_parser("bench", help="measure what a choice costs")
    bench = bench.add_subparsers(metavar="<bench>", required=True, dest="bench")
    decode = bench.add_parser(
        "decode", help="milliseconds per token against the number of images", **LAYOUT
    )
    decode.add_argument(
        "--images",
        type=counts,
        default="1,2,4,8,16,32,64",
        metavar="N,N",
        help="images in the prompt",
    )
    decode.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens of an answer")
    decode.add_argument("--repeats", type=int, default=3, metavar="N")

    loading = bench.add_parser(
        "data", help="drawing and decoding against datasets, torch and PIL", **LAYOUT
    )
    loading.add_argument(
        "--samples", type=int, default=1_000_000, metavar="N", help="positions drawn"
    )

    train = bench.add_parser(
        "train", help="memory and speed of training steps against the plan of a dry run", **LAYOUT
    )
    train.add_argument(
        "--size", choices=("1b", "tiny"), default="1b", help="of the LLM, random weights"
    )
    train.add_argument(
        "--fusion",
        choices=("concat", "modality_adaptive", "hyperattention"),
        default="modality_adaptive",
    )
    train.add_argument("--rows", type=int, default=4, metavar="N", help="samples of a step")
    train.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a sample")
    train.add_argument("--images", type=int, default=1, metavar="N", help="of a sample")
    train.add_argument("--steps", type=int, default=10, metavar="N", help="steps timed")
    train.add_argument("--precision", choices=PRECISIONS, default="bf16-mixed")
    train.add_argument(
        "--checkpointing", action="store_true", help="activations are computed again"
    )
    train.add_argument("--compiled", action="store_true", help="layers are compiled")
    for parser in (decode, loading, train, *side_by_side(bench)):
        parser.add_argument(
            "--out", default=None, metavar="DIR", help="by default benchmarks/<bench>"
        )


def side_by_side(bench: Any) -> list[argparse.ArgumentParser]:
    """Adds and returns the parsers of what is measured in turns with what it is compared with."""
    images = bench.add_parser(
        "images", help="time and memory of steps and prefill against the number of images", **LAYOUT
    )
    images.add_argument(
        "--images", type=counts, default="1,2,4,8,16,32,64", metavar="N,N", help="images of the row"
    )
    parsers = {}
    for name, text in SIDE_BY_SIDE.items():
        parser = parsers[name] = bench.add_parser(name, help=text, **LAYOUT)
        parser.add_argument(
            "--pack-to", type=int, default=320, metavar="N", help="the most tokens of a row"
        )
    for parser, repeats in (
        (images, 5),
        (parsers["step"], 7),
        (parsers["modality_adaptive"], 9),
        (parsers["peak"], 7),
    ):
        parser.add_argument(
            "--repeats",
            type=int,
            default=repeats,
            metavar="N",
            help="turns, of which the median is taken",
        )
        parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
        parser.add_argument(
            "--size",
            choices=("small", "0.4b", "quick"),
            default="small",
            help="two cores, a GPU, a moment",
        )
    return [images, *parsers.values()]


def counts(text: str) -> list[int]:
    """Return [1, 2, 4] for `1,2,4`, for argparse."""
    # Ascending: slopes and ratios are from the first to the last.
    numbers = sorted({int(word) for word in text.split(",")})
    if numbers[0] < 1:
        raise ValueError(text)
    return numbers
