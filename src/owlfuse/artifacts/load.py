"""Models from folders: runs, exports, and what `owlfuse.load` reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import OmegaConf
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoProcessor

from owlfuse.artifacts.checking import (
    BUILD_ERRORS,
    MAX_TABLE,
    build_errors,
    check_adapter,
    check_counts,
    check_files,
    check_shapes,
    error_reason,
)
from owlfuse.artifacts.hf.configuration import read_configuration
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.hf.processing import OwlfuseImageProcessor, OwlfuseProcessor
from owlfuse.artifacts.lora import merge_lora
from owlfuse.artifacts.released.loading import read_record
from owlfuse.artifacts.released.weights import FLOATS, TensorInfo, read_header, shard_names
from owlfuse.artifacts.resume import computing_keys, is_path, read_past
from owlfuse.artifacts.run_data import check_tokenizer, run_tokenizer
from owlfuse.artifacts.runs import BEST, check_which, chosen_checkpoint, read_results
from owlfuse.artifacts.weights import check_fits, load_weights, read, set_precision
from owlfuse.config.compose import read_run
from owlfuse.config.identity import flat
from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_CONFIG, read_json
from owlfuse.core.folder_kinds import check_exported
from owlfuse.core.types import IMAGE
from owlfuse.data.chat.answer_format import AnswerFormat
from owlfuse.data.chat.tokenizer import prepare
from owlfuse.model.adapters import without_peft_warnings
from owlfuse.model.layouts import names_in_float32
from owlfuse.model.llm import recompute_activations
from owlfuse.model.multimodal import MultimodalLM, build_model, on_meta
from owlfuse.model.quantization import Quantization


def load_with_processor(
    folder: Path, which: str = "last", checkpoint: Path | None = None
) -> tuple[OwlfuseForConditionalGeneration, OwlfuseProcessor]:
    """Returns model and processor of an exported or imported folder, or of a run's last or best
    checkpoint.

    Args:
        checkpoint: of a run, one that was chosen before; by default `which` chooses.

    Raises:
        DataError: neither, or a folder without a tokenizer.
    """
    if (folder / "config.yaml").exists():
        trained = load_run(folder, which, checkpoint)
        return wrap(trained), make_processor(trained)
    check_which(which, of_run=False)
    model, processor = load_exported(folder)
    if processor is None:
        raise DataError(
            f"{folder} has no tokenizer, so there is nothing to chat with; import it from a "
            "folder with one"
        )
    return model, processor


log = logging.getLogger(__name__)

MAX_UNSAVED = 2**28
"""Numbers of tables that no weights hold, as those of positions: of some millions usually."""
ADAPTER, RELEASED = "adapter", "released"
"""Folders in an export."""


@dataclass
class TrainedModel:
    """A run's model with what is needed to chat with it or to export it."""

    model: MultimodalLM
    tokenizer: Any
    results: dict[str, Any] | None
    """results.json, where the run has one of these weights."""
    image_token: str = IMAGE
    """What stands for an image in the tokenizer."""


def load_run(folder: Path, which: str = "last", checkpoint: Path | None = None) -> TrainedModel:
    """Returns the model of a run's last or best checkpoint, in eval mode on the CPU. The run's data
    are not needed, but its tokenizer is.

    Args:
        checkpoint: one that was chosen before; by default `which` chooses.
    """
    # only names that owlfuse knows are imported
    config = read_run(folder)
    tokenizer = run_tokenizer(folder, config["data"])
    # a data module of the user's may have none
    sources = config["data"].get("sources") or {}
    tiled = [name for name, node in sources.items() if node.get("tile")]
    if tiled:
        log.warning(
            "%s was trained with tiles (data.sources.%s.tile), and whole pictures are shown to it "
            "outside of its validation; for tiles export it, and set tile to true in the export's "
            "processor_config.json",
            folder,
            tiled[0],
        )
    checkpoint = checkpoint or chosen_checkpoint(folder, which)
    check_not_edited(config, folder, checkpoint)
    model, content = load_run_model(folder, config, len(tokenizer), checkpoint)
    results = results_of_checkpoint(folder, checkpoint.name == BEST, content.get("global_step"))
    return TrainedModel(model.eval(), tokenizer, results)


def check_not_edited(config: dict[str, Any], folder: Path, checkpoint: Path) -> None:
    """Raises DataError for a key of the model that config.yaml has otherwise than the checkpoint,
    which has the configuration that it was trained with; and for another tokenizer."""
    past = read_past(checkpoint)
    check_tokenizer(folder, past)
    trained = flat(past.config["model"], "model")
    free = ["model.compile", *computing_keys(OmegaConf.create(config))]
    for key, value in flat(config["model"], "model").items():
        if trained.get(key) != value and not is_path(key) and key not in free:
            raise DataError(
                f"{folder / 'config.yaml'}: {key} is {value}, and {checkpoint.name} was trained "
                f"with {trained.get(key)}; give that back"
            )


def results_of_checkpoint(folder: Path, best: bool, step: int | None) -> dict[str, Any] | None:
    """Returns the content of a run's results.json, None where it is of another checkpoint: of the
    best instead of the last, or of before the run went on."""
    results = read_results(folder)
    of_best = results.get("checkpoint") == BEST
    of_same_weights = results.get("steps") == step and of_best == best
    return results if results and of_same_weights else None


def wrap(trained: TrainedModel) -> OwlfuseForConditionalGeneration:
    """Returns the model as one of transformers; answers end as the chat template and the LLM's own
    generation configuration say."""
    tokenizer = trained.tokenizer
    if tokenizer is None:
        released = trained.model.released
        image_token_id = released.image_token_id if released else None
        return OwlfuseForConditionalGeneration.wrap(trained.model, image_token_id)
    # the padding token, the image token and the chat template of training
    prepare(tokenizer, trained.image_token)
    image_token_id = tokenizer.get_vocab().get(trained.image_token)
    if image_token_id is None:
        raise DataError(
            f"the tokenizer has no {trained.image_token}; give it: tokenizer.add_special_tokens"
        )
    generation = AnswerFormat.of(tokenizer).generation(tokenizer, trained.model.llm)
    # transformers' default would end an answer after a few words
    generation["max_new_tokens"] = 256
    return OwlfuseForConditionalGeneration.wrap(trained.model, image_token_id, generation)


def make_processor(trained: TrainedModel) -> OwlfuseProcessor:
    """Returns preprocessing, tokenizer and chat template: the one of training, which takes texts
    and parts."""
    tokenizer, image_token = prepare(trained.tokenizer, trained.image_token), trained.image_token
    # of a hub's folder with code, which transformers keeps and writes, and no export may name
    tokenizer.init_kwargs.pop("auto_map", None)
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
    """Returns the model and processor of OUT, LoRA's updates applied: beside the weights, or folded
    into them with `merge`, in float32.

    Raises:
        DataError: a folder that is no export, or one that is damaged (the file is named).
    """
    folder = check_exported(folder)
    # in this order: nothing is built of a folder whose files name code, and no memory is taken for
    # one whose numbers do not fit its weights
    check_files(folder)
    weights = check_weights(folder)
    shapes = {name: info.shape for name, info in weights.items()}
    config_file = folder / "config.json"
    check_counts(read_json(config_file, limit=MAX_CONFIG), config_file, shapes)
    with build_errors(config_file):
        check_skeleton(folder, shapes)
        # mismatched sizes are collected, and reported together below
        wrapped, loading_info = OwlfuseForConditionalGeneration.from_pretrained(
            folder,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    # how answers end, which the next run's and the next export's are told by
    ends = wrapped.generation_config.eos_token_id
    # weights that were imported without a tokenizer have none
    if ends is not None:
        wrapped.model.llm.generation_config.eos_token_id = ends
    if wrapped.config.dtype is not None:
        wrapped.model.llm.config.dtype = wrapped.config.dtype  # by which it is exported again
    problems = []
    for problem in ("missing", "unexpected", "mismatched"):
        for entry in loading_info[f"{problem}_keys"]:
            problems.append(f"{describe_tensor(entry)} ({problem})")
    if problems:
        raise DataError(
            f"{folder}: the weights do not fit config.json: {', '.join(sorted(problems))}; export "
            "it anew"
        )
    restore_llm_dtype(wrapped.model, weights)
    if (folder / ADAPTER).is_dir():
        check_adapter(folder / ADAPTER)
        update_file = folder / ADAPTER / "adapter_model.safetensors"
        # Before peft reads it, which has no words for a file that is cut off.
        updates = read_header(update_file)
        with build_errors(folder / ADAPTER), without_peft_warnings():
            # injects its layers into `wrapped` itself
            peft_model = PeftModel.from_pretrained(wrapped, folder / ADAPTER, torch_device="cpu")
        check_updates(peft_model, set(updates), update_file)
        if merge:
            # in 16 bits small updates would be rounded away
            merge_lora(wrapped.model.float())
        else:
            lora = [weight for name, weight in wrapped.named_parameters() if ".lora_" in name]
            restore_update_dtype(lora, updates.values())
    if (folder / RELEASED).is_dir():
        wrapped.model.released = read_record(folder / RELEASED)
    # released weights that came without a tokenizer are imported without a processor
    processor = None
    if (folder / "processor_config.json").exists():
        processor = load_processor(folder)
        check_processor(processor, wrapped.model, folder / "processor_config.json")
    return wrapped.eval(), processor


def check_processor(processor: OwlfuseProcessor, model: MultimodalLM, file: Path) -> None:
    """Raises DataError where a processor prepares other pictures than the model takes: of another
    size, which may be beyond all memory, or at another number of positions."""
    expected = OwlfuseImageProcessor.of(model.vision.preprocessing)
    tokens = model.fusion.tokens_per_image
    pairs: dict[str, tuple[Any, Any]] = {}
    pairs["tokens_per_image"] = processor.tokens_per_image, tokens
    for key in ("size", "image_mean", "image_std", "interpolation", "resize"):
        value = getattr(processor.image_processor, key, None)
        pairs[f"image_processor.{key}"] = (value, getattr(expected, key))
    for key, (value, model_value) in pairs.items():
        if value != model_value:
            raise DataError(
                f"{file}: {key} is {str(value)[:80]}, and the model's is {model_value}; export the "
                "folder anew"
            )


def restore_llm_dtype(model: MultimodalLM, weights: dict[str, TensorInfo]) -> None:
    """Gives the LLM the 16 bits that it has in its files beside parts in 32, as after a run with
    `model.llm.dtype`: transformers gives all weights the one type of config.json."""
    dtypes = {}
    for name, info in weights.items():
        dtypes[name.removeprefix("model.")] = FLOATS.get(info.dtype, torch.float32)
    parameters = {name: p for name, p in model.llm.named_parameters(prefix="llm") if name in dtypes}
    in_float32 = {f"llm.{name}" for name in names_in_float32(model.llm, strict=False)}
    matrices = [name for name, p in parameters.items() if p.ndim > 1 and name not in in_float32]
    # of an LLM that was in 4 bits some are in 32, and then all weights are
    if len({dtypes[name] for name in matrices}) == 1:
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(dtypes[name])


def restore_update_dtype(parameters: Iterable[nn.Parameter], tensors: Iterable[TensorInfo]) -> None:
    """Gives an adapter's updates the type that they have in its file: peft makes float32 of 16
    bits, with which the answers are no more those of the trained model."""
    dtypes = {info.dtype for info in tensors}
    # of several types float32 holds all numbers exactly
    if len(dtypes) == 1:
        dtype = FLOATS.get(dtypes.pop(), torch.float32)
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)


def check_updates(model: PeftModel, names: set[str], file: Path) -> None:
    """Raises DataError where the file of an adapter lacks an update, or has one that no layer
    takes, of which peft only warns.

    Args:
        names: of the file's tensors.
    """
    expected = set(get_peft_model_state_dict(model))
    problems = [f"{name} (missing)" for name in expected - names]
    problems += [f"{name} (unexpected)" for name in names - expected]
    if problems:
        raise DataError(
            f"{file}: its updates are not those of adapter_config.json: {min(problems)} and "
            f"{len(problems) - 1} more; export or copy the folder anew"
        )


def check_skeleton(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Builds the model of an exported folder without memory, and compares it with the shapes of its
    weights. Numbers of config.json that have nothing to do with the weights would else take
    memory. Raises DataError."""
    config = read_configuration(folder)
    with torch.device("meta"):
        skeleton = OwlfuseForConditionalGeneration(config)
    tied = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    check_shapes(skeleton, folder, shapes, tied)
    saved = skeleton.state_dict().keys()
    unsaved = sum(b.numel() for name, b in skeleton.named_buffers() if name not in saved)
    limit = max(MAX_UNSAVED, sum(map(prod, shapes.values())))
    if unsaved > limit:
        raise DataError(
            f"{folder / 'config.json'}: its model computes tables of {unsaved:,} numbers that its "
            f"weights do not have, over the limit of {limit:,}"
        )


def load_processor(folder: Path) -> OwlfuseProcessor:
    """Returns the processor of an exported folder. Raises DataError where its files make none."""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # tokenizers raises a plain Exception for a file that is not one of its own
        if type(error) is not Exception and not isinstance(error, BUILD_ERRORS):
            raise
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder}: its tokenizer and processor_config.json make no processor: "
            f"{error_reason(error)}"
        ) from error
    if not isinstance(processor, OwlfuseProcessor):
        raise DataError(
            f"{folder / 'processor_config.json'}: makes a {type(processor).__name__}; export the "
            "folder anew"
        )
    return processor


def describe_tensor(entry: str | tuple) -> str:
    """Returns a tensor's name, with both shapes where transformers gives them."""
    if isinstance(entry, str):
        return entry
    name, shape, expected = entry
    return f"{name} {tuple(shape)}, expected {tuple(expected)}"


def check_weights(folder: Path) -> dict[str, TensorInfo]:
    """Returns what the headers of a folder's safetensors files say of its weights. Raises DataError
    with the file that is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    names = shard_names(index, MAX_TABLE) if index.exists() else ["model.safetensors"]
    weights: dict[str, TensorInfo] = {}
    for name in names:
        header = read_header(folder / name)
        weights |= header
        problems = []
        for tensor, info in header.items():
            # batch norms have a counter of this name
            is_weight = not tensor.endswith("num_batches_tracked")
            if is_weight and not info.dtype.startswith(("F", "BF")):
                problems.append(f"{tensor} is {info.dtype}")
        if problems:
            raise DataError(
                f"{folder / name}: {', '.join(problems)}, and weights are floating-point numbers; "
                "export it anew"
            )
    return weights


def load_base(folder: str, nodes: dict[str, Any], vocab_size: int) -> MultimodalLM:
    """Returns the folder's model for training: float32 or the LLM's `dtype`, LoRA's updates folded
    in, embeddings for at least `vocab_size` tokens, position embeddings resampled where its
    pictures had another size.
    Reading it uses up no random numbers. On the meta device only the folder's config.json is read.

    Args:
        nodes: the configuration's `model`, for how the LLM computes (`attention`,
            `gradient_checkpointing`) and is held (`dtype`, `quantization`), and for the size.
    """
    llm, image_size = nodes["llm"], nodes["vision"].get("image_size")
    state = torch.get_rng_state()  # a model from files draws fewer random numbers than a new one
    attention = llm.get("attention", "sdpa")
    on_meta = torch.get_default_device().type == "meta"
    if on_meta:
        config = read_configuration(check_exported(Path(folder)), attn_implementation=attention)
        wrapped = OwlfuseForConditionalGeneration(config)
    else:
        # merged: a new run may have other adapters
        wrapped = load_exported(Path(folder), merge=True, attention=attention)[0]
    model, trained_in_4_bits = wrapped.model.float(), wrapped.config.llm_trained_in_4_bits
    torch.set_rng_state(state)
    # position embeddings are resampled before training, not by it
    if image_size and model.vision.preprocessing.size != (image_size, image_size):
        model.set_image_size(image_size)
    if llm.get("dtype"):
        in_float32 = names_in_float32(model.llm)
        for name, parameter in model.llm.named_parameters():
            if name not in in_float32:
                parameter.data = parameter.data.to(getattr(torch, llm["dtype"]))
    # the new run's tokenizer may have more tokens
    if model.llm.get_input_embeddings().num_embeddings < vocab_size:
        # the meta device has no embeddings to take a mean of
        model.llm.resize_token_embeddings(vocab_size, mean_resizing=not on_meta)
    if llm.get("gradient_checkpointing"):
        recompute_activations(model.llm)
    if llm.get("quantization") is not None:
        if trained_in_4_bits and not on_meta:
            log.warning(
                "the LLM of %s was trained beside weights in 4 bits: rounded to 4 bits again, it "
                "loses a part of that training; without model.llm.quantization it keeps all",
                folder,
            )
        model.quantize(Quantization.of(llm["quantization"]))
    return model.train()


def load_run_model(
    folder: Path,
    config: dict[str, Any],
    vocab_size: int,
    checkpoint: Path,
) -> tuple[MultimodalLM, dict[str, Any]]:
    """Returns the model of a run's checkpoint, its frozen weights made anew as training made them,
    and of the checkpoint what `read` gives.

    Raises:
        DataError: it does not fit the model, or the frozen weights are others now.
    """
    config = with_paths_found(config, folder)
    config_file = folder / "config.yaml"
    weights, content = read(checkpoint)
    # a run may come from anybody, and its parts are built before its weights are compared
    check_counts(
        config["model"], config_file, {name: tuple(w.shape) for name, w in weights.items()}
    )
    with build_errors(config_file):
        check_not_larger(config["model"], vocab_size, weights, config_file)
    frozen = content.get("frozen", {})
    # frozen random weights are made again, not stored: the same draws as in training
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    # a checkpoint without frozen parameters has all weights
    init_from = config.get("init_from") if frozen else None
    with build_errors(config_file):
        base = load_base(init_from, config["model"], vocab_size) if init_from else None
        model, _ = build_model(config["model"], vocab_size, base, content.get("new_tokens", {}))
    # before check_fits, which hashes bytes
    set_precision(model, config["trainer"].get("precision"))
    check_fits(model, weights, frozen)
    load_weights(model, weights)
    return model, content


def check_not_larger(
    part_configs: dict[str, Any], vocab_size: int, weights: Mapping[str, Tensor], file: Path
) -> None:
    """Raises DataError for a configuration whose model would take far more memory than the weights
    of the checkpoint do, before it is made."""
    plan, _ = on_meta(part_configs, vocab_size)
    planned = found = 0
    for name, tensor in plan.state_dict().items():
        # frozen ones are in no checkpoint
        if name in weights:
            planned += tensor.numel()
            found += weights[name].numel()
    if planned > 2 * found:
        raise DataError(
            f"{file}: its model has {planned:,} numbers where the checkpoint has {found:,}; give "
            "the configuration back that it was trained with"
        )


def with_paths_found(node: dict[str, Any], folder: Path, prefix: str = "") -> dict[str, Any]:
    """Returns a run's configuration with paths that lead somewhere from the working folder.

    Those that a run names are relative to the folder in which it was begun, which is above its own:
    runs can be read from anywhere, and moved together with what they start from.

    Args:
        prefix: of the keys, where it is a part of the configuration.
    """
    located = {}
    for name, value in node.items():
        if isinstance(value, dict):
            value = with_paths_found(value, folder, f"{prefix}{name}.")
        elif isinstance(value, str) and is_path(f"{prefix}{name}"):
            value = find_path(value, folder)
        located[name] = value
    return located


def find_path(path: str, folder: Path) -> str:
    """Returns a path of a run as it leads from the working folder: as it is where it leads
    somewhere, or from the nearest folder above the run's from which it does."""
    # os.path: a name of the hub, or of a stranger, may be none of a file
    if os.path.exists(os.path.expanduser(path)):
        return path
    for parent in folder.resolve().parents:
        if os.path.exists(parent / path):
            return str(parent / path)
    return path
