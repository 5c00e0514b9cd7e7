"""What may know of what, and how long a file may be."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "owlfuse"
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path):
    """`src/owlfuse/model/fusion/base.py` -> `owlfuse.model.fusion.base`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Every module and name that a file imports, at its top and inside its functions, as dotted
    paths."""
    found = set()
    package = (
        name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def ours(path):
    return {name for name in imports_of(path) if name.split(".")[0] == "owlfuse"}


def siblings(folder, path):
    """The other modules of a folder that a file imports, by name."""
    prefix = f"owlfuse.{folder.replace('/', '.')}."
    inside = {
        name.removeprefix(prefix).split(".")[0] for name in ours(path) if name.startswith(prefix)
    }
    modules = {other.stem for other in (SOURCE / folder).glob("*.py")}
    return (inside & modules) - {path.stem, "base"}


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def test_types_imports_nothing_of_ours():
    assert ours(SOURCE / "types.py") == set()


@pytest.mark.parametrize("folder", ["connectors", "fusion", "data/formats"])
def test_siblings_do_not_import_each_other(folder):
    files = sorted((SOURCE / folder).glob("*.py"))
    assert len(files) >= 4
    assert {path.stem: siblings(folder, path) for path in files if siblings(folder, path)} == {}


def test_data_does_not_import_model():
    parts = ("model", "module", "fusion", "connectors", "llm", "adapters")
    for path in (SOURCE / "data").rglob("*.py"):
        found = {name.split(".")[1] for name in ours(path) if "." in name} & set(parts)
        assert not found, f"{name_of(path)} imports {found}"


@every_file
def test_requires_grad_is_changed_in_adapters_alone(path):
    changed = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "requires_grad_":
            changed.append(node.lineno)
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "requires_grad"
            and isinstance(node.ctx, ast.Store)
        ):
            changed.append(node.lineno)
        if isinstance(node, ast.keyword) and node.arg == "requires_grad":
            changed.append(node.value.lineno)
        if isinstance(node, ast.Constant) and node.value == "requires_grad":  # setattr
            changed.append(node.lineno)
    if name_of(path) == "owlfuse.model.adapters":
        assert changed
    else:
        assert changed == []


PARALLEL = (
    "owlfuse.parallel.strategies",
    "owlfuse.parallel.sharding",
    "owlfuse.parallel.checkpoints",
)


@every_file
def test_torch_distributed_is_named_in_the_parallel_files_alone(path):
    names = re.findall(r"torch\.distributed|from torch import .*\bdistributed\b", path.read_text())
    assert name_of(path) in PARALLEL or names == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name in ("connectors", "fusion")], ids=name_of
)
def test_the_forward_path_reads_no_tensor_and_loops_over_no_rows(path):
    """No `.item()`, `nonzero` or `.tolist()`, which wait for the device and make shapes depend
    on data."""
    called = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert called & {"item", "nonzero", "tolist", "masked_select"} == set()


def test_a_file_that_handles_tensors_opens_with_its_letters():
    for folder in ("connectors", "fusion"):
        for path in (SOURCE / folder).glob("*.py"):
            if path.name != "__init__.py":
                opening = ast.get_docstring(ast.parse(path.read_text())) or ""
                assert re.search(r"\b[A-Z] ", opening), name_of(path)
