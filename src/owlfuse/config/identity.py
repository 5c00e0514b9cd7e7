"""What a result is of: hashes of code, configuration and data.

Results with different ones are not compared.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from owlfuse.core.environment import LIBRARIES, versions

SOURCE = Path(__file__).resolve().parents[1]
ENTRY = "owlfuse.training.train"
"""The module whose imports are the code of a training and of its evaluation."""

FREE: tuple[str, ...] = (
    "name",
    "runs",
    "experiment",
    "resume",
    "dry_run",
    "plan",
    "logger",
    "checkpoint",
    "data.workers",
)
FREE += ("trainer.log_every_n_steps", "trainer.enable_model_summary", "trainer.enable_progress_bar")
FREE += (
    "evaluation.contact_sheet",
    "evaluation.decode_tokens",
    "evaluation.explain",
    "accept_changed_data",
)
"""Keys that change neither what is learned nor how it is scored."""


def config_hash(config: dict[str, Any], changes: list[dict[str, Any]] | None = None) -> str:
    """12 hexadecimal digits for a resolved configuration, its keys of FREE left out.

    Args:
        changes: what of it was otherwise until which step (see `resume.learned_changes`).
    """
    kept = {
        key: value
        for key, value in flat(config).items()
        if not any(key == f or key.startswith(f"{f}.") for f in FREE)
    }
    content = [kept, changes] if changes else kept
    return digest(json.dumps(content, sort_keys=True, default=str).encode())


def code_hash(config: dict[str, Any]) -> str:
    """12 hexadecimal digits for the code that a run of this configuration executes: the source
    files of owlfuse that a training imports, its formats and parts whichever are chosen, so that
    the cells of an ablation are of one code, those of the user's modules that a `_target_` names
    wherever they lie, with what they import of the user's, and the versions of LIBRARIES.
    """
    targets = {
        str(value) for key, value in flat(config).items() if key.rpartition(".")[2] == "_target_"
    }
    named = owlfuse_files({ENTRY, *parts_of_owlfuse()})
    named |= user_files({target.partition(".")[0] for target in targets})
    parts = [
        f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in named.items()
    ]
    return digest("\n".join([*parts, json.dumps(versions())]).encode())


def parts_of_owlfuse() -> set[str]:
    """The modules below the packages of which a configuration chooses."""
    files = [path for package in ("data", "model") for path in (SOURCE / package).rglob("*.py")]
    return {f"owlfuse.{'.'.join(p.relative_to(SOURCE).with_suffix('').parts)}" for p in files}


def owlfuse_files(names: set[str], source: Path = SOURCE) -> dict[str, Path]:
    """The files of owlfuse that the modules of these names import, by their paths in the package.

    Args:
        names: dotted names of modules, or of what is in them; names of other packages are left out.
        source: the folder of the package.
    """
    files: dict[str, Path] = {}
    waiting = sorted(names)
    while waiting:
        path = file_of(waiting.pop(), source)
        if path is None or str(path.relative_to(source)) in files:
            continue
        files[str(path.relative_to(source))] = path
        waiting += sorted(names_imported_by(path))
    for template in source.glob("data/chat/templates/*.jinja"):
        files[str(template.relative_to(source))] = template
    return dict(sorted(files.items()))


def file_of(name: str, source: Path) -> Path | None:
    """The file of a module, or of the module that holds what is named."""
    package, *parts = name.split(".")
    if package != source.name:
        return None
    while parts:
        path = source.joinpath(*parts)
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
        parts.pop()
    return source / "__init__.py"


@cache
def names_imported_by(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, at its top and inside its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def user_files(modules: set[str]) -> dict[str, Path]:
    """The Python files of top-level modules, and of the user's modules that they import, by names
    that do not depend on where they lie. A module that is installed counts where it is among the
    first, and is not followed; those of LIBRARIES are known by their versions."""
    found: dict[str, Path] = {}
    known = {*LIBRARIES, *sys.stdlib_module_names}
    waiting = sorted(modules - known)
    while waiting:
        module = waiting.pop()
        known.add(module)
        spec = spec_of(module)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        file = Path(spec.origin).resolve()
        files = sorted(file.parent.rglob("*.py")) if spec.submodule_search_locations else [file]
        found |= {f"{module}/{path.relative_to(file.parent)}": path for path in files}
        if not is_installed(file):
            imported = (
                {name for path in files for name in imported_modules(path)} - known - set(waiting)
            )
            waiting += sorted(name for name in imported if is_users(name))
    return dict(sorted(found.items()))


def spec_of(module: str) -> ModuleSpec | None:
    """Where a top-level module is imported from, or would be.

    The working folder comes last, as in `own_modules.import_own`, and also before a module is
    imported from it: else the hash would depend on what was imported when it was made.
    """
    if module in sys.modules:
        return sys.modules[module].__spec__
    return importlib.util.find_spec(module) or PathFinder.find_spec(module, [os.getcwd()])


def is_users(module: str) -> bool:
    """Whether a module is a file of the user's, and not installed."""
    spec = spec_of(module)
    return (
        spec is not None
        and bool(spec.origin)
        and not is_installed(Path(str(spec.origin)).resolve())
    )


def is_installed(file: Path) -> bool:
    """Whether a file is one of Python's or of an installed package."""
    places = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return "site-packages" in file.parts or any(
        file.is_relative_to(Path(place).resolve()) for place in places
    )


def imported_modules(file: Path) -> set[str]:
    """The top-level modules that a file imports, at its top and inside its functions; none of a
    file that does not parse."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def differing_hash(
    found: dict[str, Any], wanted: dict[str, Any], accept_changed_data: bool = False
) -> str | None:
    """Which of `config`, `code` and `data` is not the same; None where all are. Data count where
    both know theirs: older results have no hash of them, and a plan opens none."""
    for what in ("config", "code"):
        if found.get(what) != wanted.get(what):
            return what
    known = found.get("data") and wanted.get("data")
    return "data" if known and found["data"] != wanted["data"] and not accept_changed_data else None


def data_hash(identity: dict[str, str]) -> str:
    """12 hexadecimal digits for what `data.identity` and `artifacts.identity` find."""
    return digest(json.dumps(identity, sort_keys=True).encode())


def digest(content: bytes) -> str:
    """The first 12 digits of its sha256."""
    return hashlib.sha256(content).hexdigest()[:12]


def flat(value: object, path: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, object] = {}
    for key, child in value.items():
        found |= flat(child, f"{path}.{key}" if path else str(key))
    return found
