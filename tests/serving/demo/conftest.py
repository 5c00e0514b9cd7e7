"""Two small random models with the shapes' tokenizer, of different fusions, in folders of one
name."""

import pytest
import torch
from PIL import Image

from helpers import llm_fields, model_node
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel
from owlfuse.data.chat.tokenizer import load_tokenizer
from owlfuse.data.shapes.write import write_shapes
from owlfuse.model.multimodal import build_model
from owlfuse.serving.demo.models import load_models


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """work/concat/out and work/hyper/out, and the pictures red.png and blue.png beside."""
    work = tmp_path_factory.mktemp("demo")
    write_shapes(
        str(work / "shapes"),
        train_pictures=40,
        val_pictures=4,
        held_out_pictures=6,
        text_train=100,
        text_val=8,
    )
    tokenizer = load_tokenizer(str(work / "shapes" / "tokenizer"))
    for name, fusion in (("concat", "concat"), ("hyper", "hyperattention-adaptive")):
        torch.manual_seed(0)
        node = model_node(fusion, llm=llm_fields("qwen2", max_position_embeddings=4000))
        export(
            TrainedModel(build_model(node, len(tokenizer))[0].eval(), tokenizer, None),
            work / name / "out",
            source=f"run_{name}",
        )
    for color in ("red", "blue"):
        Image.new("RGB", (50, 40), color).save(work / f"{color}.png")
    return work


@pytest.fixture(scope="session")
def loaded(exported):
    """Both models as the demo loads them, and what it says meanwhile.

    They never end an answer by themselves.
    """
    said = []
    models = load_models([exported / "concat" / "out", exported / "hyper" / "out"], said.append)
    for model in models:
        eos = model.processor.tokenizer.eos_token_id
        model.model.generation_config.suppress_tokens = [eos]
    return models, said
