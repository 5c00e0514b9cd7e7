"""The three fusions with the weights of released models against what the released code gave."""

import pytest
import torch
from torch.nn import functional as F

from goldens_mapping import FAMILIES, inputs_of, model_of, read


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_loss_are_the_released_ones(family):
    config, _, io = read(family)
    batch, visual = inputs_of(family, config, io)
    logits = model_of(family)(batch, visual)
    valid = io["valid"]
    assert torch.equal(valid, batch.attention_mask.bool())
    torch.testing.assert_close(logits[valid], io["logits"][valid], rtol=0, atol=1e-4)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    torch.testing.assert_close(loss, io["loss"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_goldens_tell_whether_the_images_are_seen(family):
    config, _, io = read(family)
    batch, visual = inputs_of(family, config, io)
    visual.tokens = visual.tokens.flip(0)
    logits = model_of(family)(batch, visual)
    assert (logits[:2] - io["logits"][:2])[io["valid"][:2]].abs().max() > 1e-2
    text_only = io["valid"][2]
    torch.testing.assert_close(logits[2][text_only], io["logits"][2][text_only], rtol=0, atol=1e-4)
