"""Checks of a model's folder before anything of it is built: of its JSON files, and of the headers
of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from transformers.core_model_loading import revert_weight_conversion

from owlfuse.config.trust import check_timm_inside, nodes_of
from owlfuse.core.errors import FILE_ERRORS, DataError
from owlfuse.core.files import MAX_CONFIG, check_no_device, read_json, read_text
from owlfuse.data.chat.tokenizer import MAX_TEMPLATE, parse_template

MAX_TABLE = 512 * 2**20
"""Bytes of a tokenizer or of an index of shards; the largest tokenizers have 40 MB."""
TABLE_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json")
TEMPLATE_KEYS = ("chat_template", "template")
FORBIDDEN = {
    "auto_map": "names code to run",
    "quantization_config": "is of a quantised model, and owlfuse exports plain weights",
    "transformers_weights": "names another file of weights",
}
"""Keys of JSON files by which transformers would run code of the folder or read other files, and
why they are refused."""
KERNEL_KEY = re.compile(r"_?(attn|experts)_implementation(_internal)?")
"""Keys whose value may be a kernel of the hub, which is code."""
COUNT_KEY = re.compile(r"(^|_)(n_)?(layers?|depths?|blocks?|experts?|stages?|repeats?)$")
"""Keys that say how many modules are built."""
ALWAYS_ALLOWED = 1000
"""Modules that are built within seconds, whatever the weights hold."""
ADAPTER_KEYS = {
    "peft_type",
    "task_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "ensure_weight_tying",
}
"""Keys of an adapter_config.json that say which layers have an update and of which size. Others
name modules to import or files to read, and are refused unless they are empty."""
BUILD_ERRORS = (
    *FILE_ERRORS,
    ArithmeticError,
    AssertionError,
    MemoryError,
    StrictDataclassError,
)
"""What timm, transformers and torch raise for numbers that make no model."""


def check_files(folder: Path) -> None:
    """Checks the JSON files and chat templates of an exported folder.

    Raises DataError with the file and what is wrong.
    """
    # transformers would load the base model that it names
    adapter_file = folder / "adapter_config.json"
    if adapter_file.exists():
        raise DataError(
            f"{adapter_file}: names another model; owlfuse's adapters lie in {folder / 'adapter'}; "
            "remove the file"
        )
    for file in folder.rglob("*"):
        check_no_device(file)
    for file in sorted(folder.glob("*.json")):
        is_table = file.name in TABLE_FILES or file.name.endswith(".index.json")
        content = read_json(file, limit=MAX_TABLE if is_table else MAX_CONFIG)
        # a tokenizer's keys are tokens, and any word may be one
        if file.name != "tokenizer.json":
            check_object(content, file)
    for file in sorted(folder.rglob("*.jinja")):
        parse_template(read_text(file, MAX_TEMPLATE), str(file))


def check_object(content: dict[str, Any], file: Path) -> None:
    """Checks one JSON file's keys. Raises DataError."""
    # nested keys, too: transformers reads sub-configurations
    for path, node in nodes_of(content):
        prefix = f"{path}." if path else ""
        for key, value in node.items():
            if key in FORBIDDEN and value:
                raise DataError(
                    f"{file}: {prefix}{key}: {FORBIDDEN[key]}; such a folder is not read"
                )
            # a plain name is a kernel of transformers itself
            if KERNEL_KEY.fullmatch(key) and "/" in str(value):
                raise DataError(
                    f"{file}: {prefix}{key} is {str(value)[:80]}, a kernel of the hub; such a "
                    "folder is not read"
                )
            check_timm_inside(key, value, f"{file}: {prefix}{key}")
            if key in TEMPLATE_KEYS and isinstance(value, str):
                parse_template(value, f"{file}: {prefix}{key}")


def check_counts(config: dict[str, Any], file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Checks that a configuration has no more layers than the weights hold, before any is built.
    Raises DataError.

    Args:
        shapes: of the weights by name, from the files' headers.
    """
    # each layer, block or expert has at least one tensor
    most = max(ALWAYS_ALLOWED, len(shapes))
    for path, node in nodes_of(config):
        for key, value in node.items():
            if not COUNT_KEY.search(str(key)):
                continue
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, int | float) and number > most for number in numbers):
                full_key = f"{path}.{key}" if path else key
                raise DataError(
                    f"{file}: {full_key} is {str(value)[:80]}, and the weights have "
                    f"{len(shapes):,} tensors in all"
                )
    text_config = config.get("text_config")
    # transformers builds as many layers before it looks at the weights
    layers = text_config.get("num_hidden_layers") if isinstance(text_config, dict) else None
    indices = set()
    for name in shapes:
        if match := re.match(r"model\.llm\.[^\d]*\.(\d+)\.", name):
            indices.add(match[1])
    if isinstance(layers, int) and indices and layers != len(indices):
        raise DataError(
            f"{file}: text_config.num_hidden_layers is {layers:,}, and the weights have "
            f"{len(indices):,} layers"
        )


def check_shapes(
    wrapped: Any,
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    tied: dict[str, str],
) -> None:
    """Checks the weights' names and shapes against a model without memory, before memory is
    allocated. Raises DataError.

    Args:
        tied: names that stand for others, which the files need not hold.
    """
    state = wrapped.state_dict()
    # transformers saves these under other names, so that only their total size can be compared
    if set(revert_weight_conversion(wrapped, dict(state))) != set(state):
        model_numel = sum(tensor.numel() for tensor in state.values())
        file_numel = sum(map(prod, shapes.values()))
        # twice: tied weights are saved once
        if model_numel > 2 * file_numel:
            raise DataError(
                f"{folder}: config.json describes {model_numel:,} numbers, and the weights have "
                f"{file_numel:,}"
            )
        return
    problems = [f"{name} (unexpected)" for name in set(shapes) - set(state)]
    for name, tensor in state.items():
        expected = tuple(tensor.shape)
        if name not in shapes:
            if tied.get(name) not in shapes:
                problems.append(f"{name} (missing)")
        elif shapes[name] != expected:
            problems.append(f"{name} {shapes[name]}, expected {expected} (mismatched)")
    if problems:
        listed = ", ".join(sorted(problems)[:8])
        if len(problems) > 8:
            listed += f" and {len(problems) - 8} more"
        raise DataError(f"{folder}: the weights do not fit config.json: {listed}; export it anew")


def check_adapter(folder: Path) -> None:
    """Checks that an adapter's folder holds a LoRA update and nothing that names code or other
    files. Raises DataError."""
    file = folder / "adapter_config.json"
    content = read_json(file, limit=MAX_CONFIG)
    if content.get("peft_type") != "LORA":
        raise DataError(
            f"{file}: peft_type is {str(content.get('peft_type'))[:40]}, and owlfuse exports LORA"
        )
    defaults = LoraConfig().to_dict()
    for key, value in content.items():
        is_default = not value or (key in defaults and defaults[key] == value)
        if key not in ADAPTER_KEYS and not is_default:
            raise DataError(
                f"{file}: {key}: no key of an adapter that owlfuse exports; such a folder is not "
                "read"
            )
    # strings name methods that read other files
    if not isinstance(content.get("init_lora_weights", True), bool):
        raise DataError(
            f"{file}: init_lora_weights is {content['init_lora_weights']!r}, expected true or false"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise DataError(
            f"{folder / 'adapter_model.safetensors'} is missing; export or copy the folder anew"
        )


def error_reason(error: Exception) -> str:
    """Returns an error's message on one line, cut off; its class where it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def build_errors(file: Path) -> Iterator[None]:
    """Turns what timm, transformers and torch raise for wrong numbers or names into a DataError
    that names the file."""
    try:
        yield
    # the first says what is wrong already; the second, a RuntimeError, is no fault of the file
    except (DataError, torch.OutOfMemoryError):
        raise
    except BUILD_ERRORS as error:
        raise DataError(
            f"{file} describes no model that can be built: {error_reason(error)}"
        ) from error
