"""Signatures read from source files, so that a misspelled key is refused without importing torch,
lightning and transformers.

For a class with bases, decorators or a metaclass whose effect is not known here there is no
signature, and `check` imports the class.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# Packages whose files are read; tests/config/test_config_signatures.py compares every configured
# target with the class itself.
PACKAGES = ("owlfuse", "lightning")
# Decorators of `__init__` that leave the signature as it is: lightning's, which uses
# functools.wraps.
WRAPPERS = ("_defaults_from_env_vars",)
REQUIRED = inspect.Parameter.empty


class UnknownError(Exception):
    """The files alone do not determine the signature."""


def read_signature(target: Any) -> Callable | None:
    """Returns a function that has the signature of a dotted path's class or function, for
    `check_arguments`, or None where it cannot be known without importing it. Types that cannot be
    known are left out of the signature."""
    if not isinstance(target, str) or target.partition(".")[0] not in PACKAGES:
        return None
    module, _, name = target.rpartition(".")
    try:
        defining_module, node = definition(module, name)
        if isinstance(node, ast.FunctionDef):
            parameters = arguments_of(defining_module, node, skip=0)
        else:
            parameters = parameters_of_class(defining_module, node)
        signature = inspect.Signature(parameters)
    # ValueError: parameters in an order that Python does not allow
    except (UnknownError, ValueError):
        return None

    def stand_in() -> None:
        """Carries the signature."""

    stand_in.__signature__ = signature  # type: ignore[attr-defined]  # which inspect reads
    return stand_in


def definition(module: str, name: str) -> tuple[str, ast.AST]:
    """Return the module that defines a name, and the definition, imports followed. Raises
    UnknownError."""
    for node in reversed(statements(module)):  # the last one counts
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    return module, node.value
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(absolute(module, node), alias.name)
    raise UnknownError(f"{module}.{name}")


@cache
def statements(module: str) -> list[ast.stmt]:
    """Return the statements of a module's file, with those below `if TYPE_CHECKING:`.

    Raises UnknownError.
    """
    file = source_file(module)
    if file is None:
        raise UnknownError(module)
    body: list[ast.stmt] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            body += node.body
        else:
            body.append(node)
    return body


def source_file(module: str) -> Path | None:
    """Return the file of a module in one of the packages, which are not imported."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package) if package in PACKAGES else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations)), *parts)
    files = [path / "__init__.py"]
    if parts:
        files.append(path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def absolute(module: str, node: ast.ImportFrom) -> str:
    """Return the module that an import names, relative to the module that it is in.

    Raises UnknownError.
    """
    if not node.level:
        return node.module or ""
    file = source_file(module)
    package = module if file and file.name == "__init__.py" else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def parameters_of_class(module: str, node: ast.AST) -> list[inspect.Parameter]:
    """Return the parameters of a call of a class. Raises UnknownError."""
    if not isinstance(node, ast.ClassDef) or node.keywords:
        raise UnknownError("no class, or one with a metaclass")
    methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
    # `__new__` may take other arguments than `__init__`.
    if "__new__" in methods:
        raise UnknownError("__new__")
    if node.decorator_list and not is_dataclass(node):
        raise UnknownError("a decorated class")
    if "__init__" in methods:
        return arguments_of(module, methods["__init__"], skip=1)
    if is_dataclass(node):
        # keyword-only ones last
        fields = dataclass_fields(module, node).values()
        return sorted(fields, key=lambda field: field.kind)
    if not node.bases:
        return []
    # Which `__init__` counts would take the whole method resolution order.
    if len(node.bases) > 1:
        raise UnknownError("no __init__ of its own, and several bases")
    return parameters_of_class(*base_of(module, node.bases[0]))


def base_of(module: str, base: ast.expr) -> tuple[str, ast.AST]:
    """Return the module and the definition of a base class. Raises UnknownError."""
    if not isinstance(base, ast.Name):
        raise UnknownError(ast.unparse(base))
    return definition(module, base.id)


def is_dataclass(node: ast.ClassDef) -> bool:
    """Whether `@dataclass` is the only decorator, with no argument that changes what a call
    takes."""
    if len(node.decorator_list) != 1:
        return False
    decorator = node.decorator_list[0]
    if isinstance(decorator, ast.Call):
        harmless = ("eq", "frozen", "repr", "order", "kw_only")
        if any(keyword.arg not in harmless for keyword in decorator.keywords):
            return False
        decorator = decorator.func
    return isinstance(decorator, ast.Name) and decorator.id == "dataclass"


def dataclass_fields(module: str, node: ast.AST) -> dict[str, inspect.Parameter]:
    """Return the arguments of a dataclass, those of its bases first. Raises UnknownError."""
    if not isinstance(node, ast.ClassDef) or len(node.bases) > 1:
        raise UnknownError("no class, or one with several bases")
    fields = {}
    if node.bases:
        fields = dataclass_fields(*base_of(module, node.bases[0]))
    if not is_dataclass(node):
        if not node.decorator_list:
            return fields  # a plain class between dataclasses adds none
        raise UnknownError("a decorated class")
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if "kw_only=True" in ast.unparse(node.decorator_list[0]):
        kind = inspect.Parameter.KEYWORD_ONLY
    for child in node.body:
        if not isinstance(child, ast.AnnAssign) or not isinstance(child.target, ast.Name):
            continue
        name, value = child.target.id, child.value
        annotation = ast.unparse(child.annotation)
        # By the text of the annotation, as dataclasses does it for postponed annotations.
        if "ClassVar" in annotation:
            continue
        if "InitVar" in annotation or "KW_ONLY" in annotation:
            raise UnknownError(annotation)
        if isinstance(value, ast.Call) and getattr(value.func, "id", None) == "field":
            options = field_options(value)
            if "init" in options:  # init=False
                continue
            value = options.get("default", options.get("default_factory"))
        fields[name] = parameter(module, name, kind, child.annotation, value)
    return fields


def field_options(call: ast.Call) -> dict[str | None, ast.expr]:
    """Return the arguments of a dataclass's `field(...)`. Raises UnknownError for arguments of
    unknown effect, and for an `init` that is not False."""
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    if not set(options) <= {"default", "default_factory", "init", "repr", "compare", "metadata"}:
        raise UnknownError(ast.unparse(call))
    init = options.get("init")
    if init is not None and (not isinstance(init, ast.Constant) or init.value):
        raise UnknownError(ast.unparse(call))
    return options


def arguments_of(module: str, node: ast.AST, skip: int) -> list[inspect.Parameter]:
    """Return the parameters of a function without the first `skip`. Raises UnknownError."""
    if not isinstance(node, ast.FunctionDef) or not all(map(is_wrapper, node.decorator_list)):
        raise UnknownError("no function, or a decorated one")
    kinds = inspect.Parameter
    arguments = node.args
    positional: list[tuple[ast.arg, Any]] = []
    positional += [(a, kinds.POSITIONAL_ONLY) for a in arguments.posonlyargs]
    positional += [(a, kinds.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    # defaults belong to the last arguments
    without_default = len(positional) - len(arguments.defaults)
    defaults = [None] * without_default + list(arguments.defaults)
    parameters = []
    for (a, kind), default in zip(positional, defaults, strict=True):
        parameters.append(parameter(module, a.arg, kind, a.annotation, default))
    parameters = parameters[skip:]
    if arguments.vararg:
        parameters.append(inspect.Parameter(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(parameter(module, a.arg, kinds.KEYWORD_ONLY, a.annotation, default))
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return parameters


def is_wrapper(decorator: ast.expr) -> bool:
    """Whether a decorator leaves the signature as it is."""
    return isinstance(decorator, ast.Name) and decorator.id in WRAPPERS


def parameter(
    module: str,
    name: str,
    kind: Any,
    annotation: ast.expr | None,
    value: ast.expr | None,
) -> inspect.Parameter:
    """Return a parameter, without its type where that cannot be known.

    Args:
        value: its default, which becomes None where it is None, and `...` for any other.
    """
    default: Any = REQUIRED
    if value is not None:
        is_none = isinstance(value, ast.Constant) and value.value is None
        default = None if is_none else ...
    parameter_type: Any = REQUIRED
    if annotation is not None:
        # TypeError: typing refuses it, as it would for the class itself
        with suppress(UnknownError, TypeError):
            parameter_type = type_of(module, annotation)
    return inspect.Parameter(name, kind, annotation=parameter_type, default=default)


def type_of(module: str, node: ast.AST) -> Any:
    """Return the type of an annotation.

    Raises UnknownError, for a class of the packages too, which is not imported.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return type_of(module, ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return type_named(module, node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        members = type_of(module, node.left), type_of(module, node.right)
        return typing.Union[members]  # noqa: UP007  # `|` takes no None on both sides
    if isinstance(node, ast.Subscript):
        outer = type_of(module, node.value)
        if outer is typing.Literal:
            return typing.Literal[ast.literal_eval(node.slice)]
        children = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        members = tuple(type_of(module, child) for child in children)
        return outer[members if len(members) > 1 else members[0]]
    raise UnknownError(ast.dump(node))


def type_named(module: str, name: str) -> Any:
    """Return a builtin, a name from Python's own modules, or an alias. Raises UnknownError."""
    for node in statements(module):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        source = node.module or ""
        if source.split(".")[0] not in sys.stdlib_module_names:
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return getattr(importlib.import_module(source), alias.name)
    try:
        defining_module, node_of_name = definition(module, name)
    except UnknownError:
        builtin = getattr(sys.modules["builtins"], name, None)
        if not isinstance(builtin, type):
            raise
        return builtin
    return type_of(defining_module, node_of_name)
