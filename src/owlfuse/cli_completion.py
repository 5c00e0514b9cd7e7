"""`owlfuse completion bash|zsh|fish`: what a shell needs to complete commands, experiments, groups and runs by the Tab key.
Imports nothing heavy: it runs at every press."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from owlfuse.config_files import ConfigFolders, find_folders

COMPOSING = ("train", "config", "mixture", "recipe", "ablate")
"""Commands whose words are overrides of a configuration."""
READING = ("eval", "export", "chat", "demo")
"""Commands whose words are folders of models."""
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


def completion_command(shell: str, line: str, commands: Iterable[str]) -> None:
    """Prints a shell's script, or with `words` what the last word of a command line may become, a line each."""
    print(SCRIPTS[shell] if shell in SCRIPTS else "\n".join(candidates(line, commands)), end="" if shell in SCRIPTS else "\n")


def candidates(line: str, commands: Iterable[str]) -> list[str]:
    """Returns what the last word of a command line may become, the line being as it was typed up to the cursor."""
    words = line.split(" ")
    last, before = words[-1], [word for word in words[1:-1] if word]
    if not before:
        return matching(last, [*commands, "--help", "--version"])
    command, folders = before[0], find_folders()
    if last.startswith(("resume=", "init_from=")):
        key = last.partition("=")[0]
        return matching(last, [f"{key}={run}" for run in runs()])
    if command in ("recipe", "ablate") and len(before) == 1:
        return matching(last, folders.recipe_names if command == "recipe" else folders.ablation_names)
    if command == "report":
        return matching(last, [file.parent.name for file in Path("runs").glob("*/ablation.json")])
    if command in COMPOSING:
        return matching(last, overrides(folders))
    if command in READING:
        tasks = [f"task={name}" for name in folders.options("task")] if command == "eval" and len(before) > 1 else []
        return matching(last, [*runs(), *tasks])
    fixed = {"data": ["shapes"], "completion": list(SCRIPTS)}
    return matching(last, fixed.get(command, []))


def overrides(folders: ConfigFolders) -> list[str]:
    """Every `<group>=<option>` and `experiment=<name>`, and a few keys."""
    words = [f"experiment={name}" for name in folders.experiment_names]
    for group, options in folders.groups.items():
        if group == "model/adapter":
            parts = ("vision", "connector", "fusion", "llm")
            words += [f"{group}@model.adapter.{part}={option}" for part in parts for option in options]
        elif group not in ("task", "data/source"):
            words += [f"{group}={option}" for option in options]
    return [*words, *KEYS]


def matching(last: str, words: Iterable[str]) -> list[str]:
    """The words that begin as the last one, until its `=` alone where it has none yet."""
    heads = (word if "=" in last else word[: word.find("=") + 1] or word for word in words)
    return sorted({word for word in heads if word.startswith(last)})


def runs() -> list[str]:
    """The runs below ./runs."""
    return sorted({str(file.parent) for pattern in ("*/*", "*/*/*") for file in Path("runs").glob(f"{pattern}/config.yaml")})
