"""Every configuration key with its type, default and meaning, as tables: read from the yamls of
`configs/`, and from the signatures and docstrings of what their `_target_`s name. `make docs` puts
them into the page `configuration`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docstring_parser
import yaml

from owlfuse.config.check import SUPPLIED, annotation_of, describe, locate_target, parameters_of
from owlfuse.config.compose import PlanOptions
from owlfuse.config.folders import find_folders
from owlfuse.config.recipes import RECIPE_KEYS, STAGE_KEYS
from owlfuse.studies.ablation.file import AblationFile
from owlfuse.studies.ablation.run import Options as AblateOptions

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
UNSET = object()
WHAT_GROUPS_ARE = {
    "model/vision": "The backbone: pixels to features",
    "model/connector": "The connector: features to visual tokens",
    "model/fusion": "The fusion: how visual tokens meet the LLM",
    "model/llm": "The LLM",
    "model/adapter": "What of a part is trained: `model/adapter@model.adapter.<part>=<policy>`",
    "data": "The data: tokenizer, mixture, batches",
    "data/source": (
        "A source: `/data/source@data.sources.<name>: <format>` among the defaults of an "
        "experiment's file"
    ),
    "trainer": "The trainer",
    "optim": "The optimizer and its schedule",
    "logger": "Loggers",
    "evaluation": "The evaluation at a run's end",
    "task": "A benchmark of `owlfuse eval MODEL task=<name>`",
}


@dataclass
class Key:
    """One key of a table.

    Attributes:
        defaults: by option of the group; UNSET where the key has to be given.
    """

    name: str
    kind: str
    meaning: str
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """The keys of one `_target_` at one place of the configuration."""

    place: str
    """What stands before each key, as `model.fusion`; for adapters and sources the part or
    source is left open."""
    target: str
    options: list[str]
    keys: dict[str, Key]
    comments: list[str]
    """The words at the top of the options' yamls."""


def group_tables(group: str) -> list[Table]:
    """The tables of a group, one for each place and target, the options that share it together."""
    tables: dict[tuple[str, str], Table] = {}
    for option in find_folders(CONFIGS).groups[group]:
        text = (CONFIGS / group / f"{option}.yaml").read_text()
        node, comments = yaml.safe_load(text) or {}, key_comments(text)
        parent = parent_of(group, node)
        for path, content in nodes({**parent, **node}, place_of(group)):
            below = path.removeprefix(place_of(group)).strip(".")
            own = {
                key.removeprefix(f"{below}.") if below else key: words
                for key, words in comments.items()
            }
            table = tables.setdefault(
                (path, content["_target_"]), Table(path, content["_target_"], [], {}, [])
            )
            table.options.append(option)
            if not below and (opening := opening_comment(text)):
                table.comments.append(f"`{option}`: {opening}")
            add_keys(table, option, content, own)
    return list(tables.values())


def parent_of(group: str, node: dict[str, Any]) -> dict[str, Any]:
    """What an option takes from another of its group by its defaults."""
    names = [
        name for name in node.get("defaults", []) if isinstance(name, str) and name != "_self_"
    ]
    return {
        k: v
        for name in names
        for k, v in yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text()).items()
    }


def place_of(group: str) -> str:
    """Where a group's keys stand in the configuration."""
    return {"model/adapter": "model.adapter.<part>", "data/source": "data.sources.<name>"}.get(
        group, group.replace("/", ".")
    )


def nodes(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`, at or below this one."""
    if "_target_" in node:
        yield path, node
    for key, value in node.items():
        if isinstance(value, dict):
            yield from nodes(value, f"{path}.{key}")


def add_keys(table: Table, option: str, node: dict[str, Any], comments: dict[str, str]) -> None:
    """Adds what one option says of the keys to their table.

    Of other libraries' classes those of the yaml.
    """
    target = locate_target(node["_target_"], "_target_", lambda key: str(CONFIGS))
    parameters, meanings = parameters_of(target) or {}, documented(target)
    ours = node["_target_"].startswith("owlfuse.")
    names = list(parameters) if ours else [key for key in node if not key.startswith("_")]
    given = {"data": (), **SUPPLIED}.get(place_key(table.place), ())
    for name in names:
        parameter = parameters.get(name)
        if name in ("self", *given) or (
            parameter and parameter.kind is inspect.Parameter.VAR_KEYWORD
        ):
            continue
        meaning = meanings.get(name, "")
        if not meaning or meaning.lower().startswith("see "):
            meaning = comments.get(name, meaning)
        default = parameter.default if parameter else UNSET
        value = node.get(name, UNSET if default is inspect.Parameter.empty else default)
        value = UNSET if value == "???" else value
        annotation = annotation_of(parameter, target) if parameter else inspect.Parameter.empty
        kind = "anything" if annotation in (inspect.Parameter.empty, Any) else describe(annotation)
        key = table.keys.setdefault(name, Key(name, kind, meaning))
        key.meaning = key.meaning or meaning
        key.defaults[option] = value


def place_key(place: str) -> str:
    """The place as SUPPLIED names it."""
    return "logger.*" if place.startswith("logger.") else place


def documented(target: Any) -> dict[str, str]:
    """What docstrings say of the arguments, those of a class's bases too: the first sentence of
    other libraries' words."""
    classes = target.__mro__ if inspect.isclass(target) else ()
    texts = [
        text
        for cls in classes
        for text in (cls.__dict__.get("__doc__"), doc_of(cls.__dict__.get("__init__")))
    ]
    texts = texts if classes else [target.__doc__]
    found: dict[str, str] = {}
    for text in filter(None, texts):
        for parameter in docstring_parser.parse(
            text, docstring_parser.DocstringStyle.GOOGLE
        ).params:
            for name in parameter.arg_name.split(", "):
                words = " ".join((parameter.description or "").split())
                ours = target.__module__.split(".")[0] == "owlfuse"
                found.setdefault(name, words if ours else words.split(". ")[0].rstrip("."))
    return found


def doc_of(function: Any) -> str | None:
    """A function's docstring, None where it has none."""
    return getattr(function, "__doc__", None)


def key_comments(text: str) -> dict[str, str]:
    """The words behind each key of a yaml, by dotted path."""
    lines = text.split("\n")
    found: dict[str, str] = {}

    def visit(node: yaml.Node, path: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            block = isinstance(value, yaml.MappingNode | yaml.SequenceNode) and not value.flow_style
            end = key.end_mark if block else value.end_mark
            _, mark, words = lines[end.line][end.column :].partition("#")
            full = f"{path}{key.value}"
            if mark and words.strip():
                found[full] = words.strip()
            if block:
                visit(value, f"{full}.")

    visit(yaml.compose(text), "")
    return found


def opening_comment(text: str) -> str:
    """The words at the top of a yaml."""
    lines = text.split("\n")
    count = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:count])


def root_keys(file: str, skip: tuple[str, ...] = ()) -> Table:
    """The keys of a root file that belong to no group."""
    text = (CONFIGS / f"{file}.yaml").read_text()
    comments = key_comments(text)
    keys = {}
    for name, value in flat(
        {k: v for k, v in yaml.safe_load(text).items() if k not in ("defaults", *skip)}
    ):
        kind = describe(type(value)) if value is not None else "text (str) or null"
        if name.startswith("plan."):
            kind = describe(annotation_of(parameters_of(PlanOptions)[name[5:]], PlanOptions))
        kind = "a whole number (int) or null" if name == "max_questions" else kind
        keys[name] = Key(name, kind, comments.get(name, ""), {file: value})
    return Table("", "", [file], keys, [])


def flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def checkpoint_table() -> Table:
    """The keys of `checkpoint`."""
    text = (CONFIGS / "train.yaml").read_text()
    node = yaml.safe_load(text)["checkpoint"]
    table = Table("checkpoint", node["_target_"], ["train"], {}, [])
    own = {key.removeprefix("checkpoint."): words for key, words in key_comments(text).items()}
    add_keys(table, "train", node, own)
    return table


def fields_table(cls: type) -> Table:
    """The fields of a dataclass, the keys of a file or a command that no yaml of `configs/` has."""
    table = Table("", "", [], {}, [])
    add_keys(table, cls.__name__, {"_target_": f"{cls.__module__}.{cls.__name__}"}, {})
    return table


def all_tables() -> dict[str, list[Table]]:
    """The tables of the page by their headings."""
    found = {"A run": [root_keys("train", ("checkpoint",)), checkpoint_table()]}
    for group in WHAT_GROUPS_ARE:
        found[group] = group_tables(group)
    found["An evaluation on a benchmark"] = [root_keys("eval")]
    found["An ablation's file, `experiments/<name>/ablation.yaml`"] = [fields_table(AblationFile)]
    found["Settings of `owlfuse ablate` itself, on the command line"] = [
        fields_table(AblateOptions)
    ]
    return found


def undocumented(tables: dict[str, list[Table]]) -> list[str]:
    """Keys without a meaning, as `group: target.key`."""
    lists = [(heading, table) for heading, several in tables.items() for table in several]
    return [
        f"{heading}: {table.target}.{key.name}"
        for heading, table in lists
        for key in table.keys.values()
        if not key.meaning
    ]


def written(value: Any) -> str:
    """A value as a yaml has it, on one line."""
    if value is UNSET:
        return "needs a value"
    if not isinstance(value, str | int | float | bool | list | dict | tuple | None):
        return f"`{value}`"
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, str) and "\n" in value:
        return f"`{json.dumps(value)}`"
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
        .removesuffix("\n...\n")
        .strip()
    )
    return f"`{text}`"


def default_cell(key: Key) -> str:
    """One default, or that of each option where they differ."""
    by_value: dict[str, list[str]] = {}
    for option, value in key.defaults.items():
        by_value.setdefault(written(value), []).append(option)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{', '.join(options)}: {value}" for value, options in by_value.items())


def rows(keys: list[Key], prefix: str = "") -> str:
    """A Markdown table."""
    if not keys:
        return "It has no keys of its own."
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = [f"`{prefix}{key.name}`", key.kind, default_cell(key), key.meaning.rstrip(".")]
        lines.append("| " + " | ".join(map(escaped, cells)) + " |")
    return "\n".join(lines)


def escaped(cell: str) -> str:
    """A cell whose words mean nothing to Markdown but for what stands in backticks."""
    pieces = re.split(r"(`[^`]+`)", cell)
    words = [p if p.startswith("`") else re.sub(r"([*_<>\[\]{}$\\])", r"\\\1", p) for p in pieces]
    return "".join(words).replace("|", "\\|")


def plain_rows(keys: dict[str, str]) -> str:
    """A table of keys that have a meaning alone."""
    return "\n".join(
        [
            "| key | meaning |",
            "|---|---|",
            *(f"| `{key}` | {meaning} |" for key, meaning in keys.items()),
        ]
    )


def section(table: Table, prefix: str) -> str:
    """One table with its options above it."""
    if not table.target:
        return rows(list(table.keys.values()))
    name = (
        f"{{py:obj}}`{table.target}`"
        if table.target.startswith("owlfuse.")
        else f"`{table.target}`"
    )
    options = ", ".join(f"`{option}`" for option in table.options)
    lines = [
        f"### `{prefix}` {options}" if prefix else f"### `{table.place}`",
        "",
        f"`_target_`: {name}",
        "",
    ]
    lines += [f"- {comment}" for comment in table.comments] + [""]
    return "\n".join([*lines, rows(list(table.keys.values()), f"{table.place}."), ""])


def page() -> str:
    """All tables as Markdown.

    Raises:
        ValueError: keys without a meaning, which are listed.
    """
    tables = all_tables()
    if missing := undocumented(tables):
        raise ValueError(
            "keys without a word on them in a yaml or docstring: " + "; ".join(missing)
        )
    parts: list[str] = []
    for heading, several in tables.items():
        parts += [f"## {WHAT_GROUPS_ARE.get(heading, heading)}", ""]
        if heading in WHAT_GROUPS_ARE:
            options = dict.fromkeys(option for table in several for option in table.options)
            parts += [
                f"Group `{heading}`; options: {', '.join(f'`{option}`' for option in options)}.",
                "",
            ]
        for table in several:
            prefix = (
                f"{heading}="
                if heading in WHAT_GROUPS_ARE and table.place == place_of(heading)
                else ""
            )
            parts += [section(table, prefix), ""]
    parts += [
        "## A recipe's file, `experiments/<name>/recipe.yaml`",
        "",
        plain_rows(RECIPE_KEYS),
        "",
    ]
    parts += ["Each of the stages:", "", plain_rows(STAGE_KEYS), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())
