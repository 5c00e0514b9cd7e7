"""A run, or any model, as a folder that transformers, peft and owlfuse read; and reading one.

OUT/ holds config.json, model.safetensors (in shards over a size), generation_config.json, the tokenizer with its chat template,
processor_config.json, README.md (the model card) and, of a run with LoRA, adapter/ in peft's format.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor

from owlfuse.data.chat import ChatEncoder
from owlfuse.data.datamodule import load_tokenizer
from owlfuse.hub.adapter import merge_lora, save_lora, without_lora
from owlfuse.hub.card import model_card
from owlfuse.hub.modeling import OwlfuseForConditionalGeneration
from owlfuse.hub.processing import FLATTEN, OwlfuseImageProcessor, OwlfuseProcessor
from owlfuse.model import MultimodalLM, build_model
from owlfuse.runs import last_checkpoint
from owlfuse.types import DataError

ADAPTER = "adapter"


@dataclass
class Trained:
    """A run's model with what is needed to talk to it."""

    model: MultimodalLM
    tokenizer: Any
    results: dict[str, Any] | None
    """results.json, where the run has one."""


def load_run(folder: Path) -> Trained:
    """The model of a run's last checkpoint, in eval mode on the CPU. The run's data are not needed, but its tokenizer is."""
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    encoder = ChatEncoder(load_tokenizer(config["data"]["tokenizer"]), tokens_per_image=1)
    model, _ = build_model(config["model"], len(encoder.tokenizer))
    checkpoint = torch.load(last_checkpoint(folder), map_location="cpu", weights_only=True, mmap=True)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()})
    results = folder / "results.json"
    return Trained(model.eval(), encoder.tokenizer, json.loads(results.read_text()) if results.exists() else None)


def export(trained: Trained, out: Path, merge: bool = False, max_shard_size: str = "5GB", source: str = "") -> Path:
    """Writes OUT, whole or not at all.

    Args:
        merge: fold LoRA's updates into the weights; else they are written apart, in `adapter/`.
        source: what the model card says it comes from.

    Raises:
        FileExistsError: OUT holds something.
    """
    model = trained.model
    wrapped = wrap(model, trained.tokenizer)
    if merge:
        merge_lora(model)
    with whole_folder(out) as folder:
        wrapped.save_pretrained(folder, state_dict=without_lora(wrapped), max_shard_size=max_shard_size)
        if not merge:
            save_lora(wrapped, folder / ADAPTER)
        if trained.tokenizer is not None:
            processor_of(model, trained.tokenizer).save_pretrained(folder)
        (folder / "README.md").write_text(model_card(model, trained.results, source, (folder / ADAPTER).exists()))
    return out


def wrap(model: MultimodalLM, tokenizer: Any) -> OwlfuseForConditionalGeneration:
    """As a model of transformers; answers end with the tokenizer's end of sequence."""
    if tokenizer is None:
        return OwlfuseForConditionalGeneration.wrap(model, None)
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    image = tokenizer.convert_tokens_to_ids("<image>")
    if image == tokenizer.unk_token_id or image is None:
        raise DataError("the tokenizer has no <image> token; add it: tokenizer.add_special_tokens")
    return OwlfuseForConditionalGeneration.wrap(model, image, {"eos_token_id": end, "pad_token_id": pad, "max_new_tokens": 256})


def processor_of(model: MultimodalLM, tokenizer: Any) -> OwlfuseProcessor:
    """Preprocessing, tokenizer and chat template. The template takes messages whose content has parts, whatever the
    tokenizer's own takes."""
    tokenizer.padding_side = "left"
    return OwlfuseProcessor(
        OwlfuseImageProcessor.of(model.vision.preprocessing),
        tokenizer,
        chat_template=FLATTEN + tokenizer.chat_template.removeprefix(FLATTEN),
        tokens_per_image=model.fusion.tokens_per_image,
    )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, and is gone if anything fails."""
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    beside.mkdir()
    try:
        yield beside
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_exported(
    folder: Path, merge: bool = False, attention: str = "sdpa"
) -> tuple[OwlfuseForConditionalGeneration, OwlfuseProcessor | None]:
    """The model and processor of OUT, LoRA's updates applied: beside the weights, or folded into them with `merge`.

    Raises:
        DataError: a folder that is no export, or one that is damaged (the file is named).
    """
    folder = check_exported(folder)
    check_weights(folder)
    wrapped = OwlfuseForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    if (folder / ADAPTER).is_dir():
        from peft import PeftModel

        PeftModel.from_pretrained(wrapped, folder / ADAPTER)
        if merge:
            merge_lora(wrapped.model)
    has_processor = (folder / "processor_config.json").exists()
    return wrapped.eval(), AutoProcessor.from_pretrained(folder) if has_processor else None


def check_weights(folder: Path) -> None:
    """Opens each safetensors file, which reads its header alone. Raises DataError with the file that is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for name in sorted(shards):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except FileNotFoundError:
            raise DataError(f"{folder / name} is missing; export or copy the folder anew") from None
        except (SafetensorError, OSError) as error:
            raise DataError(f"{folder / name} is damaged ({error}); export or copy it anew") from error


def check_exported(folder: Path) -> Path:
    """The folder, if it is one that `export` wrote. Raises DataError."""
    folder = Path(folder).expanduser()
    config = folder / "config.json"
    if not config.is_file():
        raise DataError(f"{folder} has no config.json; name a folder that `owlfuse export` or `owlfuse import` wrote")
    try:
        model_type = json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise DataError(f"{config} is not JSON as an export's; export it anew") from None
    if model_type != "owlfuse":
        raise DataError(f"{config} is of a {model_type} model; a released mPLUG-Owl is read by `owlfuse import {folder} OUT`")
    return folder
