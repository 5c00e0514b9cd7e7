"""Has a small model trained and saved by callers that are not ours, as `python saved_by_callers.py
STRATEGY FOLDER` on each rank of torchrun; test_parallel_checkpoints.py reads what is there."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from owlfuse.core.checkpoint_files import find_checkpoint_error
from owlfuse.core.errors import DataError
from owlfuse.parallel.checkpoints import BACKGROUND, read_shards
from owlfuse.parallel.strategies import Replicated, Sharded
from owlfuse.training.checkpoints import Checkpoints
from owlfuse.training.finite import FiniteWatch


class SmallModule(LightningModule):
    """A linear layer, sharded where the strategy has a mesh, with what `Checkpoints` asks of a
    module."""

    updating = False

    def __init__(self):
        super().__init__()
        self.finite = FiniteWatch()

    def configure_model(self):
        if hasattr(self, "model"):
            return
        torch.manual_seed(0)
        self.model = nn.Linear(4, 4)
        if self.device_mesh is not None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SaveInTheMiddle(Callback):
    """Calls `trainer.save_checkpoint`, and compares at once what lies there with the weights."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.path)
        assert find_checkpoint_error(self.path) is None
        if self.path.is_dir():
            saved = read_shards(self.path)["weight"]
        else:
            saved = torch.load(self.path, weights_only=True)["state_dict"]["model.weight"]
        weight = module.model.weight
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        assert torch.equal(saved, weight.detach())
        if any(isinstance(callback, Checkpoints) for callback in trainer.callbacks):
            self.fail_on_every_rank(trainer)

    def fail_on_every_rank(self, trainer):
        """An error that only rank 0 meets, at once or in the background, is raised on all."""
        blocked = self.path.with_name("blocked")  # a file, where a folder is needed
        blocked.touch()
        with pytest.raises(DataError, match="x.ckpt could not be written: (File exists|Not a dir)"):
            trainer.save_checkpoint(blocked / "x.ckpt")
        # In the background the error comes here, or with the next checkpoint.
        with pytest.raises(DataError, match="x.ckpt could not be written: (File exists|Not a dir)"):  # noqa: PT012
            trainer.save_checkpoint(blocked / "x.ckpt", storage_options=BACKGROUND)
            trainer.save_checkpoint(self.path, storage_options=BACKGROUND)


def train(strategy, folder, devices=1, with_ours=True):
    """Trains two steps, with a user's ModelCheckpoint, and with our callback or without."""
    ours = [Checkpoints(every=1)] if with_ours else []
    mine = ModelCheckpoint(folder / "mine", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy={"replicated": Replicated, "sharded": Sharded}.get(strategy, lambda: "auto")(),
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*ours, SaveInTheMiddle(folder / "middle.ckpt"), mine],
    )
    trainer.fit(SmallModule(), DataLoader(torch.ones(8, 4), batch_size=2))
    for step in (1, 2):
        path = folder / "mine" / f"step={step}.ckpt"
        assert path.is_dir() == (strategy == "sharded")
        assert find_checkpoint_error(path) is None
    trainer.strategy.barrier()
    assert not list(folder.rglob("*.part"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    train(sys.argv[1], Path(sys.argv[2]), devices=2)
