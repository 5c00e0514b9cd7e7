"""What a result is of: a hash of the code and one of the configuration. Results with different ones are not compared."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("owlfuse", "torch", "lightning", "transformers", "timm", "peft")
SOURCE = Path(__file__).resolve().parent
ASIDE = ("ablation", "bench", "cli.py", "cli_help.py", "cli_parser.py", "chat.py")
"""What of the code no training or evaluation runs through: changing it makes no other results."""

FREE = ("name", "runs", "experiment", "resume", "dry_run", "plan", "logger", "checkpoint", "data.workers")
FREE += ("trainer.log_every_n_steps", "trainer.enable_model_summary", "evaluation.contact_sheet", "evaluation.decode_tokens")
FREE += ("evaluation.explain",)
"""Keys that change neither what is learned nor how it is scored."""


def versions() -> dict[str, str]:
    """Of owlfuse, Python and the libraries that decide results."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def config_hash(config: dict[str, Any]) -> str:
    """12 hexadecimal digits for a resolved configuration, its keys of FREE left out."""
    kept = {key: value for key, value in flat(config).items() if not any(key == f or key.startswith(f"{f}.") for f in FREE)}
    return digest(json.dumps(kept, sort_keys=True, default=str).encode())


def code_hash(config: dict[str, Any]) -> str:
    """12 hexadecimal digits for the code that a run of this configuration executes: owlfuse's source files, modules of the
    working folder that a `_target_` names, and the versions of LIBRARIES."""
    files = [file for file in sorted(SOURCE.rglob("*")) if file.suffix in (".py", ".jinja")]
    files = [file for file in files if file.relative_to(SOURCE).parts[0] not in ASIDE]
    named = {str(file.relative_to(SOURCE)): file for file in files}
    targets = {str(value) for key, value in flat(config).items() if key.rpartition(".")[2] == "_target_"}
    for module in sorted({target.partition(".")[0] for target in targets} - {"owlfuse", "lightning", "torch"}):
        named |= own_files(module)
    parts = [f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in named.items()]
    return digest("\n".join([*parts, json.dumps(versions())]).encode())


def own_files(module: str) -> dict[str, Path]:
    """The files of a top-level module that lies in the working folder, none of one that is installed."""
    here = Path.cwd().resolve()
    spec = sys.modules[module].__spec__ if module in sys.modules else importlib.util.find_spec(module)
    file = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if file is None or not file.is_relative_to(here) or "site-packages" in file.parts:
        return {}
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return {str(one.relative_to(here)): one for one in files}


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
