"""A run, or any model, as a folder that transformers, peft and owlfuse read; and reading one.

OUT/ holds config.json, model.safetensors (in shards over a size), generation_config.json, the tokenizer with its chat template,
processor_config.json, README.md (the model card) and, of a run with LoRA, adapter/ in peft's format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoProcessor
from transformers.core_model_loading import revert_weight_conversion

from owlfuse.config import read_run
from owlfuse.data.answer_format import AnswerFormat
from owlfuse.data.chat_tokenizer import prepare
from owlfuse.data.formats.base import IMAGE
from owlfuse.deferred import Deferred, storage_of
from owlfuse.folder_kinds import check_exported
from owlfuse.folders import whole_folder
from owlfuse.foreign import MAX_CONFIG, read_json_object
from owlfuse.hub.adapter import merge_lora, save_lora, without_lora
from owlfuse.hub.card import model_card
from owlfuse.hub.checking import (
    BUILD_ERRORS,
    MAX_TABLE,
    check_adapter,
    check_counts,
    check_files,
    check_shapes,
    describing,
    header_shapes,
)
from owlfuse.hub.configuration import OwlfuseConfig
from owlfuse.hub.later import exported_later
from owlfuse.hub.modeling import OwlfuseForConditionalGeneration
from owlfuse.hub.processing import OwlfuseImageProcessor, OwlfuseProcessor
from owlfuse.hub.writing import write_weights
from owlfuse.model import MultimodalLM
from owlfuse.released.record import read_record, write_record
from owlfuse.run_data import run_tokenizer
from owlfuse.types import DataError
from owlfuse.weights import load_run_model

KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
ADAPTER, RELEASED = "adapter", "released"


@dataclass
class Trained:
    """A run's model with what is needed to talk to it."""

    model: MultimodalLM
    tokenizer: Any
    results: dict[str, Any] | None
    """results.json, where the run has one."""
    image_token: str = IMAGE
    """What stands for an image in the tokenizer."""
    deferred: Deferred | None = None
    """What knows the tensors of a model without memory."""

    def value(self, tensor: Tensor) -> Tensor:
        """What a tensor of the model holds."""
        return tensor if self.deferred is None else self.deferred.value(tensor)


def load_run(folder: Path, deferred: Deferred | None = None, which: str = "last") -> Trained:
    """The model of a run's last or best checkpoint, in eval mode on the CPU. The run's data are not needed, but its
    tokenizer is.

    Args:
        deferred: knows the tensors, and the model has no memory: for `export`.
    """
    config = read_run(folder)
    tokenizer = run_tokenizer(folder, config["data"])
    with deferred or nullcontext():
        model, _ = load_run_model(folder, config, len(tokenizer), which)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else None
    return Trained(model.eval(), tokenizer, results, deferred=deferred)


def export(trained: Trained, out: Path, merge: bool = False, max_shard_size: str = "5GB", source: str = "") -> Path:
    """Writes OUT, whole or not at all. Of a model without memory one tensor is in memory at a time, and of a layer that LoRA's
    update is folded into a few copies.

    Args:
        merge: fold LoRA's updates into the weights; else they are written apart, in `adapter/`.
        source: what the model card says it comes from.

    Raises:
        FileExistsError: OUT holds something.
    """
    model = trained.model
    wrapped = wrap(trained)
    if merge:
        merge_lora(model, trained.deferred)
    with whole_folder(out) as folder:
        save_weights(wrapped, folder, max_shard_size, trained.value)
        if not merge:
            save_lora(wrapped, folder / ADAPTER, trained.value)
        if trained.tokenizer is not None:
            processor_of(trained).save_pretrained(folder)
        if released := model.released:
            write_record(released, folder / RELEASED)
        (folder / "README.md").write_text(model_card(model, trained.results, source, (folder / ADAPTER).exists()))
    return out


def save_weights(
    wrapped: OwlfuseForConditionalGeneration, folder: Path, max_shard_size: str, value: Callable[[Tensor], Tensor]
) -> None:
    """What `wrapped.save_pretrained` writes, without LoRA. An LLM that transformers has under other names than its files, as
    it has mixtures of experts, is in memory as a whole."""
    state = untied(without_lora(wrapped), wrapped)
    if set(revert_weight_conversion(wrapped, state)) != set(state):
        whole = {name: value(tensor) for name, tensor in state.items()}
        wrapped.save_pretrained(folder, state_dict=whole, max_shard_size=max_shard_size)
        return
    wrapped.save_pretrained(folder, state_dict={})  # all but the weights
    metadata = {"total_parameters": wrapped.num_parameters()}
    write_weights(folder, state, lambda name: value(state[name]), max_shard_size, metadata)


def untied(state: dict[str, Tensor], wrapped: OwlfuseForConditionalGeneration) -> dict[str, Tensor]:
    """The state without the names of weights that are others' too, by which transformers does not look for them."""
    tied = wrapped.get_expanded_tied_weights_keys(all_submodels=True)
    twice = {name for name, source in tied.items() if {name, source} <= set(state)}
    return {
        name: tensor
        for name, tensor in state.items()
        if not (name in twice and storage_of(tensor) == storage_of(state[tied[name]]))
    }


def wrap(trained: Trained) -> OwlfuseForConditionalGeneration:
    """As a model of transformers; answers end as the chat template and the LLM's own generation configuration say."""
    tokenizer = trained.tokenizer
    if tokenizer is None:
        released = trained.model.released
        return OwlfuseForConditionalGeneration.wrap(trained.model, released.image_token_id if released else None)
    prepare(tokenizer, trained.image_token)
    image = tokenizer.get_vocab().get(trained.image_token)
    if image is None:
        raise DataError(f"the tokenizer has no {trained.image_token}; give it: tokenizer.add_special_tokens")
    ends = AnswerFormat.of(tokenizer).generation(tokenizer, trained.model.llm)
    return OwlfuseForConditionalGeneration.wrap(trained.model, image, {**ends, "max_new_tokens": 256})


def processor_of(trained: Trained) -> OwlfuseProcessor:
    """Preprocessing, tokenizer and chat template: the one of training, which takes texts and parts."""
    tokenizer, image_token = prepare(trained.tokenizer, trained.image_token), trained.image_token
    tokenizer.padding_side = "left"
    return OwlfuseProcessor(
        OwlfuseImageProcessor.of(trained.model.vision.preprocessing),
        tokenizer,
        chat_template=tokenizer.chat_template,
        tokens_per_image=trained.model.fusion.tokens_per_image,
        image_token=image_token,
    )


def load_exported(
    folder: Path, merge: bool = False, attention: str = "sdpa"
) -> tuple[OwlfuseForConditionalGeneration, OwlfuseProcessor | None]:
    """The model and processor of OUT, LoRA's updates applied: beside the weights, or folded into them with `merge`. Within
    `Deferred` the model has no memory.

    Raises:
        DataError: a folder that is no export, or one that is damaged (the file is named).
    """
    folder = check_exported(folder)
    check_files(folder)
    files = check_weights(folder)
    config_file = folder / "config.json"
    check_counts(read_json_object(config_file, MAX_CONFIG), config_file, header_shapes(files))
    with describing(config_file):
        check_skeleton(folder, files)
        if Deferred.current is None:
            wrapped, found = OwlfuseForConditionalGeneration.from_pretrained(
                folder,
                attn_implementation=attention,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        else:
            wrapped, found = exported_later(folder, attention)
    if wrapped.config.dtype is not None:
        wrapped.model.llm.config.dtype = wrapped.config.dtype  # by which it is exported again, in memory or not
    if wrong := [f"{name} ({what.removesuffix('_keys')})" for what in KEYS for name in map(name_of, found[what])]:
        raise DataError(f"{folder}: the weights do not fit config.json: {', '.join(sorted(wrong))}; export it anew")
    if (folder / ADAPTER).is_dir():
        from peft import PeftModel

        check_adapter(folder / ADAPTER)
        with describing(folder / ADAPTER):
            PeftModel.from_pretrained(wrapped, folder / ADAPTER, torch_device="cpu")
        if merge:
            merge_lora(wrapped.model, Deferred.current)
    if (folder / RELEASED).is_dir():
        wrapped.model.released = read_record(folder / RELEASED)
    has_processor = (folder / "processor_config.json").exists()
    return wrapped.eval(), load_processor(folder) if has_processor else None


def check_skeleton(folder: Path, files: list[Path]) -> None:
    """Builds the model of an exported folder without memory, and compares it with the headers of its weights. Numbers of
    config.json that have nothing to do with the weights would else ask for memory. Raises DataError."""
    config = OwlfuseConfig.from_pretrained(folder)
    deferred = Deferred.current
    with torch.device("meta"), deferred.drawing_nothing() if deferred is not None else nullcontext():
        skeleton = OwlfuseForConditionalGeneration(config)
    tied = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    check_shapes(skeleton, folder, header_shapes(files), tied)


def load_processor(folder: Path) -> OwlfuseProcessor:
    """The processor of an exported folder. Raises DataError where its files make none."""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # tokenizers raises a plain Exception for a file that is not one of its own
        if type(error) is not Exception and not isinstance(error, BUILD_ERRORS):
            raise
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{folder}: its tokenizer and processor_config.json make no processor: {reason}") from error
    if not isinstance(processor, OwlfuseProcessor):
        raise DataError(f"{folder / 'processor_config.json'}: makes a {type(processor).__name__}; export the folder anew")
    return processor


def is_weight(name: str) -> bool:
    """Not a counter, as batch norms have."""
    return not name.endswith("num_batches_tracked")


def name_of(entry: str | tuple) -> str:
    """A tensor's name; with the shapes found and expected, where transformers gives them."""
    return entry if isinstance(entry, str) else f"{entry[0]} {tuple(entry[1])}, expected {tuple(entry[2])}"


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each opened, which reads its header alone. Raises DataError with the file that is
    missing or damaged."""
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.exists():
        places = read_json_object(index, MAX_TABLE).get("weight_map")
        names: list[Any] = list(places.values()) if isinstance(places, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise DataError(f"{index}: weight_map: expected the name of a file beside it for each tensor; export it anew")
        shards = set(names)
    for name in sorted(shards):
        try:
            with safe_open(folder / name, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise DataError(f"{folder / name} is missing; export or copy the folder anew") from None
        except (SafetensorError, OSError) as error:
            raise DataError(f"{folder / name} is damaged ({error}); export or copy it anew") from error
        if wrong := [f"{own} is {kind}" for own, kind in kinds.items() if not kind.startswith(("F", "BF")) and is_weight(own)]:
            raise DataError(f"{folder / name}: {', '.join(wrong)}, and weights are floating-point numbers; export it anew")
    return [folder / name for name in sorted(shards)]
