"""A model goes on with pictures of another size: position embeddings resampled, tables rebuilt,
all else as it was."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from helpers import (
    CONNECTORS,
    FUSIONS,
    IMAGE_SIZE,
    ROWS,
    VIT,
    VOCAB,
    each,
    make_batch,
    make_model,
    model_node,
)
from owlfuse.model.multimodal import build_model

LARGER = 2 * IMAGE_SIZE


def larger(batch):
    """The batch with its pictures at twice the size."""
    batch.pixel_values = F.interpolate(batch.pixel_values, scale_factor=2, mode="bilinear")
    return batch


@each({**CONNECTORS, "abstractor-positions": {**CONNECTORS["abstractor"], "positions": True}})
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.fast_cases(3)
def test_the_model_is_the_one_that_is_built_at_that_size_with_the_resampled_weights(node, fusion):
    model = make_model(fusion, connector=node)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.set_image_size(LARGER)
    fresh = build_model(
        model_node(fusion, connector=node, vision={**VIT, "image_size": LARGER}), VOCAB
    )[0].eval()
    table = "vision.body.pos_embed"
    wanted = {
        **before,
        table: resample_abs_pos_embed(before[table], [4, 4], [2, 2], num_prefix_tokens=1),
    }
    wanted |= {
        name: tensor
        for name, tensor in fresh.state_dict().items()
        if name == "connector.image_positions"
    }
    assert {name: t.shape for name, t in wanted.items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    fresh.load_state_dict(wanted)
    assert (model.fusion.tokens_per_image, model.vision.grid) == (
        fresh.fusion.tokens_per_image,
        (4, 4),
    )
    assert model.vision.preprocessing == fresh.vision.preprocessing
    batch = larger(make_batch(ROWS, model.fusion.tokens_per_image))
    with torch.no_grad():
        assert torch.equal(model(batch), fresh(batch))


def test_features_of_a_larger_picture_resemble_those_of_the_smaller_one():
    """Resampled, and not anew: the position embeddings at twice the size look like the old ones."""
    model = make_model()
    old = model.vision.body.pos_embed[:, 1:].clone()
    with torch.no_grad():
        model.vision.body.pos_embed.mul_(50)
    model.set_image_size(LARGER)
    new = model.vision.body.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2) / 50
    back = F.avg_pool2d(new, 2).flatten(2).transpose(1, 2)
    assert F.cosine_similarity(back.flatten(), old.flatten(), dim=0) > 0.9


def test_a_convolutional_backbone_has_its_table_of_places_at_the_new_grid():
    vision = {
        "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
        "name": "resnet10t",
        "positions": True,
        "norm": True,
        "image_size": 64,
    }
    vision["kwargs"] = {"channels": [8, 8, 16, 16], "stem_width": 8}
    model = make_model(vision=vision)
    model.set_image_size(128)
    fresh = make_model(vision={**vision, "image_size": 128})
    assert model.vision.grid == (4, 4)
    assert torch.equal(model.vision.positions, fresh.vision.positions)
    assert set(model.state_dict()) == set(fresh.state_dict())


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        (
            40,
            "vision: image_size: image_size is 40, which VisionTransformer's patches of 16 pixels",
        ),
        (0, "vision: image_size: image_size is 0, expected pixels"),
    ],
)
def test_a_size_that_does_not_fit_names_the_part(image_size, message):
    with pytest.raises(ValueError, match=message):
        make_model().set_image_size(image_size)
