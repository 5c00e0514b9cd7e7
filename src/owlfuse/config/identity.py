"""Hashes of the code, the configuration and the data of a result.

Results with different hashes are not compared.
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

from owlfuse.config.check import is_within
from owlfuse.core.environment import LIBRARIES, versions
from owlfuse.core.files import sha256

SOURCE = Path(__file__).resolve().parents[1]
# The module whose imports are the code of a training and of its evaluation.
ENTRY = "owlfuse.training.train"

# Keys of how a run is done, by which neither the trained model nor its scores change.
UNLEARNED_KEYS = (
    "checkpoint",
    "data.workers",
    "trainer.log_every_n_steps",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "evaluation.batch_size",
    "evaluation.contact_sheet",
    "evaluation.decode_tokens",
    "evaluation.explain",
)
# These, and those of where a run is kept.
IGNORED_KEYS = (
    *UNLEARNED_KEYS,
    "name",
    "runs",
    "experiment",
    "resume",
    "dry_run",
    "plan",
    "logger",
    "accept_changed_data",
)


def config_hash(config: dict[str, Any], changes: list[dict[str, Any]] | None = None) -> str:
    """Return 12 hexadecimal digits for a resolved configuration without IGNORED_KEYS.

    Args:
        changes: settings that were different until a step (see `resume.learned_changes`).
    """
    hashed = {}
    for key, value in flat(config).items():
        # a group that holds nothing but ignored keys is as one without them
        is_empty = value == {} and any(is_within(name, key) for name in IGNORED_KEYS)
        if not is_empty and not is_within(key, *IGNORED_KEYS):
            hashed[key] = value
    content = [hashed, changes] if changes else hashed
    return digest(json.dumps(content, sort_keys=True, default=str).encode())


def code_hash(config: dict[str, Any], entry: str = ENTRY) -> str:
    """Return 12 hexadecimal digits for the code that a run of this configuration executes.

    It covers the source files of owlfuse that a training imports, with all formats and parts, so
    that the cells of an ablation are of one code; those of the user's modules that a `_target_`
    names, with the user's modules that they import; and the versions of LIBRARIES.

    Args:
        entry: the module in the place of the training's.
    """
    targets = set()
    for key, value in flat(config).items():
        if key.rpartition(".")[2] == "_target_":
            targets.add(str(value))
    files = owlfuse_files({entry, *choosable_modules()})
    files |= user_files({target.partition(".")[0] for target in targets})
    lines = []
    for name, file in files.items():
        lines.append(f"{name} {sha256(file)}")
    return digest("\n".join([*lines, json.dumps(versions())]).encode())


def choosable_modules() -> set[str]:
    """Return the modules of the packages whose parts a configuration chooses."""
    modules = set()
    for package in ("data", "model"):
        for path in (SOURCE / package).rglob("*.py"):
            modules.add(".".join(("owlfuse", *path.relative_to(SOURCE).with_suffix("").parts)))
    return modules


def owlfuse_files(names: set[str], source: Path = SOURCE) -> dict[str, Path]:
    """Return the files of owlfuse that the modules of these names import, by their paths in the
    package.

    Args:
        names: dotted names of modules, or of names in them; those of other packages are left out.
        source: the folder of the package.
    """
    files: dict[str, Path] = {}
    waiting = sorted(names)
    while waiting:
        path = file_of(waiting.pop(), source)
        if path is None or str(path.relative_to(source)) in files:
            continue
        files[str(path.relative_to(source))] = path
        waiting += sorted(owlfuse_names(path))
    # Templates are code too: they decide every token of a chat.
    for template in source.glob("data/chat/templates/*.jinja"):
        files[str(template.relative_to(source))] = template
    return dict(sorted(files.items()))


def file_of(name: str, source: Path) -> Path | None:
    """Return the file of a module, or of the module that defines a name."""
    package, *parts = name.split(".")
    if package != source.name:
        return None
    while parts:
        # A dotted name may end in a class or function: the longest path that is a file counts.
        path = source.joinpath(*parts)
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
        parts.pop()
    return source / "__init__.py"


def imported_names(file: Path) -> set[str]:
    """Return the dotted names that a file imports, at its top and inside its functions; none of a
    file that does not parse, and none that is relative."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# Files of owlfuse do not change while a command runs, and those of an ablation are hashed often.
owlfuse_names = cache(imported_names)


def user_files(modules: set[str]) -> dict[str, Path]:
    """Return the Python files of top-level modules, and of the user's modules that they import, by
    names that do not depend on their folder.

    An installed module counts where it is among the first, and its imports are not followed; those
    of LIBRARIES are known by their versions.
    """
    files: dict[str, Path] = {}
    visited = {*LIBRARIES, *sys.stdlib_module_names}
    waiting = sorted(modules - visited)
    while waiting:
        module = waiting.pop()
        visited.add(module)
        spec = spec_of(module)
        # Compiled extensions are known by the version of their package alone.
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        file = Path(spec.origin).resolve()
        if module not in modules and is_installed(file):
            continue
        is_package = bool(spec.submodule_search_locations)
        # A package as a whole, since its relative imports are not followed.
        module_files = sorted(file.parent.rglob("*.py")) if is_package else [file]
        imported: set[str] = set()
        for path in module_files:
            files[f"{module}/{path.relative_to(file.parent)}"] = path
            if not is_installed(file):
                imported |= {name.partition(".")[0] for name in imported_names(path)}
        # Sorted, so that the order of the walk does not depend on hashes.
        waiting += sorted(imported - visited - set(waiting))
    return dict(sorted(files.items()))


def spec_of(module: str) -> ModuleSpec | None:
    """Return how a top-level module is or would be imported.

    The working folder comes last, as in `user_modules.import_user_module`, and also before a module
    is imported from it: else the hash would depend on what was imported when it was made.
    """
    if module in sys.modules:
        return sys.modules[module].__spec__
    return importlib.util.find_spec(module) or PathFinder.find_spec(module, [os.getcwd()])


def is_installed(file: Path) -> bool:
    """Whether a file is one of Python's or of an installed package."""
    if {"site-packages", "dist-packages"} & {*file.parts}:
        return True
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        if file.is_relative_to(Path(sysconfig.get_path(name)).resolve()):
            return True
    return False


def differing_hash(
    actual: dict[str, Any], expected: dict[str, Any], accept_changed_data: bool
) -> str | None:
    """Return which of `config`, `code` and `data` is not the same; None where all are. Hashes of
    data count where both have one: older results have none, and a plan opens no data."""
    config = actual.get("config")
    # that of a run that went on with changed data, but for that
    if accept_changed_data:
        config = actual.get("config_of_keys", config)
    if config != expected.get("config"):
        return "config"
    if actual.get("code") != expected.get("code"):
        return "code"
    if accept_changed_data or not actual.get("data") or not expected.get("data"):
        return None
    return "data" if actual["data"] != expected["data"] else None


def data_hash(identity: dict[str, str]) -> str:
    """Return 12 hexadecimal digits for the fingerprints of `data.identity` and
    `artifacts.identity`."""
    return digest(json.dumps(identity, sort_keys=True).encode())


def digest(content: bytes) -> str:
    """Return the first 12 hexadecimal digits of the content's sha256."""
    return hashlib.sha256(content).hexdigest()[:12]


def flat(value: object, path: str = "") -> dict[str, object]:
    """Return nested dictionaries as one: {"a": {"b": 1}} as {"a.b": 1}. An empty one stays, since
    `quantization={}` asks for something, and null for nothing."""
    if not isinstance(value, dict) or (not value and path):
        return {path: value}
    items: dict[str, object] = {}
    for key, child in value.items():
        items |= flat(child, f"{path}.{key}" if path else str(key))
    return items
