"""Experiments as Hydra finds them: files, and the stages of recipes."""

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from owlfuse.config_files import EXPERIMENTS, ConfigFolders


class ExperimentSource(FileConfigSource):
    """A folder as Hydra's group `experiments`; its files are for the root (`@package _global_`) unless they say otherwise.
    The stages of `<recipe>/recipe.yaml` are files too, `<recipe>/<stage>`."""

    @staticmethod
    def scheme() -> str:
        return "experiments"

    def load_config(self, config_path: str) -> ConfigResult:
        if (stage := self._stage(config_path)) is not None:
            where = f"{self.scheme()}://{self.path}"
            return ConfigResult(self.provider, where, OmegaConf.create(stage), header={"package": "_global_"})
        result = super().load_config(self._inside(config_path))
        result.header["package"] = result.header["package"] or "_global_"
        return result

    def is_group(self, config_path: str) -> bool:
        return config_path == "" or (_is_experiment(config_path) and super().is_group(self._inside(config_path)))

    def is_config(self, config_path: str) -> bool:
        if not _is_experiment(config_path):
            return False
        return super().is_config(self._inside(config_path)) or self._stage(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> "list[str]":
        return super().list(self._inside(config_path), results_filter) if _is_experiment(config_path) else []

    def _stage(self, config_path: str) -> dict[str, Any] | None:
        return ConfigFolders(configs=(), experiments=(Path(self.path),)).stage(config_path)

    @staticmethod
    def _inside(config_path: str) -> str:
        return config_path.partition("/")[2]


def _is_experiment(config_path: str) -> bool:
    return config_path.split("/")[0] == EXPERIMENTS
