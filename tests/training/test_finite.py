"""A loss that is no finite number: noted where it arises, told with its step, and never in a
checkpoint."""

from types import SimpleNamespace

import pytest
import torch

from helpers import SHAPE_COUNTS, SMALL_RUN
from owlfuse.config.compose import compose
from owlfuse.core.errors import DataError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.model.loss import batch_loss
from owlfuse.training import module as training
from owlfuse.training import train
from owlfuse.training.finite import FiniteWatch
from owlfuse.training.module import MultimodalModule


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_step_without_a_finite_loss_is_named(value, tmp_path):
    watch = FiniteWatch()
    watch.check(tmp_path)
    for step, loss in enumerate([1.0, 0.0, value, 2.0, value], start=1):
        watch.note(torch.tensor(loss), step)
        if step < 3:
            watch.check(tmp_path)
    assert not watch.told
    with pytest.raises(
        DataError,
        match=r"^step 3: the loss of its global batch.*; begin anew with a smaller optim.lr",
    ):
        watch.check(tmp_path)
    assert watch.told


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 50], ids=["at a step that is logged", "at a checkpoint"])
def test_a_run_ends_and_the_checkpoints_before_are_as_they_were(every, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shapes("data/shapes", **SHAPE_COUNTS)
    batches, loss_of = [], batch_loss

    def lost_in_step_3(model, batch):
        loss, tokens = loss_of(model, batch)
        batches.extend([1] * model.training)
        return (loss * float("nan") if model.training and len(batches) == 3 else loss), tokens

    monkeypatch.setattr(training, "batch_loss", lost_in_step_3)
    words = [
        "experiment=shapes_owl3",
        *SMALL_RUN,
        "trainer.max_steps=6",
        "trainer.val_check_interval=2",
    ]
    words += [f"trainer.log_every_n_steps={every}", "name=lost"]
    with pytest.raises(
        DataError,
        match=r"step 3: the loss .* go on from the last checkpoint by resume=runs/shapes_owl3/lost",
    ):
        train.run(compose(words))
    written = sorted(
        path.name for path in (tmp_path / "runs/shapes_owl3/lost/checkpoints").glob("*.ckpt")
    )
    assert written == ["best.ckpt", "step_00000002.ckpt"]
    state = torch.load(
        tmp_path / "runs/shapes_owl3/lost/checkpoints/step_00000002.ckpt", weights_only=True
    )["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert len(batches) == (3 if every == 1 else 4)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_gradient_that_is_no_number_is_noticed_whether_or_not_gradients_are_clipped(
    limit, precision, tmp_path
):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, float("nan")])
    module = SimpleNamespace(
        log=lambda *_: None,
        trainer=SimpleNamespace(precision=precision, global_step=2),
        finite=FiniteWatch(),
        skipped_updates=torch.zeros(()),
    )
    optimizer = torch.optim.SGD([weight], lr=0.1)
    MultimodalModule.configure_gradient_clipping(module, optimizer, limit)
    if precision == "16-mixed":  # whose scaler leaves the update out
        assert module.skipped_updates == 1
        module.finite.check(tmp_path)
    else:
        with pytest.raises(DataError, match="^step 3: "):
            module.finite.check(tmp_path)
