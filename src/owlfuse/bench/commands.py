"""`owlfuse bench <what>` on the command line. Heavy imports stay inside."""

import argparse
from pathlib import Path

from owlfuse.cli_help import LAYOUT


def run_bench(arguments: argparse.Namespace) -> None:
    """Runs the benchmark that was named."""
    out = Path(arguments.out)
    if arguments.bench == "data":
        from owlfuse.bench.data import bench_data

        bench_data(out, arguments.samples)
    elif arguments.bench == "train":
        from owlfuse.bench.train import bench_train

        names = ("size", "fusion", "rows", "length", "images", "steps", "precision", "checkpointing", "compiled")
        bench_train(**{name: getattr(arguments, name) for name in names}, out=out)
    else:
        from owlfuse.bench.decode import bench_decode

        bench_decode(arguments.images, arguments.tokens, arguments.repeats, out)


def add_bench(commands) -> None:
    """Adds the parsers of the benchmarks."""
    bench = commands.add_parser("bench", help="measure what a choice costs")
    bench = bench.add_subparsers(metavar="<bench>", required=True, dest="bench")
    decode = bench.add_parser("decode", help="milliseconds per token against the number of images", **LAYOUT)
    decode.add_argument("--images", type=counts, default="1,2,4,8,16,32,64", metavar="N,N", help="images in the prompt")
    decode.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens of an answer")
    decode.add_argument("--repeats", type=int, default=3, metavar="N")

    loading = bench.add_parser("data", help="drawing and decoding against datasets, torch and PIL", **LAYOUT)
    loading.add_argument("--samples", type=int, default=1_000_000, metavar="N", help="positions drawn")

    train = bench.add_parser("train", help="memory and speed of training steps against the plan of a dry run", **LAYOUT)
    train.add_argument("--size", choices=("1b", "tiny"), default="1b", help="of the LLM, random weights")
    train.add_argument("--fusion", choices=("concat", "modality_adaptive", "hyperattention"), default="modality_adaptive")
    train.add_argument("--rows", type=int, default=4, metavar="N", help="samples of a step")
    train.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a sample")
    train.add_argument("--images", type=int, default=1, metavar="N", help="of a sample")
    train.add_argument("--steps", type=int, default=10, metavar="N", help="steps timed")
    train.add_argument("--precision", default="bf16-mixed", help="32-true, bf16-mixed, bf16-true, ...")
    train.add_argument("--checkpointing", action="store_true", help="activations are computed again")
    train.add_argument("--compiled", action="store_true", help="layers are compiled")
    for parser in (decode, loading, train):
        parser.add_argument("--out", default="runs/bench", metavar="DIR")


def counts(text: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4], for argparse."""
    found = sorted({int(word) for word in text.split(",")})
    if found[0] < 1:
        raise ValueError(text)
    return found
