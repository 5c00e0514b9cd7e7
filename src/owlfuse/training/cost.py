"""What a run costs, measured beside its steps: tokens a second, peak memory, and how far it is."""

from __future__ import annotations

import statistics
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from owlfuse.core.files import read_json_if_there, write_json
from owlfuse.core.types import Batch
from owlfuse.model.quantization import count_parameters
from owlfuse.parallel.collectives import data_ranks

PROGRESS = "progress.json"
KEPT = 2000
"""Steps that the median is taken of, the last ones."""


class Cost(Callback):
    """Measures training, and writes `progress.json` of the run's folder about once a second.

    A token is a real one of text: neither padding nor a position that an image takes, so that
    fusions with different numbers of visual tokens are measured by the same work. Memory on a CPU
    is the peak of the process's resident memory in training less what it had before the model was
    built (data workers apart); on a GPU it is torch's peak of allocated memory.
    """

    def __init__(self) -> None:
        self.before = 0
        self.tokens: Any = 0
        self.steps: deque[tuple[float, Any]] = deque(maxlen=KEPT)
        self.began = self.written = 0.0
        self.cost: dict[str, Any] = {}

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Before the model is built."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        # The peak of the imports must not count as that of training.
        reset_peak()
        self.before = resident("VmRSS")

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A run that goes on has what it measured before, one of which all steps are done too; its
        own measure takes its place where it has steps enough."""
        progress = read_json_if_there(Path(trainer.default_root_dir) / PROGRESS)
        self.cost = progress.get("cost", {})

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The first step begins."""
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Counts the tokens; after an optimizer step, notes its time."""
        # It stays a tensor: reading it would have every micro batch wait for the device.
        self.tokens = self.tokens + batch.attention_mask.sum() - batch.placeholder.sum()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = time.perf_counter()
        self.steps.append((now - self.began, self.tokens))
        self.tokens, self.began = 0, now
        if trainer.is_global_zero and now - self.written > 1:
            self.write(trainer)

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """What was measured until then is kept for the run that goes on."""
        if trainer.is_global_zero and self.steps:
            self.on_fit_end(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Works out the cost, before the model is moved or evaluated."""
        model = getattr(module, "model", None)
        if model is None:
            return
        self.cost |= {
            "trained_parameters": model.trained_count(),
            "parameters": count_parameters(model),
        }
        if (speed := self.tokens_per_s(data_ranks(trainer))) is not None:
            self.cost["tokens_per_s"] = speed
        device = trainer.strategy.root_device
        on_gpu = device.type == "cuda"
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device)
        else:
            peak = max(0, resident("VmHWM") - self.before)
        measure = "allocated on the GPU" if on_gpu else "resident, less before the model was built"
        if self.steps:  # else it is the memory that loading takes
            # A run that goes on may have needed more before it was stopped.
            if self.cost.get("peak_memory_of") == measure:
                peak = max(peak, self.cost.get("peak_memory_bytes") or 0)
            self.cost |= {"peak_memory_bytes": peak, "peak_memory_of": measure}
        if trainer.is_global_zero:
            self.write(trainer)

    def tokens_per_s(self, ranks: int) -> float | None:
        """The median over optimizer steps after the first tenth of them, at least one and at most
        10; times the ranks, whose rows are like this one's. None without two steps."""
        # The first steps take longer: they allocate memory and choose kernels.
        warm = min(10, max(1, len(self.steps) // 10))
        rates = [
            float(tokens) / seconds for seconds, tokens in list(self.steps)[warm:] if seconds > 0
        ]
        return round(statistics.median(rates) * ranks, 1) if rates else None

    def write(self, trainer: Trainer) -> None:
        """`progress.json`, written atomically."""
        self.written = time.perf_counter()
        path = Path(trainer.default_root_dir) / PROGRESS
        progress = {"step": trainer.global_step, "steps": trainer.max_steps, "cost": self.cost}
        with suppress(OSError):  # a full disk is told by what must be written
            write_json(path, progress)


def resident(name: str) -> int:
    """Bytes of this process's memory in RAM by its name in /proc:

    VmRSS now, VmHWM at its peak. 0 where there is no /proc.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> None:
    """VmHWM begins anew, where Linux lets it; else it holds the imports' peak too."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
