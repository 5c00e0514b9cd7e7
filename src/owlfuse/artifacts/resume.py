"""The keys of a configuration that a resumed run may change, and the record of the configuration in
its checkpoints.

A changed key is applied from the step at which the run is resumed, or it is refused by name: none
is ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from owlfuse.artifacts.weights import checkpoint_errors
from owlfuse.config.aliases import with_current_names
from owlfuse.config.build import to_dict
from owlfuse.config.check import is_within
from owlfuse.config.compose import origin_of, read_run
from owlfuse.config.identity import IGNORED_KEYS, flat
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.model.adapters import PARTS
from owlfuse.model.parts import compute_only
from owlfuse.parallel.checkpoints import META

PATH_KEYS: tuple[str, ...] = (
    "data.*.file",
    "data.*.image_root",
    "data.*.cache_dir",
    "data.tokenizer",
    "init_from",
    "model.vision.weights",
    "model.vision.backbones.*.weights",
    "model.llm.pretrained",
    "model.llm.gguf_file",
)
"""Keys whose values are paths. The contents are compared instead (see `owlfuse.data.identity`)."""
ANYTHING: tuple[str, ...] = (
    "resume",
    "name",
    "runs",
    "experiment",
    "dry_run",
    "plan*",
    "logger*",
    "checkpoint*",
    "accept_changed_data",
    "data.workers",
    "data.max_pixels",
    "data.*.on_error",
    "data.*.max_skips",
)

ON_RESUME: tuple[str, ...] = (
    *ANYTHING,
    "model.compile",
    *PATH_KEYS,
    "trainer.*",
    "evaluation*",
    "callbacks*",
    # the position in the data is counted in samples, and not in batches
    "data.global_batch_size",
    "data.micro_batch_size",
    "data.pack_to",
    "optim.lr",
    "optim.part_lr.*",
    "optim.weight_decay",
    "optim.betas",
    "optim.eps",
    "optim.warmup_steps",
    "optim.min_lr_ratio",
)
ON_EVALUATION: tuple[str, ...] = (
    *ANYTHING,
    "model.compile",
    *PATH_KEYS,
    "evaluation*",
    "data.validation*",
    "data.max_length",
    "data.on_length*",
    "data.video*",
    "data.chat_template",
    "data.thinking",
)
"""Patterns of keys that may change."""

VALIDATED_BY: tuple[str, ...] = (
    "data.validation*",
    "data.max_length",
    "data.on_length*",
    "data.video*",
    "data.thinking",
    "data.chat_template",
    "trainer.limit_val_batches",
)
"""Keys, and contents, after a change of which a validation is of other samples than before."""
ANSWERED_BY: tuple[str, ...] = (
    *VALIDATED_BY,
    "evaluation.max_questions",
    "evaluation.max_new_tokens",
    "evaluation.history",
)
"""Those after which an evaluation is of other samples or answers."""

REFUSED = {
    "trainer._target_": "",
    "evaluation.before": "; it is past its first step",
    "data.sources.*.weight": (
        "; other weights from a step on are data.weights_at={STEP: {SOURCE: WEIGHT}}"
    ),
}
"""Keys that may not, though a pattern above has them, or with something better to do."""
CONTENTS = " (contents)"
"""The end of a change's name that is no key's."""
ANOTHER = "; begin another run, from this one's weights by init_from= of its export"
WEIGHTS_OF_32_BITS = ("32-true", "32", "bf16-mixed", "16-mixed", "None")
"""Precisions that a run can change between: its weights stay float32."""


@dataclass
class Past:
    """What a checkpoint keeps of the run until its step."""

    step: int
    config: dict[str, Any]
    """The resolved configuration of the step."""
    positions: StepPositions
    changes: list[dict[str, Any]] = field(default_factory=list)
    """{"step", "changes": {key: [before, after]}} each time that it went on with other keys."""
    identity: dict[str, str] = field(default_factory=dict)
    """See `owlfuse.data.identity`."""
    new_tokens: dict[str, int] = field(default_factory=dict)
    """See `owlfuse.model.new_tokens`."""
    metrics: str | None = None
    """metrics.csv as it was when the checkpoint was written, if there was one."""
    code: str | None = None
    """The hash of the code that trained (see `config.identity`); None of a checkpoint from before
    it was recorded."""
    precision: str | None = None
    """The precision that it trained in, likewise."""
    tokenizer: str | None = None
    """The hash of the run's tokenizer, likewise."""
    ended: bool = False
    """Whether a callback, as EarlyStopping, ended the training at the step."""


def read_past(checkpoint: Path) -> Past:
    """What a checkpoint keeps; of one that was written before it kept anything, what the run's
    config.yaml says."""
    path = checkpoint / META if checkpoint.is_dir() else checkpoint
    with checkpoint_errors(checkpoint):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=path == checkpoint)
        step, record = content["global_step"], content.get("run") or {}
    # an older release called some parts otherwise
    config = with_current_names(record.get("config")) or read_run(checkpoint.parent.parent)
    positions = content.get("step_positions") or [(0, 0, config["data"]["global_batch_size"])]
    if "metrics" in content:
        metrics = content["metrics"]
    else:  # a run of before November 2026, which has it in a file beside
        metrics = read_if_there(checkpoint.with_suffix(".csv"))
        metrics = metrics or read_if_there(checkpoint.parent.parent / "metrics.csv")
    return Past(
        step,
        config,
        StepPositions(positions),
        record.get("changes", []),
        record.get("identity", {}),
        content.get("new_tokens", {}),
        metrics,
        record.get("code"),
        record.get("precision"),
        record.get("tokenizer"),
        content.get("ended", False),
    )


def read_if_there(file: Path) -> str | None:
    """Returns a file's text, None where there is no such file."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def changed_keys(past: Past, config: DictConfig) -> dict[str, list[Any]]:
    """Keys that are not as they were until the step: {key: [before, after]}.

    Raises:
        ConfigError: a key that a run that goes on cannot change.
    """
    allowed = [*ON_RESUME, *computing_keys(config)]
    if past.config["data"].get("weights_by", "samples") == "samples":
        # else they change which sample stands where
        allowed += ["data.max_length", "data.on_length*"]
    return compared(past, config, allowed, "goes on")


def changed_evaluation_keys(past: Past, config: DictConfig) -> dict[str, list[Any]]:
    """`changed_keys` for an evaluation. Raises ConfigError for a key that changes nothing of it, or
    changes the model."""
    return compared(past, config, [*ON_EVALUATION, *computing_keys(config)], "is evaluated")


def config_at(past: Past, config: DictConfig, of_run: DictConfig) -> DictConfig:
    """Returns the configuration of an evaluation of a checkpoint behind which the run went on with
    other keys: those that train are the checkpoint's, unless the command line changes them.

    Args:
        config: of the run, with what the command line changes.
        of_run: without that.
    """
    then = comparable(past.config, past.step)
    now = comparable(to_dict(of_run), past.step)
    asked = comparable(to_dict(config), past.step)
    since = []
    for key in {**now, **then}:
        may_change = matches(key, ON_RESUME) and not matches(key, ON_EVALUATION)
        if may_change and then.get(key) != now.get(key) == asked.get(key):
            since.append(key)
    config = copy.deepcopy(config)
    with open_dict(config):
        # first what was not there then, below which something may have been
        for key in since:
            if key not in then:
                parent, _, name = key.rpartition(".")
                del OmegaConf.select(config, parent)[name]
        for key in since:
            if key in then:
                OmegaConf.update(config, key, then[key])
    return config


def computing_keys(config: DictConfig) -> list[str]:
    """Returns the keys of the model's parts that change only how they compute, as their classes
    say."""
    keys = []
    for name in PARTS:
        keys += [f"model.{name}.{option}" for option in compute_only(config.model[name])]
    return keys


def compared(
    past: Past,
    config: DictConfig,
    allowed: list[str],
    doing: str,
) -> dict[str, list[Any]]:
    """Returns `changed_keys`, for a command that the user is `doing`."""
    before, after = comparable(past.config, past.step), comparable(to_dict(config), past.step)
    changes = {}
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            changes[key] = [before.get(key), after.get(key)]
    for key, (old, new) in changes.items():
        hint = next((hint for pattern, hint in REFUSED.items() if fnmatchcase(key, pattern)), None)
        if hint is None and matches(key, allowed) and not narrows(key, old, new):
            continue
        raise ConfigError(
            f"{origin_of(config, key)}: {key}: it is {old} until step {past.step} and {new} now, "
            f"and a run that {doing} cannot change it{ANOTHER if hint is None else hint}"
        )
    return {key: values for key, values in changes.items() if not matches(key, ANYTHING)}


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Returns whether a key has the form of one of some patterns."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def samples_changed(changes: Iterable[str], patterns: Iterable[str]) -> bool:
    """Returns whether one of some changes, by their names, gives other samples or answers.

    Args:
        patterns: VALIDATED_BY or ANSWERED_BY.
    """
    # A path alone changes nothing: contents have names of their own.
    return any(matches(name, patterns) and not is_path(name) for name in changes)


def narrows(key: str, old: Any, new: Any) -> bool:
    """Returns whether a change of precision changes the type of the weights."""
    return key == "trainer.precision" and not {str(old), str(new)} <= set(WEIGHTS_OF_32_BITS)


def comparable(config: dict[str, Any], step: int) -> dict[str, object]:
    """Keys by their dotted paths.

    Of `data.weights_at` only what was in force before the step: later phases may change.
    """
    data = dict(config["data"])
    # a YAML key may be a text or a number
    phases = data.pop("weights_at", None) or {}
    data["weights_at"] = {int(first): phase for first, phase in phases.items() if int(first) < step}
    keys = flat({**config, "data": data})
    keys.pop("optim.newton_schulz", None)  # a former option, which compose ignores too
    return keys


def check_identity(
    past: Past, identity: dict[str, str], config: DictConfig
) -> dict[str, list[Any]]:
    """What of the data and of the weights that the run starts from is other than until the step, as
    `changed_keys` gives keys.

    Raises:
        DataError: something is, and `accept_changed_data` is not set.
    """
    changed = {
        name: [old, identity[name]]
        for name, old in past.identity.items()
        # what the run needs no longer, as a base whose weights are all trained, is not compared
        if identity.get(name, old) != old
    }
    if changed and not config.get("accept_changed_data"):
        name = next(iter(changed))
        path = OmegaConf.select(config, f"{name.partition(',')[0]}")
        if isinstance(path, DictConfig):
            path = path.get("file")
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DataError(
            f"{name} ({path}){more}: the contents are not those that the run had until step "
            f"{past.step}; give the same back, or go on with what is there by "
            "accept_changed_data=true"
        )
    return {f"{name}{CONTENTS}": [old[:16], new[:16]] for name, (old, new) in changed.items()}


def recorded(past: Past | None, changes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Returns the changes of the whole run, with those of this resumption."""
    before = past.changes if past else []
    return [*before, {"step": past.step, "changes": changes}] if past and changes else before


def learned_changes(changes: list[dict[str, Any]], contents: bool = True) -> list[dict[str, Any]]:
    """Returns the changes of training or scoring, which belong to the configuration's hash.

    Args:
        contents: with those of data and weights.
    """
    learned = []
    for change in changes:
        keys = {}
        for key, values in change["changes"].items():
            left_out = key.endswith(CONTENTS) and not contents
            if not (left_out or is_within(key, *IGNORED_KEYS) or is_path(key)):
                keys[key] = values
        if keys:
            learned.append({**change, "changes": keys})
    return learned


def is_path(key: str) -> bool:
    """Returns whether the value of a key is a path, whose contents are compared instead."""
    return matches(key, PATH_KEYS)
