"""The classes of an exported model for transformers. Importing this package registers them, so
that transformers' Auto classes and pipelines read what `owlfuse export` writes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from owlfuse.artifacts.hf.configuration import OwlfuseConfig
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.hf.processing import OwlfuseImageProcessor, OwlfuseProcessor

AutoConfig.register(OwlfuseConfig.model_type, OwlfuseConfig, exist_ok=True)
AutoModelForImageTextToText.register(OwlfuseConfig, OwlfuseForConditionalGeneration, exist_ok=True)
BACKENDS: dict[str, Any] = dict.fromkeys(("pil", "torchvision"), OwlfuseImageProcessor)
AutoImageProcessor.register(OwlfuseConfig, image_processor_classes=BACKENDS, exist_ok=True)
AutoProcessor.register(OwlfuseConfig, OwlfuseProcessor, exist_ok=True)
