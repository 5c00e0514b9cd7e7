"""Lightning strategies for several processes, replicated or sharded."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

from lightning import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.optim import Optimizer

from owlfuse.core.checkpoint_files import partial_path, remove_checkpoint
from owlfuse.core.errors import DataError, first_line
from owlfuse.model.layouts import names_in_float32
from owlfuse.model.multimodal import MultimodalLM
from owlfuse.parallel.checkpoints import (
    CheckpointWriter,
    leave,
    load_shards,
    naming_checkpoint,
    new_gloo_group,
    optimizer_by_name,
    raised_on_every_rank,
    shards_writer,
)

TIMEOUT_MINUTES = 10.0
EXIT_SECONDS = 0.3  # for gloo's threads to let go of the last collective's tensors


class Replicated(DDPStrategy):
    """Every rank has the whole model and its own rows (DDP).

    Args:
        timeout_minutes: a rank that waits for longer ends the run.
    """

    def __init__(self, timeout_minutes: float = TIMEOUT_MINUTES) -> None:
        # as views into DDP's buckets gradients are in memory once, and not twice
        super().__init__(timeout=timedelta(minutes=timeout_minutes), gradient_as_bucket_view=True)

    def setup_environment(self) -> None:
        """See Lightning's."""
        delay_exit()
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Has the first rank write a file; raises on every rank what fails there."""
        with raised_on_every_rank(self):
            super().save_checkpoint(checkpoint, filepath, storage_options)


class Sharded(ModelParallelStrategy):
    """Parameters, gradients and optimizer state are shared out: over `data` ranks that have rows of
    their own (FSDP2), and over `tensor` ranks that compute on the same rows (tensor parallelism).
    Their product is the number of processes.

    Args:
        data: ranks, or `auto`: all processes over `tensor`.
        tensor: ranks, or `auto`: all processes over `data`. It divides the LLM's heads and
            key-value heads.
        timeout_minutes: a rank that waits for longer ends the run.
    """

    def __init__(
        self,
        data: int | Literal["auto"] = "auto",
        tensor: int | Literal["auto"] = 1,
        timeout_minutes: float = TIMEOUT_MINUTES,
    ) -> None:
        if data == tensor == "auto":
            raise ValueError("data and tensor are both auto; give a number for one of them")
        super().__init__(data, tensor, timeout=timedelta(minutes=timeout_minutes))
        self.writer = CheckpointWriter()
        self.checkpoint_io = self.writer
        self.side: Any = None

    def sizes(self) -> tuple[int, int]:
        """Data and tensor ranks.

        Raises ValueError where their product is not the number of processes.
        """
        ranks = self.num_nodes * self.num_processes
        data, tensor = cast(
            "tuple[Any, Any]", (self._data_parallel_size, self._tensor_parallel_size)
        )
        data = ranks // tensor if data == "auto" else data
        tensor = ranks // data if tensor == "auto" else tensor
        if data * tensor != ranks:
            raise ValueError(
                f"trainer.strategy: {data} data x {tensor} tensor ranks are {data * tensor} "
                f"processes, and there are {ranks} "
                f"(devices {self.num_processes} x num_nodes {self.num_nodes})"
            )
        return data, tensor

    def setup_environment(self) -> None:
        """See Lightning's; `auto` is worked out here."""
        self._data_parallel_size, self._tensor_parallel_size = self.sizes()
        delay_exit()
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """See `optimizer_by_name`."""
        return optimizer_by_name(cast("nn.Module", self.model), optimizer)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A folder: see `load_shards`, and what it raises."""
        model = cast("nn.Module", self.model)
        return load_shards(model, self.optimizers, Path(checkpoint_path))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a folder of shards; raises on every rank what fails on any. With the
        `storage_options` `BACKGROUND` it returns when the state is copied."""
        path, first = Path(self.broadcast(filepath)), self.is_global_zero
        part, background = partial_path(path), bool(storage_options)
        if background and self.side is None:
            self.side = new_gloo_group(strategy_timeout(self))
        with raised_on_every_rank(self):
            # The write before may have failed, and at most one copy is in memory.
            self.writer.wait()
            if first:
                with naming_checkpoint(path):
                    remove_checkpoint(part)
                    part.mkdir(parents=True)
        with raised_on_every_rank(self):
            # The folder is there by now on every rank: the block before ends on all together.
            write = shards_writer(checkpoint, part, first, self.side if background else None)
            self.writer.write(path, write, background, commits=first)

    def teardown(self) -> None:
        """See Lightning's; a write in the background is finished first."""
        # first, since the write needs the group
        self.writer.teardown()
        if self.side is not None:
            leave(self.side)
            self.side = None
        super().teardown()


def delay_exit() -> None:
    """Has this process wait a moment before it ends, once. Python's end under gloo's threads aborts
    a process that is done, one in eight of those that end right after a collective (pytorch
    #179291); the others are then ended as if it had failed."""
    # for a process that makes several strategies
    atexit.unregister(time.sleep)
    atexit.register(time.sleep, EXIT_SECONDS)


@contextmanager
def rank_timeouts_as_data_errors(trainer: Trainer) -> Iterator[None]:
    """A rank that waits in vain for another ends with a DataError that names the step, and not
    in a backend's words alone."""
    try:
        yield
    except RuntimeError as error:
        if trainer.world_size == 1:  # which waits for nobody: a data worker's or a kernel's time
            raise
        # Backends have no class for it: gloo and NCCL raise a RuntimeError with words of their own.
        reason = first_line(error)
        if not any(
            word in reason.lower()
            for word in ("timed out", "timeout", "connection closed", "connection reset")
        ):
            raise
        raise DataError(
            f"rank {trainer.global_rank} waited in vain for another rank after step "
            f"{trainer.global_step} ({reason[-120:]}); "
            f"see what the others say, and go on with resume={trainer.default_root_dir}"
        ) from error


def check_strategy(trainer: Trainer, model: MultimodalLM, checkpoint: Path | None) -> None:
    """Raises ValueError for a strategy under which gradients or weights are not where training
    looks for them, heads that the tensor ranks do not divide, or shards that the strategy does not
    read."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | Sharded):
        raise ValueError(
            f"trainer.strategy: {type(trainer.strategy).__name__} keeps weights or gradients "
            "otherwise than owlfuse decays, clips and divides them; take trainer=ddp, or "
            "trainer=fsdp to shard"
        )
    if isinstance(trainer.strategy, Sharded):
        tensor_ranks = trainer.strategy.sizes()[1]
        model.check_split(tensor_ranks)
        if trainer.precision == "16-mixed" and tensor_ranks > 1:
            # torch's GradScaler asks the ranks of the first gradient's mesh alone
            raise ValueError(
                "trainer.precision: tensor ranks do not tell each other of gradients beyond "
                "float16, and would drift apart; take bf16-mixed, or trainer=fsdp"
            )
        in_float32 = names_in_float32(model.llm, strict=trainer.precision != "16-true")
        if in_float32 and trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision: of {type(model.llm).__name__} transformers keeps "
                f"{min(in_float32)} and {len(in_float32) - 1} more in 32 bits, and sharding takes "
                "one type of a layer; take bf16-mixed"
            )
        if checkpoint is not None and checkpoint.is_file():
            # Lightning counts its optimizer's parameters over the model, and ours are by groups.
            raise ValueError(
                f"resume: {checkpoint} is not sharded, and this trainer is; go on without "
                "trainer.strategy, or begin another run, from this one's weights by init_from= of "
                "its export"
            )
    if checkpoint is not None and checkpoint.is_dir() and not isinstance(trainer.strategy, Sharded):
        raise ValueError(
            f"resume: {checkpoint} is sharded, and this trainer is not; change trainer.devices "
            "and trainer.strategy alone"
        )


def strategy_timeout(strategy: Any) -> timedelta:
    """Returns how long a rank of a strategy waits for the others."""
    # Private in Lightning, whose strategies of several processes all have it and offer no other.
    return getattr(strategy, "_timeout", None) or timedelta(minutes=TIMEOUT_MINUTES)
