"""The released vision towers as timm models, and how pictures become their pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from timm.data import (
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import nn
from transformers import CLIPVisionConfig, SiglipVisionConfig

from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_CONFIG, read_json
from owlfuse.model.vision.backbone import TimmBackbone

CLIP = "vit_large_patch14_clip_quickgelu_224"
SIGLIP = "vit_so400m_patch14_siglip_384"

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names -> timm's."""

STATISTICS = {
    CLIP: (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    SIGLIP: (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}
"""Mean and standard deviation of pixels, where the image processor's file says none."""

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, which preprocessor_config.json holds -> timm's names."""


class TimmBackboneWithEps(TimmBackbone):
    """A `TimmBackbone` whose layer norms have an epsilon that no name of timm has.

    Args:
        eps: of every layer norm.
        backbone: the arguments of `TimmBackbone`.
    """

    def __init__(self, eps: float, **backbone: Any) -> None:
        super().__init__(**backbone)
        for module in self.body.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps


def clip_node(folder: Path, fields: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Returns the node of the tower of mPLUG-Owl1 and 2: CLIP's ViT, whose features are all tokens
    after the last norm. The released code has quick GELU whatever `hidden_act` says.

    Args:
        fields: of the released configuration; what it lacks has the default of the released code.
        image_size: that default for the picture's side in pixels.
    """
    defaults = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": image_size,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    }
    fields = {**defaults, **present(fields), "hidden_act": "quick_gelu"}
    return backbone_node(folder, CLIP, fields)


def llava_node(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the node of the tower of LLaVA 1.5: CLIP's ViT, whose features are the patches that
    the last block but one gives, before the final norm.

    Args:
        config: the released configuration; what its `vision_config` lacks has transformers'
            default for `CLIPVisionConfig`.

    Raises:
        DataError: another tower, or other features of it.
    """
    expected = {
        "vision_feature_layer": (-2,),
        "vision_feature_select_strategy": ("default", "full"),
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True,),
    }
    for name, values in expected.items():
        value = config.get(name, values[0])
        if value not in values:
            raise DataError(
                f"{folder / 'config.json'}: {name} is {value}, expected "
                f"{' or '.join(map(str, values))}"
            )
    fields = present(config.get("vision_config") or {})
    tower = fields.get("model_type", "clip_vision_model")
    if tower != "clip_vision_model":
        raise DataError(
            f"{folder / 'config.json'}: vision_config.model_type is {tower}, expected "
            "clip_vision_model"
        )
    # transformers writes only what differs from these
    fields = {**CLIPVisionConfig().to_dict(), **fields}
    node = backbone_node(folder, CLIP, fields)
    node["output"] = "penultimate"
    node["class_token"] = config.get("vision_feature_select_strategy") == "full"
    node["resize"] = resize_of(read_processor(folder)[1])
    return node


def resize_of(processor: dict[str, Any]) -> str:
    """Returns what becomes of a picture's aspect ratio: CLIP's processor scales the shorter side
    and cuts the longer one unless told otherwise, as by a height and a width; LLaVA's may put bars
    around the picture before."""
    is_llava = str(processor.get("image_processor_type")).startswith("Llava")
    if is_llava and processor.get("do_pad") is True:
        return "letterbox"
    size = processor.get("size")
    is_exact = isinstance(size, dict) and {"height", "width"} <= size.keys()
    return "stretch" if is_exact or processor.get("do_center_crop") is False else "crop"


def read_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the file of a folder's image processor and its content, nothing where there is none:
    a part of processor_config.json, as transformers 5 saves a processor and reads it first, or
    preprocessor_config.json."""
    file = folder / "processor_config.json"
    content = read_json(file, limit=MAX_CONFIG) if file.exists() else {}
    processor = content.get("image_processor")
    if isinstance(processor, dict):
        return file, processor
    file = folder / "preprocessor_config.json"
    return file, read_json(file, limit=MAX_CONFIG) if file.exists() else {}


def siglip_node(folder: Path, fields: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the node of the tower of mPLUG-Owl3: SigLIP, whose features are the output of the
    last block but one.

    Args:
        fields: `vision_config`, of which transformers' `SiglipVisionConfig` knows the defaults;
            None: so400m at 384 pixels.

    Raises:
        DataError: an activation that timm does not have, or a single block.
    """
    if fields is None:
        fields = {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        }
    fields = {**SiglipVisionConfig().to_dict(), **present(fields)}
    if fields["num_hidden_layers"] < 2:
        raise DataError(
            f"{folder / 'config.json'}: vision_config.num_hidden_layers is 1, and the last but "
            "one is read"
        )
    node = backbone_node(folder, SIGLIP, fields)
    node["kwargs"] |= {"class_token": False, "pre_norm": False, "global_pool": ""}
    node["output"] = "penultimate"
    return node


def present(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that are not null."""
    return {name: value for name, value in fields.items() if value is not None}


def backbone_node(folder: Path, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the node of timm's ViT of that name with the width, depth, heads, patches, activation
    and epsilon of a released tower, and the preprocessing of its pictures.

    Raises:
        DataError: an activation that timm does not have.
    """
    activation = fields["hidden_act"]
    if activation not in ACTIVATIONS:
        raise DataError(
            f"{folder / 'config.json'}: vision_config.hidden_act is {activation}; known are "
            f"{', '.join(ACTIVATIONS)}"
        )
    width, hidden = fields["hidden_size"], fields["intermediate_size"]
    ratio = hidden / width
    mean, std = STATISTICS[name]
    kwargs = {
        "embed_dim": width,
        "depth": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "patch_size": fields["patch_size"],
        # timm takes int(width * ratio), which rounding may lower by one
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        "act_layer": ACTIVATIONS[activation],
        **pixels(folder, fields, mean, std),
    }
    eps = fields["layer_norm_eps"]
    node: dict[str, Any] = {
        "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
        # timm's CLIP models have 1e-5 built in
        "name": CLIP if eps == 1e-5 else name,
        "kwargs": kwargs,
    }
    # the epsilon of the LayerNorm that timm calls so
    if eps == 1e-6:
        kwargs["norm_layer"] = "layernorm"
    elif eps != 1e-5:
        node |= {"_target_": "owlfuse.artifacts.released.vision.TimmBackboneWithEps", "eps": eps}
    return node


def pixels(
    folder: Path,
    fields: dict[str, Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, Any]:
    """Returns timm's arguments for the picture's size and its preprocessing, which are those of the
    image processor's file where there is one.

    A size that the patches do not divide is cut to one that they do: the released mPLUG-Owl3 has
    384 in its configuration, and its processor makes 378 of them; the convolution would not read
    the rest.

    Raises:
        DataError: an image processor whose pictures have another grid of patches than the model.
    """
    patch = fields["patch_size"]
    # whole patches: 384 pixels have 27 of 14
    grid = fields["image_size"] // patch
    image_size = grid * patch
    interpolation = "bicubic"
    file, processor = read_processor(folder)
    processor = present(processor)
    if processor:
        image_size = processor_image_size(file, processor, image_size)
        check_processor_steps(file, processor)
        mean, std = processor.get("image_mean", mean), processor.get("image_std", std)
        interpolation = RESAMPLING.get(processor.get("resample", -1), interpolation)
        if image_size // patch != grid:
            patches = image_size // patch
            raise DataError(
                f"{file}: pictures of {image_size} pixels have {patches} x {patches} patches, and "
                f"the model has {grid} x {grid}; correct the size or take the file away"
            )
        for numbers in (mean, std):
            if not isinstance(numbers, list | tuple) or len(numbers) != 3:
                raise DataError(
                    f"{file}: image_mean and image_std are {mean} and {std}; each is three numbers"
                )
    overlay = {
        "input_size": [3, image_size, image_size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": interpolation,
    }
    return {"img_size": image_size, "pretrained_cfg_overlay": overlay}


def check_processor_steps(file: Path, processor: dict[str, Any]) -> None:
    """Raises DataError for steps of a released processor that no backbone's preprocessing has."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(name) is False:
            raise DataError(f"{file}: {name} is false, and pictures are always prepared by it")
    factor = processor.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise DataError(f"{file}: rescale_factor is {factor}, and pixels are divided by 255")
    resample = processor.get("resample", 3)
    if resample not in RESAMPLING:
        raise DataError(
            f"{file}: resample is {resample}; supported are "
            f"{', '.join(f'{number} ({name})' for number, name in RESAMPLING.items())}"
        )
    cut = processor.get("crop_size")
    size = processor.get("size")
    if processor.get("do_center_crop", True) and cut and size and sides(cut) != sides(size):
        raise DataError(
            f"{file}: size is {size} and crop_size {cut}: a picture would be scaled to the one and "
            "cut to the other, and owlfuse scales it to what is cut"
        )


def sides(size: Any) -> set[Any]:
    """Returns the lengths in a processor's size, which has them by names or is one number."""
    return set(size.values()) if isinstance(size, dict) else {size}


def processor_image_size(file: Path, processor: dict[str, Any], default: int) -> int:
    """Returns the side of the pictures that come out of a released processor.

    Raises DataError for pictures that are not square.
    """
    # the cut is the last step of the processor, and decides the size
    size = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    size = size or processor.get("size") or processor.get("image_size") or default
    lengths = sides(size)
    if len(lengths) != 1 or not all(isinstance(length, int) for length in lengths):
        raise DataError(
            f"{file}: the size is {size}; pictures of a released model are square, so give one "
            "number of pixels"
        )
    return lengths.pop()
