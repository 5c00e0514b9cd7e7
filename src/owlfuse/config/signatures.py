"""Signatures read from source files, so that a misspelled key is told without importing torch,
lightning and transformers.

Only what the files say beyond doubt counts: for a class with bases, decorators or a metaclass whose
effect is not known here there is no signature, and `config_targets` asks the class itself.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("owlfuse", "lightning")
"""Whose files are read; tests/config/test_config_signatures.py compares every configured target
with the class itself."""
WRAPPERS = ("_defaults_from_env_vars",)
"""Decorators of `__init__` that leave the signature as it is: lightning's, which uses
functools.wraps."""
REQUIRED = inspect.Parameter.empty


class UnknownError(Exception):
    """The files do not say it beyond doubt."""


def read_signature(target: Any) -> Callable | None:
    """Returns a function that has the signature of a dotted path's class or function, for
    `check_arguments`, or None where it cannot be known without importing it. Types that cannot be
    known are left out of the signature."""
    if not isinstance(target, str) or target.partition(".")[0] not in PACKAGES:
        return None
    module, _, name = target.rpartition(".")
    try:
        home, node = definition(module, name)
        parameters = (
            arguments_of(home, node, skip=0)
            if isinstance(node, ast.FunctionDef)
            else parameters_of_class(home, node)
        )
        signature = inspect.Signature(parameters)
    # ValueError: parameters in an order that Python does not allow
    except (UnknownError, ValueError):
        return None

    def stand_in() -> None:
        """Has the signature alone."""

    stand_in.__signature__ = signature  # type: ignore[attr-defined]  # which inspect reads
    return stand_in


def definition(module: str, name: str) -> tuple[str, ast.AST]:
    """The module that defines a name, and the definition, imports followed. Raises UnknownError."""
    for node in reversed(statements(module)):  # the last one counts
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return module, node.value
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(absolute(module, node), alias.name)
    raise UnknownError(f"{module}.{name}")


@cache
def statements(module: str) -> list[ast.stmt]:
    """The statements of a module's file, those below `if TYPE_CHECKING:` too.

    Raises UnknownError.
    """
    file = source_file(module)
    if file is None:
        raise UnknownError(module)
    body: list[ast.stmt] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        type_checking = (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        )
        body += node.body if type_checking else [node]  # type: ignore[attr-defined]  # of an ast.If
    return body


def source_file(module: str) -> Path | None:
    """The file of a module in one of the packages, which are not imported."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package) if package in PACKAGES else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations)), *parts)
    files = (path / "__init__.py", path.with_suffix(".py") if parts else path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that an import names, relative to the module that it stands in.

    Raises UnknownError.
    """
    if not node.level:
        return node.module or ""
    file = source_file(module)
    package = module if file and file.name == "__init__.py" else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def parameters_of_class(module: str, node: ast.AST) -> list[inspect.Parameter]:
    """What a call of a class takes. Raises UnknownError."""
    if not isinstance(node, ast.ClassDef) or node.keywords:
        raise UnknownError("no class, or one with a metaclass")
    methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
    if "__new__" in methods:
        raise UnknownError("__new__")
    if node.decorator_list and not is_dataclass(node):
        raise UnknownError("a decorated class")
    if "__init__" in methods:
        return arguments_of(module, methods["__init__"], skip=1)
    if is_dataclass(node):
        # keyword-only ones last
        return sorted(dataclass_fields(module, node).values(), key=lambda field: field.kind)
    if not node.bases:
        return []
    if len(node.bases) > 1:
        raise UnknownError("no __init__ of its own, and several bases")
    return parameters_of_class(*base_of(module, node.bases[0]))


def base_of(module: str, base: ast.expr) -> tuple[str, ast.AST]:
    """Where a base class is defined. Raises UnknownError."""
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
        if any(
            keyword.arg not in ("eq", "frozen", "repr", "order", "kw_only")
            for keyword in decorator.keywords
        ):
            return False
        decorator = decorator.func
    return isinstance(decorator, ast.Name) and decorator.id == "dataclass"


def dataclass_fields(module: str, node: ast.AST) -> dict[str, inspect.Parameter]:
    """The arguments of a dataclass, those of its bases first. Raises UnknownError."""
    if not isinstance(node, ast.ClassDef) or len(node.bases) > 1:
        raise UnknownError("no class, or one with several bases")
    fields = dataclass_fields(*base_of(module, node.bases[0])) if node.bases else {}
    if not is_dataclass(node):
        if not node.decorator_list:
            return fields  # a plain class between dataclasses adds none
        raise UnknownError("a decorated class")
    keyword_only = "kw_only=True" in ast.unparse(node.decorator_list[0])
    kind = (
        inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    )
    for child in node.body:
        if not isinstance(child, ast.AnnAssign) or not isinstance(child.target, ast.Name):
            continue
        name, value = child.target.id, child.value
        annotation = ast.unparse(child.annotation)
        if "ClassVar" in annotation:
            continue
        if "InitVar" in annotation or "KW_ONLY" in annotation:
            raise UnknownError(annotation)
        default = default_of(value)
        if (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id == "field"
        ):
            options = {keyword.arg: keyword.value for keyword in value.keywords}
            if not set(options) <= {
                "default",
                "default_factory",
                "init",
                "repr",
                "compare",
                "metadata",
            }:
                raise UnknownError(ast.unparse(value))
            if "init" in options:
                if not isinstance(options["init"], ast.Constant) or options["init"].value:
                    raise UnknownError(ast.unparse(value))
                continue
            default = default_of(options.get("default", options.get("default_factory")))
        fields[name] = parameter(module, name, kind, child.annotation, default)
    return fields


def arguments_of(module: str, node: ast.AST, skip: int) -> list[inspect.Parameter]:
    """The parameters of a function without the first `skip`. Raises UnknownError."""
    if not isinstance(node, ast.FunctionDef) or any(
        not is_wrapper(decorator) for decorator in node.decorator_list
    ):
        raise UnknownError("no function, or a decorated one")
    arguments = node.args
    positional: list[tuple[ast.arg, Any]] = [
        (a, inspect.Parameter.POSITIONAL_ONLY) for a in arguments.posonlyargs
    ]
    positional += [(a, inspect.Parameter.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parameters = [
        parameter(module, a.arg, kind, a.annotation, default_of(default))
        for (a, kind), default in zip(positional, defaults, strict=True)
    ][skip:]
    if arguments.vararg:
        parameters.append(inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(
            parameter(
                module, a.arg, inspect.Parameter.KEYWORD_ONLY, a.annotation, default_of(default)
            )
        )
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return parameters


def is_wrapper(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id in WRAPPERS


def default_of(node: ast.expr | None) -> Any:
    """None where it is None, `...` for any other default, and `REQUIRED` without one: more of it
    is not asked."""
    if node is None:
        return REQUIRED
    return None if isinstance(node, ast.Constant) and node.value is None else ...


def parameter(
    module: str, name: str, kind: Any, annotation: ast.expr | None, default: Any
) -> inspect.Parameter:
    """One parameter, its type left out where it cannot be known."""
    known: Any = REQUIRED
    if annotation is not None:
        try:
            known = type_of(module, annotation)
        # TypeError: what typing refuses, as it would for the class itself
        except (UnknownError, TypeError):
            known = REQUIRED
    return inspect.Parameter(name, kind, annotation=known, default=default)


def type_of(module: str, node: ast.AST) -> Any:
    """The type that an annotation means.

    Raises UnknownError, for a class of the packages too, which is not imported.
    """
    if isinstance(node, ast.Constant):
        return (
            type_of(module, ast.parse(node.value, mode="eval").body)
            if isinstance(node.value, str)
            else node.value
        )
    if isinstance(node, ast.Name):
        return type_named(module, node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return typing.Union[  # noqa: UP007
            type_of(module, node.left), type_of(module, node.right)
        ]  # of None and a type too
    if isinstance(node, ast.Subscript):
        outer = type_of(module, node.value)
        if outer is typing.Literal:
            return typing.Literal[ast.literal_eval(node.slice)]
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        members = tuple(type_of(module, child) for child in inner)
        return outer[members if len(members) > 1 else members[0]]
    raise UnknownError(ast.dump(node))


def type_named(module: str, name: str) -> Any:
    """A builtin, what a module of Python's own defines, or an alias. Raises UnknownError."""
    for node in statements(module):
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] in sys.stdlib_module_names
        ):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return getattr(importlib.import_module(node.module or ""), alias.name)
    try:
        home, found = definition(module, name)
    except UnknownError:
        builtin = getattr(sys.modules["builtins"], name, None)
        if not isinstance(builtin, type):
            raise
        return builtin
    return type_of(home, found)
