"""Small runs on real files, trained for a few steps."""

import pytest
import torch

from owlfuse.config.compose import compose
from owlfuse.data.shapes.write import write_shapes
from owlfuse.training import train

SMALL = [
    "data.workers=0",
    "data.global_batch_size=8",
    "model.vision.image_size=32",
    "evaluation.max_questions=4",
    "evaluation.max_new_tokens=3",
    "trainer.max_steps=3",
]


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A working folder with a small set of shapes."""
    path = tmp_path_factory.mktemp("hub")
    sizes = {
        "train_pictures": 48,
        "val_pictures": 6,
        "held_out_pictures": 6,
        "text_train": 120,
        "text_val": 8,
    }
    write_shapes(str(path / "shapes"), **sizes)
    return path


@pytest.fixture(scope="session")
def train_run(work):
    """train_run(name, *overrides) -> the run's folder; one of the name is trained once. Embeddings
    are moved, so that no two tokens look alike after so few steps."""

    def make(name, *overrides):
        folder = work / "runs" / "any" / name
        if not folder.exists():
            sizes = [
                f"+data.prepare.{k}={v}"
                for k, v in {"train_pictures": 48, "val_pictures": 6}.items()
            ]
            sizes += [
                f"+data.prepare.{k}={v}"
                for k, v in {"held_out_pictures": 6, "text_train": 120, "text_val": 8}.items()
            ]
            places = [f"data.folder={work / 'shapes'}", f"runs={work / 'runs'}", f"name={name}"]
            made = train.run(compose([*SMALL, *sizes, *places, *overrides]))
            folder.parent.mkdir(parents=True, exist_ok=True)
            made.rename(folder)
        return folder

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make
    torch.set_num_threads(threads)
