"""The arguments of every command. Imports nothing heavy."""

import argparse
import sys
from typing import Any, NoReturn

from owlfuse import __version__
from owlfuse.bench.commands import add_bench
from owlfuse.cli_completion import HELP, SCRIPTS
from owlfuse.cli_help import ABLATE, DEMO, EVAL, EVAL_USAGE, EXIT_CODES, LAYOUT, RECIPE, TrainHelp
from owlfuse.terminal import visible


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(failed(message, 2))


def failed(message: str, code: int) -> int:
    """Tells an error in one line, and gives the exit code back."""
    print(f"owlfuse: error: {visible(message)}", file=sys.stderr)
    return code


def make_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser("owlfuse", description="Experiments on multimodal LLMs.", epilog=EXIT_CODES, **LAYOUT)
    text = "a module of yours: parts of it may stand in a model that chat, eval, export or load reads"
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE", help=text)
    parser.add_argument("--version", action="version", version=f"owlfuse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    _add_runs(commands)
    _add_models(commands)
    add_bench(commands)
    _add_data(commands)
    return parser


def _add_runs(commands: Any) -> None:
    train = commands.add_parser("train", help="train one run, or a sweep with -m", add_help=False, **LAYOUT)
    train.add_argument("-h", "--help", action=TrainHelp, nargs=0, help="this page")
    train.add_argument("-m", "--multirun", action="store_true", help="a run for every combination of listed values")
    train.add_argument("overrides", nargs="*", help="experiment=<name>, <group>=<option>, <key>=<value>, resume=<run>")

    recipe = commands.add_parser("recipe", help="run the stages of a recipe in order", epilog=RECIPE, **LAYOUT)
    recipe.add_argument("recipe", metavar="NAME", help="a folder with a recipe.yaml below experiments/")
    recipe.add_argument("overrides", nargs="*", help="as of train for all stages; stages.<stage>.<key>=<value>; dry_run=true")

    ablate = commands.add_parser("ablate", help="run a grid of cells, and report on it", epilog=ABLATE, **LAYOUT)
    ablate.add_argument("ablation", metavar="NAME", help="a folder with an ablation.yaml below experiments/")
    ablate.add_argument(
        "overrides", nargs="*", help="as of train, for all cells; jobs=, launcher=, seeds=, dry_run=, anew=, name="
    )

    report = commands.add_parser("report", help="write the report of an ablation anew, finished or not", **LAYOUT)
    report.add_argument("ablation", metavar="NAME", help="an ablation, or its folder in runs/")
    report.add_argument("overrides", nargs="*", metavar="baseline=CELL", help="the cell that differences are to")

    evaluate = commands.add_parser(
        "eval", help="evaluate a run, or any model on a benchmark", usage=EVAL_USAGE, epilog=EVAL, **LAYOUT
    )
    evaluate.add_argument("overrides", nargs="*", metavar="RUN", help="the run's folder, then <key>=<value> to change")


def _add_models(commands: Any) -> None:
    export = commands.add_parser("export", help="write a run for transformers, peft and owlfuse", **LAYOUT)
    export.add_argument("run", metavar="RUN", help="a run's folder, or one that was exported or imported")
    export.add_argument("out", metavar="OUT", help="a folder that is written")
    export.add_argument(
        "overrides", nargs="*", help="merge=true folds LoRA in; layout=released; max_shard_size=5GB; which=best"
    )

    released = commands.add_parser("import", help="read a released mPLUG-Owl1, 2 or 3 checkpoint", **LAYOUT)
    released.add_argument("folder", metavar="FOLDER", help="with a released config.json and weights")
    released.add_argument("out", metavar="OUT", help="a folder that is written in owlfuse's own format")
    released.add_argument("overrides", nargs="*", help="max_shard_size=5GB")

    chat = commands.add_parser("chat", help="talk to a model about pictures", **LAYOUT)
    chat.add_argument("folder", metavar="OUT", help="an exported or imported folder, or a run's")
    chat.add_argument(
        "overrides", nargs="*", metavar="QUESTION", help="without one it is a conversation; which=best: a run's best checkpoint"
    )
    chat.add_argument("--image", action="append", default=[], metavar="PATH", help="a picture to ask about; may be repeated")
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer")
    chat.add_argument("--thinking", action="store_true", help="have the model think first, where its chat template knows how")
    chat.add_argument("--explain", metavar="PNG", help="draw where the (last) answer looked in the pictures, into a file")

    demo = commands.add_parser("demo", help="a page in the browser: several models side by side", epilog=DEMO, **LAYOUT)
    demo.add_argument("folders", nargs="+", metavar="OUT", help="exported or imported folders, or runs'; which=best")
    demo.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="by default only this machine reaches the page")
    demo.add_argument("--port", type=int, metavar="N", help="by default the first free one from 7860 on")


def _add_data(commands: Any) -> None:
    mixture = commands.add_parser("mixture", help="print what a run would draw, and write mixture.json", **LAYOUT)
    mixture.add_argument("overrides", nargs="*", help="as of train, and steps=N, out=DIR")

    data = commands.add_parser("data", help="write a dataset", **LAYOUT).add_subparsers(metavar="<set>", required=True)
    shapes = data.add_parser("shapes", help="pictures of coloured shapes, with questions", **LAYOUT)
    shapes.add_argument("folder", metavar="DIR", help="a folder that is written")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--pictures", type=int, default=12000, metavar="N", help="pictures to train with")

    completion = commands.add_parser("completion", help="print a script for a shell's Tab key", epilog=HELP, **LAYOUT)
    completion.add_argument("shell", choices=[*SCRIPTS, "words"], metavar="{bash,zsh,fish}")
    completion.add_argument("line", nargs="?", default="", help=argparse.SUPPRESS)

    config = commands.add_parser("config", help="print the composed configuration as yaml", **LAYOUT)
    config.add_argument("overrides", nargs="*", help="as of train")
