"""A sharded model has the weights, buffers and ties of the model that one process builds."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from helpers import CONNECTORS, FUSIONS, VOCAB, llm_fields, model_node, perturb, policy
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel, load_base
from owlfuse.model.llm import load_llm
from owlfuse.model.multimodal import build_model
from owlfuse.parallel.sharding import build_for, zero_other_rows
from owlfuse.parallel.strategies import Sharded
from owlfuse.training.module import MultimodalModule

LORA = {"llm": policy("LoRA", r=2), "fusion": policy("Full")}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


@pytest.fixture
def module(mesh):
    """What a LightningModule says of its strategy."""
    strategy = Sharded()
    strategy.cluster_environment = LightningEnvironment()
    strategy.parallel_devices = [torch.device("cpu")]
    strategy._device_mesh = mesh  # which Lightning makes when a trainer begins
    return SimpleNamespace(trainer=SimpleNamespace(strategy=strategy, precision="32-true"))


def tensors_of(model):
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def compare(module, build):
    """Whether a sharded model is as the one that `build` gives; returns both."""
    torch.manual_seed(3)
    wanted, summary = build()
    after = torch.rand(3)
    torch.manual_seed(3)
    found, sharded_summary = build_for(module, build)
    assert torch.equal(torch.rand(3), after), "the generator does not stand where it would"
    assert sharded_summary == summary
    expected = tensors_of(wanted)
    assert tensors_of(found).keys() == expected.keys()
    for name, tensor in tensors_of(found).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert whole.dtype == expected[name].dtype, name
        assert torch.equal(whole, expected[name]), name
        assert tensor.requires_grad == expected[name].requires_grad, name
    assert found.new_rows == wanted.new_rows
    assert found.llm.generation_config == wanted.llm.generation_config
    return found, wanted


@pytest.mark.parametrize(
    "fusion",
    [
        "concat",
        "modality_adaptive",
        "hyperattention-adaptive",
        "cross_attention-before-mlp",
        "deepstack",
    ],
)
@pytest.mark.fast_cases(1)
def test_random_weights_are_those_of_one_process(fusion, module):
    nodes = model_node(fusion, connector=CONNECTORS["abstractor"], adapter=LORA)
    found, _ = compare(module, lambda: build_model(nodes, VOCAB))
    assert all(isinstance(parameter, DTensor) for parameter in found.parameters())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_pretrained_weights_are_read_and_new_embeddings_drawn(tied, module, tmp_path):
    llm = load_llm(90, config=llm_fields("qwen3", tie_word_embeddings=tied))
    perturb(llm.parameters())
    llm.generation_config.eos_token_id = [4, 5]  # which config.json does not say
    llm.save_pretrained(tmp_path, max_shard_size="20KB")
    nodes = model_node(
        FUSIONS["modality_adaptive"], pretrained=str(tmp_path), adapter={"llm": policy("Frozen")}
    )
    found, wanted = compare(module, lambda: build_model(nodes, VOCAB))
    assert found.new_rows
    assert found.llm.generation_config.eos_token_id == [4, 5]
    one = found.llm.get_input_embeddings().weight is found.llm.get_output_embeddings().weight
    assert (
        one
        == (wanted.llm.get_input_embeddings().weight is wanted.llm.get_output_embeddings().weight)
        == tied
    )


def test_the_configuration_is_the_folders_and_not_what_the_yaml_says_of_it(module, tmp_path):
    """Else ranks would compute with other rotary frequencies than the weights were trained with."""
    load_llm(
        VOCAB, config=llm_fields(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ).save_pretrained(tmp_path)
    nodes = model_node("concat", pretrained=str(tmp_path), architecture=llm_fields())
    found, _ = compare(module, MultimodalModule(nodes, None, VOCAB).build)
    assert found.llm.config.rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.fast_cases(1)
def test_an_exported_base_is_resized_and_its_lora_folded_in(dtype, module, tmp_path):
    parts = {"fusion": FUSIONS["hyperattention-adaptive"], "connector": CONNECTORS["abstractor"]}
    model, _ = build_model(model_node(**parts, adapter=LORA), VOCAB)
    perturb(model.parameters())
    out = export(TrainedModel(model.eval().to(dtype), None, None), tmp_path / "out")
    nodes = model_node(**parts)
    nodes["vision"] = {**nodes["vision"], "image_size": 48}
    size = VOCAB + 20
    compare(module, lambda: build_model(nodes, size, load_base(str(out), nodes, size)))


def test_parameters_that_stay_float32_when_weights_are_read_do_so(module, tmp_path):
    """As transformers keeps some norms and routers."""

    def build():
        model, summary = build_model(model_node("concat"), VOCAB)
        if not model.llm.get_input_embeddings().weight.is_meta:
            model.llm.model.norm.to(torch.float64)
        return model, summary

    found, _ = compare(module, build)
    assert found.llm.model.norm.weight.dtype == torch.float64


def test_rows_of_a_sharded_table_keep_their_gradients(module):
    found, _ = compare(module, lambda: build_model(model_node("concat"), VOCAB))
    table = found.llm.get_input_embeddings().weight
    table.grad = torch.distributed.tensor.distribute_tensor(
        torch.ones(table.shape), table.device_mesh, table.placements
    )
    zero_other_rows(table, [2, 5])
    kept = table.grad.full_tensor()
    assert kept[[2, 5]].eq(1).all()
    assert kept.sum() == 2 * table.shape[1]
