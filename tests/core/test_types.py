import dataclasses

import pytest
import torch

from helpers import IMAGE, make_batch
from owlfuse.core.types import Batch


@pytest.mark.parametrize(
    "rows",
    [
        [[11, 12, 13]],
        [[IMAGE, 11], [12, 13, 14], [15, IMAGE, 16, IMAGE]],
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_a_batch_numbers_its_images_by_where_they_begin(rows, left):
    expected = make_batch(rows, left=left)
    batch = Batch.of(
        expected.input_ids,
        expected.placeholder,
        expected.image_positions,
        pixel_values=expected.pixel_values,
        attention_mask=expected.attention_mask,
        labels=expected.labels,
    )
    for field in dataclasses.fields(Batch):
        found, wanted = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(found, wanted)
        else:
            assert found == wanted
