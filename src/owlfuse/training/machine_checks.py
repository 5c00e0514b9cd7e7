"""What of the key `trainer` cannot work, told before data are read and a weight is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from omegaconf import DictConfig

from owlfuse.artifacts.runs import is_first_rank
from owlfuse.config.build import to_dict
from owlfuse.config.compose import origin_of
from owlfuse.core.environment import is_launched
from owlfuse.core.errors import ConfigError
from owlfuse.data.mixture.lengths import usable_cores
from owlfuse.parallel.torchrun import torchrun_processes

REFUSALS = (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError)
"""What Lightning's Trainer raises for arguments that do not fit together, and for a library that
a strategy lacks."""


def refuse(config: DictConfig, key: str, message: str) -> ConfigError:
    """The error about a key of `trainer`, with the file that sets it."""
    path = f"trainer.{key}"
    return ConfigError(f"{origin_of(config, path)}: {path} is {config.trainer.get(key)}: {message}")


def check_machine(config: DictConfig) -> str | None:
    """What the user is to be told of processes that are started on the CPU in the place of GPUs;
    None where there are none.

    Raises:
        ConfigError: this machine does not have the accelerator or as many devices; a variable of
            the environment that changes the training.
    """
    check_environment(os.environ)
    trainer = to_dict(config.trainer)
    name, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    unchecked = ["auto", "cpu"]
    has_mps = torch.backends.mps.is_available()
    if has_mps:
        # Lightning takes `gpu` for Apple's GPU where there is one.
        unchecked += ["gpu", "mps"]
    if isinstance(name, str) and name not in unchecked:
        check_available(config, name, gpus)
    if gpus and name in ("auto", "gpu", "cuda"):
        check_gpus(config, devices, gpus)
    # Who asks for the CPU may have as many processes there as they like; `auto` was meant for
    # GPUs.
    elif name == "auto" and not has_mps:
        return check_processes(config, devices)
    return None


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for a variable by which Lightning sets an argument of its Trainer, which
    no config.yaml would tell."""
    for name in sorted(environment):
        if name.startswith("PL_TRAINER_") and environment[name]:
            key = name.removeprefix("PL_TRAINER_").lower()
            raise ConfigError(
                f"environment: {name}={environment[name]}: Lightning would take it, and the run's "
                f"config.yaml would not have it; unset it, and write +trainer.{key}="
            )


def check_available(config: DictConfig, name: str, gpus: int) -> None:
    """Raises ConfigError for an accelerator that is unknown or not there."""
    if name in ("gpu", "cuda"):
        if not gpus:
            instead = "write trainer=cpu, or trainer.accelerator=cpu trainer.precision=32-true"
            raise refuse(
                config,
                "accelerator",
                f"torch finds no GPU on this machine; to train on the CPU, {instead}",
            )
        return
    accelerators = AcceleratorRegistry.available_accelerators()
    if name not in accelerators:
        raise refuse(
            config, "accelerator", f"expected one of auto, gpu, {', '.join(sorted(accelerators))}"
        )
    if not AcceleratorRegistry[name]["accelerator"].is_available():
        raise refuse(
            config,
            "accelerator",
            "torch finds no such device on this machine; to train on the CPU, write trainer=cpu",
        )


def check_gpus(config: DictConfig, devices: Any, gpus: int) -> None:
    """Raises ConfigError for more GPUs than there are."""
    # `auto` and -1 take the GPUs that there are.
    count = int(devices) if str(devices).isdecimal() else 0
    if isinstance(devices, list):
        count = len(devices)
    if count > gpus:
        raise refuse(config, "devices", f"this machine has {gpus} GPU{'s' * (gpus != 1)}")


def check_processes(config: DictConfig, devices: Any) -> str | None:
    """What to tell of a run that takes what there is, on a machine without a GPU. Raises
    ConfigError for more processes than cores."""
    # A process that was started by a launcher, or by the first one, is no news to the user.
    if not str(devices).isdecimal() or int(devices) < 2 or is_launched():
        return None
    count, cores = int(devices), usable_cores()
    if count > cores:
        raise refuse(
            config,
            "devices",
            f"there is no GPU, and this machine has {cores} CPU core{'s' * (cores != 1)}; take at "
            "most as many devices, or say "
            "trainer.accelerator=cpu to start as many processes on them all the same",
        )
    return f"there is no GPU: trainer.devices={count} starts {count} processes on the CPU"


def check_launcher(trainer: Trainer, config: DictConfig) -> None:
    """Raises ConfigError for other processes than the trainer has, and for several machines where
    nothing has started this process on each of them."""
    count = trainer.num_nodes * trainer.num_devices
    started = torchrun_processes() or count
    # Each would train by itself, into the same folder.
    if started != count or (trainer.world_size == 1 and not is_first_rank()):
        raise refuse(
            config,
            "devices",
            f"a launcher has started this process as one of several (RANK is "
            f"{os.environ.get('RANK', 'not set')}, WORLD_SIZE {os.environ.get('WORLD_SIZE', 1)}), "
            f"and the trainer has {count}; write trainer=ddp trainer.devices=<processes of a "
            "machine>, or unset these variables",
        )
    environment = None
    if isinstance(trainer.strategy, ParallelStrategy):
        environment = trainer.strategy.cluster_environment
    # In a batch script without srun these are the tasks that were asked for, and no processes.
    if isinstance(environment, SLURMEnvironment) and environment.world_size() != count:
        raise refuse(
            config,
            "devices",
            f"SLURM has {environment.world_size()} tasks (SLURM_NTASKS), and the trainer has "
            f"{count} processes and leaves their start to it; start as many tasks by srun, or set "
            "SLURM_JOB_NAME=interactive, and the first process starts the others",
        )
    # Lightning's own environment starts the processes of one machine; whoever starts them by hand
    # on several says which machine it is by NODE_RANK.
    if (
        trainer.num_nodes > 1
        and isinstance(environment, LightningEnvironment)
        and "NODE_RANK" not in os.environ
    ):
        raise refuse(
            config,
            "num_nodes",
            "nothing has started this process on several machines, so it would wait for the "
            "others in vain; start it on each "
            "by torchrun or SLURM (docs/scaling.md), or leave num_nodes at 1",
        )
