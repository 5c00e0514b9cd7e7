"""Tokenizer and LLM have to fit: the same token behind every id, and tokens that the LLM does
not know are trained."""

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
    """The tokenizer that lies beside the weights a run starts from, with what to call it: that of
    the folder `init_from`, or of the node `model.llm`'s `pretrained` or GGUF file. None for random
    weights, and where there is none."""
    if init_from:
        return found_in(init_from, f"init_from={init_from}")
    pretrained = llm.get("pretrained")
    if not pretrained:
        return None
    name = f"model.llm.pretrained={pretrained}"
    if gguf_file := llm.get("gguf_file"):
        path = Path(packaged(pretrained)).expanduser() / gguf_file
        return (name, load_tokenizer(str(path))) if path.is_file() else None
    return found_in(pretrained, name)


def found_in(source: str, name: str) -> tuple[str, PreTrainedTokenizerBase] | None:
    """The tokenizer of a folder or a hub name."""
    folder = Path(packaged(source)).expanduser()
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    try:
        return name, load_tokenizer(source)
    except DataError as error:
        log.warning("%s has no tokenizer to compare data.tokenizer with (%s)", name, error)
        return None


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, name: str, other: PreTrainedTokenizerBase, source: str
) -> None:
    """Raises ValueError where an id that both tokenizers have is another token in one of them."""
    tokens, others = by_id(tokenizer), by_id(other)
    for index in sorted(set(tokens) & set(others)):
        if tokens[index] != others[index]:
            raise ValueError(
                f"data.tokenizer={name} is not the tokenizer of {source}: token {index} is "
                f"{tokens[index]!r}, and "
                f"{others[index]!r} there; leave data.tokenizer out or name that one"
            )


def by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokenizer's tokens by their ids."""
    return {index: token for token, index in tokenizer.get_vocab().items()}


def unknown_tokens(
    tokenizer: PreTrainedTokenizerBase, known: PreTrainedTokenizerBase, rows: int | None
) -> dict[str, int]:
    """The tokens, with their ids, that the LLM was never trained with: those that its own tokenizer
    does not have or that lie behind the rows of its embeddings. `<image>` is none of them, since
    visual tokens stand in its place."""
    vocabulary = known.get_vocab()
    new = {
        token: index
        for token, index in tokenizer.get_vocab().items()
        if token != IMAGE and (token not in vocabulary or (rows is not None and index >= rows))
    }
    return dict(sorted(new.items(), key=lambda item: item[1]))


def tokens_to_train(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    init_from: str | None,
    llm: Mapping[str, Any],
    rows: int | None,
) -> dict[str, int]:
    """`unknown_tokens` of a run that starts from trained weights, none of random ones.

    Args:
        tokenizer: the data's, with all that was added to it, loaded from `name`.
        llm: the node `model.llm`.
        rows: of the weights' embeddings, before they grow to the tokenizer's size.

    Raises:
        ValueError: the weights have another tokenizer.
    """
    if not init_from and not llm.get("pretrained"):
        return {}
    beside = tokenizer_of_weights(init_from, llm)
    if beside is not None:
        source, known = beside
        check_same_tokens(tokenizer, name, known, source)
    else:
        known = load_tokenizer(name)
    return unknown_tokens(tokenizer, known, rows)
