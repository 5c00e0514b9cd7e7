"""Checks that tokenizer and LLM fit, with the same token behind every id, and finds the tokens that
the LLM was not trained with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from owlfuse.core.errors import DataError
from owlfuse.core.packages import packaged
from owlfuse.core.types import IMAGE
from owlfuse.data.chat.tokenizer import load_tokenizer

log = logging.getLogger(__name__)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def tokenizer_of_weights(
    init_from: str | None, llm: Mapping[str, Any]
) -> tuple[str, PreTrainedTokenizerBase] | None:
    """Returns the tokenizer beside the weights that a run starts from, and its name for messages:
    that of the folder `init_from`, or of the node `model.llm`'s `pretrained` or GGUF file. None for
    random weights, and for weights without a tokenizer."""
    if init_from:
        return tokenizer_in(init_from, f"init_from={init_from}")
    pretrained = llm.get("pretrained")
    if not pretrained:
        return None
    name = f"model.llm.pretrained={pretrained}"
    if gguf_file := llm.get("gguf_file"):
        # a GGUF file holds a tokenizer, too
        path = Path(packaged(pretrained)).expanduser() / gguf_file
        return (name, load_tokenizer(str(path))) if path.is_file() else None
    return tokenizer_in(pretrained, name)


def tokenizer_in(source: str, name: str) -> tuple[str, PreTrainedTokenizerBase] | None:
    """Returns the tokenizer of a folder or a hub name with its name for messages, None for a folder
    without one."""
    folder = Path(packaged(source)).expanduser()
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    try:
        return name, load_tokenizer(source)
    except DataError as error:
        log.warning("%s has no tokenizer to compare data.tokenizer with (%s)", name, error)
        return None


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    weights_tokenizer: PreTrainedTokenizerBase,
    source: str,
) -> None:
    """Raises ValueError where an id that both tokenizers have is another token in one of them."""
    tokens, expected = tokens_by_id(tokenizer), tokens_by_id(weights_tokenizer)
    # either may have grown: only ids that both have can differ
    for index in sorted(set(tokens) & set(expected)):
        if tokens[index] != expected[index]:
            raise ValueError(
                f"data.tokenizer={name} is not the tokenizer of {source}: token {index} is "
                f"{tokens[index]!r}, and {expected[index]!r} there; leave data.tokenizer out or "
                "name that one"
            )


def tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns the tokenizer's tokens by their ids."""
    return {index: token for token, index in tokenizer.get_vocab().items()}


def unknown_tokens(
    tokenizer: PreTrainedTokenizerBase,
    weights_tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    splices: bool = True,
) -> dict[str, int]:
    """Returns the tokens, with their ids, that the LLM was never trained with: those that its own
    tokenizer lacks or that lie behind the rows of its embeddings.

    Args:
        splices: whether visual tokens stand in the place of `<image>`, which is then none of them.
    """
    vocabulary = weights_tokenizer.get_vocab()
    new_tokens = {}
    for token, index in tokenizer.get_vocab().items():
        is_new = token not in vocabulary or (rows is not None and index >= rows)
        if is_new and not (splices and token == IMAGE):
            new_tokens[token] = index
    return dict(sorted(new_tokens.items(), key=lambda item: item[1]))


def tokens_to_train(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    init_from: str | None,
    llm: Mapping[str, Any],
    rows: int | None,
    splices: bool = True,
) -> dict[str, int]:
    """Returns the `unknown_tokens` of a run that starts from trained weights, none of random ones.

    Args:
        tokenizer: the data's, with all that was added to it, loaded from `name`.
        llm: the node `model.llm`.
        rows: of the weights' embeddings, before they grow to the tokenizer's size.
        splices: see `unknown_tokens`.

    Raises:
        ValueError: the weights have another tokenizer.
    """
    if not init_from and not llm.get("pretrained"):
        return {}
    named_tokenizer = tokenizer_of_weights(init_from, llm)
    if named_tokenizer is None:
        # the data's own, without the tokens that were added to it
        return unknown_tokens(tokenizer, load_tokenizer(name), rows, splices)
    source, weights_tokenizer = named_tokenizer
    check_same_tokens(tokenizer, name, weights_tokenizer, source)
    return unknown_tokens(tokenizer, weights_tokenizer, rows, splices)
