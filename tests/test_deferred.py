"""A model built without memory holds, tensor by tensor, what it would hold in memory."""

import json

import pytest
import torch

from helpers import CONNECTORS, FUSIONS, llm_fields, model_node, policy
from owlfuse.deferred import Deferred
from owlfuse.llm import load_llm
from owlfuse.model import build_model


def state(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def compare(node):
    torch.manual_seed(3)
    wanted, _ = build_model(node, 97)
    after = torch.rand(3)
    torch.manual_seed(3)
    with Deferred() as deferred:
        model, _ = build_model(node, 97)
    assert torch.equal(torch.rand(3), after)  # the generator stands where it would
    assert all(p.is_meta for p in model.parameters())
    for name, tensor in state(model).items():
        assert torch.equal(deferred.value(tensor.detach()), state(wanted)[name]), name
        assert tensor.requires_grad == state(wanted)[name].requires_grad


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_every_fusion(fusion, model_type):
    lora = {"llm": policy("LoRA", r=2), "fusion": policy("Full")}
    compare(model_node(FUSIONS[fusion], llm=llm_fields(model_type), connector=CONNECTORS["abstractor"], adapter=lora))


@pytest.mark.parametrize("tied", [True, False])
def test_pretrained_weights_are_read_from_their_files(tmp_path, tied):
    load_llm(97, config=llm_fields(tie_word_embeddings=tied)).save_pretrained(tmp_path, max_shard_size="20KB")
    compare(model_node(FUSIONS["modality_adaptive"], pretrained=str(tmp_path)))
    compare(model_node(FUSIONS["hyperattention-adaptive"], pretrained=str(tmp_path)))


@pytest.mark.parametrize("tied", [True, False])
def test_pretrained_weights_are_read_from_files_of_torch_save(tmp_path, monkeypatch, tied):
    monkeypatch.setattr("owlfuse.stored.MAPPED", 10_000)  # mapped anew now and then
    llm = load_llm(90, config=llm_fields(tie_word_embeddings=tied))
    llm.config.save_pretrained(tmp_path)
    weights = list(llm.state_dict().items())
    for number, part in enumerate((weights[::2], weights[1::2]), start=1):
        torch.save(dict(part), tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    files = {name: f"pytorch_model-0000{1 + k % 2}-of-00002.bin" for k, (name, _) in enumerate(weights)}
    index = {"metadata": {"total_size": sum(tensor.nbytes for _, tensor in weights)}, "weight_map": files}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    compare(model_node(FUSIONS["hyperattention-adaptive"], pretrained=str(tmp_path)))  # 7 new embeddings are drawn


def test_what_is_read_is_not_changed_by_memory_that_a_parameter_is_given_later():
    source = torch.rand(2, 3)
    with Deferred() as deferred:
        parameter = torch.nn.Parameter(torch.empty(2, 3))
        deferred.read(parameter, lambda: source)
        before = parameter.detach()
        parameter.data = parameter.data * 2
    assert torch.equal(deferred.value(parameter), source * 2)
    assert torch.equal(deferred.value(before), source)


def test_a_single_number_made_beside_a_tensor_is_known():
    """As torch's check of a covariance makes one, on the tensor's own device."""
    with Deferred():
        beside = torch.zeros(3)
        for value in (True, False) * 20:
            number = torch.full((), value, dtype=torch.bool, device=beside.device)
            assert bool(number.all()) == value


def test_a_tensor_changed_in_parts_holds_all_of_the_changes():
    with Deferred() as deferred:
        tensor = torch.zeros(3, 4)
        tensor[1].normal_()
        tensor[:, 2] += tensor[1].sum()
        copy = tensor.clone()
        tensor.fill_(7)
    assert torch.equal(deferred.value(tensor), torch.full((3, 4), 7.0))
    value = deferred.value(copy)
    assert value[1, 0] != 0
    assert value[0, 2] != 0
    assert value[0, 0] == 0
