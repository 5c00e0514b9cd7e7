"""Exported models read without memory, and files written as a stream, are those of transformers and safetensors."""

import pytest
import torch
from safetensors.torch import save_file

from helpers import CONNECTORS, FUSIONS, VOCAB, model_node, perturb, policy
from owlfuse.cli import main
from owlfuse.deferred import Deferred
from owlfuse.hub.export import Trained, export, load_exported
from owlfuse.hub.start import load_base
from owlfuse.hub.writing import write_file, write_weights
from owlfuse.model import build_model
from owlfuse.types import DataError


def write_export(out, fusion, dtype, **llm):
    lora = {"llm": policy("LoRA", r=2)}
    model, _ = build_model(model_node(FUSIONS[fusion], connector=CONNECTORS["abstractor"], adapter=lora, **llm), VOCAB)
    perturb(model.parameters())
    export(Trained(model.eval().to(dtype), None, None), out)
    return model


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fusion", ["modality_adaptive", "hyperattention-adaptive"])
def test_a_base_without_memory_holds_what_one_in_memory_does(fusion, dtype, tmp_path):
    """LoRA's updates folded in, position embeddings resampled, embeddings grown by rows that are drawn."""
    write_export(tmp_path / "out", fusion, dtype)
    nodes = {"vision": {"image_size": 48}, "llm": {}}
    torch.manual_seed(3)
    wanted = load_base(str(tmp_path / "out"), nodes, VOCAB + 20)
    after = torch.rand(3)
    torch.manual_seed(3)
    with Deferred() as deferred:
        found = load_base(str(tmp_path / "out"), nodes, VOCAB + 20)
    assert torch.equal(torch.rand(3), after)
    assert all(parameter.is_meta for parameter in found.parameters())
    assert tensors_of(found).keys() == tensors_of(wanted).keys()
    for name, tensor in tensors_of(found).items():
        value = deferred.value(tensor.detach())
        assert value.dtype == tensors_of(wanted)[name].dtype, name
        assert torch.equal(value, tensors_of(wanted)[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merge", [False, True])
def test_an_export_is_the_same_whether_the_model_is_in_memory_or_not(merge, dtype, tmp_path):
    write_export(tmp_path / "out", "modality_adaptive", dtype)
    source = tmp_path / "out"
    assert main(["export", str(source), str(tmp_path / "found"), f"merge={str(merge).lower()}", "max_shard_size=20KB"]) == 0
    wrapped, _ = load_exported(source)
    export(Trained(wrapped.model, None, None), tmp_path / "wanted", merge=merge, max_shard_size="20KB", source="out")
    names = {str(path.relative_to(tmp_path / "wanted")) for path in (tmp_path / "wanted").rglob("*.*")}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= names
    assert ("adapter/adapter_model.safetensors" in names) != merge
    for name in names:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes(), name


def test_a_file_written_as_a_stream_is_the_one_that_safetensors_writes(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.int32)
    tensors = {f"b.{k}.\u00e9": torch.randn(k + 1, 3).to(kind) for k, kind in enumerate(kinds)}
    tensors |= {"a": torch.randn(5), "z": torch.tensor(3), "empty": torch.zeros(0, 4)}
    write_file(tmp_path / "mine", tensors, tensors.get)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_that_are_not_as_they_were_announced_are_told(tmp_path):
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(DataError, match=r"a is .*, expected \(2, 3\) of torch.float32"):
            write_weights(tmp_path, {"a": torch.zeros(2, 3)}, lambda name, wrong=wrong: wrong, "5GB")
    with pytest.raises(DataError, match="a is torch.complex64"):
        write_weights(tmp_path, {"a": torch.zeros(2, dtype=torch.complex64)}, None, "5GB")
