"""A `MultimodalLM` as a model of transformers: from_pretrained, save_pretrained and generate are
transformers' own.

N images, Q visual tokens per image, B rows, I the most images of a row, T text positions, V
vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from owlfuse.artifacts.checking import FORBIDDEN
from owlfuse.artifacts.hf.configuration import OwlfuseConfig
from owlfuse.core.errors import DataError
from owlfuse.core.types import Batch, VisualTokens, image_starts, number_images
from owlfuse.model.llm import balancing_coefficient, cache_argument
from owlfuse.model.loss import token_loss
from owlfuse.model.multimodal import MultimodalLM, assemble
from owlfuse.model.quantization import check_rows, quantized_layers

log = logging.get_logger(__name__)


class OwlfuseForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Text and pictures in, text out.

    Args:
        model: one that is there already; by default it is assembled from the configuration, with
            random weights.
    """

    config_class = OwlfuseConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # any sequence
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: OwlfuseConfig, model: MultimodalLM | None = None) -> None:
        super().__init__(config)
        if model is None:
            # Gemma 3's own configuration has the LLM's inside
            llm_config = config.text_config.get_text_config(decoder=True)
            model = assemble(config.nodes(), llm_config.vocab_size)
        self.model = model
        with no_init_weights():  # the parts have initialised themselves, or are trained
            self.post_init()
        # private in transformers, which collects them of its own models alone: what is read in 32
        # bits where the rest is in 16
        strict = getattr(model.llm, "_keep_in_fp32_modules_strict", None) or ()
        self._keep_in_fp32_modules_strict = {*strict}

    @classmethod
    def wrap(
        cls,
        model: MultimodalLM,
        image_token_id: int | None,
        generation: dict[str, Any] | None = None,
    ) -> OwlfuseForConditionalGeneration:
        """A model that is in memory, for generation or export.

        `generation`: fields of the generation configuration.
        """
        # the LLM's node is made of text_config, which transformers reads too
        nodes = {name: node for name, node in (model.nodes or {}).items() if name != "llm"}
        # the LLM's own is not to be changed
        text_config = copy.deepcopy(model.llm.config)  # transformers writes its attention into it
        remove_forbidden(text_config)
        config = OwlfuseConfig(
            **nodes,
            text_config=text_config,
            image_token_id=image_token_id,
            tokens_per_image=model.fusion.tokens_per_image,
            llm_trained_in_4_bits=bool(quantized_layers(model)),
        )
        wrapped = cls(config, model)
        # ends of the chat template, and lengths
        wrapped.generation_config.update(**generation or {})
        # what is set here counts, not what the LLM's configuration has
        wrapped.generation_config._from_model_config = False
        return wrapped

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Buffers that no checkpoint holds (position tables, rotary frequencies)
        are computed anew, since transformers makes the model on the meta device."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # of transformers' quantization_config, which asks for any layer
        for name, layer in quantized_layers(model).items():
            if layer.weight.device.type == "cpu":
                check_rows(name, layer)
        # both after loading, which replaces parameters
        restore_buffers(model)
        align(model)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Returns which weights are tied: those that the LLM names, by their names here."""
        tied = self.model.llm.get_expanded_tied_weights_keys(all_submodels=all_submodels)
        return {f"model.llm.{name}": f"model.llm.{source}" for name, source in tied.items()}

    def get_input_embeddings(self) -> nn.Module:
        """Returns those of the LLM."""
        return self.model.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Returns those of the LLM."""
        return self.model.llm.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the LLM's."""
        self.model.llm.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the LLM's."""
        self.model.llm.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Gives the LLM another number of tokens, see `PreTrainedModel.resize_token_embeddings`."""
        embeddings = self.model.llm.resize_token_embeddings(*args, **kwargs)
        # the LLM has a configuration of its own, and this one is what is saved
        self.config.get_text_config(decoder=True).vocab_size = embeddings.num_embeddings
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        visual: VisualTokens | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        max_positions: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last `logits_to_keep` positions, or at those of a tensor;
        with labels (B, T) also the mean loss of the next token.

        Args:
            pixel_values: (N, 3, H, W) of the images in the order of their placeholders. Not needed
                with `visual`.
            visual: what `encode` gave for the whole prompt; needed with a cache that holds a part
                of it.
            attention_mask: (B, T) of 1 and 0, all ones by default.
            cache: or `past_key_values`, as older transformers call it: with one that holds earlier
                positions, `input_ids` are the new ones and `attention_mask` covers both.
            max_positions: what a row has behind so many is padding: it has ended, and a table of
                positions has no row for it.
            num_items_in_batch: by which the summed loss is divided, as transformers' Trainer gives
                it: the supervised tokens of all micro batches of a step. By default those of this
                batch.

        Raises:
            ValueError: a mask of another shape; a prompt in the cache whose `visual` is not given.
            TypeError: an argument that would have no effect.
        """
        check_unused(kwargs)
        cache = cache if cache is not None else past_key_values
        had_cache = cache is not None
        if cache is None and use_cache:
            cache = DynamicCache(config=self.model.llm.config)
        # positions that the cache holds
        earlier = cache.get_seq_length() if cache is not None else 0
        # new positions and those of the cache
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), earlier + input_ids.shape[1])
        # behind a cache the mask is longer than the ids
        if attention_mask.ndim != 2 or (not had_cache and attention_mask.shape != input_ids.shape):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)} and input_ids "
                f"{tuple(input_ids.shape)}; give (rows, positions), 1 at text and 0 at padding: "
                "the LLM makes its own masks from it"
            )
        if max_positions is not None:
            attention_mask = attention_mask * (attention_mask.cumsum(1) <= max_positions)
        if visual is None:
            if earlier:
                raise ValueError(
                    "the cache holds earlier positions: give `visual` too, which `encode` makes "
                    "of the whole prompt"
                )
            visual = self.encode(input_ids, pixel_values)
        batch = self.batch(input_ids, attention_mask, visual)
        # one forward for training, evaluation and generation
        logits = self.logits(batch, visual, cache, logits_to_keep)
        loss = None
        if labels is not None:
            labels, share = without_images(labels, batch.placeholder)
            summed, count = token_loss(logits, labels)
            # As in training: of a mixture of experts that is trained, how unevenly they are used.
            if self.model.balancing_loss is not None:
                balance = balancing_coefficient(self.model.llm) * self.model.balancing_loss
                summed = summed + balance * count
            loss = summed / (count if num_items_in_batch is None else num_items_in_batch * share)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, **{cache_argument(self.model.llm): cache}
        )

    def logits(
        self, batch: Batch, visual: VisualTokens, cache: Any, logits_to_keep: int | Tensor
    ) -> Tensor:
        """Returns the logits (B, R, V) of the last positions, or of those of a tensor (R,)."""
        if not isinstance(logits_to_keep, Tensor):
            return self.model(batch, visual, cache, logits_to_keep)
        rows, steps = batch.input_ids.shape
        # the model counts positions over all rows
        starts = torch.arange(rows, device=logits_to_keep.device)[:, None] * steps
        places = (starts + logits_to_keep % steps).flatten()
        return self.model(batch, visual, cache, places).view(rows, len(logits_to_keep), -1)

    def batch(self, input_ids: Tensor, attention_mask: Tensor, visual: VisualTokens) -> Batch:
        """Returns the rows as the model takes them: new ids (B, T) behind what a cache holds, the
        mask over both. No pixels: the visual tokens are there already."""
        placeholder = self.placeholder(visual, attention_mask.shape[1])[:, -input_ids.shape[1] :]
        return Batch.of(
            self.embeddable_ids(input_ids, placeholder),
            placeholder,
            visual.image_positions,
            attention_mask=attention_mask,
            image_index=visual.image_index,
            has_images=True,
            visual_count=int(placeholder.sum()),
        )

    def embeddable_ids(self, input_ids: Tensor, placeholder: Tensor) -> Tensor:
        """Returns the ids (B, T), 0 at placeholders whose id has no embedding: visual tokens stand
        there, so that the id does not matter."""
        embeddings: Any = self.get_input_embeddings()
        unknown = placeholder & (input_ids >= embeddings.num_embeddings)
        return input_ids.masked_fill(unknown, 0)

    def placeholder(self, visual: VisualTokens, length: int) -> Tensor:
        """(B, length) bool, True at the positions that images take: known from where they begin,
        since an answer may hold the id of `<image>` too."""
        positions = torch.arange(length, device=visual.image_positions.device)[None, :, None]
        first = visual.image_positions[:, None]
        last = first + self.config.tokens_per_image - 1
        in_image = (positions >= first) & (positions <= last)  # (B, length, I)
        in_image &= visual.image_index[:, None] >= 0
        return in_image.any(-1)

    def encode(self, input_ids: Tensor, pixel_values: Tensor | None) -> VisualTokens:
        """Runs the backbone once for all images (N, 3, H, W), and finds where the rows (B, T) hold
        them.

        Raises:
            DataError: placeholders that are no whole images, or more or fewer of them than images.
        """
        if self.config.image_token_id is None:
            raise DataError(
                "config.json has no image_token_id, the id that stands for an image; set "
                "model.config.image_token_id"
            )
        placeholder = input_ids == self.config.image_token_id
        per_image = self.config.tokens_per_image
        counts = placeholder.sum(1)  # (B,) positions that images take in each row
        total = int(counts.sum())
        images = 0 if pixel_values is None else len(pixel_values)
        if total != images * per_image or (counts % per_image).any():
            raise DataError(
                f"the prompt has {total} image positions, {per_image} to an image, and {images} "
                "images were given; there must be one <image> for each"
            )
        starts_by_row = []
        for row in placeholder.cpu():  # one wait for the device, not one a row
            starts_by_row.append(row.nonzero().flatten()[::per_image].tolist())
        positions = image_starts(starts_by_row, input_ids.shape[1]).to(input_ids.device)
        index = number_images(positions, input_ids.shape[1])
        if pixel_values is not None and images:
            weight = next(self.model.vision.parameters())
            features = self.model.vision(pixel_values.to(weight.device, weight.dtype))
            tokens, levels = self.model.connect(features)
        else:
            # a blank image that no row points to, as in a `Batch` without images
            embeddings: Any = self.get_input_embeddings().weight
            tokens = embeddings.new_zeros(1, self.model.connector.tokens, embeddings.shape[1])
            extra = self.model.fusion.levels
            levels = tokens.expand(extra, *tokens.shape) if extra else None
        return VisualTokens(tokens, index, positions, levels)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Returns the arguments of a forward as transformers', but drops a cache whose keys are
        rotated by other frequencies than the next step's, as Phi-3's own class does: those of
        longrope change once a row is longer than the LLM was first made for."""
        name = "cache" if "cache" in kwargs else "past_key_values"
        cache, limit = kwargs.get(name), length_of_short_factors(self.model.llm)
        cached = 0 if cache is None else cache.get_seq_length()
        if limit and cached <= limit < input_ids.shape[1]:
            visual = kwargs.get("visual")
            if visual is not None:
                # the visual keys too, which are kept without a cache of the text's
                visual.kv_cache.clear()
            if cached:
                kwargs |= {name: None, "next_sequence_length": None}
        above: Any = super()
        return above.prepare_inputs_for_generation(input_ids, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Returns the mask (B, T) of generate as it is, which would give the LLM's own masks
        (B, 1, T, T') with a static cache; where images are is counted by rows and positions."""
        return attention_mask

    def _expand_inputs_for_generation(  # type: ignore[override]  # by name, as generate calls it
        self, expand_size: int = 1, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """The one place that generate passes through before its rows multiply: images are encoded
        here, once for all beams and steps, and their keys and values are kept from the first step
        on."""
        if kwargs.get("visual") is None:
            check_whole_prompt(input_ids, **kwargs)
            # the pixels themselves are not repeated for every beam
            pixels = kwargs.pop("pixel_values", None)
            # generate takes inputs from the CPU, and moves what it knows of
            kwargs["visual"] = self.encode(input_ids.to(self.device), pixels)
        visual: VisualTokens = kwargs["visual"]
        kwargs["visual"] = replace(
            visual,
            image_index=visual.image_index.repeat_interleave(expand_size, dim=0),
            image_positions=visual.image_positions.repeat_interleave(expand_size, dim=0),
            kv_cache={},
        )
        above: Any = super()
        return above._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )


def check_whole_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    cache: Any = None,
    **_: Any,
) -> None:
    """Raises ValueError for ids (B, T) that are only those behind what a cache holds: their
    pictures would be looked for at places of the whole row."""
    cache = past_key_values if cache is None else cache
    cached = 0 if cache is None else cache.get_seq_length()
    length = input_ids.shape[1]
    masked = 0 if attention_mask is None else attention_mask.shape[1]
    if cached and (masked > length or cached >= length):
        raise ValueError(
            f"the cache holds {cached} positions and input_ids are the {length} behind them; give "
            "the whole chat's input_ids and all its pictures, of which those in the cache are not "
            "computed again"
        )


def without_images(labels: Tensor, placeholder: Tensor) -> tuple[Tensor, Tensor | float]:
    """Returns labels (B, T) without those at positions of images, placeholder (B, T) True, and the
    share of them that is left.

    TRL leaves it to the model not to learn them. transformers' Trainer has counted them in
    `num_items_in_batch`, of all micro batches: the share of this one is taken for that of all.
    """
    supervised = labels != -100
    at_images = supervised & placeholder
    if not at_images.any():
        return labels, 1.0
    log.warning_once(
        "labels hold positions of images, which are not learned; set labels[labels == "
        "model.config.image_token_id] = -100, since trainers count them by the labels"
    )
    # the first position of a row has no token before it that would predict it
    count = supervised[:, 1:].sum().clamp(min=1)
    return labels.masked_fill(at_images, -100), 1 - at_images[:, 1:].sum() / count


def length_of_short_factors(llm: PreTrainedModel) -> int | None:
    """Returns the length beyond which longrope rotates by other frequencies; None without it."""
    config = llm.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return parameters.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )


GIVEN_BY_GENERATE = {"return_dict", "cache_position", "tokenizer", "assistant_tokenizer"}
"""Arguments of every forward that transformers' generate hands down, whether or not it has them."""


def check_unused(arguments: dict[str, Any]) -> None:
    """Raises TypeError for arguments of a forward that it does not use, unless they ask for what
    it does anyway."""
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    unused = sorted(given - GIVEN_BY_GENERATE)
    if unused:
        raise TypeError(
            f"{', '.join(unused)}: owlfuse's models have no such argument; positions follow from "
            "attention_mask, and attentions and hidden states are the LLM's (model.model.llm)"
        )


def remove_forbidden(config: PreTrainedConfig) -> None:
    """Removes from an LLM's configuration, and from those inside of it, what the reader of an
    export refuses. transformers keeps and writes such keys of the folder that the LLM came from:
    how a GGUF file was quantised, or where the hub has code for a class that transformers has
    itself. The weights are plain by now, and code of a folder is never run."""
    for key in FORBIDDEN:
        vars(config).pop(key, None)
    for name in config.sub_configs:
        sub_config = getattr(config, name, None)
        if sub_config is not None:
            remove_forbidden(sub_config)


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Moves weights that are a file mapped into memory, at odd addresses, to where torch puts its
    own: the kernels of some processors round otherwise at odd ones, and logits would differ in the
    last bit from those before the export."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def restore_buffers(model: OwlfuseForConditionalGeneration) -> None:
    """Sets the buffers that are not saved to what the model's constructor makes of them."""
    with init_empty_weights(include_buffers=False), torch.device("cpu"):
        fresh = OwlfuseForConditionalGeneration(cast("OwlfuseConfig", model.config))
    persistent = set(fresh.state_dict())
    for name, buffer in fresh.named_buffers():
        if name in persistent:
            continue
        path, _, attribute = name.rpartition(".")
        # torch's own table: setattr would make a buffer that is not persistent persistent
        buffers: Any = model.get_submodule(path)._buffers
        old = buffers[attribute]
        dtype = old.dtype if buffer.is_floating_point() else None
        buffers[attribute] = buffer.to(old.device, dtype)
