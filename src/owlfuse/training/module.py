"""The LightningModule: loss, logging, optimizer.

B rows, T text positions, V vocabulary, R places of logits.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from owlfuse.artifacts.load import load_base
from owlfuse.artifacts.weights import (
    check_fits,
    frozen_hashes,
    model_state,
    saved_names,
    set_precision,
)
from owlfuse.core.types import Batch
from owlfuse.data.datamodule import ChatData
from owlfuse.model.adapters import PartSummary, print_summary
from owlfuse.model.llm import balancing_coefficient, check_architecture
from owlfuse.model.loss import batch_loss
from owlfuse.model.multimodal import MultimodalLM, build_model
from owlfuse.model.vision.batch_norm import trained_norms
from owlfuse.parallel.collectives import (
    all_gather_rows,
    all_reduce_gradients,
    clip,
    data_ranks,
    divide,
    in_float64,
    total_norm,
)
from owlfuse.parallel.sharding import build_for, zero_other_rows
from owlfuse.training.callbacks import callbacks_of
from owlfuse.training.finite import FiniteWatch
from owlfuse.training.optim import AdamWCosine, apply_schedule, check_groups, group_settings
from owlfuse.training.sample_counts import SampleCounts
from owlfuse.training.validation_losses import ValidationLosses

log = logging.getLogger(__name__)
AVERAGED = frozenset(("state_dict", "current_model_state"))
"""Keys of the weights in a checkpoint of Lightning's WeightAveraging: the average, and what is
trained. Others have the first alone."""


class MultimodalModule(lightning.LightningModule):
    """Trains a `MultimodalLM`, built in `configure_model` from the configuration's `model`.

    The loss is summed over supervised tokens, and divided by the supervised tokens of the whole
    global batch, over ranks and accumulation steps: gradients are those of the sum until just
    before they are clipped.
    """

    def __init__(
        self,
        model_config: dict[str, Any],
        optim: AdamWCosine,
        vocab_size: int,
        init_from: str | None = None,
        new_tokens: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        # frozen weights are in no checkpoint; on_load_checkpoint checks the others
        self.strict_loading = False
        self.frozen: dict[str, str] | None = None
        self.init_from = init_from
        self.model_config = model_config
        self.optim = optim
        self.vocab_size = vocab_size
        self.new_tokens = new_tokens or {}
        self.record: dict[str, Any] = {}
        """What a checkpoint keeps of the run beside its state (see `owlfuse.artifacts.resume`)."""
        self.rates_changed = False
        """Whether a run that goes on has other keys of `optim` than before."""
        self.configured_groups: list[dict[str, Any]] = []
        # None until configure_model, where Lightning wants it built
        self.model: MultimodalLM = None  # type: ignore[assignment]
        self.norms_are_shared = False
        self.updated_at: int | None = None
        """The trainer's step when the last update of the weights began; the step rises when the
        update is done."""
        self.skipped_updates: Any = 0.0
        """Of this command, by the scaler of 16-mixed."""
        self.finite = FiniteWatch()
        self.validation_losses = ValidationLosses()
        self.loss_sum: Any = 0.0
        self.token_count: Any = 0
        self.balance_sum: Any = 0.0

    @cached_property
    def samples(self) -> SampleCounts:
        """What the data held so far; there is none before Lightning has the data."""
        return SampleCounts(self.datamodule.sources)

    def configure_model(self) -> None:
        """Builds the model once, where Lightning wants it built."""
        if self.model is None:
            # Lightning's default is bfloat16 by now in bf16-true: other random weights
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                self.model, summary = build_for(self, self.build)
            finally:
                torch.set_default_dtype(default)
            set_precision(self.model, self.trainer.precision)
            self.norms_are_shared = data_ranks(self.trainer) > 1 and bool(trained_norms(self.model))
            if self.global_rank == 0:
                print_summary(summary, self.model_config)
                if self.model.new_rows:
                    print(new_rows_line(self.new_tokens, self.model.new_rows))

    @property
    def datamodule(self) -> ChatData:
        """The data, which Lightning hangs on its trainer."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def build(self) -> tuple[MultimodalLM, list[PartSummary]]:
        """The model and what of it is trained."""
        # `architecture` stands for a configuration that may be out of reach; here it is read, on
        # the meta device too.
        llm = {
            key: value for key, value in self.model_config["llm"].items() if key != "architecture"
        }
        nodes = {**self.model_config, "llm": llm}
        base = load_base(self.init_from, nodes, self.vocab_size) if self.init_from else None
        model, summary = build_model(nodes, self.vocab_size, base, self.new_tokens)
        if base is None:
            check_architecture(model.llm, self.model_config["llm"].get("architecture"))
        return model, summary

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The summed loss, scaled so that after Lightning's division by the accumulation steps, and
        the ranks' mean, the sum over both is left."""
        with self.norms_of(batch):
            loss, tokens = batch_loss(self.model, batch)
        self.samples.add(batch)
        self.loss_sum = self.loss_sum + loss.detach()
        self.token_count = self.token_count + tokens
        if self.model.balancing_loss is not None:
            # times the tokens, by which the sum is divided
            balance = self.model.balancing_loss * tokens
            self.balance_sum = self.balance_sum + balance.detach()
            loss = loss + balancing_coefficient(self.model.llm) * balance

        divided_later = self.trainer.accumulate_grad_batches * data_ranks(self.trainer)
        return loss * (divided_later * self.loss_scale)

    def norms_of(self, batch: Batch) -> AbstractContextManager[None]:
        """A context for a batch, in which batch norms of several ranks keep their statistics where
        a rank has no picture: in its place they would take the blank one's, and without it the
        others would wait for ever."""
        if not self.norms_are_shared:
            return nullcontext()
        without_images = torch.tensor([float(not batch.has_images)], device=self.device)
        if all_gather_rows(self.trainer, without_images).any():
            return self.model.vision.statistics_kept()
        return nullcontext()

    @property
    def loss_scale(self) -> float:
        """What the summed loss is multiplied by: gradients in float16 would overflow as sums over a
        large batch. A power of two, by which only the exponent changes."""
        if self.trainer.precision not in ("16-true", "16-mixed"):
            return 1.0
        return 2.0 ** -int(math.log2(self.datamodule.global_batch_size))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the supervised tokens of the global batch, and logs its loss
        and what it held."""
        sums = torch.stack([in_float64(self.loss_sum), in_float64(self.token_count)])
        counts = torch.tensor(self.samples.row()).to(sums)
        # one collective for the loss and all counts of the step
        rows = all_gather_rows(self.trainer, torch.cat([sums, counts]))
        loss_sum, tokens = rows[:, :2].sum(0).to(self.loss_sum)
        self.finite.note(loss_sum, self.trainer.global_step + 1)

        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it
        if self.trainer.global_step % every == 0:  # reading waits for the device, as logging does
            self.finite.check(Path(self.trainer.default_root_dir))
            if len(rows) > 1:
                self.samples.check_ranks(self.trainer, rows[:, 2:])

        self.log_dict(self.samples.end_step(rows[:, 2:]))
        tokens = tokens.clamp_min(1)
        self.divide_gradients(optimizer, tokens)
        self.log("train/loss", loss_sum / tokens, prog_bar=True)
        if self.model.balancing_loss is not None:
            sums_of_ranks = all_gather_rows(self.trainer, in_float64(self.balance_sum)[None])
            balance = sums_of_ranks.sum().to(tokens)
            self.log("train/router_loss", balance / tokens)
        self.loss_sum, self.token_count, self.balance_sum = 0.0, 0, 0.0

    def divide_gradients(self, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
        """Turns gradients of the summed loss into those of its mean over the global batch."""
        all_reduce_gradients(self.model.per_head(), self.trainer.strategy)
        # Of these tables only the rows of new tokens are trained.
        for table, new_rows in self.model.row_limits():
            zero_other_rows(table, new_rows)
        divide(gradients_of(optimizer), tokens * self.loss_scale)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm over all parameters and all ranks' shards, logged as `train/grad_norm`; by
        value as Lightning does."""
        # of unclipped gradients, too: an update by what is no number ruins all weights
        norm = total_norm(gradients_of(optimizer))
        self.log("train/grad_norm", norm)
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip(gradients_of(optimizer), norm, gradient_clip_val)
        if self.trainer.precision == "16-mixed":
            # whose scaler leaves out such an update, and tries the next with smaller gradients
            self.skipped_updates = self.skipped_updates + (~torch.isfinite(norm)).float()
            self.log("train/skipped_updates", self.skipped_updates)
        else:
            self.finite.note(norm, self.trainer.global_step + 1)
        # Lightning calls nothing of ours between this and the update
        self.updated_at = self.trainer.global_step

    @property
    def updating(self) -> bool:
        """Whether an error now finds weights of which some are already those of the next step."""
        return self.updated_at == self.trainer.global_step

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss of a batch of a validation source."""
        loss, tokens = batch_loss(self.model, batch)
        source = list(self.datamodule.validation)[dataloader_idx]
        self.validation_losses.add(source, batch, loss, tokens)

    def on_validation_epoch_end(self) -> None:
        """Logs the loss per supervised token of the validation sources, `<source>/loss`, over the
        batches of all ranks."""
        losses, remarks = self.validation_losses.end(self.trainer)
        for batch_remarks in remarks:
            self.datamodule.note_validation(batch_remarks, logs=self.trainer.is_global_zero)
        for number, (source, loss) in enumerate(losses.items()):
            # All ranks have the same number: without `sync_dist` Lightning would warn of them, and
            # a mean over the ranks would round it.
            options: dict[str, Any] = {"reduce_fx": "max", "sync_dist": True}
            self.log(f"{source}/loss", loss, prog_bar=number == 0, **options)

    def configure_optimizers(self) -> Any:
        """See `AdamWCosine`."""
        built = self.optim.build(self.model, self.trainer.max_steps)
        # Private in torch: a fused optimizer says that it divides by the scale of 16-mixed itself,
        # and then gradients would be clipped, and logged, while they are still multiplied by it.
        built["optimizer"]._step_supports_amp_scaling = False
        self.configured_groups = group_settings(built["optimizer"])
        return built

    def on_train_start(self) -> None:
        """A run that goes on gets the rates of the configuration as it is now; what a checkpoint
        brought are those of then."""
        if self.trainer.global_step:
            scheduler = self.trainer.lr_scheduler_configs[0].scheduler
            groups = self.configured_groups if self.rates_changed else None
            change = apply_schedule(scheduler, groups)
            if change is not None and self.trainer.is_global_zero:
                log.warning(
                    "the learning rate at step %d is %.3g by the schedule until now and %.3g by "
                    "the one from here on "
                    "(max_steps=%d)",
                    *(self.trainer.global_step, *change, self.trainer.max_steps),
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Frozen weights stay out but for their hash; what was skipped, truncated and noted until
        the last whole step goes in."""
        if "state_dict" in checkpoint:
            # once a run, since frozen weights stay what they are
            self.frozen = frozen_hashes(self.model) if self.frozen is None else self.frozen
            names = {f"model.{name}" for name in saved_names(self.model)}
            for key in AVERAGED & checkpoint.keys():
                state = checkpoint[key]
                checkpoint[key] = {name: state[name] for name in state if name in names}
            checkpoint["frozen"] = self.frozen
        checkpoint["new_tokens"] = self.new_tokens
        self.samples.save(self.trainer, checkpoint)
        checkpoint["run"] = self.record
        checkpoint["step_positions"] = self.datamodule.step_positions.changes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint between two micro batches goes on from the last whole step, whose number
        the sampler knows."""
        self.configure_model()
        averages = callbacks_of(self.trainer, WeightAveraging)
        if checkpoint.keys() >= AVERAGED and not averages:
            # a run without the callback goes on with what is trained, and not with its average
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        if "state_dict" in checkpoint:
            check_fits(self.model, model_state(checkpoint), checkpoint.get("frozen", {}))
        for state in checkpoint.get("optimizer_states", []):
            check_groups(state["param_groups"], self.optim.groups(self.model))
        if checkpoint.keys() >= AVERAGED:
            # loaded strictly by that callback: what is frozen is the same in both
            for key in AVERAGED:
                checkpoint[key] = {**self.state_dict(), **checkpoint[key]}
        self.samples.load(self.trainer, checkpoint)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for count in ("ready", "started", "processed", "completed"):
            progress["current"][count] = progress["total"][count] = done
        progress["is_last_batch"] = False


def new_rows_line(new_tokens: dict[str, int], tables: dict[str, list[int]]) -> str:
    """What is trained of an LLM beside what its adapter says."""
    names = list(new_tokens)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"llm: new tokens ({len(names)}: {shown}), whose rows of {' and '.join(tables)} are "
        "trained beside its adapter"
    )


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Of all the parameters that an optimizer trains and that have one."""
    return [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
