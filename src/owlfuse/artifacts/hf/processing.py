"""Pictures and text -> the model's inputs, as transformers' pipelines call it.

N images, H and W their size in pixels, B rows, T text positions.
"""

from __future__ import annotations

import base64
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.processing_utils import ImagesKwargs, TextKwargs

from owlfuse.core.errors import DataError
from owlfuse.core.types import IMAGE
from owlfuse.data.chat.answer_format import AnswerFormat
from owlfuse.data.chat.supervision import cut_at_borders
from owlfuse.data.media.images import MAX_PIXELS, open_image, to_rgb, upright
from owlfuse.data.media.tiles import check_tiled, views_of
from owlfuse.data.words import show_words, spell_words
from owlfuse.model.vision.base import Preprocessing, Resize


class OwlfuseImageProcessor(BaseImageProcessor):
    """Pictures -> `pixel_values` (N, 3, H, W), by the very `Preprocessing` of training.

    Args:
        size: {"height", "width"} in pixels.
        image_mean, image_std: of RGB values from 0 to 1.
        interpolation: bicubic, bilinear, nearest, ...
        resize: stretch, letterbox or crop; an export from before it could be chosen has stretched.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int],
        image_mean: list[float],
        image_std: list[float],
        interpolation: str,
        resize: Resize = "stretch",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = dict(size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.interpolation = interpolation
        self.resize = resize

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> OwlfuseImageProcessor:
        """That of a backbone."""
        height, width = preprocessing.size
        size = {"height": height, "width": width}
        return cls(
            size,
            list(preprocessing.mean),
            list(preprocessing.std),
            preprocessing.interpolation,
            preprocessing.resize,
        )

    def preprocessing(self) -> Preprocessing:
        """That of the backbone it was made of."""
        return Preprocessing(
            (self.size["height"], self.size["width"]),
            tuple(self.image_mean),
            tuple(self.image_std),
            self.interpolation,
            self.resize,
        )

    def __call__(  # type: ignore[override]  # one way for every release of transformers
        self, images: Any, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Pictures of any size and mode, one or a list, also nested: PIL, paths, URLs, arrays.

        Raises:
            TypeError: options of a call, such as `size` or `do_resize`.
        """
        given = sorted(name for name, value in kwargs.items() if value is not None)
        if given:
            raise TypeError(f"{', '.join(given)}: {FIXED_PICTURES}")
        preprocess = self.preprocessing()
        pixels = [preprocess(to_rgb(picture)) for picture in open_images(images)]
        return BatchFeature(
            {"pixel_values": torch.stack(pixels)} if pixels else {}, tensor_type=return_tensors
        )


class OwlfuseProcessor(ProcessorMixin):
    """Tokenizer and image processor together; each `<image>` grows to the positions that an image
    takes.

    Args:
        tokens_per_image: the model's.
        image_token: the tokenizer's token that stands for an image.
        tile: whether a picture becomes a global view and tiles, an image each (see `tiles`), as of
            a source with `tile: 1`.
        padding_side: the tokenizer's from now on, by which pipelines pad too.
    """

    def __init__(
        self,
        image_processor: OwlfuseImageProcessor,
        tokenizer: Any,
        chat_template: str | None = None,
        tokens_per_image: int = 1,
        image_token: str = IMAGE,
        tile: bool = False,
        padding_side: str = "left",
    ) -> None:
        if image_token not in tokenizer.get_vocab():
            raise DataError(
                f"the tokenizer has no {image_token}, which stands for an image; take the one "
                "that was exported"
            )
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        # not what the tokenizer came with: answers are generated behind the rows
        tokenizer.padding_side = padding_side
        self.tile = tile
        if tile:
            check_tiled(image_processor.resize)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Returns `input_ids` and `attention_mask` (B, T), padded on the tokenizer's `padding_side`
        unless that is given, and `pixel_values` (N, 3, H, W) if there are images.

        Args:
            images: pictures in the order of their `<image>` marks (see `open_images`); a list of
                lists, one for each text, is the same.
            text: with an `<image>` for each picture; one that is a word is hidden (see
                `data.words`). Special tokens are not added: a chat template writes its own.

        Raises:
            DataError: another number of `<image>` marks than of images.
            TypeError: videos, audio, options for pictures, and those for texts without effect.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = open_images(images)
        token = self.image_token
        check_nesting(images, texts, token)
        placeholders = sum(text.count(token) for text in texts)
        if placeholders != len(pictures):
            raise DataError(
                f"the text has {placeholders} {token} and {len(pictures)} images were given; there "
                "must be one for each"
            )
        views = [self.views(picture) for picture in pictures]
        view_counts = iter([len(picture_views) for picture_views in views])
        expanded = []
        for text in texts:
            row, *texts_behind = text.split(token)
            for text_behind in texts_behind:
                row += token * (self.tokens_per_image * next(view_counts)) + text_behind
            expanded.append(row)
        image_options = kwargs.pop("images_kwargs", {})
        text_options = kwargs.pop("text_kwargs", {})
        options = {
            "padding": len(texts) > 1,
            "padding_side": self.tokenizer.padding_side,
            "add_special_tokens": False,
            "verbose": False,
            "return_tensors": "pt",
            **kwargs.pop("common_kwargs", {}),
            **kwargs,
            **text_options,
        }
        check_options(options)
        tensors = options.pop("return_tensors")
        features = self.encode_texts(expanded, tensors, **options)
        all_views = list(chain.from_iterable(views))
        features |= self.image_processor(all_views, return_tensors=tensors, **image_options)
        return BatchFeature(features)

    def views(self, picture: Image.Image) -> list[Image.Image]:
        """Returns what the model sees of a picture, an image each: itself, or with `tile` a global
        view and tiles."""
        if not self.tile:
            return [picture]
        # again: users set `processor.tile` after it was made
        check_tiled(self.image_processor.resize)
        # tiles of a picture have the size of its global view
        return views_of(to_rgb(picture), self.image_processor.preprocessing().size)

    @cached_property
    def answer_format(self) -> AnswerFormat:
        """The texts that the chat template writes around an answer."""
        return AnswerFormat.of(self.tokenizer)

    def encode_texts(self, texts: list[str], tensors: str | None, **options: Any) -> dict[str, Any]:
        """Returns `input_ids` and `attention_mask` (B, T). As in training, the text before an
        answer has the tokens that it has as a prompt."""
        # rows are padded once words are spelled out, which changes their lengths
        padding = {name: options.pop(name) for name in PADDING if name in options}
        if padding.get("padding") == "max_length" and "max_length" in options:
            padding["max_length"] = options["max_length"]
        if not options.get("truncation"):
            options.pop("max_length", None)
        plain_texts = [show_words(text, self.image_token) for text in texts]
        encoded = self.tokenizer(plain_texts, return_offsets_mapping=True, **options)
        rows, all_offsets = encoded["input_ids"], encoded["offset_mapping"]
        for ids, offsets, text, hidden in zip(rows, all_offsets, plain_texts, texts, strict=True):
            # without a template there are no answers whose borders matter
            if self.tokenizer.chat_template:
                cut_at_borders(self.tokenizer, text, ids, offsets, self.answer_format.starts(text))
            spell_words(self.tokenizer, self.image_token, hidden, ids, offsets, "a prompt")
        # now that the rows have their final lengths
        padded = self.tokenizer.pad(
            {"input_ids": rows},
            return_tensors=tensors,
            **padding,
        )
        return {name: padded[name] for name in ("input_ids", "attention_mask")}


PADDING = ("padding", "padding_side", "pad_to_multiple_of")
USED_OPTIONS = {
    *PADDING,
    "truncation",
    "max_length",
    "add_special_tokens",
    "verbose",
    "return_tensors",
    # it is always there
    "return_attention_mask",
}
"""Options of a processor's call that have an effect."""
OTHER_MODALITIES = ("videos", "audio", "videos_kwargs", "audio_kwargs")


def check_options(options: dict[str, Any]) -> None:
    """Removes what callers pass for no videos and no audio, and refuses what transformers'
    processors know and this one does not use. What a template may know (`enable_thinking`) stays.

    Raises:
        TypeError: an option without effect.
    """
    for name in OTHER_MODALITIES:
        value = options.pop(name, None)
        if value is not None and len(value):
            raise TypeError(f"{name}: the processor takes pictures and texts alone")
    pictures = sorted(
        name
        for name in ImagesKwargs.__annotations__
        if name not in USED_OPTIONS and options.get(name) is not None
    )
    if pictures:
        raise TypeError(f"{', '.join(pictures)}: {FIXED_PICTURES}")
    texts = sorted(
        name
        for name in TextKwargs.__annotations__
        if name not in USED_OPTIONS and options.get(name)
    )
    if texts:
        raise TypeError(
            f"{', '.join(texts)}: the processor does not support it; use processor.tokenizer for "
            "texts without pictures"
        )
    cuts = options.get("truncation") or options.get("padding") == "max_length"
    if options.get("max_length") is not None and not cuts:
        raise TypeError("max_length: has no effect without truncation=True or padding='max_length'")


FIXED_PICTURES = (
    "pictures are prepared as in training, whatever a call asks for; what preprocessor_config.json "
    "says can be changed there"
)


def check_nesting(images: Any, texts: list[str], token: str) -> None:
    """Raises DataError for lists of pictures, one for each text, of which one has another number of
    pictures than its text has marks: they would be shown in the texts behind it."""
    rows = images if isinstance(images, list | tuple) else []
    if not any(isinstance(row, list | tuple) for row in rows):
        return
    # A single text may have them in any nesting.
    if len(texts) == 1:
        return
    counts = [len(row) if isinstance(row, list | tuple) else int(row is not None) for row in rows]
    marks = [text.count(token) for text in texts]
    if counts != marks:
        raise DataError(
            f"the texts have {marks} {token} and the lists of images {counts}; each text must have "
            "one for each of its images"
        )


def open_images(images: Any) -> list[Image.Image]:
    """Returns one picture, a list or lists of them as a list of PIL pictures.

    A picture may be a path, a URL or an array.
    """
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(chain.from_iterable(map(open_images, images)))
    if isinstance(images, Image.Image):
        return [upright(images)]
    if isinstance(images, str | Path):
        path = Path(images).expanduser()
        text = str(images)
        # transformers' own loader shows what lies under transparent pixels
        if text.startswith("data:"):
            encoded = base64.b64decode(text.partition(",")[2])
            return [open_image(Path(), encoded, "prompt", MAX_PIXELS)]
        if text.startswith(("http://", "https://")):
            with urlopen(text, timeout=60) as answer:  # of the two schemes above
                return [open_image(Path(), answer.read(), "prompt", MAX_PIXELS)]
        return [open_image(path.parent, path.name, "prompt", MAX_PIXELS)]
    try:
        return [to_pil_image(images)]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"an image is a {type(images).__name__}; give a PIL picture, a path, a URL or an "
            f"array: {error}"
        ) from None
