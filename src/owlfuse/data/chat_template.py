"""Chat templates by name or file, for tokenizers that have none or where another is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from owlfuse.data.lines import check_record
from owlfuse.types import DataError

MAX_TEMPLATE = 2**20
"""Bytes of a template; the longest have 20 KB."""
FOLDER = Path(__file__).parent / "templates"

CONTROL = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}
"""What a template writes as control tokens. The last one ends a turn, and so becomes the tokenizer's end of sequence; the
templates that are not here end a turn with the end of sequence that the tokenizer has."""


def template_names() -> list[str]:
    """The templates that have a name."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def use_template(tokenizer: Any, chat_template: str | None) -> Any:
    """The tokenizer with a chat template, given by its name or as the path of a .jinja file; None leaves it its own.

    The control tokens of a named template are added where the tokenizer lacks them, so that each is one token.

    Raises:
        DataError: no such name or file, a file that is no Jinja template, a tokenizer without what the template needs.
    """
    if chat_template is None:
        return tokenizer
    tokenizer.chat_template = read_template(chat_template)
    control = CONTROL.get(chat_template, [])
    if missing := [token for token in control if token not in tokenizer.get_vocab()]:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if control:
        tokenizer.add_special_tokens({"eos_token": control[-1]})
    if tokenizer.eos_token is None:
        raise DataError(
            f"chat_template: {chat_template}: the tokenizer {tokenizer.name_or_path} has no end-of-sequence token to end a turn"
        )
    return tokenizer


def read_template(chat_template: str) -> str:
    """The text of a template, by its name or path. Raises DataError, see `use_template`."""
    from jinja2 import Environment, TemplateSyntaxError

    named = chat_template in template_names()
    path = FOLDER / f"{chat_template}.jinja" if named else Path(chat_template).expanduser()
    if not named and path.suffix != ".jinja":
        raise DataError(
            f"chat_template: {chat_template} is none of {', '.join(template_names())}, nor the path of a .jinja file"
        )
    try:
        check_record(path.stat().st_size, f"chat_template: {path}", MAX_TEMPLATE)
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except FileNotFoundError:
        raise DataError(f"chat_template: {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"chat_template: {path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"chat_template: {path}: {error.strerror}") from None
    except TemplateSyntaxError as error:
        raise DataError(f"chat_template: {path}: line {error.lineno}: {error.message}") from None
    if not text.strip():
        raise DataError(f"chat_template: {path} is empty")
    return text
