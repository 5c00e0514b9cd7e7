"""A single image of 1x1 features has no statistics of its own."""

import torch
from torch import nn

from owlfuse.model.vision.batch_norm import SyncedBatchNorm, allow_single_values


def norms():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    allow_single_values(norm)
    return norm, SyncedBatchNorm(norm, lambda tensor: tensor)


def test_a_single_value_is_normed_by_the_running_statistics_which_stay():
    for norm in norms():
        before = norm.running_mean.clone()
        out = norm(torch.full((1, 3, 1, 1), 4.0))
        torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 2.0, 1.0]), atol=1e-4, rtol=0)
        assert norm.training
        assert torch.equal(norm.running_mean, before)


def test_several_values_are_normed_as_torch_does_and_move_the_statistics_as_torch_does():
    values = torch.randn(4, 3, 2, 2) + 5
    plain = nn.BatchNorm2d(3)
    wanted = plain(values)
    for norm in (norms()[0], SyncedBatchNorm(nn.BatchNorm2d(3), lambda tensor: tensor)):
        norm.running_mean.zero_()
        torch.testing.assert_close(norm(values), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(norm.running_mean, plain.running_mean)
        torch.testing.assert_close(norm.running_var, plain.running_var)
        assert int(norm.num_batches_tracked) == 1


def test_a_rank_that_is_blank_adds_nothing_and_no_rank_with_images_keeps_the_statistics():
    norm = SyncedBatchNorm(nn.BatchNorm2d(3), lambda tensor: tensor)
    norm.blank = True
    out = norm(torch.ones(2, 3, 2, 2))
    torch.testing.assert_close(out, torch.ones(2, 3, 2, 2), atol=1e-4, rtol=0)
    assert int(norm.num_batches_tracked) == 0
