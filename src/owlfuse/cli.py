"""`owlfuse <command>`. Heavy imports stay inside the commands, so that `--help` answers at once."""

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path

from owlfuse.bench.commands import run_bench
from owlfuse.cli_parser import failed, make_parser
from owlfuse.own_modules import import_own
from owlfuse.packages import MissingPackage
from owlfuse.terminal import guard_terminal, visible


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. Unexpected exceptions pass through with their traceback."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        match = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        guess = f"did you mean '{match[0]}'?" if match else f"the commands are {', '.join(COMMANDS)}"
        return failed(f"{argv[0]}: no such command; {guess}", 2)
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        command = arguments.command
        return failed(f"command line: {unknown[0]}: no such option of {command}; see owlfuse {command} --help", 2)
    if rest and not hasattr(arguments, "overrides"):
        return failed(f"command line: {rest[0]}: not an argument of {arguments.command}; see its --help", 2)
    if rest:
        arguments.overrides += rest  # words after an option, as in `a=1 -m b=2`
    return report_errors(lambda: _run(arguments), arguments.command)


def _run(arguments: argparse.Namespace) -> None:
    guard_terminal()
    for module in arguments.trust:
        _trust(module)
    COMMANDS[arguments.command](arguments)


def report_errors(call: Callable[[], None], command: str) -> int:
    """Runs a command and returns its exit code. What a user can mend is said in one line; other exceptions pass through."""
    try:
        call()
        return 0
    except KeyboardInterrupt as stop:
        print(visible(f"owlfuse: {str(stop) or 'interrupted'}"), file=sys.stderr)
        return 130
    except Exception as error:
        name = type(error).__module__ + "." + type(error).__qualname__
        if name == "owlfuse.config_errors.ConfigError":
            return failed(str(error), 2)
        if name == "owlfuse.types.DataError" or isinstance(error, FileNotFoundError | FileExistsError):
            message = str(error).rpartition("DataError: ")[2]  # of a data worker, torch hands on the whole traceback
            return failed(" ".join(message.split()), 1)
        if isinstance(error, OSError):
            from owlfuse.full_disk import why_not_written

            if reason := why_not_written(error):
                return failed(f"{command}: {reason}; make room or permit it, then run it again", 1)
        if isinstance(error, MissingPackage):
            return failed(str(error).rpartition("MissingPackage: ")[2].strip(), 1)
        raise


def _trust(module: str) -> None:
    """Lets a model have parts of this module (or be a timm model of the hub). Raises ConfigError: there is no such module."""
    from owlfuse.config_errors import ConfigError
    from owlfuse.foreign import trust

    trust(module)
    if ":" in module:
        return
    try:
        import_own(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise  # the module is there, and what it imports is not
        raise ConfigError(f"command line: --trust {module}: no such module in this folder or installed") from None


def _train(arguments: argparse.Namespace) -> None:
    from owlfuse import config

    if arguments.multirun:
        from owlfuse.sweep import sweep

        sweep(arguments.overrides)
        return
    composed = config.compose(arguments.overrides)
    if composed.get("dry_run"):
        from owlfuse.plan_tables import dry_run

        dry_run(composed)
        return
    from owlfuse import train

    train.run(composed)


def _eval(arguments: argparse.Namespace) -> None:
    from owlfuse.config import ConfigError, compose, find_run
    from owlfuse.signals import signals_end_the_run

    words = arguments.overrides
    folder = next((word for word in words if "=" not in word or Path(word).is_dir()), None)
    if folder is None:
        raise ConfigError("command line: name the run's folder: owlfuse eval RUN [overrides]")
    words.remove(folder)
    if any(word.startswith("task=") for word in words):
        from owlfuse.tasks.options import check_model, compose_options

        check_model(folder)
        compose_options(words)  # mistakes, before heavy imports
        from owlfuse.tasks.run import evaluate_task

        with signals_end_the_run():
            return evaluate_task(folder, words)
    find_run(folder)
    compose([f"resume={folder}", *(word for word in words if not word.startswith("which="))])  # mistakes, before heavy imports
    from owlfuse import evaluation

    with signals_end_the_run():
        evaluation.evaluate_run(folder, words)


def _data(arguments: argparse.Namespace) -> None:
    from owlfuse.data.shapes import write_shapes

    try:
        write_shapes(folder=arguments.folder, seed=arguments.seed, train_pictures=arguments.pictures)
    except ValueError as error:
        raise SystemExit(failed(" ".join(str(error).split()), 2)) from None


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
    from owlfuse.chat_checks import check_images, explanation_file
    from owlfuse.runs import check_model, split_which

    which, words = split_which(arguments.overrides)
    question = " ".join(words) or None
    folder = check_model(arguments.folder, which)
    check_images(arguments.image)
    has_pictures = question is None or bool(arguments.image)
    out = explanation_file(arguments.explain, has_pictures) if arguments.explain else None
    from owlfuse.chat import chat

    asked = arguments.max_new_tokens, arguments.temperature, out, arguments.thinking, which
    chat(folder, arguments.image, question, *asked)


def _demo(arguments: argparse.Namespace) -> None:
    from owlfuse.demo.command import demo_command

    demo_command(arguments.folders, arguments.host, arguments.port)


def _mixture(arguments: argparse.Namespace) -> None:
    from owlfuse.config import compose

    compose([word for word in arguments.overrides if word.partition("=")[0] not in ("steps", "out")])  # before heavy imports
    from owlfuse.survey import mixture_command

    mixture_command(arguments.overrides)


def _recipe(arguments: argparse.Namespace) -> None:
    from owlfuse.recipe_stages import compose_stages, split_dry_run

    _, words = split_dry_run(arguments.overrides)
    compose_stages(arguments.recipe, words, importing=False)  # mistakes, before heavy imports
    from owlfuse.recipe import recipe_command

    recipe_command(arguments.recipe, arguments.overrides)


def _ablate(arguments: argparse.Namespace) -> None:
    from owlfuse.ablation.run import ablate_command

    ablate_command(arguments.ablation, arguments.overrides)


def _report(arguments: argparse.Namespace) -> None:
    from owlfuse.ablation.report import report_command

    report_command(arguments.ablation, arguments.overrides)


def _completion(arguments: argparse.Namespace) -> None:
    from owlfuse.cli_completion import completion_command

    completion_command(arguments.shell, arguments.line, COMMANDS)


COMMANDS = {
    "train": _train,
    "recipe": _recipe,
    "ablate": _ablate,
    "report": _report,
    "eval": _eval,
    "export": _export,
    "import": _import,
    "chat": _chat,
    "demo": _demo,
    "mixture": _mixture,
    "bench": run_bench,
    "data": _data,
    "config": _config,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
