"""The wheel, built from the source archive and installed into an environment of its own, in a
folder outside the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
TINY = "{train_pictures: 24, val_pictures: 4, held_out_pictures: 4, text_train: 40, text_val: 4}"
CONNECTOR = """
from torch import nn
from owlfuse.model.connectors.base import Connector

class MeanConnector(Connector):
    def __init__(self, in_width, out_width, patches, grid):
        super().__init__()
        self.tokens = 1
        self.proj = nn.Linear(in_width, out_width)

    def forward(self, features):
        return self.proj(features.mean(dim=1, keepdim=True))
"""
OWN = {
    "my_parts.py": CONNECTOR,
    "configs/model/connector/mean.yaml": "_target_: my_parts.MeanConnector\n",
    "experiments/mine.yaml": f"""
defaults: [override /model/connector: mean, override /model/fusion: concat]
data: {{prepare: {TINY}}}
trainer: {{max_steps: 2}}
""",
    "experiments/connectors/ablation.yaml": """
question: Which connector?
base: mine
factors: {connector: {mean: [model/connector=mean], linear: [model/connector=linear]}}
seeds: [0]
metrics: [val/exact_match]
""",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """As `make wheel` builds it, but in the running environment, which has what builds it only
    with the extra dev."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(REPO)],
        check=True,
        capture_output=True,
    )
    (found,) = out.glob("owlfuse-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The environment's folder of scripts.

    Its libraries are those of the running environment, without its owlfuse.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # after what lies in `site` itself
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run(
        [*install, "--no-deps", "--ignore-installed", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder outside the repository, with parts and experiments of a user."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in OWN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def owlfuse(installed, place, *words, fails=False):
    """The console script's output: no PYTHONPATH, and no git, pytest or Python of ours on the
    path."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST"))
    }
    environment |= {"PATH": str(installed), "HOME": str(place), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [installed / "owlfuse", *words],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    return result.stderr if fails else result.stdout


def test_it_carries_configs_experiments_and_their_files_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if not name.startswith("owlfuse-")}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPO, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    expected = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    expected |= {
        f"owlfuse/{name}" for name in tracked if name.startswith(("configs/", "experiments/"))
    }
    assert carried == expected
    assert carried >= {
        "owlfuse/py.typed",
        "owlfuse/studies/ablation/page.css",
        "owlfuse/serving/demo/transcript.html.jinja",
        "owlfuse/studies/ablation/page.html.jinja",
        "owlfuse/experiments/fusion/README.md",
    }
    assert wheel.stat().st_size < 2**20


def test_its_metadata_name_licence_and_pythons_and_no_file_that_an_index_lacks(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    readme = metadata.get_payload()
    assert readme.startswith("# owlfuse")
    assert "](docs/" not in readme


def test_it_is_the_installed_package_that_runs(installed, place):
    code = (
        "import owlfuse, owlfuse.config.folders as c; print(owlfuse.__file__, "
        "c.find_folders().configs[0])"
    )
    printed = subprocess.run(
        [installed / "python", "-I", "-c", code],
        cwd=place,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert [Path(path).is_relative_to(installed.parent) for path in printed] == [True, True]


def test_the_default_experiment_trains_in_an_empty_folder(installed, tmp_path):
    tiny = [f"+data.prepare.{pair.replace(': ', '=')}" for pair in TINY.strip("{}").split(", ")]
    owlfuse(
        installed,
        tmp_path,
        "train",
        "experiment=shapes_owl3",
        "trainer.max_steps=2",
        "name=first",
        *tiny,
    )
    assert (tmp_path / "runs/shapes_owl3/first/results.json").is_file()


def test_own_experiments_parts_and_ablations_of_the_working_folder_are_found(installed, place):
    owlfuse(installed, place, "train", "experiment=mine", "name=first")
    owlfuse(installed, place, "ablate", "connectors")
    assert (place / "runs/connectors/report/index.html").is_file()
    owlfuse(installed, place, "export", "runs/mine/first", "out")
    # a yaml of the folder names the part
    owlfuse(installed, place, "chat", "out", "What?", "--max-new-tokens", "2")
    owlfuse(installed, place, "train", "experiment=mine", "init_from=out", "name=second")
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(place / "my_parts.py", elsewhere)
    refusal = owlfuse(installed, elsewhere, "chat", "../out", "What?", fails=True)
    assert refusal.splitlines()[-1].endswith(
        "if you trust it, import my_parts first, or write: owlfuse --trust my_parts ..."
    )
    owlfuse(
        installed,
        elsewhere,
        "--trust",
        "my_parts",
        "chat",
        "../out",
        "What?",
        "--max-new-tokens",
        "2",
    )


def test_every_recipe_and_ablation_that_it_carries_is_listed(installed, place):
    help_page = owlfuse(installed, place, "train", "--help")
    for name in ("mine", "shapes_owl3", "owl1_paper", "connectors", "hyper_parts"):
        assert name in help_page
