"""What results are known by: the user's own code wherever it lies, pictures, weights."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from helpers import SHAPE_COUNTS
from owlfuse.artifacts.identity import weights_identity
from owlfuse.config.identity import (
    ENTRY,
    SOURCE,
    choosable_modules,
    code_hash,
    config_hash,
    data_hash,
    differing_hash,
    flat,
    owlfuse_files,
    owlfuse_names,
)
from owlfuse.config.user_modules import import_user_module
from owlfuse.data import identity as data_identities
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.identity import data_identity
from owlfuse.data.shapes.write import write_shapes


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder on the path that is not the working folder, with a part and what it imports."""
    place = tmp_path / "elsewhere"
    (place / "userparts").mkdir(parents=True)
    (place / "userparts" / "__init__.py").write_text("")
    (place / "userparts" / "inner.py").write_text("import userhelpers\nclass Part: pass\n")
    (place / "userhelpers.py").write_text("def late():\n    from userlate import value\n")
    (place / "userlate.py").write_text("value = 1\n")
    (place / "usersingle.py").write_text("import torch, json\n")
    monkeypatch.syspath_prepend(place)
    importlib.invalidate_caches()
    yield place
    for name in [
        name
        for name in sys.modules
        if name.startswith("user") and hasattr(sys.modules[name], "__file__")
    ]:
        if str(sys.modules[name].__file__).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("target", "file", "counts"),
    [
        ("userparts.inner.Part", "userparts/inner.py", True),
        ("userparts.inner.Part", "userparts/__init__.py", True),
        ("userparts.inner.Part", "userhelpers.py", True),
        ("userparts.inner.Part", "userlate.py", True),
        ("userparts.inner.Part", "usersingle.py", False),
        ("usersingle.Part", "usersingle.py", True),
        ("usersingle.Part", "userlate.py", False),
        ("owlfuse.training.optim.AdamWCosine", "userlate.py", False),
    ],
)
def test_the_users_user_modules_belong_to_the_hash_of_the_code(outside, target, file, counts):
    config = {"model": {"fusion": {"_target_": target}}}
    before = code_hash(config)
    (outside / file).write_text((outside / file).read_text() + "\n# changed\n")
    assert (code_hash(config) != before) == counts


def test_a_module_in_the_working_folder_counts_before_it_is_imported_too(tmp_path, monkeypatch):
    (tmp_path / "userlocal.py").write_text("class Part: pass\n")
    config = {"model": {"_target_": "userlocal.Part"}}
    absent = code_hash(config)
    monkeypatch.chdir(tmp_path)
    before = code_hash(config)
    monkeypatch.setattr(sys, "path", [*sys.path])
    import_user_module("userlocal")
    assert absent != before == code_hash(config)
    del sys.modules["userlocal"]


def test_the_hash_of_the_code_does_not_depend_on_where_it_lies(outside, tmp_path, monkeypatch):
    config = {"model": {"fusion": {"_target_": "userparts.inner.Part"}}}
    before = code_hash(config)
    moved = Path(shutil.move(outside, tmp_path / "moved"))
    monkeypatch.setattr(
        sys, "path", [str(moved), *(entry for entry in sys.path if entry != str(outside))]
    )
    importlib.invalidate_caches()
    assert code_hash(config) == before


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("training/module.py", True),
        ("model/multimodal.py", True),
        ("data/mixture/schedule.py", True),
        ("data/formats/llava.py", True),
        ("data/chat/templates/vicuna.jinja", True),
        ("data/formats/alpaca.py", True),  # whichever are chosen
        ("model/fusion/concat.py", True),
        ("serving/demo/page.py", False),
        ("studies/ablation/page.py", False),
        ("evaluation/lmms/prompts.py", False),
        ("planning/tables.py", False),
        ("__main__.py", False),
    ],
)
def test_the_code_of_a_run_is_what_its_training_imports(file, counts):
    files = owlfuse_files({ENTRY, *choosable_modules(), "torch.nn.Linear"})
    assert (SOURCE / file).is_file()
    assert (file in files) == counts


def test_a_module_that_is_imported_through_another_counts_wherever_the_package_lies(tmp_path):
    source = tmp_path / "owlfuse"
    (source / "inner").mkdir(parents=True)
    (source / "__init__.py").write_text("")
    (source / "first.py").write_text("def late():\n    from owlfuse.inner import second\n")
    (source / "inner/__init__.py").write_text("")
    (source / "inner/second.py").write_text("import owlfuse.third\n")
    (source / "third.py").write_text("from owlfuse.first import late\nimport json\n")
    (source / "alone.py").write_text("import owlfuse.first\n")
    owlfuse_names.cache_clear()
    files = owlfuse_files({"owlfuse.first.late"}, source)
    assert list(files) == ["first.py", "inner/second.py", "third.py"]


@pytest.fixture
def shapes(tmp_path):
    write_shapes(str(tmp_path / "shapes"), **SHAPE_COUNTS)
    return tmp_path / "shapes"


def identity_of(folder, root=None):
    source = LLaVA(str(folder / "train.json"), image_root=root and str(root))
    source.name = "shapes"
    return data_identity({"shapes": source}, {})


def test_data_are_known_by_contents_and_not_by_place_or_time(shapes, tmp_path):
    before = identity_of(shapes)
    assert set(before) == {"data.sources.shapes", "data.sources.shapes, its pictures"}
    # with times of now
    copy = Path(shutil.copytree(shapes, tmp_path / "copy", copy_function=shutil.copyfile))
    assert identity_of(copy) == before
    assert identity_of(copy, root=shapes) == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("limit", [2**27, 4000])
@pytest.mark.parametrize(
    "change", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"x")]
)
def test_a_picture_that_changes_is_noticed(shapes, monkeypatch, limit, change):
    """Above the limit by its size, or where it is of those that are read."""
    monkeypatch.setattr(data_identities, "MAX_BYTES", limit)
    before = identity_of(shapes)
    names = sorted(
        {
            sample
            for index in range(48)
            for sample in LLaVA(str(shapes / "train.json"))[index].images
        }
    )
    for name in names if change is flip and limit == 4000 else names[7:8]:
        change(shapes / name)
    after = identity_of(shapes)
    assert after["data.sources.shapes"] == before["data.sources.shapes"]
    assert after["data.sources.shapes, its pictures"] != before["data.sources.shapes, its pictures"]


def test_a_picture_counts_behind_many_records_of_text_and_whatever_its_name_is(tmp_path):
    name = os.fsdecode(b"p\xff.png")
    text = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    shown = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho"}]
    records = [{"conversations": text}] * 100
    for image in (name, "half\ud83d.png", "folder"):
        records.append({"image": image, "conversations": shown})
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "folder").mkdir()
    identities = []
    for content in (b"one", b"two"):
        (tmp_path / name).write_bytes(content)
        identities.append(identity_of(tmp_path)["data.sources.shapes, its pictures"])
    assert identities[0] != identities[1]


@pytest.mark.parametrize(
    ("key", "files"),
    [
        ("init_from", ["config.json", "model.safetensors", "adapter/adapter_model.safetensors"]),
        (
            "model.llm.pretrained",
            ["config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "a.gguf"],
        ),
        ("model.vision.weights", ["."]),
    ],
)
def test_weights_that_a_run_starts_from_are_known_by_their_contents(tmp_path, key, files):
    for name in files:
        place = tmp_path / "weights" if name == "." else tmp_path / "weights" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"0" * 100)
    config = {"model": {"llm": {}, "vision": {}}}
    node = config if key == "init_from" else config["model"][key.split(".")[1]]
    node[key.rpartition(".")[2]] = str(tmp_path / "weights")
    before = weights_identity(config)
    assert set(before) == {key}
    for name in files:
        flip(tmp_path / "weights" / name)
        after = weights_identity(config)
        assert data_hash(after) != data_hash(before)
        before = after


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache, and a function that has a name's file at a commit there, which the name
    stands for from then on."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(name, file, commit):
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / file).write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)

    return put


@pytest.mark.parametrize(
    ("key", "name", "file"),
    [
        ("model.llm.pretrained", "org/model", "config.json"),
        ("model.vision.pretrained", "timm/resnet10t.c3_in1k", "model.safetensors"),
        ("model.vision.pretrained", "timm/resnet10t.c3_in1k", "pytorch_model.bin"),
    ],
)
def test_weights_of_the_hub_are_known_by_the_commit_that_is_loaded(hub, key, name, file):
    config = {
        "model": {
            "llm": {"pretrained": "org/model"},
            "vision": {"name": "resnet10t", "pretrained": True},
        }
    }
    assert weights_identity(config) == {}  # neither is to be had
    hub(name, file, "1" * 40)
    before = weights_identity(config)
    assert before == {key: f"hub:{'1' * 40}"}
    assert weights_identity(config) == before
    hub(name, file, "2" * 40)
    assert weights_identity(config) == {key: f"hub:{'2' * 40}"}
    assert data_hash(weights_identity(config)) != data_hash(before)


def test_changes_belong_to_the_hash_of_the_configuration():
    config = {"model": {}, "optim": {"lr": 1.0}}
    changed = [{"step": 4, "changes": {"optim.lr": [2.0, 1.0]}}]
    assert config_hash(config, []) == config_hash(config) != config_hash(config, changed)


@pytest.mark.parametrize(
    ("found", "accept", "what"),
    [
        ({"code": "a", "config": "b", "data": "c"}, False, None),
        ({"code": "a", "config": "b"}, False, None),
        ({"code": "a", "config": "b", "data": "x"}, False, "data"),
        ({"code": "a", "config": "b", "data": "x"}, True, None),
        ({"code": "x", "config": "b", "data": "x"}, True, "code"),
        ({"code": "x", "config": "x", "data": "c"}, False, "config"),
    ],
)
def test_results_of_other_hashes_are_told_by_what_differs(found, accept, what):
    assert differing_hash(found, {"code": "a", "config": "b", "data": "c"}, accept) == what


def test_an_empty_group_is_not_the_same_as_none():
    assert flat({"a": {"b": {}}, "c": None}) == {"a.b": {}, "c": None}
    quantized = {"model": {"llm": {"quantization": {}}}}
    assert config_hash(quantized) != config_hash({"model": {"llm": {"quantization": None}}})


def test_the_batch_size_of_an_evaluation_makes_no_other_configuration():
    """What a GPU that is too small is advised to set changes no answer."""
    assert config_hash({"evaluation": {"batch_size": 4}}) == config_hash({"evaluation": {}})
