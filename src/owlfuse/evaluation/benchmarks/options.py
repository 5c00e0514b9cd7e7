"""The options of `owlfuse eval MODEL task=<name>`.

Imports nothing heavy, so that mistakes are reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omegaconf import DictConfig

from owlfuse.config.build import to_dict
from owlfuse.config.check import check_arguments
from owlfuse.config.compose import compose_root, origin_of
from owlfuse.config.messages import check_name
from owlfuse.core.errors import ConfigError


@dataclass(kw_only=True)
class Options:
    """The keys of eval.yaml.

    Args:
        name: of the results; None: the task's.
        out: the folder for `<name>.json` and `<name>/predictions.jsonl`; None: `tasks` in the
            model's.
        batch_size: questions answered at a time on each rank; it does not change the answers in
            float32.
        max_questions: a seeded sample, of each group in proportion; None: all.
        dtype: `float32`; or `saved`: as the model's folder has its weights.
        thinking: prompts ask for a thought before the answer, which is scored without it.
        workers: processes of each rank that open pictures; 0: its own.
        which: of a run's checkpoints, `last`, or `best` by validation loss.
    """

    task: dict
    name: str | None
    out: str | None
    batch_size: int
    max_questions: int | None
    dtype: Literal["float32", "saved"]
    workers: int
    thinking: bool = False
    which: str = "last"

    def __post_init__(self) -> None:
        if (
            self.batch_size < 1
            or self.workers < 0
            or (self.max_questions is not None and self.max_questions < 1)
        ):
            raise ConfigError(
                "command line: batch_size and max_questions are at least 1, and workers at least 0"
            )


def compose_options(words: list[str]) -> tuple[Options, DictConfig]:
    """Returns eval.yaml with the overrides, as options and as a configuration with the benchmark's
    node.

    Raises ConfigError.
    """
    config = compose_root("eval", words)
    plain = to_dict(config)
    tasks = [word.removeprefix("task=") for word in words if word.startswith("task=")]
    if len(tasks) > 1:
        raise ConfigError(
            f"command line: task= is given {len(tasks)} times, and one benchmark is evaluated at a "
            "time"
        )
    chosen = tasks[0].strip("'\"").replace("/", "_")
    # a task may lie in a subfolder of the group, and results are a file in one folder
    plain["name"] = chosen if plain["name"] is None else str(plain["name"])
    check_arguments(Options, "", "", plain, lambda path: origin_of(config, path))
    check_name(f"{origin_of(config, 'name')}: name", plain["name"])
    return Options(**plain), config
