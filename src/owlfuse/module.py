"""The LightningModule: loss, logging, optimizer. B rows, T text positions, V vocabulary."""

from __future__ import annotations

import logging
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F

from owlfuse.adapters import print_summary
from owlfuse.data.packing import Padding
from owlfuse.hub.start import load_base
from owlfuse.model import MultimodalLM, build_model
from owlfuse.optim import AdamWCosine
from owlfuse.types import Batch, DataError

log = logging.getLogger(__name__)


class MultimodalModule(lightning.LightningModule):
    """Trains a `MultimodalLM`, built in `configure_model` from the configuration's `model`.

    The loss is summed over supervised tokens, and divided by the supervised tokens of the whole global batch, over ranks and
    accumulation steps: gradients are those of the sum until just before they are clipped.
    """

    def __init__(self, model_config: dict[str, Any], optim: AdamWCosine, vocab_size: int, init_from: str | None = None) -> None:
        super().__init__()
        self.init_from = init_from
        self.model_config = model_config
        self.optim = optim
        self.vocab_size = vocab_size
        self.model: MultimodalLM | None = None
        self.skipped: list[tuple[str, str, str]] = []
        self.truncated: dict[str, int] = {}
        self.counted: tuple[list[tuple[str, str, str]], dict[str, int]] = ([], {})
        """`skipped` and `truncated` at the last whole step, which a checkpoint goes on from."""
        self.loss_sum = 0.0
        self.token_count = 0
        self.padding = Padding()

    def configure_model(self) -> None:
        """Builds the model once, where Lightning wants it built."""
        if self.model is None:
            base = load_base(self.init_from, self.model_config, self.vocab_size) if self.init_from else None
            self.model, summary = build_model(self.model_config, self.vocab_size, base)
            if self.global_rank == 0:
                print_summary(summary)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The summed loss, scaled so that after Lightning's division by the accumulation steps, and the ranks' mean, the sum
        over both is left."""
        loss, tokens = token_loss(self.model(batch), batch.labels)
        self.count_skipped(batch)
        self.loss_sum = self.loss_sum + loss.detach()
        self.token_count = self.token_count + tokens
        self.padding.add(batch)
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def count_skipped(self, batch: Batch) -> None:
        """Says each sample that was left out or cut. Raises DataError past a source's `max_skips`."""
        for source, sample, turns in batch.truncated:
            self.truncated[source] = self.truncated.get(source, 0) + 1
            log.info("truncated %s by %d turns (%d of source %s so far)", sample, turns, self.truncated[source], source)
        for source, sample, reason in batch.skipped:
            self.skipped.append((source, sample, reason))
            count = sum(skip[0] == source for skip in self.skipped)
            log.warning("skipped %s (%d of source %s so far): %s", sample, count, source, reason)
            limit = self.trainer.datamodule.sources[source].max_skips
            if count > limit:
                raise DataError(f"source {source} had {count} wrong samples, over its max_skips of {limit}; the last: {reason}")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the supervised tokens of the global batch, and logs its loss and its share of padding."""
        padding = torch.tensor([self.padding.tokens, self.padding.unpacked, self.padding.positions]).to(self.loss_sum)
        totals = torch.stack([self.loss_sum, self.token_count.to(self.loss_sum), *padding])
        loss_sum, tokens, *padding = self.trainer.strategy.reduce(totals, reduce_op="sum")
        for name, share in Padding(*padding).shares().items():
            self.log(f"data/{name}", share)
        tokens = tokens.clamp_min(1)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(gradients, tokens)
        self.log("train/loss", loss_sum / tokens, prog_bar=True)
        self.loss_sum, self.token_count, self.padding = 0.0, 0, Padding()
        self.counted = list(self.skipped), dict(self.truncated)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss per supervised token of the validation sources, `<source>/loss`."""
        loss, tokens = token_loss(self.model(batch), batch.labels)
        name = list(self.trainer.datamodule.validation)[dataloader_idx]
        self.log(
            f"{name}/loss",
            loss / tokens.clamp_min(1),
            batch_size=int(tokens),
            prog_bar=dataloader_idx == 0,
            add_dataloader_idx=False,
            sync_dist=True,
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """See `AdamWCosine`."""
        return self.optim.build(self.model, self.trainer.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What was skipped and truncated until the last whole step goes with the weights."""
        checkpoint["skipped"], checkpoint["truncated"] = self.counted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint between two micro batches goes on from the last whole step, whose number the sampler knows."""
        self.configure_model()
        self.skipped = [tuple(skip) for skip in checkpoint.get("skipped", [])]
        self.truncated = dict(checkpoint.get("truncated", {}))
        self.counted = list(self.skipped), dict(self.truncated)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for count in ("ready", "started", "processed", "completed"):
            progress["current"][count] = progress["total"][count] = done
        progress["is_last_batch"] = False


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token summed over the supervised ones, and their number. logits (B, T, V), labels (B, T)."""
    targets = labels[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")
    return loss, (targets != -100).sum()
