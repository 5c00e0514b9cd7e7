"""What the files of a model may name: its parts, and nothing else that Python could run.

A run's config.yaml and an export's config.json name the classes of their parts by `_target_`, and
such a folder may come from anybody. Before anything in it is imported, built or loaded, its files
pass this gate. A name is accepted where it is

- a part of owlfuse or Lightning that the key is for (see SLOTS),
- a name that the user's own yamls hold (configs/ and experiments/, owlfuse's and the working
  folder's), or
- of a module that the user has named by `--trust`, or, in Python, of a file of the user's that has
  been imported.
"""

from __future__ import annotations

import fnmatch
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from owlfuse.config.aliases import with_current_names
from owlfuse.config.folders import find_folders
from owlfuse.config.own_modules import import_own
from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_CONFIG, read_text

ENVIRONMENT = "OWLFUSE_TRUST"
"""Of the environment: what `--trust` named, for the processes that a command starts."""


MAX_DEPTH = 100
"""Of brackets in a config.yaml."""
HUB_NAME = re.compile(r"[A-Za-z-_]+:|.*/")
"""Names of timm that are no entry of its own registry: `hf-hub:`, `local-dir:` and paths."""
PREPROCESSING = {
    "input_size",
    "fixed_input_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
}
"""Keys of timm's `pretrained_cfg_overlay` that say how pictures become pixels.

Others name files and addresses.
"""

accepted: set[str] = set()
"""Names that the user's own configuration has asked for in this process."""


@dataclass(frozen=True)
class Slot:
    """What stands at a key of the configuration.

    Args:
        path: of the key, a pattern.
        targets: the names that are accepted without a further look.
        base: the class that other parts are derived from; None: any class or function of a module
            that is trusted.
    """

    path: str
    targets: tuple[str, ...]
    base: str | None = None


def below(package: str, *names: str) -> tuple[str, ...]:
    """Dotted paths of names in a package or module."""
    return tuple(f"{package}.{name}" for name in names)


FORMATS = below(
    "owlfuse.data.formats",
    *(
        "alpaca.Alpaca",
        "captions.Captions",
        "llava.LLaVA",
        "messages.Messages",
        "parquet.Parquet",
        "sharegpt.ShareGPT",
    ),
    "webdataset.WebDataset",
)
SLOTS = (
    Slot(
        "model.vision",
        below(
            "owlfuse",
            "model.vision.backbone.TimmBackbone",
            "artifacts.released.vision.TimmBackboneWithEps",
        ),
        "torch.nn.Module",
    ),
    Slot(
        "model.connector",
        below(
            "owlfuse.model.connectors",
            "abstractor.Abstractor",
            "linear.LinearConnector",
            "mlp.MLPConnector",
        ),
        "torch.nn.Module",
    ),
    Slot(
        "model.fusion",
        below(
            "owlfuse.model.fusion",
            "concat.Concat",
            "hyperattention.HyperAttention",
            "modality_adaptive.ModalityAdaptive",
        ),
        "owlfuse.model.fusion.base.Fusion",
    ),
    Slot("model.llm", ("owlfuse.model.llm.load_llm",)),
    Slot("model.adapter.*", below("owlfuse.model.adapters", "Frozen", "Full", "LastN", "LoRA")),
    Slot("data", ("owlfuse.data.datamodule.ChatData",), "lightning.LightningDataModule"),
    Slot("data.prepare", below("owlfuse.data.shapes", "write.write_shapes", "many.write_many")),
    Slot("data.video", ("owlfuse.data.media.video.VideoSampling",)),
    Slot("data.*.*.video", ("owlfuse.data.media.video.VideoSampling",)),
    Slot("data.sources.*", FORMATS, "owlfuse.data.formats.base.Source"),
    Slot("data.validation.*", FORMATS, "owlfuse.data.formats.base.Source"),
    Slot("trainer", ("lightning.Trainer", "lightning.pytorch.Trainer"), "lightning.Trainer"),
    Slot(
        "trainer.strategy",
        below("owlfuse.parallel.strategies", "Replicated", "Sharded"),
        "lightning.pytorch.strategies.Strategy",
    ),
    Slot("optim", below("owlfuse.training.optim", "AdamWCosine", "MuonCosine")),
    Slot(
        "logger.*",
        below("lightning.pytorch.loggers", "CSVLogger", "TensorBoardLogger"),
        "lightning.pytorch.loggers.Logger",
    ),
    Slot(
        "callbacks.*",
        below(
            "lightning.pytorch.callbacks",
            "DeviceStatsMonitor",
            "EarlyStopping",
            "EMAWeightAveraging",
            "ThroughputMonitor",
            "Timer",
        ),
        "lightning.Callback",
    ),
    Slot("evaluation", ("owlfuse.evaluation.validation.Evaluation",)),
    Slot("checkpoint", ("owlfuse.training.checkpoints.Checkpoints",)),
)
SLOT_PACKAGES = ("owlfuse", "lightning")
"""Packages of which parts are accepted by what they are, and not because a yaml names them for
another key."""


def trust(*names: str) -> None:
    """Accepts the parts of modules (`parts.mean`), or a timm model of the hub
    (`hf-hub:<owner>/<name>`), that files of models name. The modules are not imported before a part
    of theirs is asked for."""
    words = [*trusted(), *names]
    os.environ[ENVIRONMENT] = ",".join(dict.fromkeys(words))


def trusted() -> list[str]:
    """What `--trust` and `trust` have named."""
    return [word for word in os.environ.get(ENVIRONMENT, "").split(",") if word]


def accept(config: Any) -> None:
    """Accepts every `_target_` of a configuration that is the user's own, so that what is made
    from it can be read back."""
    accepted.update(
        node["_target_"]
        for _, node in nodes_of(config, "")
        if isinstance(node.get("_target_"), str)
    )


def read_run_config(folder: Path) -> Any:
    """A run's config.yaml, every name in it checked.

    It is written resolved, by `owlfuse train`: interpolations, which read the environment, and
    Hydra's own keys, which read other files, do not stand in it.

    Raises:
        DataError: in one line: a file that is no run's configuration, or that names what is not
            accepted.
    """
    file = folder / "config.yaml"
    text = read_text(file, MAX_CONFIG)
    if flow_depth(text) > MAX_DEPTH:
        raise DataError(f"{file}: nested too deep for a run's configuration")
    try:
        if any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)
        ):
            raise DataError(
                f"{file}: has a reference (*name) to another place, which no run's config.yaml has"
            )
        content: Any = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(
            f"{file}: line {line}: not YAML: {error.problem or error.context}"
        ) from None
    except RecursionError:
        raise DataError(f"{file}: nested too deep for a run's configuration") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file}: no run's configuration: {' '.join(str(error).split())[:200]}"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(
            f"{file}: no run's configuration: it has no model; name a folder that owlfuse train "
            "wrote"
        )
    for key in ("defaults", "hydra"):
        if key in content:
            raise DataError(
                f"{file}: {key}: no key of a run's config.yaml, which owlfuse train writes resolved"
            )
    for path, value in values_of(content, ""):
        if isinstance(value, str) and "${" in value:
            raise DataError(
                f"{file}: {path} is {value[:80]!r}, an interpolation; a run's config.yaml is "
                "written resolved"
            )
    content = with_current_names(content)
    check_names(content, file)
    return content


def flow_depth(text: str) -> int:
    """How many brackets are open at once; yaml takes time by the square of it."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        deepest = max(deepest, depth)
    return deepest


def check_names(config: dict[str, Any], file: Path) -> None:
    """Checks every name of a configuration that is read from a file. Nothing is imported that is
    not accepted.

    Args:
        config: with keys as a run's configuration has them.

    Raises:
        DataError: the first name that is not accepted.
    """
    for path, node in nodes_of(config, ""):
        if "_target_" in node:
            check_target(path, node["_target_"], file)
    vision = config.get("model", {}).get("vision")
    if isinstance(vision, dict):
        check_backbone(vision, file)


def check_target(path: str, target: Any, file: Path) -> None:
    """Checks that a `_target_` is accepted at a key, and is what the key is for.

    Raises DataError.
    """
    key = f"{file}: {path}._target_"
    if (
        not isinstance(target, str)
        or not all(part.isidentifier() for part in target.split("."))
        or "." not in target
    ):
        raise DataError(f"{key}: {str(target)[:80]!r} is no dotted path to a class")
    slot = next((slot for slot in SLOTS if fnmatch.fnmatchcase(path, slot.path)), None)
    if slot is not None and target in slot.targets:
        return
    module = target.rpartition(".")[0]
    is_users = target in accepted or named_by_user(target, file)
    if is_users and module.partition(".")[0] not in SLOT_PACKAGES:
        return
    is_trusted = any(is_within(module, word) for word in trusted()) or imported_by_user(module)
    if not (is_users or is_trusted):
        raise DataError(f"{key}: {target} is no part of owlfuse{remedy(module)}")
    part = located(target, key)
    defined_in = getattr(part, "__module__", None) or "elsewhere"
    if not is_within(defined_in, module.partition(".")[0]):
        raise DataError(
            f"{key}: {target} is no part of {module}, which only imports it from {defined_in}"
        )
    if slot is None and not is_within(module, "owlfuse"):
        return
    if slot is None:
        raise DataError(f"{key}: {target} is not what {path} takes")
    base = located(slot.base, key) if slot.base else None
    is_part = inspect.isclass(part) and issubclass(part, base) if base is not None else is_trusted
    if not is_part:
        wanted = f"a {base.__name__}" if base is not None else "one of " + ", ".join(slot.targets)
        raise DataError(f"{key}: {target} is not what {path} takes: {wanted}")


def remedy(module: str) -> str:
    """What to do about a name that is not accepted.

    Modules of Python itself are never a model's part.
    """
    if module.partition(".")[0] in {*sys.stdlib_module_names, "owlfuse"}:
        return " and is not run; get the model from somebody you trust"
    return (
        f", and no yaml of yours names it; if you trust it, import {module} first, or write: "
        f"owlfuse --trust {module} ..."
    )


def is_within(module: str, parent: str) -> bool:
    """Whether a module is the parent or lies below it."""
    return f"{module}.".startswith(f"{parent}.")


def imported_by_user(module: str) -> bool:
    """Whether the program has imported a file of its own by that name: one that is neither
    Python's nor installed."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or is_within(module, "owlfuse"):
        return False
    path = Path(file).resolve()
    standard = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return not is_installed and not any(path.is_relative_to(place) for place in standard)


def named_by_user(word: str, file: Path) -> bool:
    """Whether a yaml of the user's own configuration holds the word as a value. A `configs` folder
    inside of the folder that is read is a part of it, and not the user's."""
    folders = find_folders()
    foreign = file.resolve().parent
    for folder in (*folders.configs, *folders.experiments):
        if folder.resolve().is_relative_to(foreign):
            continue
        for path in folder.rglob("*.yaml"):
            if word.encode() in path.read_bytes() and word in yaml_values(path):
                return True
    return False


def yaml_values(path: Path) -> list[Any]:
    """The values of a yaml; none of one that cannot be read, which is told where it is used."""
    try:
        return [
            value for _, value in values_of(yaml.safe_load(path.read_text(encoding="utf-8")), "")
        ]
    except (yaml.YAMLError, ValueError):
        return []


def located(target: str, key: str) -> Any:
    """The object of a module, by its dotted path. Raises DataError where there is none."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_own(module), name, None)
    except ModuleNotFoundError as error:
        raise DataError(f"{key}: {target}: no module '{error.name}' can be imported") from None
    if not callable(found):
        raise DataError(f"{key}: {module} has no class or function '{name}'")
    return found


def check_backbone(vision: dict[str, Any], file: Path, hub: bool = True) -> None:
    """Checks the arguments of a timm model, which can name files and addresses that weights are
    read from.

    Args:
        hub: whether `name` may be a model of the hub, as it may in a run, whose backbone is made
            anew from pretrained weights.

    Raises:
        DataError: a key that names a file or an address; a model of the hub.
    """
    kwargs = vision.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        raise DataError(
            f"{file}: vision.kwargs is a {type(kwargs).__name__}, expected a group of keys"
        )
    for key, value in kwargs.items():
        is_overlay = (
            key == "pretrained_cfg_overlay"
            and isinstance(value, dict)
            and set(value) <= PREPROCESSING
        )
        names_file = str(key).startswith(("pretrained", "checkpoint", "cache")) and not is_overlay
        if names_file:
            raise DataError(
                f"{file}: vision.kwargs.{key}: a file or address of weights, which a model's "
                "folder may not name"
            )
    name = vision.get("name")
    if (
        isinstance(name, str)
        and not hub
        and HUB_NAME.match(name)
        and name not in trusted()
        and not named_by_user(name, file)
    ):
        raise DataError(
            f"{file}: vision.name is {name[:120]}, which would be fetched from elsewhere; "
            f"if you trust it, write: owlfuse --trust {name[:120]} ..."
        )


def nodes_of(value: Any, path: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every dictionary below a value with its dotted path, parents first; an index of a list is
    a part of the path."""
    if isinstance(value, dict):
        yield path, value
    for key, child in items_of(value):
        yield from nodes_of(child, f"{path}.{key}" if path else str(key))


def values_of(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value below a dictionary or list that is neither, and every key, with its dotted
    path."""
    if not isinstance(value, dict | list):
        yield path, value
    for key, child in items_of(value):
        full = f"{path}.{key}" if path else str(key)
        if isinstance(key, str):
            yield full, key
        yield from values_of(child, full)


def items_of(value: Any) -> Any:
    """Keys or indices of a dictionary or list with what stands there."""
    return (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
