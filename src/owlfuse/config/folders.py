"""Where configuration lies:

`configs/` (groups) and `experiments/`, ours and the user's. Imports nothing heavy.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from owlfuse.config.recipes import read_stages

EXPERIMENTS = "experiments"  # Hydra's name for the group that `experiment=<name>` chooses from
# experiments/<recipe>/recipe.yaml holds stages, which are experiments `<recipe>/<stage>`
RECIPE = "recipe"
ABLATION = "ablation"  # experiments/<name>/ablation.yaml holds factors and seeds


@dataclass(frozen=True)
class ConfigFolders:
    """Folders of groups and of experiments; of two files with one name the first folder's
    counts."""

    configs: tuple[Path, ...]
    experiments: tuple[Path, ...] = ()
    root: str = "train"  # the root file's name in configs[0]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Each group and its options: {"model/fusion": ["concat", ...]}, without the
        experiments."""
        groups: dict[str, set[str]] = {}
        for name in _yamls(self.configs):
            group, _, option = name.rpartition("/")
            if group:
                groups.setdefault(group, set()).add(option)
        return {group: sorted(groups[group]) for group in sorted(groups)}

    @cached_property
    def experiment_names(self) -> list[str]:
        """Names as experiment=<name> takes them, in subfolders as `folder/name`, without recipes
        and ablations."""
        names = _yamls(self.experiments)
        return sorted(name for name in names if name.rpartition("/")[2] not in (RECIPE, ABLATION))

    @cached_property
    def recipe_names(self) -> list[str]:
        """Names as `owlfuse recipe <name>` takes them."""
        return self._folders_of(RECIPE)

    @cached_property
    def ablation_names(self) -> list[str]:
        """Names as `owlfuse ablate <name>` takes them."""
        return self._folders_of(ABLATION)

    def recipe(self, name: str) -> Path | None:
        """The file of a recipe."""
        return next(
            (
                path
                for folder in self.experiments
                if (path := folder / name / f"{RECIPE}.yaml").is_file()
            ),
            None,
        )

    def ablation(self, name: str) -> Path | None:
        """The file of an ablation."""
        return next(
            (
                path
                for folder in self.experiments
                if (path := folder / name / f"{ABLATION}.yaml").is_file()
            ),
            None,
        )

    def _folders_of(self, file: str) -> list[str]:
        return sorted(
            name.rpartition("/")[0]
            for name in _yamls(self.experiments)
            if name.rpartition("/")[2] == file
        )

    def stage(self, config_path: str) -> dict[str, Any] | None:
        """The content of "experiments/<recipe>/<stage>", which a recipe's file holds; None where
        there is none, or where the name has a file of its own. Raises ConfigError for a recipe that
        cannot be read."""
        head, _, rest = config_path.partition("/")
        recipe, _, stage = rest.rpartition("/")
        file = self.recipe(recipe) if head == EXPERIMENTS and recipe else None
        if file is None or self._own_file(config_path):
            return None

        return read_stages(file).get(stage)

    def stage_names(self, recipe: str) -> list[str]:
        """The stages of a recipe in order; none where there is no such recipe."""
        file = self.recipe(recipe) if recipe else None
        return list(read_stages(file)) if file else []

    def options(self, group: str) -> list[str]:
        return self.experiment_names if group == EXPERIMENTS else self.groups.get(group, [])

    def get_group_options(self, group_name: str, results_filter: object = None) -> list[str]:
        """`options` under the name that Hydra's glob(...) asks for."""
        return self.options(EXPERIMENTS if group_name == "experiment" else group_name)

    def file(self, config_path: str) -> Path | None:
        """The file of one entry of a defaults list: "model/fusion/concat",
        "experiments/shapes_owl1" or "train". That of a recipe's stage is the recipe's."""
        own = self._own_file(config_path)
        if own is None and self.stage(config_path) is not None:
            return self.recipe(config_path.partition("/")[2].rpartition("/")[0])
        return own

    def _own_file(self, config_path: str) -> Path | None:
        head, _, rest = config_path.partition("/")
        folders, name = (
            (self.experiments, rest) if head == EXPERIMENTS else (self.configs, config_path)
        )
        return next(
            (path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None
        )


def find_folders(config_dir: str | Path | None = None) -> ConfigFolders:
    """The package's or the repository's folders, then those of the working folder.

    With `config_dir` only it and the `experiments` beside it.
    """
    if config_dir is not None:
        roots = [Path(config_dir).resolve()]
    else:
        package = Path(__file__).resolve().parents[1]
        ours = package if (package / "configs").is_dir() else package.parents[1]
        roots = list(dict.fromkeys([ours / "configs", Path.cwd().resolve() / "configs"]))
    experiments = [root.parent / EXPERIMENTS for root in roots]
    return ConfigFolders(
        configs=tuple(roots[:1] + [root for root in roots[1:] if root.is_dir()]),
        experiments=tuple(folder for folder in experiments if folder.is_dir()),
    )


def _yamls(folders: tuple[Path, ...]) -> set[str]:
    return {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in folders
        for path in folder.rglob("*.yaml")
    }
