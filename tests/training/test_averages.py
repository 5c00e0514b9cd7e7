"""Averaged weights of Lightning's WeightAveraging, and what is no weight."""

import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from owlfuse.training.averages import AveragesFollow

INDICES = torch.arange(732)


class Small(lightning.LightningModule):
    """A layer that is trained, one that is not, and a table of indices as Swin's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.frozen = torch.nn.Linear(3, 3), torch.nn.Linear(300, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("indices", INDICES.clone(), persistent=False)

    def training_step(self, batch, index):
        return self.layer(batch).square().sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.01)


class Record(Callback):
    """The weights after each step, and those that validations see; behind the averaging."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *given):
        self.trained.append(module.layer.weight.detach().clone())

    def on_validation_epoch_start(self, trainer, module):
        self.validated.append(module.layer.weight.detach().clone())


def fit(folder, steps, **options):
    module, record = Small(), Record()
    frozen = module.frozen.weight.clone()
    batches = DataLoader(torch.randn(steps, 3), batch_size=1)
    trainer = lightning.Trainer(
        max_steps=steps,
        val_check_interval=1,
        num_sanity_val_steps=0,
        callbacks=[AveragesFollow(), EMAWeightAveraging(**options), record],
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, batches, DataLoader(torch.zeros(1, 3)))
    return module, frozen, record


def test_what_is_not_trained_stays_as_it_is_in_the_average(tmp_path):
    module, frozen, record = fit(tmp_path, 20, decay=0.9999)
    assert torch.equal(module.indices, INDICES)
    assert torch.equal(module.frozen.weight, frozen)
    # and what is trained is averaged
    expected = record.trained[0]
    for weight in record.trained[1:]:
        expected = 0.9999 * expected + 0.0001 * weight
    torch.testing.assert_close(module.layer.weight, expected)
    assert not torch.equal(module.layer.weight, record.trained[-1])


@pytest.mark.parametrize("first", [3, 100])
def test_until_its_first_update_the_average_is_what_is_trained(tmp_path, first):
    module, _, record = fit(tmp_path, 6, decay=0.5, update_starting_at_step=first)
    for number, (trained, validated) in enumerate(
        zip(record.trained, record.validated, strict=True)
    ):
        # the first update copies
        assert torch.equal(trained, validated) is (number <= first)
    assert torch.equal(module.layer.weight, record.validated[-1])
