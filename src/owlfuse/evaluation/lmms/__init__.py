"""lmms-eval's door to owlfuse: `lmms-eval --model owlfuse --model_args pretrained=OUT --tasks
<task>`.

lmms-eval finds `manifests` by the entry point `lmms_eval.models`. Of what is here only `models`
imports lmms-eval.
"""

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval is told of: `owlfuse`, for generation and log-likelihood, and `owlfuse_chat`,
    for tasks that give messages, which lmms-eval has for generation alone."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest("owlfuse", simple_class_path="owlfuse.evaluation.lmms.models.Owlfuse"),
        ModelManifest("owlfuse_chat", chat_class_path="owlfuse.evaluation.lmms.models.OwlfuseChat"),
    ]
