"""What libraries say that a user of a command can do nothing about. Nothing changes where owlfuse is only imported."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("lightning.pytorch", "lightning.fabric")
"""Their warnings stay. What is below a warning tells which accelerators there are, advertises, and repeats the commands."""
MESSAGES = (
    r"The '.*' does not have many workers",  # data.workers is the user's choice, and the step time shows what it costs
    r"Consider setting `persistent_workers=True`",  # a run is one epoch, so that its workers live as long
    r"Experiment logs directory .* exists and is not empty",  # two loggers write into the run's folder
    r"You're resuming from a checkpoint that ended before the epoch ended",  # the sampler goes on where it was
)
"""Beginnings of Lightning's warnings about what owlfuse does on purpose."""
LIBRARIES = r"(lightning|torch|torchvision|transformers|huggingface_hub|peft|timm|accelerate|hydra|omegaconf)\b"
"""Whose calls of what will be no more are for their makers to change."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, libraries neither advertise nor tell of what a user cannot change; what a user can act on they say as ever. Lines
    come in the order in which they were printed where output goes into a file, too. It decorates the functions behind the
    commands."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    with warnings.catch_warnings():
        for message in MESSAGES:
            warnings.filterwarnings("ignore", message, UserWarning)
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", "", category, LIBRARIES)
        for logger in loggers:
            logger.setLevel(max(logging.WARNING, logger.level))
        if bars:
            hide_weight_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()


def hide_weight_bars() -> None:
    """No bars of weights that are read from or written to the disk. Those of downloads, which take minutes, stay: transformers
    can only turn off both."""
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    utils.enable_progress_bars()
