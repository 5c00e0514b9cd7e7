"""`owlfuse <command>`. Heavy imports stay inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from owlfuse import __version__
from owlfuse.config.folders import ConfigFolders, find_folders, known_runs
from owlfuse.config.messages import split_settings
from owlfuse.config.recipes import PARTS
from owlfuse.config.user_modules import import_user_module
from owlfuse.core.errors import failed, hint, report_errors
from owlfuse.core.terminal import LAYOUT, guard_terminal


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Unexpected exceptions pass through with their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    # it says which faster kernels it lacks when peft imports it, in runs without 4 bits, too
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    # Argparse would list all commands, without a guess.
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        return failed(f"{argv[0]}: no such command{hint(argv[0], COMMANDS)}", 2)
    arguments, unparsed = parser.parse_known_args(argv)
    command = arguments.command
    for word in unparsed:
        if word.startswith("-"):
            return failed(
                f"command line: {word}: no such option of {command}; see owlfuse {command} --help",
                2,
            )
    if unparsed and not hasattr(arguments, "overrides"):
        return failed(
            f"command line: {unparsed[0]}: not an argument of {command}; see its --help", 2
        )
    if unparsed:
        arguments.overrides += unparsed  # words after an option, as in `a=1 -m b=2`
    return report_errors(lambda: _run(arguments), command)


def _run(arguments: argparse.Namespace) -> None:
    guard_terminal()
    # Before the command, which may read a model at once.
    for module in arguments.trust:
        _trust(module)
    COMMANDS[arguments.command](arguments)


def _trust(module: str) -> None:
    """Accept parts of this module in models (or a timm model of the hub).

    Raises ConfigError: there is no such module.
    """
    from owlfuse.config.trust import trust
    from owlfuse.core.errors import ConfigError

    trust(module)
    # It is `hf-hub:<owner>/<name>`, a model of timm, and no module.
    if ":" in module:
        return
    try:
        import_user_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists and imports one that does not
        raise ConfigError(
            f"command line: --trust {module}: no such module in this folder or installed"
        ) from None


def _train(arguments: argparse.Namespace) -> None:
    from owlfuse.config import compose

    if arguments.multirun:
        from owlfuse.studies.sweep import sweep

        sweep(arguments.overrides)
        return
    composed = compose.compose(arguments.overrides)
    if composed.get("dry_run"):
        from owlfuse.planning.tables import dry_run

        dry_run(composed)
        return
    from owlfuse.training import train

    train.run(composed)


def _eval(arguments: argparse.Namespace) -> None:
    from owlfuse.config.compose import compose, find_run
    from owlfuse.core.errors import ConfigError, DataError
    from owlfuse.core.signals import signals_end_the_run

    words = arguments.overrides
    # The name of a folder may hold an equals sign.
    folder = next((word for word in words if "=" not in word or Path(word).is_dir()), None)
    if folder is None:
        raise ConfigError("command line: name the run's folder: owlfuse eval RUN [overrides]")
    words.remove(folder)
    if any(word.startswith("task=") for word in words):
        from owlfuse.artifacts.runs import check_model
        from owlfuse.evaluation.benchmarks.options import compose_options

        try:
            check_model(folder)
        except DataError as error:
            raise ConfigError(f"command line: {error}") from error
        compose_options(words)  # it reports mistakes before the heavy imports
        from owlfuse.evaluation.benchmarks.run import evaluate_task

        with signals_end_the_run():
            return evaluate_task(folder, words)
    find_run(folder)
    # It reports mistakes before the heavy imports.
    compose([f"resume={folder}", *split_settings(words, ["which"])[1]])
    from owlfuse.evaluation import validation

    with signals_end_the_run():
        validation.evaluate_run(folder, words)


def _data(arguments: argparse.Namespace) -> None:
    from owlfuse.core.signals import signals_end_the_run
    from owlfuse.data.shapes.write import write_shapes

    try:
        with signals_end_the_run():
            write_shapes(
                folder=arguments.folder, seed=arguments.seed, train_pictures=arguments.pictures
            )
    except ValueError as error:
        raise SystemExit(failed(" ".join(str(error).split()), 2)) from None


def _config(arguments: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from owlfuse.config.compose import compose

    print(OmegaConf.to_yaml(compose(arguments.overrides)), end="")


def _export(arguments: argparse.Namespace) -> None:
    from owlfuse.artifacts.commands import export_command
    from owlfuse.core.signals import signals_end_the_run

    with signals_end_the_run():
        export_command(arguments.run, arguments.out, arguments.overrides)


def _import(arguments: argparse.Namespace) -> None:
    from owlfuse.artifacts.commands import import_command
    from owlfuse.core.signals import signals_end_the_run

    with signals_end_the_run():
        import_command(arguments.folder, arguments.out, arguments.overrides)


def _chat(arguments: argparse.Namespace) -> None:
    from owlfuse.artifacts.runs import check_model, split_which
    from owlfuse.serving.chat_checks import check_images, check_numbers, explanation_file

    which, words = split_which(arguments.overrides)
    question = " ".join(words) or None
    has_pictures = question is None or bool(arguments.image)
    out = explanation_file(arguments.explain, has_pictures) if arguments.explain else None
    folder = check_model(arguments.folder, which)
    # Mistakes are reported before the heavy imports.
    check_numbers(arguments.max_new_tokens, arguments.temperature)
    check_images(arguments.image)
    from owlfuse.serving.chat import chat

    chat(
        folder,
        arguments.image,
        question,
        arguments.max_new_tokens,
        arguments.temperature,
        out,
        arguments.thinking,
        which,
    )


def _demo(arguments: argparse.Namespace) -> None:
    from owlfuse.serving.demo.command import demo_command

    demo_command(arguments.folders, arguments.port)


def _mixture(arguments: argparse.Namespace) -> None:
    from owlfuse.config.compose import compose

    # It reports mistakes before the heavy imports.
    compose(split_settings(arguments.overrides, ("steps", "out"))[1])
    from owlfuse.planning.mixture import mixture_command

    mixture_command(arguments.overrides)


def _recipe(arguments: argparse.Namespace) -> None:
    from owlfuse.studies.recipe.compose import compose_stages, split_dry_run

    _, words = split_dry_run(arguments.overrides)
    # It reports mistakes before the heavy imports.
    compose_stages(arguments.recipe, words, importing=False)
    from owlfuse.studies.recipe.run import recipe_command

    recipe_command(arguments.recipe, arguments.overrides)


def _ablate(arguments: argparse.Namespace) -> None:
    from owlfuse.studies.ablation.run import ablate_command

    ablate_command(arguments.ablation, arguments.overrides)


def _report(arguments: argparse.Namespace) -> None:
    from owlfuse.studies.ablation.report import report_command

    report_command(arguments.ablation, arguments.overrides)


def _completion(arguments: argparse.Namespace) -> None:
    if arguments.shell in SCRIPTS:
        print(SCRIPTS[arguments.shell], end="")
    else:  # `words`, of which each takes a line
        print("\n".join(completions(arguments.line)))


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
    "data": _data,
    "config": _config,
    "completion": _completion,
}


# Commands whose words are overrides of a configuration.
COMMANDS_OF_OVERRIDES = ("train", "config", "mixture", "recipe", "ablate")
# Commands whose words are folders of models.
COMMANDS_OF_MODELS = ("eval", "export", "chat", "demo")
# Keys that are completed.
KEYS = ("dry_run=true", "init_from=", "name=", "resume=", "seed=", "trainer.max_steps=")

BASH = """\
_owlfuse() {
    local line="${COMP_LINE:0:COMP_POINT}" current="${COMP_WORDS[COMP_CWORD]}" IFS=$'\\n'
    local typed="${line##* }"
    [[ $current == [=:@] ]] && current=""
    local done="${typed%"$current"}"  # bash ends words at = and @, and wants what follows
    COMPREPLY=($(owlfuse completion words "$line" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$done"}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _owlfuse owlfuse
"""
ZSH = """\
#compdef owlfuse
_owlfuse() {
    local -a candidates
    candidates=("${(@f)$(owlfuse completion words "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    compadd -S '' -- ${candidates:#} || _files
}
compdef _owlfuse owlfuse
"""
FISH = """\
complete -c owlfuse -a '(owlfuse completion words (commandline -cp | string collect) 2>/dev/null)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
HELP = """\
for bash, in ~/.bashrc:                    eval "$(owlfuse completion bash)"
for zsh, in ~/.zshrc after compinit:       eval "$(owlfuse completion zsh)"
for fish, in ~/.config/fish/config.fish:   owlfuse completion fish | source
"""


def completions(line: str) -> list[str]:
    """Return the completions of the last word of a command line up to the cursor."""
    words = line.split(" ")
    # The first word is `owlfuse` itself, and two spaces make an empty one.
    last, before = words[-1], [word for word in words[1:-1] if word]
    if not before:
        return matching(last, [*COMMANDS, "--help", "--version"])
    command, folders = before[0], find_folders()
    if last.startswith(("resume=", "init_from=")):
        key = last.partition("=")[0]
        return matching(last, [f"{key}={run}" for run in known_runs()])
    if command == "recipe" and len(before) == 1:
        return matching(last, folders.recipe_names)
    if command == "ablate" and len(before) == 1:
        return matching(last, folders.ablation_names)
    if command == "report":
        return matching(last, [file.parent.name for file in Path("runs").glob("*/ablation.json")])
    if command in COMMANDS_OF_OVERRIDES:
        return matching(last, override_words(folders))
    if command in COMMANDS_OF_MODELS:
        tasks = []
        # A task is named behind the model.
        if command == "eval" and len(before) > 1:
            tasks = [f"task={name}" for name in folders.options("task")]
        return matching(last, [*known_runs(), *tasks])
    fixed = {"data": ["shapes"], "completion": list(SCRIPTS)}
    return matching(last, fixed.get(command, []))


def override_words(folders: ConfigFolders) -> list[str]:
    """Return every `<group>=<option>` and `experiment=<name>`, and a few keys."""
    words = [f"experiment={name}" for name in folders.experiment_names]
    for group, options in folders.groups.items():
        keys = [group]
        if group == "model/adapter":
            # Each part has a choice of its own.
            keys = [f"{group}@model.adapter.{part}" for part in PARTS]
        # One is of `eval` alone, the other is chosen below the name of a source.
        elif group in ("task", "data/source"):
            continue
        for key in keys:
            words += [f"{key}={option}" for option in options]
    return [*words, *KEYS]


def matching(last: str, words: Iterable[str]) -> list[str]:
    """Return the words that begin as the last one; only up to their `=` where it has none yet."""
    matches = set()
    for word in words:
        if "=" in word and "=" not in last:
            word = word[: word.index("=") + 1]
        if word.startswith(last):
            matches.add(word)
    return sorted(matches)


EXIT_CODES = """\
exit codes:
  0    done
  1    a file or the data is not as it should be (one line), or a fault of the program (a traceback)
  2    the configuration or the command line is wrong (one line)
  130  interrupted
"""

EXAMPLES = """\
examples:
  owlfuse train experiment=shapes_owl3
  owlfuse train experiment=shapes_owl2 model/fusion=hyperattention seed=1 name=trial
  owlfuse train model/adapter@model.adapter.llm=lora trainer.max_steps=100
  owlfuse train -m experiment=shapes_owl1,shapes_owl3 seed=0,1,2
      a run of each combination, and a table
  owlfuse train experiment=mine trainer=fsdp dry_run=true plan.gpus=8 plan.gpu_memory=80
      what a run would need, and stop
  owlfuse train resume=runs/shapes_owl3/trial trainer.max_steps=200
"""

RECIPE = """\
examples:
  owlfuse recipe owl1
  owlfuse recipe owl1_paper dry_run=true plan.gpus=32
      what each stage trains and needs; nothing is trained
  owlfuse recipe owl3 name=second seed=1 stages.supervised.optim.lr=1e-3
  torchrun --nproc-per-node 8 -m owlfuse recipe owl1_paper trainer.devices=8 \\
      trainer.strategy=ddp data.folder=DIR

The same command again goes on: finished stages are skipped, the one that was stopped resumes from
its last checkpoint.
"""

EVAL_USAGE = "owlfuse eval MODEL [task=NAME] [overrides ...]"
EVAL = """\
examples:
  owlfuse eval runs/shapes_owl3/trial                     the run's own validation sources again
  owlfuse eval runs/shapes_owl3/trial which=best          its best checkpoint by validation loss
  owlfuse eval OUT task=gqa task.file=GQA/testdev_balanced_questions.json \\
      task.image_root=GQA/images batch_size=16
  torchrun --nproc-per-node 8 -m owlfuse eval OUT task=mmbench \\
      task.file=mmbench_dev_20230712.tsv dtype=saved

With task=<name>, MODEL may be a run, an export or an imported release. The tasks are vqav2,
textvqa, gqa, docvqa, pope, scienceqa, mmbench, captions, exact_match and perplexity, or your own in
configs/task/. Keys beside task.<key>: batch_size, max_questions, dtype, workers, out, name, which.
An evaluation that was stopped goes on by the same command.
"""


ABLATE = """\
examples:
  owlfuse ablate fusion
  owlfuse ablate fusion dry_run=true         the cells and an estimate, nothing is trained
  owlfuse ablate fusion seeds=[0] trainer.max_steps=100 name=trial
  owlfuse ablate fusion jobs=2               two cells at a time
  owlfuse ablate fusion launcher=submitit_slurm jobs=8 launcher.partition=gpu \\
      launcher.timeout_min=120
  owlfuse report fusion                      at any time, of what is finished
  owlfuse report fusion baseline=owl3        with differences to another cell

Settings of its own: jobs=N; launcher=basic (on this machine) or submitit_slurm (pip install
'owlfuse[sweep]'), and launcher.<key>= for its own keys; seeds=[0,1]; name= of the folder
runs/<name>; dry_run=true; anew=true.

The same command again goes on: finished cells are skipped, what was under way resumes from its last
checkpoint, and failed cells are tried again. Runs of other code, configuration or data are never
mixed in: it stops and says so. anew=true puts them aside into runs/<name>/old and runs them again.
"""

DEMO = """\
examples:
  owlfuse demo runs/shapes_owl3/trial
  owlfuse demo runs/fusion/owl1-seed0 runs/fusion/owl3-seed0
      the same question to both, answers side by side

It needs the extra `demo` (pip install 'owlfuse[demo]') and no network. Ctrl-C ends it.
"""


class TrainHelp(argparse.Action):
    """Prints `owlfuse train --help`, for which alone the folders are read."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Any,
        values: Any,
        option_string: Any = None,
    ) -> NoReturn:
        folders = find_folders()
        lines = []
        for title, names in (
            ("experiments (experiment=<name>):", folders.experiment_names),
            ("recipes (owlfuse recipe <name>):", folders.recipe_names),
            ("ablations (owlfuse ablate <name>):", folders.ablation_names),
        ):
            lines += [title, "  " + (", ".join(names) or "none"), ""]
        lines.append("groups (<group>=<option>):")
        for group, options in folders.groups.items():
            lines.append(f"  {group:<18}{', '.join(options)}")
        parser.epilog = "\n".join([*lines, "", EXAMPLES])
        parser.print_help()
        raise SystemExit(0)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(failed(message, 2))


def make_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser(
        "owlfuse",
        description="Experiments on multimodal LLMs.",
        epilog=EXIT_CODES,
        **LAYOUT,
    )
    text = (
        "a module of yours: parts of it may stand in a model that chat, eval, export or load reads"
    )
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE", help=text)
    parser.add_argument("--version", action="version", version=f"owlfuse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    _add_runs(commands)
    _add_models(commands)
    _add_data(commands)
    return parser


def _add_command(
    commands: Any,
    name: str,
    text: str,
    *arguments: tuple[str, str | None, str],
    **options: Any,
) -> argparse.ArgumentParser:
    """Return the parser of a new command.

    Args:
        text: what it does.
        arguments: name, name in the usage and help of each positional argument; `overrides` are
            any number of words.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, **LAYOUT, **options)
    for argument, metavar, argument_help in arguments:
        nargs = "*" if argument == "overrides" else None
        parser.add_argument(argument, metavar=metavar, nargs=nargs, help=argument_help)
    return parser


def _add_runs(commands: Any) -> None:
    train = _add_command(
        commands,
        "train",
        "train one run, or a sweep with -m",
        ("overrides", None, "experiment=<name>, <group>=<option>, <key>=<value>, resume=<run>"),
        # `TrainHelp` prints it, since it has to read the folders of configuration.
        add_help=False,
    )
    train.add_argument("-h", "--help", action=TrainHelp, nargs=0, help="this page")
    train.add_argument(
        "-m", "--multirun", action="store_true", help="a run for every combination of listed values"
    )
    _add_command(
        commands,
        "recipe",
        "run the stages of a recipe in order",
        ("recipe", "NAME", "a folder with a recipe.yaml below experiments/"),
        (
            "overrides",
            None,
            "as of train for all stages; stages.<stage>.<key>=<value>; dry_run=true",
        ),
        epilog=RECIPE,
    )
    _add_command(
        commands,
        "ablate",
        "run a grid of cells, and report on it",
        ("ablation", "NAME", "a folder with an ablation.yaml below experiments/"),
        (
            "overrides",
            None,
            "as of train, for all cells; jobs=, launcher=, seeds=, dry_run=, anew=, name=",
        ),
        epilog=ABLATE,
    )
    _add_command(
        commands,
        "report",
        "write the report of an ablation anew, finished or not",
        ("ablation", "NAME", "an ablation, or its folder in runs/"),
        ("overrides", "baseline=CELL", "the cell that differences are to"),
    )
    _add_command(
        commands,
        "eval",
        "evaluate a run, or any model on a benchmark",
        ("overrides", "RUN", "the run's folder, then <key>=<value> to change"),
        usage=EVAL_USAGE,
        epilog=EVAL,
    )


def _add_models(commands: Any) -> None:
    _add_command(
        commands,
        "export",
        "write a run for transformers, peft and owlfuse",
        ("run", "RUN", "a run's folder, or one that was exported or imported"),
        ("out", "OUT", "a folder that is written"),
        (
            "overrides",
            None,
            "merge=true folds LoRA in; layout=released; max_shard_size=5GB; which=best",
        ),
    )
    _add_command(
        commands,
        "import",
        "read a released mPLUG-Owl1, 2, 3 or LLaVA 1.5 checkpoint",
        ("folder", "FOLDER", "with a released config.json and weights"),
        ("out", "OUT", "a folder that is written in owlfuse's own format"),
        ("overrides", None, "max_shard_size=5GB"),
    )
    chat = _add_command(
        commands,
        "chat",
        "talk to a model about pictures",
        ("folder", "OUT", "an exported or imported folder, or a run's"),
        (
            "overrides",
            "QUESTION",
            "without one it is a conversation; which=best: a run's best checkpoint",
        ),
    )
    chat.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="a picture to ask about; may be repeated",
    )
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer")
    chat.add_argument(
        "--thinking",
        action="store_true",
        help="have the model think first, where its chat template knows how",
    )
    chat.add_argument(
        "--explain",
        metavar="PNG",
        help="draw where the (last) answer looked in the pictures, into a file",
    )

    demo = _add_command(
        commands, "demo", "a page in the browser: several models side by side", epilog=DEMO
    )
    demo.add_argument(
        "folders",
        nargs="+",
        metavar="OUT",
        help="exported or imported folders, or runs'; which=best",
    )
    demo.add_argument(
        "--port", type=int, metavar="N", help="by default the first free one from 7860 on"
    )


def _add_data(commands: Any) -> None:
    _add_command(
        commands,
        "mixture",
        "print what a run would draw, and write mixture.json",
        ("overrides", None, "as of train, and steps=N, out=DIR"),
    )
    sets = _add_command(commands, "data", "write a dataset")
    shapes = _add_command(
        sets.add_subparsers(metavar="<set>", required=True),
        "shapes",
        "pictures of coloured shapes, with questions",
        ("folder", "DIR", "a folder that is written"),
    )
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument(
        "--pictures", type=int, default=12000, metavar="N", help="pictures to train with"
    )

    completion = _add_command(
        commands, "completion", "print a script for a shell's Tab key", epilog=HELP
    )
    completion.add_argument("shell", choices=[*SCRIPTS, "words"], metavar="{bash,zsh,fish}")
    completion.add_argument("line", nargs="?", default="", help=argparse.SUPPRESS)
    _add_command(
        commands,
        "config",
        "print the composed configuration as yaml",
        ("overrides", None, "as of train"),
    )


if __name__ == "__main__":
    # `python -m` puts the working folder first, from which the command `owlfuse` imports nothing by
    # itself.
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
    sys.exit(main())
