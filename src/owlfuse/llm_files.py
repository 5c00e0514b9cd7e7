"""A trained LLM read from a folder, the hub or an installed package."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from owlfuse.hub_access import check_hub_has
from owlfuse.packages import looks_local, missing, packaged


def load_pretrained(pretrained: str, gguf_file: str | None, options: dict[str, Any]) -> PreTrainedModel:
    """From a folder or the hub, `options` being transformers'; on the meta device only the configuration is read."""
    pretrained = packaged(pretrained)
    check_folder(pretrained, gguf_file)
    check_hub_has(pretrained, "set model.llm.pretrained to a folder with its files, or HF_HOME to a cache that has it")
    source = {"gguf_file": gguf_file} if gguf_file else {}
    found: dict[str, Any]
    try:
        if torch.get_default_device().type == "meta":
            return AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(pretrained, trust_remote_code=False, **source), **options
            )
        llm, found = _loaded(pretrained, **source, **options)
    except ImportError as error:
        if not gguf_file:
            raise
        raise missing("gguf", gguf_file) from error
    except (OSError, KeyError, IndexError, ValueError, struct.error) as error:  # the last three of a GGUF file that is cut off
        raise ValueError(f"pretrained: {pretrained}: {str(error).splitlines()[0][:200]}") from error
    if lacking := sorted(found["missing_keys"]):  # transformers makes them up, with a warning
        raise ValueError(f"pretrained: {pretrained} has no weights for {lacking[0]} and {len(lacking) - 1} more of its model")
    return llm


def _loaded(pretrained: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(pretrained, **options, output_loading_info=True, trust_remote_code=False)
    return loaded


def check_folder(pretrained: str, gguf_file: str | None = None) -> None:
    """A path that does not hold a model must not be taken for a hub name, nor another file for a GGUF file."""
    path = Path(pretrained).expanduser()
    if looks_local(pretrained) and not path.is_dir():
        raise ValueError(f"pretrained: {pretrained} is no folder")
    if gguf_file and path.is_dir():
        file = path / gguf_file
        if not file.is_file():
            beside = ", ".join(sorted(entry.name for entry in path.glob("*.gguf"))) or "no GGUF file"
            raise ValueError(f"gguf_file: {pretrained} has no {gguf_file}; it has {beside}")
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(f"gguf_file: {file} is no GGUF file: it does not begin with the letters GGUF")
