"""A tiny random model in an exported folder, and the benchmarks' files."""

import pytest
import torch

from helpers import llm_fields, model_node
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.model.multimodal import build_model
from task_files import BENCHMARKS, small_tokenizer


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(fusion) -> an exported folder, made once; the model's answers differ by picture
    and question."""
    made = {}

    def make(fusion):
        if fusion not in made:
            torch.manual_seed(1)
            tokenizer = ChatEncoder(small_tokenizer(), 1).tokenizer
            model = build_model(model_node(fusion, llm=llm_fields()), len(tokenizer))[0].eval()
            made[fusion] = export(
                TrainedModel(model, tokenizer, None), tmp_path_factory.mktemp("model") / "out"
            )
        return made[fusion]

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """An exported model with hyperattention."""
    return make_model("hyperattention-adaptive")


@pytest.fixture
def files(tmp_path):
    """files(task) -> the words of the command line that name its files."""

    def make(task):
        folder = tmp_path / f"{task} files"
        folder.mkdir(exist_ok=True)
        return [f"task.{key}='{path}'" for key, path in BENCHMARKS[task](folder).items()]

    return make
