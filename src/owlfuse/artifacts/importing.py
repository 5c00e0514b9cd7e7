"""`owlfuse import`: a released mPLUG-Owl or LLaVA 1.5 in owlfuse's own format, with a chat template
of its family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel
from owlfuse.artifacts.released.loading import load
from owlfuse.core.errors import DataError
from owlfuse.core.types import IMAGE
from owlfuse.data.chat.answer_format import ANSWER, QUESTION, find_end_mark
from owlfuse.data.chat.tokenizer import load_tokenizer, prepare, render
from owlfuse.model.new_tokens import TOKENIZER_FILES

# The prompts of the released code: mPLUG-Owl's examples, the conversation `mplug_owl2` of
# mPLUG-Owl2, and LLaVA 1.5's on the hub, which leaves Vicuna's system text out.
TEMPLATES = {
    "owl1": (
        "{{ bos_token }}The following is a conversation between a curious human and AI assistant. "
        "The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ '\\nAI: ' + message.content + eos_token }}"
        "{% else %}{{ '\\nHuman: ' "
        "+ message.content.replace('<image>\\n', '<image>').replace('<image>', '<image>\\nHuman: "
        "') }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nAI: ' }}{% endif %}"
    ),
    "owl2": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ ' ASSISTANT: ' + message.content + eos_token }}"
        "{% else %}{{ 'USER: ' + message.content.replace('<image>\\n', '<image>') }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
    "llava": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ ' ASSISTANT: ' + message.content + eos_token }}"
        "{% elif message.role == 'system' %}{{ message.content + ' ' }}"
        "{% else %}{{ 'USER: ' + message.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
}


def import_released(folder: Path, out: Path, max_shard_size: str) -> None:
    """Writes OUT, a released folder's model as an export."""
    model = load(folder)
    tokenizer, image_token = load_released_tokenizer(folder, model.released)
    trained = TrainedModel(model, tokenizer, None, image_token)
    source = f"{folder.name}, a released {model.released.family}"
    export(trained, out, max_shard_size=max_shard_size, source=source)


def load_released_tokenizer(folder: Path, released: Any) -> tuple[Any, str]:
    """Returns the folder's tokenizer, None where it has none, and the token that stands for an
    image.

    Raises:
        DataError: a tokenizer that cannot be read, or lacks the image token that config.json names.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None, IMAGE
    tokenizer: Any = load_tokenizer(str(folder))
    image_token = IMAGE
    if released.image_token_id is not None:
        token: Any = tokenizer.convert_ids_to_tokens(released.image_token_id)
        if token is None:
            raise DataError(
                f"the tokenizer of {folder} has {len(tokenizer)} tokens, and config.json's "
                f"image_token_id is {released.image_token_id}; take the tokenizer of that model"
            )
        image_token = token
    # released tokenizers come without one, their prompts being in the released code; LLaVA's newer
    # files have one that writes no end of an answer, for answering alone
    ends = tokenizer.chat_template and writes_an_end(tokenizer, image_token)
    if not ends and released.family in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[released.family]
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {folder} has no chat template; take the tokenizer_config.json of "
            "that model"
        )
    return prepare(tokenizer, image_token), image_token


def writes_an_end(tokenizer: Any, image_token: str) -> bool:
    """Returns whether a tokenizer's own chat template writes something behind an answer; one that
    cannot be used at all is told where it is."""
    question = {"role": "user", "content": QUESTION}
    chat = [question, {"role": "assistant", "content": ANSWER}]
    try:
        prepared = prepare(copy.deepcopy(tokenizer), image_token)
        text = render(prepared, chat)
    except DataError:
        return True
    return ANSWER not in text or bool(find_end_mark(prepared, chat, text))
