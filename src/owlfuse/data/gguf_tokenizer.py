"""The tokenizer of a GGUF file."""

from __future__ import annotations

import struct
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from owlfuse.packages import missing
from owlfuse.types import DataError

SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""Kinds of byte-level tokenizers (`tokenizer.ggml.pre`) that take each digit by itself before anything else."""
CONTROL = 3
"""The type of a control token (`tokenizer.ggml.token_type`)."""


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """As transformers reads it, and with what that leaves out: that digits are split first, where the kind of tokenizer does so
    (else several spaces or line breaks before a number become other tokens), and which tokens are control tokens.

    Raises:
        DataError: no such file, or none with a tokenizer.
        ModuleNotFoundError: the package gguf is not installed.
    """
    if not file.is_file():
        raise DataError(f"tokenizer: {file}: no such file")
    try:
        from gguf import GGUFReader

        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        fields = GGUFReader(file).fields
    except ImportError as error:
        raise missing("gguf", f"tokenizer: {file.name}") from error
    except (KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise DataError(f"tokenizer: {file} is no GGUF file with a tokenizer: {type(error).__name__} {error}") from error
    kinds = fields.get("tokenizer.ggml.token_type")
    if kinds is not None:
        control = [number for number, kind in enumerate(kinds.contents()) if kind == CONTROL]
        tokenizer.add_special_tokens(
            {"additional_special_tokens": tokenizer.convert_ids_to_tokens(control)}, replace_extra_special_tokens=False
        )
    pre = fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
