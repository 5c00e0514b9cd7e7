"""Which package may import which, and what may be done in one place only."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "owlfuse"
TESTS = Path(__file__).resolve().parent
FILES = sorted(SOURCE.rglob("*.py"))
PACKAGES = (
    "core",
    "config",
    "data",
    "model",
    "parallel",
    "artifacts",
    "evaluation",
    "training",
    "planning",
    "serving",
    "studies",
    "__main__",
)
"""From the ground up: a package imports none that stands behind it."""


def name_of(path):
    """`src/owlfuse/model/fusion/base.py` -> `owlfuse.model.fusion.base`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path):
    """The modules of owlfuse that a file imports, at its top and inside its functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        else:
            continue
        modules |= {name for name in names if name in MODULES}
    return modules - {name_of(path), "owlfuse"}


def package_of(module):
    return module.split(".")[1]


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def test_the_root_has_the_packages_and_the_command_alone():
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__pycache__"} == {*PACKAGES, "__init__"}
    assert len(names - {"__pycache__"}) <= 13


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) != "owlfuse"], ids=name_of)
def test_imports_run_downward(path):
    rank = PACKAGES.index(package_of(name_of(path)))
    upward = {name for name in imports_of(path) if PACKAGES.index(package_of(name)) > rank}
    assert upward == set()


def test_no_module_imports_one_that_imports_it():
    """Modules are taken away whose imports are all taken away already; a circle is what is left."""
    imports = {name: imports_of(path) for name, path in MODULES.items()}
    waiting = dict(imports)
    while free := [name for name, names in waiting.items() if not names & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert waiting == {}


@pytest.mark.parametrize("folder", ["model/connectors", "model/fusion", "data/formats"])
def test_parts_do_not_import_their_siblings(folder):
    shared = ("base", "layer_state", "probe", "records", "turns", "turn_keys", "marks")
    files = [path for path in (SOURCE / folder).glob("*.py") if path.stem not in shared]
    assert len(files) >= 4
    prefix = f"owlfuse.{folder.replace('/', '.')}."
    siblings = {prefix + path.stem for path in files}
    assert {name_of(path): imports_of(path) & siblings for path in files} == {
        name_of(path): set() for path in files
    }


def test_a_test_lies_where_its_package_does():
    """Below `tests/` are the packages, the tests of documentation and benchmarks, and what tests share."""
    shared = {"support", "docs", "goldens", "benchmarks", "__pycache__"}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir()} - shared
    assert folders <= {*PACKAGES}
    for path in TESTS.rglob("test_*.py"):
        parts = path.relative_to(TESTS).parts[:-1]
        if parts and parts[0] in PACKAGES:
            assert (SOURCE / Path(*parts)).is_dir(), path.relative_to(TESTS)


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


@every_file
def test_torch_distributed_is_named_in_the_package_parallel_alone(path):
    names = re.findall(r"torch\.distributed|from torch import .*\bdistributed\b", path.read_text())
    assert package_of(f"{name_of(path)}.") == "parallel" or names == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name in ("connectors", "fusion")], ids=name_of
)
def test_the_forward_path_reads_no_tensor_and_loops_over_no_rows(path):
    """No `.item()`, `nonzero` or `.tolist()`, which wait for the device and make shapes depend on
    data."""
    nodes = ast.walk(ast.parse(path.read_text()))
    called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert called & {"item", "nonzero", "tolist", "masked_select"} == set()


def test_a_file_that_handles_tensors_opens_with_its_letters():
    for folder in ("connectors", "fusion"):
        for path in (SOURCE / "model" / folder).glob("*.py"):
            if path.name != "__init__.py":
                opening = ast.get_docstring(ast.parse(path.read_text())) or ""
                assert re.search(r"\b[A-Z] ", opening), name_of(path)
