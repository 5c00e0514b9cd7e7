"""Released folders: their files, what is wrong with them, how much memory they take, and writing
them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from owlfuse.artifacts.released import saving
from owlfuse.artifacts.released.loading import load
from owlfuse.artifacts.released.saving import save
from owlfuse.core.errors import DataError
from owlfuse.model.connectors.linear import LinearConnector
from owlfuse.model.multimodal import assemble
from released_inputs import reference_logits
from released_models import IMAGE, KINDS, inputs, write

GOLDENS = Path(__file__).parents[2] / "goldens"
WEIGHTS = "model.safetensors"
kinds = pytest.mark.parametrize("kind", KINDS)


def tensors_of(folder):
    """Everything in a folder's safetensors by name."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def changed(folder, change):
    """Rewrites the folder's tensors after `change(tensors)`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def error_of(folder):
    """The message of `load`'s DataError, which is one line."""
    with pytest.raises(DataError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Where weights may lie


@kinds
@pytest.mark.fast_cases(2)
def test_shards_and_pickles_give_the_same_model(kind, tmp_path):
    whole = load(GOLDENS / kind).state_dict()
    tensors = load_file(GOLDENS / kind / WEIGHTS)
    names = list(tensors)
    pieces = {"one": names[::2], "two": names[1::2]}
    for form in ("shards", "pickle", "pickles"):
        folder = tmp_path / form
        folder.mkdir()
        shutil.copy(GOLDENS / kind / "config.json", folder)
        if form == "shards":
            save_torch_state_dict(tensors, folder, max_shard_size="100KB")
            assert len(list(folder.glob("*.safetensors"))) > 2
        elif form == "pickle":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            for piece, inside in pieces.items():
                torch.save({n: tensors[n] for n in inside}, folder / f"{piece}.bin")
            index = {
                "weight_map": {
                    n: f"{piece}.bin" for piece, inside in pieces.items() for n in inside
                }
            }
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert_same_bits(load(folder).state_dict(), whole)


def test_the_model_does_not_hang_on_its_files(tmp_path):
    shutil.copytree(GOLDENS / "owl1", tmp_path / "copy")
    model = load(tmp_path / "copy")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open(tmp_path / "copy" / WEIGHTS, "r+b") as file:
        file.write(b"\0" * file.seek(0, os.SEEK_END))
    (tmp_path / "copy" / WEIGHTS).write_bytes(b"")
    assert_same_bits(model.state_dict(), before)


# Tensors that do not fit


def test_all_tensors_that_do_not_fit_are_named_in_one_message(tmp_path):
    def change(tensors):
        del tensors["vision_model.embeddings.cls_token"]
        del tensors["language_model.model.norm.weight"]
        tensors["abstractor.visual_fc.bias"] = torch.zeros(63)
        tensors["qformer.weight"] = torch.zeros(2, 3)
        tensors["language_model.lm_head.weight"] = torch.zeros(320, 64, dtype=torch.int8)

    message = error_of(changed(Path(shutil.copytree(GOLDENS / "owl1", tmp_path / "owl1")), change))
    assert "5 tensors do not fit" in message
    for part in (
        "vision_model.embeddings.cls_token is missing, expected (1, 1, 48)",
        "language_model.model.norm.weight is missing, expected (64,)",
        "abstractor.visual_fc.bias has shape (63,), expected (64,)",
        "qformer.weight is left over with shape (2, 3), expected none",
        (
            "language_model.lm_head.weight in model.safetensors is I8, expected one of F64, F32, "
            "F16, "
            "BF16"
        ),
    ):
        assert part in message


def test_what_nobody_reads_may_be_there_or_not(tmp_path):
    written = write("owl3_adaptive", 1)
    last = written.config["vision_config"]["num_hidden_layers"] - 1
    io = inputs(written, [[11, IMAGE, 12]])
    expected = reference_logits(load(written.to(tmp_path / "all")), io)
    spare = (
        "rotary_emb",
        "position_ids",
        "vision_model.head.",
        "post_layernorm",
        f"vision_model.encoder.layers.{last}.",
    )
    kept = {n: t for n, t in written.tensors.items() if not any(word in n for word in spare)}
    assert len(kept) < len(written.tensors) - 20
    written.tensors = kept
    assert torch.equal(reference_logits(load(written.to(tmp_path / "few")), io), expected)


def test_owl1_reads_its_last_norm(tmp_path):
    folder = Path(shutil.copytree(GOLDENS / "owl1", tmp_path / "owl1"))
    assert "vision_model.post_layernorm.bias is missing" in error_of(
        changed(folder, lambda tensors: tensors.pop("vision_model.post_layernorm.bias"))
    )


def test_an_output_layer_that_differs_from_the_embedding_it_is_tied_to_is_an_error(tmp_path):
    written = next(
        w for w in (write("owl2", s) for s in range(9)) if w.config["tie_word_embeddings"]
    )
    embedding = written.tensors["model.embed_tokens.weight"]
    written.tensors["lm_head.weight"] = embedding.clone()
    model = load(written.to(tmp_path / "same"))
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    save(model, tmp_path / "saved")
    assert_same_bits(tensors_of(tmp_path / "same"), tensors_of(tmp_path / "saved"))
    written.tensors["lm_head.weight"] = embedding + 1
    message = error_of(written.to(tmp_path / "other"))
    assert "lm_head.weight" in message
    assert "model.embed_tokens.weight" in message


def test_position_tables_that_differ_between_layers_are_an_error(tmp_path):
    def change(tensors):
        tensors[
            "model.visual_abstractor.encoder.layers.1.crossattention.attention.q_pos_embed"
        ] += 1

    assert "q_pos_embed differ" in error_of(
        changed(Path(shutil.copytree(GOLDENS / "owl2", tmp_path / "owl2")), change)
    )


def test_position_tables_are_the_files(tmp_path):
    def change(tensors):
        for layer in range(2):
            tensors[
                f"model.visual_abstractor.encoder.layers.{layer}.crossattention.attention.k_pos_embed"
            ] += 1

    model = load(changed(Path(shutil.copytree(GOLDENS / "owl2", tmp_path / "owl2")), change))
    assert model.connector.image_positions[0].eq(1).all()


# Files that are damaged, missing or of something else


def copy_of(kind, folder):
    return Path(shutil.copytree(GOLDENS / kind, folder))


@pytest.mark.parametrize("keep", [0, 4, 5000, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    folder = copy_of("owl2", tmp_path / "owl2")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    message = error_of(folder)
    assert f"{folder / WEIGHTS} is damaged or cut off" in message
    assert "copy it anew" in message


def test_weights_of_whole_numbers_are_named(tmp_path):
    folder = copy_of("owl3_fused", tmp_path / "q")
    save_file(
        {n: t.to(torch.int8) for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
    )
    message = error_of(folder)
    assert f"{folder / WEIGHTS}: no tensor of F64, F32, F16, BF16" in message


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped, tmp_path):
    folder = copy_of("owl1", tmp_path / "owl1")
    (folder / WEIGHTS).unlink()
    content, file = (
        {"weight": torch.zeros(2), "x": Harmful(tmp_path / "run")},
        folder / "pytorch_model.bin",
    )
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    message = error_of(folder)
    assert str(file) in message
    assert "safetensors" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"weight": 3}, {"state_dict": {"weight": torch.zeros(2)}}]
)
def test_a_pickle_of_something_else_is_named(content, tmp_path):
    folder = copy_of("owl1", tmp_path / "owl1")
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin is no dictionary of tensors by name" in error_of(folder)


def test_a_truncated_pickle_is_named(tmp_path):
    folder = copy_of("owl1", tmp_path / "owl1")
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    assert "pytorch_model.bin is damaged" in error_of(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "config.json is missing"),
        (b"", "config.json: line 1: not JSON"),
        (b"\xff\xfe{", "config.json: not UTF-8"),
        (b"[1, 2]", "config.json: holds a list"),
        (
            b'{"model_type": "blip-2"}',
            "model_type is blip-2, and is one of mplug-owl, mplug_owl2, mplugowl3, llava",
        ),
        (b"{}", "model_type is None"),
        (
            b'{"model_type": "mplug-owl", "text_config": {"model_type": "bloom"}}',
            "text_config.model_type is bloom",
        ),
        (
            b'{"model_type": "mplug_owl2", "hidden_size": 60, "num_attention_heads": 7}',
            "config.json describes no model",
        ),
        (b'{"model_type": "mplugowl3", "hidden_size": "wide"}', "config.json describes no model"),
        (b'{"model_type": "mplugowl3", "hyper_layers": [0]}', "layers \\[-1\\]"),
        (
            b'{"model_type": "mplugowl3", "vision_config": {"hidden_act": "tanh"}}',
            "hidden_act is tanh",
        ),
        (
            b'{"model_type": "mplugowl3", "vision_config": {"num_hidden_layers": 1}}',
            "num_hidden_layers is 1",
        ),
    ],
)
@pytest.mark.fast_cases(5)
def test_a_configuration_that_is_none_is_named(content, expected, tmp_path):
    folder = copy_of("owl3_static", tmp_path / "m")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    message = error_of(folder)
    assert str(folder / "config.json") in message
    assert expected.replace("\\", "") in message


def test_shards_that_are_missing_are_named(tmp_path):
    folder = copy_of("owl1", tmp_path / "owl1")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_torch_state_dict(tensors, folder, max_shard_size="100KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    message = error_of(folder)
    assert f"{folder / 'model.safetensors.index.json'} names {gone.name}" in message
    assert "copy the missing shards" in message


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 3}}', "no"]
)
def test_an_index_that_is_none_is_named(index, tmp_path):
    folder = copy_of("owl1", tmp_path / "owl1")
    (folder / WEIGHTS).rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in error_of(folder)


def test_folders_without_weights_or_that_are_none_are_named(tmp_path):
    folder = copy_of("owl1", tmp_path / "owl1")
    (folder / WEIGHTS).unlink()
    assert f"{folder} has no weights" in error_of(folder)
    assert f"{folder / 'gone'} is no folder" in error_of(folder / "gone")


# Memory


MEASURE = """
import sys, threading, time
import torch
from owlfuse.artifacts.released.loading import load
torch.set_num_threads(1)
load(sys.argv[2])  # what is imported and allocated once
def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, anonymous, done = status("VmRSS"), status("RssAnon"), []
peak = [anonymous]
def watch():
    while not done:
        peak[0] = max(peak[0], status("RssAnon"))
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
model = load(sys.argv[1])
done.append(1); thread.join()
size = sum(t.nbytes for t in model.state_dict().values())
print(size, status("VmHWM") - before, peak[0] - anonymous)
"""


@pytest.mark.slow
def test_loading_takes_the_model_and_one_shard(tmp_path):
    written = write("owl2", 0)
    vocab, width = written.config["vocab_size"], written.config["hidden_size"]
    big = {"vocab_size": 1_000_000, "tie_word_embeddings": False}
    written.config |= big
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        written.tensors[name] = torch.ones(big["vocab_size"], width)
    assert vocab < big["vocab_size"]
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written.config))
    save_torch_state_dict(written.tensors, folder, max_shard_size="15MB")
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(folder), str(GOLDENS / "owl2")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    size, peak, anonymous = map(int, out.split())
    slack = 12 * 2**20
    assert size > 60e6
    assert shard < 0.6 * size
    assert peak < size + shard + slack
    assert anonymous < size + slack


# Writing


@kinds
def test_what_was_loaded_comes_back_bit_for_bit(kind, tmp_path):
    model = load(GOLDENS / kind)
    assert save(model, tmp_path / "out") == tmp_path / "out"
    assert_same_bits(tensors_of(tmp_path / "out"), load_file(GOLDENS / kind / WEIGHTS))
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        GOLDENS / kind / "config.json"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@kinds
@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.bfloat16), (1, torch.float16)])
@pytest.mark.fast_cases(2)
def test_other_sizes_and_types_come_back_in_shards(kind, seed, dtype, tmp_path):
    folder = write(kind, seed).to(tmp_path / "in", dtype)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.25],  "resample": 3}'
    )
    save(load(folder), tmp_path / "out", max_shard_size="5KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(folder))
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert_same_bits(load(tmp_path / "out").state_dict(), load(folder).state_dict())


@kinds
def test_a_file_of_several_types_comes_back_bit_for_bit(kind, tmp_path):
    def change(tensors):
        for number, name in enumerate(tensors):
            if tensors[name].is_floating_point():
                tensors[name] = tensors[name].to(
                    [torch.bfloat16, torch.float16, torch.float32, torch.bfloat16][number % 4]
                )
        if kind == "owl2":  # one tensor in the model
            for name in tensors:
                tensors[name] = tensors[name].float() if "pos_embed" in name else tensors[name]

    folder = changed(copy_of(kind, tmp_path / "in"), change)
    model = load(folder)
    save(model, tmp_path / "out")
    assert_same_bits(tensors_of(tmp_path / "out"), load_file(folder / WEIGHTS))


@kinds
def test_what_was_trained_is_what_is_written_under_its_names_and_in_its_type(kind, tmp_path):
    folder = write(kind, 2).to(tmp_path / "in", torch.bfloat16)
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    save(model, tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    again = load(tmp_path / "out")
    assert_same_bits(again.state_dict(), model.state_dict())
    fixed = [n for n in before if torch.equal(before[n], after[n])]
    assert len(fixed) < len(before) / 2
    assert all(
        "inv_freq" in n or "pos_embed" in n or n.startswith("vision_model.") or "position_ids" in n
        for n in fixed
    )


def test_trained_numbers_of_another_type_than_the_models_are_written_too(tmp_path):
    folder = changed(
        copy_of("owl1", tmp_path / "in"),
        lambda t: t.update({n: x.bfloat16() for n, x in t.items() if x.ndim > 1}),
    )
    model = load(folder)
    name = "language_model.model.norm.weight"
    assert name in model.released.original_tensors
    with torch.no_grad():
        model.llm.model.norm.weight.fill_(3)
    save(model, tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[name], torch.full((64,), 3.0))


def test_a_folder_that_holds_something_is_not_touched(tmp_path):
    model = load(GOLDENS / "owl1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not empty") as caught:
        save(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    assert load(tmp_path / "empty").released.family == "owl1"


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(tensors, folder, **options):
        (Path(folder) / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(saving, "save_torch_state_dict", fails)
    with pytest.raises(OSError, match="disk full"):
        save(load(GOLDENS / "owl1"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def with_linear(model):
    model.connector = LinearConnector(48, 64, 17, (4, 4))


def with_normed_features(model):
    model.vision.norm = torch.nn.BatchNorm1d(48)


def with_fewer_layers(model):
    model.llm.model.layers = model.llm.model.layers[:2]


def with_a_wider_vocabulary(model):
    model.llm.resize_token_embeddings(400, mean_resizing=False)


def with_another_fusion(model):
    model.fusion = load(GOLDENS / "owl3_static").fusion


@pytest.mark.parametrize(
    ("change", "begins"),
    [
        (with_linear, "connector: LinearConnector"),
        (with_normed_features, "vision: a released owl1 has no norm"),
        (with_fewer_layers, "llm: the released folder had"),
        (with_a_wider_vocabulary, "llm: language_model"),
        (with_another_fusion, "fusion: HyperAttention"),
    ],
)
def test_a_part_of_another_form_is_named(change, begins, tmp_path):
    model = load(GOLDENS / "owl1")
    change(model)
    with pytest.raises(DataError, match=f"^{begins}") as caught:
        save(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_from_elsewhere_is_not_written(tmp_path):
    nodes = load(GOLDENS / "owl2").nodes
    with pytest.raises(DataError, match="model.released is None"):
        save(assemble(nodes, 320), tmp_path / "out")
    with pytest.raises(DataError, match="^connector: LinearConnector"):
        save(
            assemble(
                {
                    **nodes,
                    "connector": {"_target_": "owlfuse.model.connectors.linear.LinearConnector"},
                },
                320,
            ),
            tmp_path / "out",
        )
