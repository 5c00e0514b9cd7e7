"""A small set of shapes, written once."""

import pytest

from owlfuse.data.shapes.write import write_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder as `owlfuse data shapes` writes it."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(
        str(folder),
        train_pictures=60,
        val_pictures=12,
        held_out_pictures=6,
        text_train=200,
        text_val=24,
    )
    return folder
