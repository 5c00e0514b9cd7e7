"""The files around the package: what the workflow calls, what the wheel would ask for."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import owlfuse

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
PACKAGES = {"yaml": "pyyaml", "PIL": "pillow", "hydra": "hydra-core"}
"""Modules whose package has another name."""
WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.y*ml"))


def workflow(path):
    """A workflow's content. YAML 1.1 reads the key `on` as true."""
    content = yaml.safe_load(path.read_text())
    return {"on" if key is True else key: value for key, value in content.items()}


def steps(path):
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


def make_targets():
    return set(re.findall(r"(?m)^([a-z-]+):(?!=)", (REPO / "Makefile").read_text()))


def test_there_is_a_workflow():
    assert [path.name for path in WORKFLOWS] == ["ci.yaml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
class TestWorkflow:
    def test_it_calls_make_targets_that_exist(self, path):
        called = {
            word
            for step in steps(path)
            for line in re.findall(r"(?m)^\s*make\b(.*)$", step.get("run", ""))
            for word in line.split()
            if "=" not in word and not word.startswith("-")
        }
        assert called >= {"test", "types", "wheel", "test-slow"}
        assert called <= make_targets()

    def test_it_may_read_the_repository_and_nothing_else(self, path):
        content = workflow(path)
        assert content["permissions"] == {"contents": "read"}
        assert not any("permissions" in job for job in content["jobs"].values())

    def test_its_actions_are_official_ones_of_a_pinned_major_version(self, path):
        used = [step["uses"] for step in steps(path) if "uses" in step]
        assert used
        assert [name for name in used if not re.fullmatch(r"actions/[a-z-]+@v\d+", name)] == []

    def test_it_runs_every_python_that_the_package_claims(self, path):
        claimed = {
            line.rpartition(" ")[2]
            for line in PROJECT["classifiers"]
            if re.search(r":: Python :: 3\.\d+$", line)
        }
        assert set(workflow(path)["jobs"]["test"]["strategy"]["matrix"]["python"]) == claimed


def test_every_package_that_the_code_imports_is_asked_for():
    """An import that only works because another package happens to bring it breaks when that one
    stops."""
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    asked = {canonicalize_name(Requirement(line).name) for line in lines}
    missing = {}
    for path in (REPO / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in (
                {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"owlfuse"}
            ):
                if canonicalize_name(PACKAGES.get(top, top)) not in asked:
                    missing.setdefault(top, set()).add(path.name)
    assert missing == {}


def test_the_version_stands_the_same_everywhere():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert owlfuse.__version__ == PROJECT["version"] == str(citation["version"])


def test_the_citation_names_the_three_papers():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    papers = [reference["url"].rpartition("/")[2] for reference in citation["references"]]
    assert papers == ["2304.14178", "2311.04257", "2408.04840"]
    assert citation["license"] == PROJECT["license"]
