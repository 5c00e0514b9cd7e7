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

from owlfuse.config.signatures import read_signature
from owlfuse.config.user_modules import import_user_module
from owlfuse.core.errors import ConfigError, hint

# Arguments that the code supplies when it builds a part, by config path (or a pattern of it):
# neither required in a yaml nor allowed there.
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
    "logger.*": ("save_dir", "version"),
}

HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")
# Packages that are suggested for a misspelled one.
TOP_MODULES = ("owlfuse", "lightning", "torch", "timm", "transformers", "peft", "torchmetrics")
TYPE_NAMES = {
    int: "a whole number (int)",
    float: "a number (float)",
    str: "text (str)",
    bool: "true or false (bool)",
    dict: "a group of keys",
    list: "a list",
    type(None): "null",
}
# Returns the file that sets a key, given by its path, or "command line".
Origin = Callable[[str], str]


def check_targets(
    config: dict[str, Any],
    origin: Origin = lambda path: "configuration",
    importing: bool = True,
) -> None:
    """Bind the arguments of every node with a `_target_` without calling it.

    The signatures in source files are checked first: the classes themselves take seconds to import.

    Args:
        importing: False checks those alone.

    Raises:
        ConfigError: the first mistake.
    """
    nodes = []
    for path, node in nodes_of(config):
        if "_target_" in node:
            nodes.append((path, node))
    for path, node in nodes:
        # All of these before the first import: a typo is answered in a tenth of a second.
        if (signature := read_signature(node["_target_"])) is not None:
            _check_call(signature, path, node, origin)
    if not importing:
        return
    for path, node in nodes:
        _check_target(path, node, origin)


def check_arguments(
    callable_: Callable,
    name: str,
    path: str,
    arguments: dict[str, Any],
    origin: Origin,
    partial: bool = False,
    builds: bool = True,
) -> None:
    """Raise ConfigError for unknown, supplied, missing and mistyped arguments of one call.

    Args:
        name: "" or " of <target>".
        builds: whether a `_target_` in them becomes an object, whose type is not known here. False:
            Hydra's keys are keys like all others.
    """
    parameters = parameters_of(callable_)
    if parameters is None:  # a builtin, which has no signature
        return
    named = {}
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            named[key] = parameter
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    supplied = _supplied_arguments(path)
    if not takes_any:
        supplied = [key for key in supplied if key in named]
    allowed = [key for key in named if key not in supplied]
    prefix = f"{path}." if path else ""
    for key, value in arguments.items():
        full = f"{prefix}{key}"
        # They are instructions for Hydra, and no arguments of the target.
        if builds and key in HYDRA_KEYS:
            continue
        if key in supplied:
            raise ConfigError(
                f"{origin(full)}: {full}: the code gives this argument; remove the key"
            )
        if key in named:
            _check_value(value, named[key], callable_, full, origin, builds)
        elif not takes_any:
            raise ConfigError(f"{origin(full)}: {full}: no such key{name}{hint(str(key), allowed)}")
    if partial:
        return
    positional = list(named)[: len(arguments.get("_args_", []))]
    for key in allowed:
        has_default = named[key].default is not inspect.Parameter.empty
        if key in arguments or key in positional or has_default:
            continue
        source = origin(f"{prefix}_target_" if name else f"{prefix}{key}")
        by = f" by {name.removeprefix(' of ')}" if name else ""
        raise ConfigError(f"{source}: {prefix}{key}: not set, and required{by}")


def _supplied_arguments(path: str) -> list[str]:
    arguments: list[str] = []
    for pattern, keys in SUPPLIED.items():
        if fnmatch.fnmatchcase(path, pattern):
            arguments += keys
    return arguments


def locate_target(target: Any, key: str, origin: Origin) -> Any:
    """Import the object at a dotted path.

    Raises ConfigError with the nearest name where the path is wrong.
    """

    def error(reason: str) -> ConfigError:  # only here, since an origin takes reading the files
        return ConfigError(f"{origin(key)}: {key}: {reason}")

    if not is_dotted_path(target):
        raise error(f"{target!r} is not a dotted path to a class or function")
    part: Any = None
    names = target.split(".")
    for number, name in enumerate(names):
        module_name, parent = ".".join(names[: number + 1]), part
        part = getattr(parent, name, None) if number else None
        if part is None and (number == 0 or inspect.ismodule(parent)):
            try:
                part = _import(module_name)
            except ModuleNotFoundError as missing:
                raise error(
                    f"{module_name} needs the module '{missing.name}', which is not installed"
                ) from None
        if part is None and number == 0:
            guess = hint(name, TOP_MODULES, listed=0)
            raise error(f"no module '{name}' can be imported{guess}")
        if part is None:
            guess = hint(name, _public_names(parent), listed=0)
            raise error(f"{'.'.join(names[:number])} has no '{name}'{guess}")
    if not callable(part):
        raise error(f"{target} is not a class or function")
    return part


def is_dotted_path(target: Any) -> bool:
    """Whether a value is a text of identifiers with points between them."""
    return isinstance(target, str) and all(part.isidentifier() for part in target.split("."))


def _import(name: str) -> Any:
    """Return the module, or None where there is no such module. Raises ModuleNotFoundError for a
    module that it imports and that is missing."""
    try:
        return import_user_module(name)
    except ModuleNotFoundError as error:
        # itself, or its parent is no package
        if error.name and is_within(name, error.name):
            return None
        raise


def parameters_of(callable_: Callable) -> dict[str, inspect.Parameter] | None:
    """Return the parameters of a call; None of a builtin without a signature."""
    try:
        return dict(inspect.signature(callable_).parameters)
    except (TypeError, ValueError):
        return None


def _check_target(path: str, node: dict[str, Any], origin: Origin) -> None:
    key = f"{path}._target_" if path else "_target_"
    _check_call(locate_target(node["_target_"], key, origin), path, node, origin)


def _check_call(
    callable_: Callable,
    path: str,
    node: dict[str, Any],
    origin: Origin,
) -> None:
    name = f" of {node['_target_']}"
    check_arguments(callable_, name, path, node, origin, bool(node.get("_partial_")))


def _check_value(
    value: Any,
    parameter: inspect.Parameter,
    callable_: Callable,
    key: str,
    origin: Origin,
    builds: bool,
) -> None:
    annotation = annotation_of(parameter, callable_)
    holds_target = builds and any("_target_" in node for _, node in nodes_of(value))
    if annotation is inspect.Parameter.empty or holds_target:
        return
    # `x: int = None` is common, and allows None.
    if value is None and parameter.default is None:
        return
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    # For an annotation that it cannot read, pydantic raises its own errors and whatever a class's
    # hooks raise: there is nothing to check with.
    except Exception:
        return
    if _is_valid(adapter, value):
        return
    choices = _literals(annotation)
    texts = [choice for choice in choices if isinstance(choice, str)]
    if choices and (isinstance(value, str) or len(texts) == len(choices)):
        options = ", ".join(map(repr, choices))
        raise ConfigError(
            f"{origin(key)}: {key}: {value!r} is not one of {options}"
            f"{hint(str(value), texts, listed=0)}"
        )
    raise ConfigError(f"{origin(key)}: {key}: {value!r} is not {describe(annotation)}")


def _is_valid(adapter: TypeAdapter, value: Any) -> bool:
    """Whether a value is of a type, strictly in Python's or in JSON's sense: a yaml list may be a
    tuple and a text a Path, but "3" is no number."""
    try:
        adapter.validate_python(value, strict=True)
        return True
    except ValidationError:
        pass
    try:
        # JSON's strict mode takes a list for a tuple, and a text for a Path.
        adapter.validate_json(json.dumps(value), strict=True)
        return True
    except (ValidationError, TypeError):
        return False


def describe(annotation: Any) -> str:
    """Return a type in words: "a number (float) or null"; of a union, the members that a yaml can
    hold."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = typing.get_args(annotation)
        plain = []
        for member in members:
            if member in TYPE_NAMES or typing.get_origin(member) is not None:
                plain.append(member)
        return " or ".join(describe(member) for member in plain or members)
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    return f"a {inspect.formatannotation(annotation).replace('typing.', '')}"


def annotation_of(parameter: inspect.Parameter, callable_: Callable) -> Any:
    """Return the parameter's type, a text resolved in its module; `empty` where it cannot be
    resolved."""
    holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    function = inspect.unwrap(callable_.__init__ if inspect.isclass(callable_) else callable_)
    # A dataclass has its bases' fields among its arguments, whose types are texts of the bases'
    # modules.
    classes = getattr(callable_, "__mro__", (callable_,))
    namespaces = [getattr(function, "__globals__", {})]
    for cls in classes:
        module = sys.modules.get(getattr(cls, "__module__", ""), types)
        namespaces.append(vars(module))
    for names in namespaces:
        # The text of an annotation is evaluated: names under TYPE_CHECKING are missing, and what is
        # no type raises anything. An annotation that cannot be read is not checked.
        with suppress(Exception):
            return typing.get_type_hints(holder, globalns=names, include_extras=True)["it"]
    return inspect.Parameter.empty


def _literals(annotation: Any) -> list[Any]:
    """Return every value that the Literals of a type allow, through unions."""
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    values: list[Any] = []
    if typing.get_origin(annotation) in (Union, types.UnionType):
        for member in typing.get_args(annotation):
            values += _literals(member)
    return values


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a value and every value below it with its dotted path, parents first; an index of a
    list is a part of the path."""
    yield path, value
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from walk(child, f"{path}.{key}" if path else str(key))


def nodes_of(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every dictionary below a value, whose own dotted path is `path`, parents first."""
    for node_path, node in walk(value, path):
        if isinstance(node, dict):
            yield node_path, node


def is_within(name: str, *parents: str) -> bool:
    """Whether a dotted name is one of the parents or lies below one."""
    return any(f"{name}.".startswith(f"{parent}.") for parent in parents)


def _public_names(parent: Any) -> list[str]:
    names = dir(parent)
    for module in pkgutil.iter_modules(getattr(parent, "__path__", [])):
        names.append(module.name)
    return [name for name in names if not name.startswith("_")]
