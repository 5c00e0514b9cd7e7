"""The classes of an exported model for transformers. Importing this package registers them, so
that transformers' Auto classes and pipelines read what `owlfuse export` writes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from owlfuse.artifacts.hf.configuration import OwlfuseConfig
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.hf.processing import OwlfuseImageProcessor, OwlfuseProcessor

AutoConfig.register(OwlfuseConfig.model_type, OwlfuseConfig, exist_ok=True)
AutoModelForImageTextToText.register(OwlfuseConfig, OwlfuseForConditionalGeneration, exist_ok=True)
BACKENDS: dict[str, Any] = dict.fromkeys(("pil", "torchvision"), OwlfuseImageProcessor)
AutoImageProcessor.register(OwlfuseConfig, image_processor_classes=BACKENDS, exist_ok=True)
AutoProcessor.register(OwlfuseConfig, OwlfuseProcessor, exist_ok=True)
# By these names transformers' Trainer knows that labels are those of the next token, where it
# computes the loss itself (label smoothing), and its server that the model takes pictures.
CLASS_NAME = OwlfuseForConditionalGeneration.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[OwlfuseConfig.model_type] = CLASS_NAME
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[OwlfuseConfig.model_type] = CLASS_NAME
