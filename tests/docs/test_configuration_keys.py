"""The reference of configuration keys, made from the code."""

import sys

import pytest
import yaml

from helpers import REPO


@pytest.fixture(scope="module")
def reference():
    """docs/configuration_keys.py."""
    pytest.importorskip("docstring_parser")
    sys.path.insert(0, str(REPO / "docs"))
    try:
        import configuration_keys
    finally:
        sys.path.remove(str(REPO / "docs"))
    return configuration_keys


@pytest.fixture(scope="module")
def tables(reference):
    return reference.all_tables()


def test_every_key_has_a_meaning(reference, tables):
    assert reference.undocumented(tables) == []


def test_a_key_without_a_word_on_it_is_found_by_its_name(reference):
    table = reference.Table(
        "model.x", "a.B", ["one"], {"k": reference.Key("k", "text (str)", "")}, []
    )
    assert reference.undocumented({"model/x": [table]}) == ["model/x: a.B.k"]


def test_every_key_of_every_yaml_is_in_a_table(tables):
    for group, several in tables.items():
        listed = {table.place + "." + key for table in several for key in table.keys}
        for path in (REPO / "configs" / group).glob("*.yaml"):
            place = several[0].place
            for key in set(yaml.safe_load(path.read_text())) - {"_target_", "defaults"}:
                nested = any(name.startswith(f"{place}.{key}.") for name in listed)
                assert f"{place}.{key}" in listed or nested or group == "logger", (path.name, key)


def test_defaults_are_those_of_the_yaml_and_else_of_the_signature(tables):
    vision, *_ = tables["model/vision"]
    assert vision.keys["image_size"].defaults == {
        "convnet": 64,
        "convnet_group_norm": 64,
        "efficientnet_lite0": 128,
        "timm": None,
    }
    abstractor = next(
        table for table in tables["model/connector"] if table.options[0] == "abstractor_owl1"
    )
    assert abstractor.keys["eps"].defaults["abstractor_owl2"] == 1e-6  # in no yaml
    assert vision.keys["output"].kind == "one of 'last', 'penultimate'"
    assert "as mPLUG-Owl3 reads SigLIP" in vision.keys["output"].meaning


def test_comments_are_those_behind_the_key(reference):
    text = "a: 1 # one\nb: # two\n  c: '# no' # three\n  d: {e: 1} # four\nf: [1, 2]\n"
    assert reference.key_comments(text) == {"a": "one", "b": "two", "b.c": "three", "b.d": "four"}
