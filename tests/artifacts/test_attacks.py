"""Every command that reads a model's folder is tried against every folder that wants more than to
be read.

An attack's code would write a file, the canary. A command must refuse the folder in one line, and
leave no canary.
"""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from owlfuse import __main__
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import load_run
from owlfuse.config import trust

COMMAND = "touch canary"


class Bomb:
    """An object whose pickle runs a command when it is read."""

    def __reduce__(self):
        return os.system, (COMMAND,)


def edit_yaml(path, value, key="config.yaml"):
    """An attack that sets a dotted key of a run's config.yaml."""

    def attack(folder):
        config = yaml.safe_load((folder / key).read_text())
        node = config
        *parents, last = path.split(".")
        for name in parents:
            node = node.setdefault(name, {}) if isinstance(node, dict) else node[int(name)]
        node[last] = value
        (folder / key).write_text(yaml.safe_dump(config))

    return attack


def edit_json(path, value, file="config.json"):
    """An attack that sets a dotted key of a JSON file."""

    def attack(folder):
        config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        node = config
        *parents, last = path.split(".")
        for name in parents:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        node[last] = value
        (folder / file).write_text(json.dumps(config))

    return attack


def write(name, content):
    """An attack that puts a file's content in its place."""

    def attack(folder):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return attack


def both(*attacks):
    """Several attacks on one folder."""

    def attack(folder):
        for each in attacks:
            each(folder)

    return attack


def manifest(folder):
    """Makes a folder of shards one that its manifest knows."""
    (path,) = (folder / "checkpoints").glob("step_*.ckpt")
    sizes = {file.name: {"bytes": file.stat().st_size} for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps(sizes))


def pickled_checkpoint(folder):
    (path,) = (folder / "checkpoints").glob("step_*.ckpt")
    torch.save({"state_dict": {"model.x": torch.ones(1)}, "global_step": 3, "frozen": Bomb()}, path)


def pickled_table(folder):
    (path,) = (folder / "checkpoints").glob("step_*.ckpt")
    path.unlink()
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    torch.save({"global_step": 3}, path / "meta.pt")
    manifest(folder)


def without_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


LOAD_LLM = "owlfuse.model.llm.load_llm"
RUN = {"_target_": "os.system", "command": COMMAND}
POSITIONAL = {"_target_": "os.system", "_args_": [COMMAND]}
PARTIAL = {"_target_": "functools.partial", "_args_": [POSITIONAL]}
EVIL_MODULE = "open('canary', 'w').close()\nfrom torch import nn\nclass Part(nn.Module): ...\n"

KEYS = [
    "model.vision",
    "model.connector",
    "model.fusion",
    "model.llm",
    "model.adapter.llm",
    "data",
    "data.sources.shapes",
]
KEYS += [
    "data.prepare",
    "trainer",
    "trainer.strategy",
    "trainer.profiler",
    "optim",
    "logger.csv",
    "evaluation",
    "checkpoint",
]
RUN_ATTACKS = {
    **{f"os.system as {key}": edit_yaml(key, RUN) for key in KEYS},
    "positional": edit_yaml("model.connector", POSITIONAL),
    "partial": edit_yaml("data.prepare", PARTIAL),
    "nested in kwargs": edit_yaml("model.vision.kwargs", {"act_layer": RUN}),
    "nested in a list": edit_yaml("trainer.plugins", [RUN]),
    "nested in optim": edit_yaml("optim.betas", [POSITIONAL, 0.9]),
    "an attribute of owlfuse": edit_yaml(
        "model.vision", {**RUN, "_target_": "owlfuse.runs.os.system"}
    ),
    "an attribute of lightning": edit_yaml(
        "logger.csv", {**RUN, "_target_": "lightning.pytorch.loggers.csv_logs.os.system"}
    ),
    "a callable of owlfuse": edit_yaml(
        "model.vision", {"_target_": "owlfuse.data.shapes.write.write_shapes", "folder": "canary"}
    ),
    "another callable of owlfuse": edit_yaml(
        "model.llm", {"_target_": "owlfuse.data.shapes.write.write_shapes", "folder": "canary"}
    ),
    "a module beside it": edit_yaml("model.connector", {"_target_": "evil_module.Part"}),
    "a subprocess": edit_yaml(
        "model.fusion", {"_target_": "subprocess.check_output", "args": ["touch", "canary"]}
    ),
    "a target that is no text": edit_yaml("model.fusion", {"_target_": ["os", "system"]}),
    "the environment": edit_yaml("experiment", "${oc.env:HOME}"),
    "a resolver": edit_yaml("data.folder", "${oc.decode:'1'}"),
    "Hydra's defaults": edit_yaml("defaults", ["_self_", {"model": "other"}]),
    "Hydra's own settings": edit_yaml("hydra", {"searchpath": ["file:///"]}),
    "an object of Python": write(
        "config.yaml", f"model: !!python/object/apply:os.system ['{COMMAND}']\n"
    ),
    "references": write("config.yaml", "a: &a [1]\nmodel: {b: [*a, *a]}\n"),
    "deep yaml": write("config.yaml", "model: " + "[" * 20000),
    "no utf-8": write("config.yaml", b"model: \xff\xfe\n"),
    "no yaml": write("config.yaml", "model: {a: [\n"),
    "a control character": write("config.yaml", "model: \x1b]0;title\x07\n"),
    "a large yaml": write("config.yaml", "model: {}\n" + "# x\n" * 2**19),
    "a file of weights": edit_yaml("model.vision.kwargs", {"checkpoint_path": "evil.pt"}),
    "an address of weights": edit_yaml(
        "model.vision.kwargs", {"pretrained_cfg": {"url": "http://127.0.0.1:9/x"}}
    ),
    "weights of the hub inside of the LLM": edit_yaml(
        "model.llm.config.vision_config",
        {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"},
    ),
    "a file of weights inside of the LLM": edit_yaml(
        "model.llm.config.vision_config", {"model_args": {"checkpoint_path": "evil.pt"}}
    ),
    "ten million layers": edit_yaml("model.llm.config.num_hidden_layers", 10_000_000),
    "wide": edit_yaml("model.llm.config.hidden_size", 1_000_000),
    "very wide": edit_yaml("model.llm.config.intermediate_size", 10**15),
    "no such LLM": edit_yaml("model.llm", {"_target_": LOAD_LLM, "pretrained": "./moved"}),
    "no such weights": edit_yaml("model.vision.weights", "./moved.safetensors"),
    "another folder": edit_yaml("name", "../../canary"),
    "a pickle": pickled_checkpoint,
    "a pickled table": pickled_table,
}

AUTO_MAP = {
    name: f"evil_module.{name}"
    for name in ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
}
PROCESSOR = "processor_config.json"
LORA = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
EXPORT_ATTACKS = {
    **{f"os.system as {key}": edit_json(key, RUN) for key in ("vision", "connector", "fusion")},
    "nested": edit_json("vision.kwargs", {"act_layer": RUN}),
    "an attribute of owlfuse": edit_json(
        "connector._target_", "owlfuse.connectors.mlp.nn.Sequential"
    ),
    "a callable of owlfuse": edit_json(
        "fusion", {"_target_": "owlfuse.data.shapes.write.write_shapes", "folder": "canary"}
    ),
    "a class of torch": edit_json("vision", {"_target_": "torch.nn.Sequential"}),
    "a module beside it": edit_json("connector", {"_target_": "evil_module.Part"}),
    "code of config.json": edit_json("auto_map", AUTO_MAP),
    "code of the LLM": edit_json("text_config.auto_map", AUTO_MAP),
    "weights of the hub inside of the LLM": edit_json(
        "text_config.vision_config", {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}
    ),
    "a file of weights inside of the LLM": edit_json(
        "text_config.vision_config.model_args", {"checkpoint_path": "evil.pt"}
    ),
    "code of the processor": edit_json("auto_map", AUTO_MAP, "processor_config.json"),
    "code of the tokenizer": edit_json("auto_map", AUTO_MAP, "tokenizer_config.json"),
    "a kernel of the hub": edit_json("text_config._attn_implementation", "kernels-community/evil"),
    "another kernel of the hub": edit_json("attn_implementation", "kernels-community/evil"),
    "other weights": edit_json("transformers_weights", "../evil.bin"),
    "quantised": edit_json("quantization_config", {"quant_method": "gptq", "bits": 4}),
    "an adapter of another model": write(
        "adapter_config.json", json.dumps({**LORA, "base_model_name_or_path": "evil/model"})
    ),
    "a module of an adapter": write(
        "adapter/adapter_config.json", json.dumps({**LORA, "megatron_config": {"a": 1}})
    ),
    "another kind of adapter": write(
        "adapter/adapter_config.json", json.dumps({"peft_type": "XLORA"})
    ),
    "an adapter without weights": write("adapter/adapter_config.json", json.dumps(LORA)),
    "weights of the hub": edit_json("vision.name", "hf-hub:evil/model"),
    "weights of a folder": edit_json("vision.name", "local-dir:/tmp"),
    "a file of weights": edit_json("vision.kwargs", {"checkpoint_path": "evil.pt"}),
    "an address of weights": edit_json(
        "vision.kwargs", {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}}
    ),
    "a pickle": without_weights,
    "a shard elsewhere": write(
        "model.safetensors.index.json", json.dumps({"weight_map": {"a": "../model.safetensors"}})
    ),
    "ten million layers": edit_json("text_config.num_hidden_layers", 10_000_000),
    "a few more layers": edit_json("text_config.num_hidden_layers", 900),
    "ten million blocks": edit_json("vision.kwargs", {"depths": [10_000_000, 1, 1, 1]}),
    "wide": edit_json("text_config.hidden_size", 1_000_000),
    "very wide": edit_json("text_config.intermediate_size", 10**15),
    "negative": edit_json("text_config.num_attention_heads", -1),
    "zero": edit_json("text_config.num_key_value_heads", 0),
    "a word for a number": edit_json("text_config.hidden_size", "large"),
    "no such LLM": edit_json("text_config.model_type", "evil"),
    "no such backbone": edit_json("vision.name", "evil"),
    "no such argument": edit_json("connector.evil", 1),
    "deep json": write(
        "config.json", '{"model_type": "owlfuse", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    ),
    "a number of 5000 digits": write(
        "config.json", '{"model_type": "owlfuse", "a": ' + "9" * 5000 + "}"
    ),
    "no utf-8": write("config.json", b'{"model_type": "\xff"}'),
    "no json": write("config.json", "{"),
    "a list": write("config.json", "[]"),
    "a large json": write("config.json", '{"model_type": "owlfuse", "a": "' + "x" * 2**21 + '"}'),
    "no parts": write("config.json", '{"model_type": "owlfuse"}'),
    "a billion positions of a picture": edit_json("tokens_per_image", 10**9, PROCESSOR),
    "a picture of gigapixels": edit_json(
        "image_processor.size", {"height": 60_000, "width": 60_000}, PROCESSOR
    ),
    "no size of a picture": edit_json("image_processor.size", {}, PROCESSOR),
    "another mean": edit_json("image_processor.image_mean", [0, 0, 0], PROCESSOR),
    "a template's syntax": edit_json("chat_template", "{% for x in %}", "tokenizer_config.json"),
    "a template's file": write("chat_template.jinja", "{{ 'a' "),
    "a large template": write("chat_template.jinja", "x" * 2**21),
    "no tokenizer": write("tokenizer.json", "{}"),
    "deep tokenizer": write("tokenizer.json", "[" * 100_000),
    "a header of the weights": write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "a pipe": lambda folder: os.mkfifo(folder / "special_tokens_map.json"),
}

SMALL_CHAT = ("chat", "{}", "What?", "--max-new-tokens", "1")
TASK = ("eval", "{}", "task=exact_match", "task.file=q.jsonl")
RUN_COMMANDS = {
    "chat": SMALL_CHAT,
    "export": ("export", "{}", "out"),
    "demo": ("demo", "{}"),
    "eval": ("eval", "{}"),
    "eval task=": TASK,
    "train resume=": ("train", "resume={}"),
}
EXPORT_COMMANDS = {
    "chat": SMALL_CHAT,
    "export": ("export", "{}", "out"),
    "demo": ("demo", "{}"),
    "eval task=": TASK,
    "init_from=": ("train", "init_from={}", "runs=runs", "name=x"),
}


@pytest.fixture(scope="module")
def folders(train_run, tmp_path_factory):
    """A run and its export, which attacks are made of."""
    out = tmp_path_factory.mktemp("attacks") / "out"
    run = train_run("shapes_owl1", "experiment=shapes_owl1")
    export(load_run(run), out)
    return {"run": run, "export": out}


@pytest.fixture
def stranger(folders, tmp_path, monkeypatch):
    """stranger(kind, attack) -> a folder in the working folder, where a module lies that leaves
    the canary when imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trust, "accepted", set())
    (tmp_path / "evil_module.py").write_text(EVIL_MODULE)
    (tmp_path / "q.jsonl").write_text('{"id": 1, "question": "What?", "answer": "red"}\n')

    def make(kind, attack):
        folder = tmp_path / "stranger"
        shutil.copytree(folders[kind], folder)
        (folder / "evil_module.py").write_text(EVIL_MODULE)
        attack(folder)
        return folder

    return make


def refused(words, folder, tmp_path, capfd):
    """Runs a command on the folder, and checks that it refuses it in one line."""
    try:
        code = __main__.main([word.format(folder) for word in words])
    except SystemExit as stop:
        code = stop.code
    errors = [line for line in capfd.readouterr().err.splitlines() if "owlfuse: error:" in line]
    assert not (tmp_path / "canary").exists(), "the folder's code was run"
    assert code in (1, 2)
    assert len(errors) == 1, errors
    assert errors[0].isprintable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attack", RUN_ATTACKS)
@pytest.mark.parametrize("command", ["chat"])
@pytest.mark.fast_cases(20)
def test_a_strangers_run_runs_no_code(command, attack, stranger, tmp_path, capfd):
    refused(RUN_COMMANDS[command], stranger("run", RUN_ATTACKS[attack]), tmp_path, capfd)


@pytest.mark.parametrize("attack", EXPORT_ATTACKS)
@pytest.mark.parametrize("command", ["chat"])
@pytest.mark.fast_cases(28)
def test_a_strangers_export_runs_no_code(command, attack, stranger, tmp_path, capfd):
    refused(EXPORT_COMMANDS[command], stranger("export", EXPORT_ATTACKS[attack]), tmp_path, capfd)


@pytest.mark.slow
# all of them pass one gate, and each command must
@pytest.mark.parametrize("attack", list(RUN_ATTACKS)[::5])
@pytest.mark.parametrize("command", sorted(set(RUN_COMMANDS) - {"chat"}))
def test_a_strangers_run_runs_no_code_by_any_command(command, attack, stranger, tmp_path, capfd):
    refused(RUN_COMMANDS[command], stranger("run", RUN_ATTACKS[attack]), tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("attack", list(EXPORT_ATTACKS)[::5])
@pytest.mark.parametrize("command", sorted(set(EXPORT_COMMANDS) - {"chat"}))
def test_a_strangers_export_runs_no_code_by_any_command(command, attack, stranger, tmp_path, capfd):
    refused(EXPORT_COMMANDS[command], stranger("export", EXPORT_ATTACKS[attack]), tmp_path, capfd)


def test_the_folders_that_attacks_are_made_of_are_read(stranger, capfd):
    """What the attacks change is refused for the change alone."""
    for kind in ("run", "export"):
        folder = stranger(kind, lambda folder: None)
        assert __main__.main([word.format(folder) for word in SMALL_CHAT]) == 0
        shutil.rmtree(folder)


def test_a_run_whose_data_name_no_sources_is_read(stranger):
    assert load_run(stranger("run", edit_yaml("data.sources", None))).model is not None


def test_weights_of_another_shape_are_told_before_memory_is_asked_for(stranger, tmp_path, capfd):
    def wider(folder):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights[name] = torch.zeros(3, 5)
        save_file(weights, folder / "model.safetensors")

    refused(SMALL_CHAT, stranger("export", wider), tmp_path, capfd)


CELL = {"key": "a", "cell": "a", "seed": 0, "steps": 1, "levels": {}, "config": {}, "hash": {}}
REPORTS = {
    "no cells": {"name": "x"},
    "cells that are no list": {"name": "x", "cells": 3, "baseline": "a", "metrics": {}},
    "a cell elsewhere": {
        "name": "x",
        "cells": [{**CELL, "key": "../../a"}],
        "baseline": "a",
        "metrics": {},
    },
    "an absolute cell": {
        "name": "x",
        "cells": [{**CELL, "key": "/tmp"}],
        "baseline": "a",
        "metrics": {},
    },
    "a cell that is a number": {
        "name": "x",
        "cells": [{**CELL, "key": 1}],
        "baseline": "a",
        "metrics": {},
    },
    "a control character": {
        "name": "x",
        "cells": [{**CELL, "key": "\x1b[2J"}],
        "baseline": "a",
        "metrics": {},
    },
}


@pytest.mark.parametrize("record", REPORTS)
def test_a_strangers_ablation_is_refused_in_one_line(record, stranger, tmp_path, capfd):
    folder = tmp_path / "ablation"
    folder.mkdir()
    (folder / "ablation.json").write_text(json.dumps(REPORTS[record]))
    refused(("report", "{}"), folder, tmp_path, capfd)


def test_a_deep_record_of_an_ablation_is_refused_in_one_line(stranger, tmp_path, capfd):
    folder = tmp_path / "ablation"
    folder.mkdir()
    (folder / "ablation.json").write_text("[" * 100_000)
    refused(("report", "{}"), folder, tmp_path, capfd)
