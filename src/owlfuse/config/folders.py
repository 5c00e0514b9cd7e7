"""The folders of configuration: `configs/` (groups) and `experiments/`, of owlfuse and of the user.
Imports nothing heavy."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from owlfuse.config.recipes import read_stages, read_yaml
from owlfuse.core.errors import ConfigError, label

EXPERIMENTS = "experiments"  # Hydra's name for the group that `experiment=<name>` chooses from
# experiments/<recipe>/recipe.yaml holds stages, which are experiments `<recipe>/<stage>`
RECIPE = "recipe"
ABLATION = "ablation"  # experiments/<name>/ablation.yaml holds factors and seeds


@dataclass(frozen=True)
class ConfigFolders:
    """Folders of groups and of experiments. Two different files of one name are refused where one
    of them is asked for."""

    configs: tuple[Path, ...]
    experiments: tuple[Path, ...] = ()
    root: str = "train"  # the root file's name in configs[0]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The options of each group: {"model/fusion": ["concat", ...]}, without the experiments."""
        groups: dict[str, set[str]] = {}
        for name in _yamls(self.configs):
            group, _, option = name.rpartition("/")
            if group:
                groups.setdefault(group, set()).add(option)
        return {group: sorted(groups[group]) for group in sorted(groups)}

    @cached_property
    def experiment_names(self) -> list[str]:
        """Names for experiment=<name>, in subfolders as `folder/name`, without recipes and
        ablations."""
        experiments = []
        for name in _yamls(self.experiments):
            if name.rpartition("/")[2] not in (RECIPE, ABLATION):
                experiments.append(name)
        return sorted(experiments)

    @cached_property
    def recipe_names(self) -> list[str]:
        """Names for `owlfuse recipe <name>`."""
        return self._folders_with(RECIPE)

    @cached_property
    def ablation_names(self) -> list[str]:
        """Names for `owlfuse ablate <name>`."""
        return self._folders_with(ABLATION)

    def recipe(self, name: str) -> Path | None:
        """Return the file of a recipe."""
        return _first_file(self.experiments, f"{name}/{RECIPE}.yaml")

    def ablation(self, name: str) -> Path | None:
        """Return the file of an ablation."""
        return _first_file(self.experiments, f"{name}/{ABLATION}.yaml")

    def _folders_with(self, stem: str) -> list[str]:
        names = [name.rpartition("/") for name in _yamls(self.experiments)]
        return sorted(folder for folder, _, file_stem in names if file_stem == stem)

    def stage(self, config_path: str) -> dict[str, Any] | None:
        """Return the content of "experiments/<recipe>/<stage>" in a recipe's file; None where there
        is none, or where the name has a file of its own. Raises ConfigError for a recipe that
        cannot be read."""
        group, _, name = config_path.partition("/")
        recipe, _, stage = name.rpartition("/")
        file = self.recipe(recipe) if group == EXPERIMENTS and recipe else None
        if file is None or self._single_file(config_path):
            return None
        return read_stages(file).get(stage)

    def stage_names(self, recipe: str) -> list[str]:
        """Return the stages of a recipe in order; none where there is no such recipe."""
        file = self.recipe(recipe) if recipe else None
        return list(read_stages(file)) if file else []

    def options(self, group: str) -> list[str]:
        """Return the options of a group, or the names of experiments."""
        return self.experiment_names if group == EXPERIMENTS else self.groups.get(group, [])

    def get_group_options(self, group_name: str, results_filter: object = None) -> list[str]:
        """Return `options`, under the name that Hydra's glob(...) calls."""
        return self.options(EXPERIMENTS if group_name == "experiment" else group_name)

    def file(self, config_path: str) -> Path | None:
        """Return the file of one entry of a defaults list: "model/fusion/concat",
        "experiments/shapes_owl1" or "train". That of a recipe's stage is the recipe's."""
        file = self._single_file(config_path)
        if file is None and self.stage(config_path) is not None:
            name = config_path.partition("/")[2]
            return self.recipe(name.rpartition("/")[0])
        return file

    def content(self, config_path: str, file: Path) -> Any:
        """Return the content of one entry of a defaults list in its file, unresolved: all of the
        file, or of a recipe's only the stage."""
        stage = self.stage(config_path)
        return read_yaml(file) if stage is None else stage

    def _single_file(self, config_path: str) -> Path | None:
        """Return the yaml that holds this entry alone."""
        group, _, name = config_path.partition("/")
        if group == EXPERIMENTS:
            return _first_file(self.experiments, f"{name}.yaml")
        return _first_file(self.configs, f"{config_path}.yaml")


def find_folders(config_dir: str | Path | None = None) -> ConfigFolders:
    """Return the package's or the repository's folders, then those of the working folder.

    With `config_dir` only it and the `experiments` beside it.
    """
    if config_dir is not None:
        roots = [Path(config_dir).resolve()]
    else:
        package = Path(__file__).resolve().parents[1]
        # A wheel has the configuration in the package, a checkout at its top.
        base = package if (package / "configs").is_dir() else package.parents[1]
        roots = [base / "configs"]
        working_root = Path.cwd().resolve() / "configs"
        # In a checkout it is the folder of the repository.
        if working_root not in roots:
            roots.append(working_root)
    experiments = [root.parent / EXPERIMENTS for root in roots]
    return ConfigFolders(
        # Without the first, there is nothing to compose: Hydra's error names it.
        configs=(roots[0], *filter(Path.is_dir, roots[1:])),
        experiments=tuple(filter(Path.is_dir, experiments)),
    )


def known_runs() -> list[str]:
    """Return the runs below ./runs."""
    # Stages of recipes lie one folder deeper than other runs.
    files = [*Path("runs").glob("*/*/config.yaml"), *Path("runs").glob("*/*/*/config.yaml")]
    return sorted({str(file.parent) for file in files})


def _first_file(folders: tuple[Path, ...], name: str) -> Path | None:
    """Return the first folder's file of a name. Raises ConfigError where a later folder has another
    one of the name, which would be ignored."""
    files = [folder / name for folder in folders if (folder / name).is_file()]
    for hidden in files[1:]:
        if hidden.read_bytes() != files[0].read_bytes():
            raise ConfigError(
                f"{label(hidden)}: {files[0]} has the same name, and would be used in its place; "
                "rename yours"
            )
    return files[0] if files else None


def _yamls(folders: tuple[Path, ...]) -> set[str]:
    names = set()
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            names.add(path.relative_to(folder).with_suffix("").as_posix())
    return names
