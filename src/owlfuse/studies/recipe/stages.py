"""The stages of a recipe, each with its model on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig

from owlfuse.config.build import build, to_dict
from owlfuse.config.compose import naming_part
from owlfuse.config.identity import UNLEARNED_KEYS
from owlfuse.config.messages import naming
from owlfuse.config.recipes import PARTS
from owlfuse.core.errors import ConfigError
from owlfuse.model.adapters import PartSummary
from owlfuse.model.multimodal import MultimodalLM, on_meta
from owlfuse.model.parts import compute_only, essential, loading_options
from owlfuse.studies.recipe.compose import compose_stages

MOVABLE_KEYS = (
    "accept_changed_data",
    "trainer.devices",
    "trainer.num_nodes",
    "data.micro_batch_size",
    *UNLEARNED_KEYS,
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
        """The folder of the run."""
        return Path(self.config.runs).expanduser() / self.config.experiment / self.config.name

    @property
    def weights(self) -> Path:
        """The export that the next stage starts from. It appears at once, at the stage's end."""
        return self.folder / "export"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.weights / "config.json").exists()  # the export is atomic


def make_stages(recipe: str, words: list[str]) -> list[Stage]:
    """Return all stages, composed and checked on the meta device; no weight is made or loaded.

    Raises ConfigError.
    """
    configs = compose_stages(recipe, words)
    for (earlier, before), (later, config) in pairwise(configs.items()):
        check_chain(earlier, before, later, config)
    stages = []
    for name, config in configs.items():
        with naming(f"stage {name}"), naming_part(config):
            plan, parts = on_meta(to_dict(config.model), vocab_size=1024)
            # Their arguments are checked by building them; they need no model.
            build(config.optim)
            build(config.evaluation)
        stages.append(Stage(name, config, plan, parts))
    return stages


def check_chain(earlier: str, before: DictConfig, later: str, config: DictConfig) -> None:
    """Checks that the parts are those of the stage before, whose weights they take: but for how
    they compute, where weights come from, and the size of pictures. Raises ConfigError."""
    for part in PARTS:
        old, new = to_dict(before.model[part]), to_dict(config.model[part])
        # Position embeddings are resampled where pictures have another size.
        free = compute_only(new) | loading_options(new) | {"image_size"}
        # An export has plain weights, and each stage says how it holds the LLM's.
        if part == "llm":
            free |= {"quantization"}
        for key in sorted({*old, *new} - free):
            if essential(old.get(key)) != essential(new.get(key)):
                raise ConfigError(
                    f"stage {later}: model.{part}.{key} is {new.get(key)}, and {old.get(key)} in "
                    f"stage {earlier}, "
                    "whose weights it starts from; set it in the base"
                )


def check_data(stage: Stage) -> None:
    """Opens the data of a stage, so that a file that is missing is reported before an earlier
    stage has trained for days."""
    with naming(f"stage {stage.name}"), naming_part(stage.config):
        data = build(stage.config.data)
        # Lengths count the positions of images, and steps depend on lengths.
        data.bind(stage.plan.vision.preprocessing, stage.plan.fusion.tokens_per_image)
        data.steps(stage.config.trainer.max_steps)
