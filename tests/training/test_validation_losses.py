"""Losses of the validation sources are means over supervised tokens, whatever the batches."""

from types import SimpleNamespace

import pytest
import torch

from helpers import ROWS, make_batch
from owlfuse.training.validation_losses import ValidationLosses


def test_each_token_counts_once_and_a_validation_begins_anew(caplog):
    trainer = SimpleNamespace(strategy=None, is_global_zero=True)
    losses = ValidationLosses()
    batch = make_batch(ROWS)
    batch.skipped = [("a", "a:3", "no image")]
    for source, loss, tokens in (("a", 6.0, 3), ("a", 1.0, 1), ("a", 0.0, 0), ("b", 0.0, 0)):
        losses.add(source, batch, torch.tensor(loss), torch.tensor(tokens))
    values, remarks = losses.end(trainer)
    # 0 would be the lowest of all, and its checkpoint the best
    assert values == {"a": pytest.approx(7 / 4)}
    assert "validation source b: no token is supervised" in caplog.text
    assert [batch_remarks.skipped for batch_remarks in remarks] == [batch.skipped] * 4
    assert losses.end(trainer) == ({}, [])
