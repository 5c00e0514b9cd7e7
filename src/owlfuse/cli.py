"""`owlfuse <command>`. Heavy imports stay inside the commands, so that `--help` answers at once."""

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import NoReturn

from owlfuse.bench.commands import add_bench, run_bench
from owlfuse.cli_help import EXIT_CODES, LAYOUT, TrainHelp


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_failed(message, 2))


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. Unexpected exceptions pass through with their traceback."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        match = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        guess = f"did you mean '{match[0]}'?" if match else f"the commands are {', '.join(COMMANDS)}"
        return _failed(f"{argv[0]}: no such command; {guess}", 2)
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        return _failed(f"command line: {unknown[0]}: no such option of {argv[0]}; see owlfuse {argv[0]} --help", 2)
    arguments.overrides = [*getattr(arguments, "overrides", []), *rest]  # words after an option, as in `a=1 -m b=2`
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a `_target_` may name the user's own module, as ./configs are found
    return _run(COMMANDS[argv[0]], arguments)


def _run(command, arguments: argparse.Namespace) -> int:
    try:
        command(arguments)
        return 0
    except KeyboardInterrupt:
        print("owlfuse: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        name = type(error).__module__ + "." + type(error).__qualname__
        if name == "owlfuse.config_errors.ConfigError":
            return _failed(str(error), 2)
        if name == "owlfuse.types.DataError" or isinstance(error, FileNotFoundError | FileExistsError):
            message = str(error).rpartition("DataError: ")[2]  # of a data worker, torch hands on the whole traceback
            return _failed(" ".join(message.split()), 1)
        if isinstance(error, ModuleNotFoundError) and "pip install owlfuse[" in str(error):
            return _failed(str(error).rpartition("ModuleNotFoundError: ")[2].strip(), 1)
        raise


def _failed(message: str, code: int) -> int:
    print(f"owlfuse: error: {message}", file=sys.stderr)
    return code


def _train(arguments: argparse.Namespace) -> None:
    from owlfuse import config

    if arguments.multirun:
        from owlfuse.sweep import sweep

        sweep(arguments.overrides)
        return
    composed = config.compose(arguments.overrides)
    from owlfuse import train

    train.run(composed)


def _eval(arguments: argparse.Namespace) -> None:
    from owlfuse.config import ConfigError, find_run

    words = arguments.overrides
    folder = next((word for word in words if "=" not in word or Path(word).is_dir()), None)
    if folder is None:
        raise ConfigError("command line: name the run's folder: owlfuse eval RUN [overrides]")
    find_run(folder)
    words.remove(folder)
    from owlfuse import evaluation

    evaluation.evaluate_run(folder, words)


def _data(arguments: argparse.Namespace) -> None:
    if arguments.overrides:
        raise SystemExit(_failed(f"command line: {arguments.overrides[0]}: not an argument of data shapes", 2))
    from owlfuse.data.shapes import write_shapes

    try:
        write_shapes(folder=arguments.folder, seed=arguments.seed, train_pictures=arguments.pictures)
    except ValueError as error:
        raise SystemExit(_failed(" ".join(str(error).split()), 2)) from None


def _config(arguments: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from owlfuse.config import compose

    print(OmegaConf.to_yaml(compose(arguments.overrides)), end="")


def _export(arguments: argparse.Namespace) -> None:
    from owlfuse.hub.commands import export_command

    export_command(arguments.run, arguments.out, arguments.overrides)


def _import(arguments: argparse.Namespace) -> None:
    from owlfuse.hub.commands import import_command

    import_command(arguments.folder, arguments.out, arguments.overrides)


def _chat(arguments: argparse.Namespace) -> None:
    from owlfuse.chat import chat

    question = " ".join(arguments.overrides) or None
    chat(Path(arguments.folder), arguments.image, question, arguments.max_new_tokens, arguments.temperature)


def _mixture(arguments: argparse.Namespace) -> None:
    from owlfuse.survey import mixture_command

    mixture_command(arguments.overrides)


COMMANDS = {
    "train": _train,
    "eval": _eval,
    "export": _export,
    "import": _import,
    "chat": _chat,
    "mixture": _mixture,
    "bench": run_bench,
    "data": _data,
    "config": _config,
}


def _parser() -> Parser:
    parser = Parser("owlfuse", description="Experiments on multimodal LLMs.", epilog=EXIT_CODES, **LAYOUT)
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    _add_runs(commands)
    _add_models(commands)
    add_bench(commands)
    _add_data(commands)
    return parser


def _add_runs(commands) -> None:
    train = commands.add_parser("train", help="train one run, or a sweep with -m", add_help=False, **LAYOUT)
    train.add_argument("-h", "--help", action=TrainHelp, nargs=0, help="this page")
    train.add_argument("-m", "--multirun", action="store_true", help="a run for every combination of listed values")
    train.add_argument("overrides", nargs="*", help="experiment=<name>, <group>=<option>, <key>=<value>, resume=<run>")

    evaluate = commands.add_parser("eval", help="evaluate a run", usage="owlfuse eval RUN [overrides ...]", **LAYOUT)
    evaluate.add_argument("overrides", nargs="*", metavar="RUN", help="the run's folder, then <key>=<value> to change")


def _add_models(commands) -> None:
    export = commands.add_parser("export", help="write a run for transformers, peft and owlfuse", **LAYOUT)
    export.add_argument("run", metavar="RUN", help="a run's folder, or one that was exported or imported")
    export.add_argument("out", metavar="OUT", help="a folder that is written")
    export.add_argument("overrides", nargs="*", help="merge=true folds LoRA in; layout=released; max_shard_size=5GB")

    released = commands.add_parser("import", help="read a released mPLUG-Owl1, 2 or 3 checkpoint", **LAYOUT)
    released.add_argument("folder", metavar="FOLDER", help="with a released config.json and weights")
    released.add_argument("out", metavar="OUT", help="a folder that is written in owlfuse's own format")
    released.add_argument("overrides", nargs="*", help="max_shard_size=5GB")

    chat = commands.add_parser("chat", help="talk to a model about pictures", **LAYOUT)
    chat.add_argument("folder", metavar="OUT", help="an exported or imported folder, or a run's")
    chat.add_argument("overrides", nargs="*", metavar="QUESTION", help="without one it is a conversation")
    chat.add_argument("--image", action="append", default=[], metavar="PATH", help="a picture to ask about; may be repeated")
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer")


def _add_data(commands) -> None:
    mixture = commands.add_parser("mixture", help="print what a run would draw, and write mixture.json", **LAYOUT)
    mixture.add_argument("overrides", nargs="*", help="as of train, and steps=N, out=DIR")

    data = commands.add_parser("data", help="write a dataset", **LAYOUT).add_subparsers(metavar="<set>", required=True)
    shapes = data.add_parser("shapes", help="pictures of coloured shapes, with questions", **LAYOUT)
    shapes.add_argument("folder", metavar="DIR", help="a folder that is written")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--pictures", type=int, default=12000, metavar="N", help="pictures to train with")

    config = commands.add_parser("config", help="print the composed configuration as yaml", **LAYOUT)
    config.add_argument("overrides", nargs="*", help="as of train")


if __name__ == "__main__":
    sys.exit(main())
