"""The one cross-entropy, beside sums of logarithms by hand."""

import math

import pytest
import torch

from owlfuse.model.loss import summed_loss, token_loss, token_losses


def losses_by_hand(logits, targets):
    """-log softmax of each target in double precision."""
    losses = []
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        total = math.fsum(math.exp(value) for value in row)
        losses.append(0.0 if target == -100 else math.log(total) - row[target])
    return losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_token_s_loss_is_that_of_its_logits_in_float32_at_least(dtype):
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=dtype)
    targets = torch.tensor([3, -100, 0, 10, -100, 5, 5])
    expected = losses_by_hand(logits, targets)
    losses = token_losses(logits, targets)
    assert losses.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert losses.tolist() == pytest.approx(expected, abs=1e-12 if dtype == torch.float64 else 1e-6)
    loss, count = summed_loss(logits, targets)
    assert float(loss) == pytest.approx(math.fsum(expected), abs=1e-5)
    assert int(count) == 5


def test_a_sequence_s_loss_is_of_the_next_token_and_counts_what_is_supervised():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 9), torch.tensor([[1, 2, -100, 4], [5, 6, 7, -100]])
    expected = losses_by_hand(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss, count = token_loss(logits, labels)
    assert float(loss) == pytest.approx(math.fsum(expected), abs=1e-5)
    assert int(count) == 4
    assert [int(value) for value in token_loss(logits, torch.full_like(labels, -100))] == [0, 0]
