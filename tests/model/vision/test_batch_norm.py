"""A single image of 1x1 features has no statistics of its own, and a frozen norm learns none."""

import torch
from torch import nn

from owlfuse.model.vision.batch_norm import allow_single_values, trained_norms


def norm():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    allow_single_values(norm)
    return norm


def test_a_single_value_is_normed_by_the_running_statistics_which_stay():
    single = norm()
    before = single.running_mean.clone()
    out = single(torch.full((1, 3, 1, 1), 4.0))
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 2.0, 1.0]), atol=1e-4, rtol=0)
    assert single.training
    assert torch.equal(single.running_mean, before)


def test_several_values_are_normed_as_torch_does():
    values = torch.randn(4, 3, 2, 2) + 5
    torch.testing.assert_close(norm()(values), nn.BatchNorm2d(3)(values))


def test_a_norm_is_trained_unless_its_weight_is_frozen():
    norms = [nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False)]
    norms[1].requires_grad_(False)
    assert trained_norms(nn.Sequential(*norms)) == [norms[0], norms[2]]
