"""Every `_target_`'s arguments are checked against its signature before anything is built."""

import fnmatch
import inspect
import json
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError

from owlfuse.config.own_modules import import_own
from owlfuse.config.signatures import read_signature
from owlfuse.core.errors import ConfigError, hint

# Arguments that the code gives when it builds a part, by config path (or a pattern of it): neither
# required in a yaml nor allowed there.
SUPPLIED: dict[str, tuple[str, ...]] = {
    "model.connector": ("in_width", "out_width", "patches", "grid"),
    "model.fusion": ("connector_tokens",),
    "model.llm": ("vocab_size",),
    "trainer": (
        "logger",
        "callbacks",
        "default_root_dir",
        "accumulate_grad_batches",
        "check_val_every_n_epoch",
        "max_epochs",
        "num_sanity_val_steps",
        "use_distributed_sampler",
    ),
    "logger.*": ("save_dir", "name", "version"),
}

HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")
# to suggest
TOP_MODULES = ("owlfuse", "lightning", "torch", "timm", "transformers", "peft", "torchmetrics")
NAMES = {
    int: "a whole number (int)",
    float: "a number (float)",
    str: "text (str)",
    bool: "true or false (bool)",
    dict: "a group of keys",
    list: "a list",
    type(None): "null",
}
Where = Callable[[str], str]  # a key's path -> the file that sets it, or "command line"


def check_targets(
    config: dict[str, Any], where: Where = lambda path: "configuration", importing: bool = True
) -> None:
    """Bind the arguments of every node with a `_target_` without calling it. Raises ConfigError.

    What the source files say is checked first: the classes themselves take seconds to import.

    importing: False checks that alone.
    """
    nodes = [(path, node) for path, node in _nodes(config, "") if "_target_" in node]
    for path, node in nodes:
        if (signature := read_signature(node["_target_"])) is not None:
            _check_call(signature, path, node, where)
    if not importing:
        return
    for path, node in nodes:
        _check_target(path, node, where)


def check_arguments(
    callable_: Callable,
    name: str,
    path: str,
    arguments: dict[str, Any],
    where: Where,
    partial: bool = False,
) -> None:
    """Unknown, supplied, missing and mistyped arguments of one call are errors.

    `name`: "" or " of <target>".
    """
    parameters = parameters_of(callable_)
    if parameters is None:  # a builtin tells nothing of its arguments
        return
    named = {
        key: p
        for key, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = [
        key
        for pattern, keys in SUPPLIED.items()
        if fnmatch.fnmatchcase(path, pattern)
        for key in keys
    ]
    supplied = [key for key in given if key in named or open_ended]
    allowed = [key for key in named if key not in supplied]
    positional = list(named)[: len(arguments.get("_args_", []))]
    prefix = f"{path}." if path else ""
    for key, value in arguments.items():
        full = f"{prefix}{key}"
        if key in HYDRA_KEYS:
            continue
        if key in supplied:
            raise ConfigError(
                f"{where(full)}: {full}: the code gives this argument; remove the key"
            )
        if key not in named and not open_ended:
            raise ConfigError(f"{where(full)}: {full}: no such key{name}{hint(str(key), allowed)}")
        if key in named:
            _check_value(value, named[key], callable_, full, where)
    for key in allowed:
        missing = (
            key not in arguments
            and key not in positional
            and named[key].default is inspect.Parameter.empty
        )
        if missing and not partial:
            place = where(f"{prefix}_target_" if name else f"{prefix}{key}")
            raise ConfigError(
                f"{place}: {prefix}{key}: not set, and required{f' by {name[4:]}' if name else ''}"
            )


def locate_target(target: Any, key: str, where: Where) -> Any:
    """Import the object at a dotted path.

    Raises ConfigError with the nearest name where the path is wrong.
    """

    def place() -> str:  # for an error alone: to find it, the files are read once more
        return f"{where(key)}: {key}"

    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"{place()}: {target!r} is not a dotted path to a class or function")
    found: Any = None
    parts = target.split(".")
    for n, part in enumerate(parts):
        name, parent = ".".join(parts[: n + 1]), found
        found = getattr(parent, part, None) if n else None
        if found is None and (n == 0 or inspect.ismodule(parent)):
            found = _import(name, place)
        if found is None:
            what = (
                f"{'.'.join(parts[:n])} has no '{part}'"
                if n
                else f"no module '{part}' can be imported"
            )
            raise ConfigError(
                f"{place()}: {what}{hint(part, _names_in(parent) if n else TOP_MODULES, listed=0)}"
            )
    if not callable(found):
        raise ConfigError(f"{place()}: {target} is not a class or function")
    return found


def _import(name: str, place: Callable[[], str]) -> Any:
    """The module, or None where there is no such module; a module that it imports and that is
    missing is an error."""
    try:
        return import_own(name)
    except ModuleNotFoundError as error:
        # itself, or its parent is no package
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise ConfigError(
            f"{place()}: {name} needs the module '{error.name}', which is not installed"
        ) from None


def parameters_of(callable_: Callable) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(callable_).parameters)
    except (TypeError, ValueError):
        return None


def _check_target(path: str, node: dict[str, Any], where: Where) -> None:
    key = f"{path}._target_" if path else "_target_"
    _check_call(locate_target(node["_target_"], key, where), path, node, where)


def _check_call(callable_: Callable, path: str, node: dict[str, Any], where: Where) -> None:
    check_arguments(
        callable_, f" of {node['_target_']}", path, node, where, partial=bool(node.get("_partial_"))
    )


def _check_value(
    value: Any, parameter: inspect.Parameter, callable_: Callable, key: str, where: Where
) -> None:
    annotation = annotation_of(parameter, callable_)
    if annotation is inspect.Parameter.empty or any(
        "_target_" in node for _, node in _nodes(value, "")
    ):
        return
    # `x: int = None` is common, and means what it says
    if value is None and parameter.default is None:
        return
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    # For an annotation that it cannot read, pydantic raises its own errors and whatever a class's
    # hooks raise: there is nothing to check with.
    except Exception:
        return
    if _valid(adapter, value):
        return
    choices = _literals(annotation)
    if choices and (isinstance(value, str) or all(isinstance(choice, str) for choice in choices)):
        guess = hint(
            str(value), [choice for choice in choices if isinstance(choice, str)], listed=0
        )
        raise ConfigError(
            f"{where(key)}: {key}: {value!r} is not one of {', '.join(map(repr, choices))}{guess}"
        )
    raise ConfigError(f"{where(key)}: {key}: {value!r} is not {describe(annotation)}")


def _valid(adapter: TypeAdapter, value: Any) -> bool:
    """Strict in Python's or in JSON's sense: a yaml list may be a tuple and a text a Path, but
    "3" is no number."""
    try:
        adapter.validate_python(value, strict=True)
        return True
    except ValidationError:
        pass
    try:
        adapter.validate_json(json.dumps(value), strict=True)
        return True
    except (ValidationError, TypeError):
        return False


def describe(annotation: Any) -> str:
    """A type in words: "a number (float) or null". Of a union, the members that a yaml can hold."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = typing.get_args(annotation)
        plain = [m for m in members if m in NAMES or typing.get_origin(m) is not None]
        return " or ".join(describe(member) for member in plain or members)
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    if annotation in NAMES:
        return NAMES[annotation]
    return f"a {inspect.formatannotation(annotation).replace('typing.', '')}"


def annotation_of(parameter: inspect.Parameter, callable_: Callable) -> Any:
    """The parameter's type; a text is resolved where it was written, and `empty` stands for what
    cannot be resolved."""
    holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    owner = inspect.unwrap(callable_.__init__ if inspect.isclass(callable_) else callable_)
    # a dataclass has its bases' fields among its arguments, whose types are texts of the bases'
    # modules
    modules = [cls.__module__ for cls in getattr(callable_, "__mro__", ())] or [
        getattr(callable_, "__module__", "")
    ]
    for names in (
        getattr(owner, "__globals__", {}),
        *(vars(sys.modules.get(module, types)) for module in modules),
    ):
        # The text of an annotation is evaluated: names under TYPE_CHECKING are not there, and
        # what is no type raises anything. What cannot be read is not checked.
        with suppress(Exception):
            return typing.get_type_hints(holder, globalns=names, include_extras=True)["it"]
    return inspect.Parameter.empty


def _literals(annotation: Any) -> list[Any]:
    """Every value that the Literals of a type allow, through unions."""
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [value for member in typing.get_args(annotation) for value in _literals(member)]
    return []


def _nodes(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary below a value with its dotted path, parents first; an index of a list is
    a part of the path."""
    if isinstance(value, dict):
        yield path, value
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in items:
        yield from _nodes(child, f"{path}.{key}" if path else str(key))


def _names_in(found: Any) -> list[str]:
    modules = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    return [name for name in [*dir(found), *modules] if not name.startswith("_")]
