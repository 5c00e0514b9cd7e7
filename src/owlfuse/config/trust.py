"""The names that the files of a model may hold: its parts, and nothing else that Python could run.

A run's config.yaml and an export's config.json name the classes of their parts by `_target_`, and
such a folder may come from anybody. Its files are checked here before anything in them is imported,
built or loaded. A name is accepted where it is

- a part of owlfuse or Lightning that the key is for (see SLOTS),
- a name in the user's yamls (configs/ and experiments/, owlfuse's and the working folder's), or
- of a module that the user has named by `--trust`, or, in Python, of a file of the user's that has
  been imported.
"""

from __future__ import annotations

import fnmatch
import inspect
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from owlfuse.config.aliases import with_current_names
from owlfuse.config.check import is_dotted_path, is_within, nodes_of, walk
from owlfuse.config.folders import find_folders
from owlfuse.config.identity import SOURCE, is_installed
from owlfuse.config.user_modules import import_user_module
from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_CONFIG, read_text

# The environment variable with the names of `--trust`, for the processes that a command starts.
ENVIRONMENT = "OWLFUSE_TRUST"


# Depth of brackets in a config.yaml.
MAX_DEPTH = 100
# Keys of an LLM's configuration by which transformers builds a model of timm.
TIMM_KEYS = ("architecture", "backbone", "model_args", "backbone_kwargs")
# How timm's options begin that name weights.
WEIGHT_OPTIONS = ("pretrained", "checkpoint", "cache")
# Names of timm that are no entry of its own registry: `hf-hub:`, `local-dir:` and paths.
HUB_NAME = re.compile(r"[A-Za-z-_]+:|.*/")
# Keys of timm's `pretrained_cfg_overlay` about preprocessing; others name files and addresses.
PREPROCESSING = {
    "input_size",
    "fixed_input_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
}

# Names that the user's own configuration has asked for in this process.
accepted: set[str] = set()


@dataclass(frozen=True)
class Slot:
    """The parts that a key of the configuration takes.

    Args:
        path: of the key, a pattern.
        targets: the names that are always accepted.
        base: the base class of other parts; None: any class or function of a trusted module.
    """

    path: str
    targets: tuple[str, ...]
    base: str | None = None


def below(package: str, *names: str) -> tuple[str, ...]:
    """Return dotted paths of names in a package or module."""
    return tuple(f"{package}.{name}" for name in names)


BACKBONES = below(
    "owlfuse",
    "model.vision.backbone.TimmBackbone",
    "artifacts.released.vision.TimmBackboneWithEps",
)
FORMATS = below(
    "owlfuse.data.formats",
    "alpaca.Alpaca",
    "captions.Captions",
    "llava.LLaVA",
    "messages.Messages",
    "parquet.Parquet",
    "sharegpt.ShareGPT",
    "webdataset.WebDataset",
)
SLOTS = (
    Slot(
        "model.vision",
        (*BACKBONES, "owlfuse.model.vision.multi.MultiBackbone"),
        "torch.nn.Module",
    ),
    Slot(
        "model.vision.backbones.*",
        BACKBONES,
        "owlfuse.model.vision.backbone.TimmBackbone",
    ),
    Slot(
        "model.connector",
        below(
            "owlfuse.model.connectors",
            "abstractor.Abstractor",
            "linear.LinearConnector",
            "mlp.MLPConnector",
            "pixel_shuffle.PixelShuffleConnector",
            "pool.PoolConnector",
            "qformer.QFormer",
            "resampler.Resampler",
        ),
        "torch.nn.Module",
    ),
    Slot(
        "model.fusion",
        below(
            "owlfuse.model.fusion",
            "concat.Concat",
            "cross_attention.CrossAttention",
            "deepstack.DeepStack",
            "hyperattention.HyperAttention",
            "modality_adaptive.ModalityAdaptive",
        ),
        "owlfuse.model.fusion.base.Fusion",
    ),
    Slot("model.llm", ("owlfuse.model.llm.load_llm",)),
    Slot(
        "model.adapter.*",
        below("owlfuse.model.adapters", "Frozen", "Full", "LastN", "LoRA"),
    ),
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
        below(
            "lightning.pytorch.loggers",
            "CSVLogger",
            "MLFlowLogger",
            "TensorBoardLogger",
            "WandbLogger",
        ),
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
# Packages whose parts are accepted by their base class, and not because a yaml names them for
# another key.
SLOT_PACKAGES = ("owlfuse", "lightning")


def trust(*names: str) -> None:
    """Accept the parts of modules (`parts.mean`), or a timm model of the hub
    (`hf-hub:<owner>/<name>`), in files of models. A module is imported when a part of it is built.
    """
    # The environment carries them to data workers, ranks and the cells of ablations.
    words = [*trusted(), *names]
    os.environ[ENVIRONMENT] = ",".join(dict.fromkeys(words))


def trusted() -> list[str]:
    """Return the names of `--trust` and `trust`."""
    return [word for word in os.environ.get(ENVIRONMENT, "").split(",") if word]


def accept(config: Any) -> None:
    """Accept every `_target_` of a configuration that is the user's own, so that the runs made of
    it can be read back."""
    for _, node in nodes_of(config):
        if isinstance(node.get("_target_"), str):
            accepted.add(node["_target_"])


def read_run_config(folder: Path) -> Any:
    """Return a run's config.yaml, every name in it checked.

    It is written resolved, by `owlfuse train`: interpolations, which read the environment, and
    Hydra's own keys, which read other files, are not in it.

    Raises:
        DataError: in one line: a file that is no run's configuration, or that names what is not
            accepted.
    """
    file = folder / "config.yaml"
    content = parse_run_config(file)
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
    for path, value in values_of(content):
        if isinstance(value, str) and "${" in value:
            raise DataError(
                f"{file}: {path} is {value[:80]!r}, an interpolation; a run's config.yaml is "
                "written resolved"
            )
    # Before the check, which knows the current names alone.
    content = with_current_names(content)
    check_names(content, file)
    return content


def parse_run_config(file: Path) -> Any:
    """Return the content of a run's config.yaml, unresolved. Raises DataError."""
    text = read_text(file, MAX_CONFIG)
    too_deep = DataError(f"{file}: nested too deep for a run's configuration")
    if flow_depth(text) > MAX_DEPTH:
        raise too_deep
    try:
        # An alias may make a small file a huge value.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise DataError(
                    f"{file}: has a reference (*name) to another place, which no run's config.yaml "
                    "has"
                )
        return OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=False)
    except DataError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(
            f"{file}: line {line}: not YAML: {error.problem or error.context}"
        ) from None
    except RecursionError:
        raise too_deep from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: no run's configuration: {reason}") from None


def flow_depth(text: str) -> int:
    """Return how many brackets are open at once; yaml takes time by the square of it."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        deepest = max(deepest, depth)
    return deepest


def check_names(config: dict[str, Any], file: Path) -> None:
    """Check every name of a configuration that is read from a file. Nothing is imported that is
    not accepted.

    Args:
        config: with keys as a run's configuration has them.

    Raises:
        DataError: the first name that is not accepted.
    """
    for path, node in nodes_of(config):
        if "_target_" in node:
            check_target(path, node["_target_"], file)
    check_weights(config.get("model", {}), file)


def check_weights(model: dict[str, Any], file: Path | str) -> None:
    """Check that no argument of a timm model, as a backbone or inside of the LLM, names a file or
    an address of weights.

    Args:
        model: the nodes of the parts.
        file: what set them, as messages begin.

    Raises:
        DataError: the first argument that does.
    """
    vision = model.get("vision")
    if isinstance(vision, dict):
        check_backbone(vision, file)
    for path, node in nodes_of(model.get("llm"), "model.llm"):
        for key, value in node.items():
            check_timm_inside(key, value, f"{file}: {path}.{key}")


def check_target(path: str, target: Any, file: Path) -> None:
    """Check that a `_target_` is accepted at a key, and is a part that the key takes.

    Raises DataError.
    """
    key = f"{file}: {path}._target_"
    if not is_dotted_path(target) or "." not in target:
        raise DataError(f"{key}: {str(target)[:80]!r} is no dotted path to a class")
    slot = next((slot for slot in SLOTS if fnmatch.fnmatchcase(path, slot.path)), None)
    if slot is not None and target in slot.targets:
        return
    module = target.rpartition(".")[0]
    is_users = target in accepted or named_by_user(target, file)
    # Parts of owlfuse and lightning are judged by their base class below.
    if is_users and module.partition(".")[0] not in SLOT_PACKAGES:
        return
    is_trusted = is_within(module, *trusted()) or imported_by_user(module)
    if not (is_users or is_trusted):
        raise DataError(f"{key}: {target} is no part of owlfuse{remedy(module)}")
    part = locate(target, key)
    # A module that merely imports os.system does not make it a part.
    defined_in = getattr(part, "__module__", None) or "elsewhere"
    if not is_within(defined_in, module.partition(".")[0]):
        raise DataError(
            f"{key}: {target} is no part of {module}, which only imports it from {defined_in}"
        )
    if slot is not None:
        check_base(slot, part, target, path, key, is_trusted)
    elif is_within(module, "owlfuse"):
        raise DataError(f"{key}: {target} is not what {path} takes")


def check_base(
    slot: Slot,
    part: Any,
    target: str,
    path: str,
    key: str,
    is_trusted: bool,
) -> None:
    """Raise DataError for a part that is not of the base class of its slot."""
    if slot.base is None:
        is_part, expected = is_trusted, "one of " + ", ".join(slot.targets)
    else:
        base = locate(slot.base, key)
        is_part, expected = inspect.isclass(part) and issubclass(part, base), f"a {base.__name__}"
    if not is_part:
        raise DataError(f"{key}: {target} is not what {path} takes: {expected}")


def remedy(module: str) -> str:
    """Return the advice about a name that is not accepted.

    Modules of Python itself are never a model's part.
    """
    if module.partition(".")[0] in {*sys.stdlib_module_names, "owlfuse"}:
        return " and is not run; get the model from somebody you trust"
    return (
        f", and no yaml of yours names it; if you trust it, import {module} first, or write: "
        f"owlfuse --trust {module} ..."
    )


def imported_by_user(module: str) -> bool:
    """Whether the program has imported a file of its own by that name: one that is neither
    Python's nor installed."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return False
    path = Path(file).resolve()
    # By the file: run as `python -m owlfuse`, owlfuse's own commands are called `__main__`.
    return not (path.is_relative_to(SOURCE) or is_installed(path))


def named_by_user(word: str, file: Path) -> bool:
    """Whether a yaml of the user's own configuration holds the word as a value. A `configs` folder
    inside of the model's folder is a part of the model, and not the user's."""
    folders = find_folders()
    model_dir = file.resolve().parent
    for folder in (*folders.configs, *folders.experiments):
        # Else a downloaded model could bring the yaml that accepts its own names.
        if folder.resolve().is_relative_to(model_dir):
            continue
        for path in folder.rglob("*.yaml"):
            # The bytes first: parsing every yaml takes seconds.
            if word.encode() in path.read_bytes() and word in yaml_values(path):
                return True
    return False


def yaml_values(path: Path) -> list[Any]:
    """Return the values of a yaml; none of one that cannot be read, which is an error elsewhere."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        return []
    return [value for _, value in values_of(content)]


def locate(target: str, key: str) -> Any:
    """Return the object of a module, by its dotted path. Raises DataError where there is none."""
    module, _, name = target.rpartition(".")
    try:
        part = getattr(import_user_module(module), name, None)
    except ModuleNotFoundError as error:
        raise DataError(f"{key}: {target}: no module '{error.name}' can be imported") from None
    if not callable(part):
        raise DataError(f"{key}: {module} has no class or function '{name}'")
    return part


def check_backbone(vision: dict[str, Any], file: Path | str, hub: bool = True) -> None:
    """Check the arguments of timm models, which can name files and addresses of weights: of a
    backbone, and of those that it is made of.

    Args:
        hub: whether `name` may be a model of the hub, as it may in a run, whose backbone is built
            again from pretrained weights.

    Raises:
        DataError: a key that names a file or an address; a model of the hub.
    """
    for path, node in nodes_of(vision, "vision"):
        # The backbone itself has one, too, where the folder is what it should be.
        if path != "vision" and "_target_" not in node:
            continue
        kwargs = node.get("kwargs") or {}
        if not isinstance(kwargs, dict):
            raise DataError(
                f"{file}: {path}.kwargs is a {type(kwargs).__name__}, expected a group of keys"
            )
        for key, value in kwargs.items():
            is_overlay = key == "pretrained_cfg_overlay" and isinstance(value, dict)
            if is_overlay and set(value) <= PREPROCESSING:
                continue
            if str(key).startswith(WEIGHT_OPTIONS):
                raise DataError(
                    f"{file}: {path}.kwargs.{key}: a file or address of weights, which a model's "
                    "folder may not name"
                )
        name = node.get("name")
        if hub or not isinstance(name, str) or not HUB_NAME.match(name):
            continue
        if name not in trusted() and not named_by_user(name, Path(file)):
            raise DataError(
                f"{file}: {path}.name is {name[:120]}, which would be fetched from elsewhere; "
                f"if you trust it, write: owlfuse --trust {name[:120]} ..."
            )


def check_timm_inside(key: str, value: Any, where: str) -> None:
    """Check a key of an LLM's configuration that transformers hands to timm's `create_model`, for a
    backbone inside of the LLM, as Gemma 3n's. Raises DataError for weights of another file or of
    the hub."""
    if key not in TIMM_KEYS:
        return
    if isinstance(value, str) and HUB_NAME.match(value):
        raise DataError(f"{where} is {value[:80]}, which would be fetched from elsewhere")
    for option in value if isinstance(value, dict) else ():
        if str(option).startswith(WEIGHT_OPTIONS):
            raise DataError(
                f"{where}.{option}: a file or address of weights, which a model's folder may not "
                "name"
            )


def values_of(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield every value below a dictionary or list that is neither, and every key, with its dotted
    path."""
    for path, value in walk(content):
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, str):
                    yield (f"{path}.{key}" if path else key), key
        elif not isinstance(value, list):
            yield path, value
