"""The stages of a recipe, each with its model on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import place
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.model.adapters import PartSummary
from owlfuse.model.multimodal import MultimodalLM, on_meta
from owlfuse.studies.recipe.compose import compose_stages

MOVABLE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.log_every_n_steps",
    "data.workers",
    "data.micro_batch_size",
)
"""Keys that may change when a recipe goes on: they do not change what is learned."""


@dataclass
class Stage:
    """One run of a recipe."""

    name: str
    config: DictConfig
    plan: MultimodalLM
    """The stage's model on the meta device."""
    parts: list[PartSummary]
    """What of each part is trained, and how."""

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.runs).expanduser() / self.config.experiment / self.config.name

    @property
    def weights(self) -> Path:
        """What the next stage starts from. It appears whole, at the stage's end."""
        return self.folder / "export"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.weights / "config.json").exists()


def make_stages(recipe: str, words: list[str]) -> list[Stage]:
    """All stages, composed and checked on the meta device; no weight is made or loaded.

    Raises ConfigError.
    """
    return [make_stage(name, config) for name, config in compose_stages(recipe, words).items()]


def make_stage(name: str, config: DictConfig) -> Stage:
    """One stage, its parts checked by themselves."""
    try:
        plan, parts = on_meta(to_dict(config.model), vocab_size=1024)
        build(config.optim), build(config.evaluation)
    except ValueError as error:
        raise ConfigError(f"stage {name}: {place(config, str(error))}") from error
    return Stage(name, config, plan, parts)


def check_data(stage: Stage) -> None:
    """Opens the data of a stage, so that a file that is missing is told before an earlier stage
    has trained for days."""
    try:
        data = build(stage.config.data)
        data.bind(stage.plan.vision.preprocessing, stage.plan.fusion.tokens_per_image)
        data.steps(stage.config.trainer.max_steps)
    except DataError as error:
        raise DataError(f"stage {stage.name}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"stage {stage.name}: {place(stage.config, str(error))}") from error
