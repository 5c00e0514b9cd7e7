"""Runs and exports from before the packages, whose files name the parts where they were then."""

import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from safetensors.torch import save_file

import owlfuse
from owlfuse.artifacts.hf.configuration import OwlfuseConfig
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.config.aliases import MOVED, with_current_names
from owlfuse.config.build import to_dict
from owlfuse.config.compose import compose
from owlfuse.config.trust import read_run_config
from owlfuse.model.fusion.modality_adaptive import ModalityAdaptive
from owlfuse.model.multimodal import on_meta

OLD = Path(__file__).parent / "old_names"
"""A config.yaml and a config.json that were written at commit 729c9e3."""


def targets_of(node):
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets_of(value)


def test_the_configuration_of_an_old_run_names_what_is_there_today():
    config = read_run_config(OLD)
    names = list(targets_of(config))
    assert len(names) == 22
    for name in names:
        assert callable(get_object(name))
    model, _ = on_meta(config["model"], vocab_size=64)
    assert isinstance(model.fusion, ModalityAdaptive)


def test_an_old_run_goes_on_under_the_names_of_today(tmp_path):
    shutil.copy(OLD / "config.yaml", tmp_path)
    config = to_dict(compose([f"resume={tmp_path}"], importing=False))
    assert config["model"] == read_run_config(OLD)["model"]


def test_an_old_export_is_loaded(tmp_path):
    model = OwlfuseForConditionalGeneration(OwlfuseConfig.from_pretrained(OLD))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(OLD / "config.json", tmp_path)
    loaded = owlfuse.load(tmp_path)
    assert isinstance(loaded.fusion, ModalityAdaptive)
    first, again = next(model.model.parameters()), next(loaded.parameters())
    assert torch.equal(first.to(again.dtype), again)  # config.json says bfloat16


@pytest.mark.parametrize("old", MOVED)
def test_an_entry_leads_to_something(old):
    new = MOVED[old]
    if new.startswith("package:"):
        assert Path(owlfuse.__file__).parents[1].joinpath(new.removeprefix("package:")).is_dir()
    else:
        assert get_object(new.rstrip(".")) is not None


def test_texts_that_only_hold_an_old_name_stay():
    text = "as in owlfuse.fusion.concat.Concat"
    assert with_current_names({"a": [text, 3, None]}) == {"a": [text, 3, None]}
