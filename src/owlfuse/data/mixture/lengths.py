"""The token counts of a source's samples, made once and cached in a file beside the data."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_write
from owlfuse.core.progress import Progress
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.truncation import OnLength
from owlfuse.data.formats.base import Source
from owlfuse.data.notes import text_of

CACHE_FOLDER = ".owlfuse"
CHUNK = 512
SMALL_SOURCE = 2048
"""Samples up to which a source is counted in this process: starting others would take longer."""
CACHE_VERSION = 3
"""Raised when a record is read or encoded otherwise than before, so that it is counted anew."""
KEYS_NOT_OF_CHATS = ("name", "weight", "on_error", "max_skips", "image_root", "file")
"""Options of a source that do not change its chats."""


@dataclass
class Lengths:
    """Token counts of a source of N samples, as the encoder makes them; pictures are not opened."""

    tokens: np.ndarray
    """(N,) int32 positions in the row, placeholders expanded; 0 for a sample that is wrong."""
    supervised: np.ndarray
    """(N,) int32 of these, those that the loss counts."""
    wrong: dict[int, str]
    """Why a sample is left out, by its index."""
    notes: dict[str, int] = field(default_factory=dict)
    """Sentences about what of the records is not used or was assumed, with their samples."""

    @property
    def total_supervised(self) -> int:
        """Supervised tokens of all samples."""
        return int(self.supervised.sum(dtype=np.int64))


Chunk = tuple[list[int], list[int], dict[int, str], dict[str, int]]
"""The fields of `Lengths` of some samples; `wrong` by the index in the source."""


def count_lengths(
    source: Source, encoder: ChatEncoder, workers: int | None = None, on_length: OnLength = "error"
) -> Lengths:
    """Return the counts of a source, from their cache, else by encoding every sample, with a
    progress bar.

    The cache is a file in `.owlfuse/` beside the source's file, whose name holds a hash of the
    source's fingerprint, the tokenizer, the template and what else changes a chat. Where that
    folder cannot be written, samples are counted each time.

    Args:
        workers: processes that encode; by default one for each core.
        on_length: what becomes of a chat over the length; one that is cut has the counts of what is
            left.
    """
    path = cache_path(source, encoder, on_length)
    lengths = read_cache(path, len(source))
    if lengths is None:
        lengths = encode_all(source, encoder, workers or os.cpu_count() or 1, on_length)
        write_cache(path, lengths)
    return lengths


def cache_path(source: Source, encoder: ChatEncoder, on_length: OnLength = "error") -> Path:
    """Return the path of a source's cached counts."""
    tokenizer = encoder.tokenizer
    options = {}
    for key, value in source.__getstate__().items():
        if key not in KEYS_NOT_OF_CHATS:
            options[key] = value
    limits = {}
    for key, value in vars(encoder).items():
        if isinstance(value, str | int | float | bool | None):
            limits[key] = value
    parts = [
        CACHE_VERSION,
        on_length,
        source.fingerprint(),
        type(source).__qualname__,
        options,
        limits,
        tokenizer.chat_template,
        tokenizer_text(tokenizer),
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    file = Path(source.file)
    return file.parent / CACHE_FOLDER / f"{file.name}.{digest[:16]}.lengths.npz"


def tokenizer_text(tokenizer: Any) -> str:
    """Return all of a fast tokenizer as JSON: vocabulary, merges, added tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Batches set these two, and neither changes how a chat is encoded.
    backend.pop("padding", None)
    backend.pop("truncation", None)
    return json.dumps(backend, sort_keys=True)


def read_cache(path: Path, samples: int) -> Lengths | None:
    """Return cached counts, or None where there are none of so many samples that can be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tokens, supervised = arrays["tokens"], arrays["supervised"]
            wrong = json.loads(arrays["wrong"].tobytes())
            notes = json.loads(arrays["notes"].tobytes())
            reasons = {int(index): reason for index, reason in wrong.items()}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    if not len(tokens) == len(supervised) == samples:
        return None
    return Lengths(tokens, supervised, reasons, notes)


def write_cache(path: Path, lengths: Lengths) -> None:
    """Write the counts atomically."""
    wrong = np.frombuffer(json.dumps(lengths.wrong).encode(), dtype=np.uint8)
    notes = np.frombuffer(json.dumps(lengths.notes).encode(), dtype=np.uint8)
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path, "wb") as file:
            np.savez_compressed(
                file, tokens=lengths.tokens, supervised=lengths.supervised, wrong=wrong, notes=notes
            )
    except OSError as error:
        print(
            f"owlfuse: the token counts cannot be kept in {path.parent}: {error.strerror}",
            file=sys.stderr,
        )


def encode_all(
    source: Source, encoder: ChatEncoder, workers: int, on_length: OnLength = "error"
) -> Lengths:
    """Count the tokens of every sample, in several processes where there are many samples."""
    starts = range(0, len(source), CHUNK)
    if workers < 2 or len(source) <= SMALL_SOURCE:
        chunks = (count_chunk(source, encoder, on_length, start) for start in starts)
        return joined(source, starts, chunks)
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with context.Pool(workers, start_worker, (source, encoder, on_length)) as pool:
        return joined(source, starts, pool.imap(count_chunk_in_worker, starts))


def joined(source: Source, starts: Iterable[int], chunks: Iterable[Chunk]) -> Lengths:
    """Return the counts of a source from those of its chunks, with a progress bar."""
    size = len(source)
    lengths = Lengths(np.zeros(size, np.int32), np.zeros(size, np.int32), {})
    with Progress(f"counting tokens of {source.name}", size) as progress:
        for start, (tokens, supervised, wrong, notes) in zip(starts, chunks, strict=True):
            stop = start + len(tokens)
            lengths.tokens[start:stop] = tokens
            lengths.supervised[start:stop] = supervised
            lengths.wrong.update(wrong)
            for text, samples in notes.items():
                lengths.notes[text] = lengths.notes.get(text, 0) + samples
            progress.advance(len(tokens))
    return lengths


def count_chunk(source: Source, encoder: ChatEncoder, on_length: OnLength, start: int) -> Chunk:
    """Return the counts of CHUNK samples from `start` on."""
    tokens: list[int] = []
    supervised: list[int] = []
    wrong: dict[int, str] = {}
    notes: Counter[str] = Counter()
    for index in range(start, min(start + CHUNK, len(source))):
        try:
            sample = source[index]
            encoded = encoder.encode(sample, on_length=on_length)
        except DataError as error:
            wrong[index] = str(source.placed(error, source.first_record(index)))
            tokens.append(0)
            supervised.append(0)
        else:
            notes.update({text_of(note) for note in sample.notes})
            tokens.append(len(encoded.input_ids))
            supervised.append(int((encoded.labels != -100).sum()))
    return tokens, supervised, wrong, dict(notes)


WORKER_ARGUMENTS: list[Any] = []
"""What a worker process counts: the source, the encoder and the policy for the length."""


def start_worker(source: Source, encoder: ChatEncoder, on_length: OnLength) -> None:
    """Prepare a worker process.

    Ctrl-C is the main process's to answer: it ends its workers by a SIGTERM, which no inherited
    handler may swallow.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    WORKER_ARGUMENTS[:] = [source, encoder, on_length]


def count_chunk_in_worker(start: int) -> Chunk:
    """Return `count_chunk` of what the worker process was started with."""
    source, encoder, on_length = WORKER_ARGUMENTS
    return count_chunk(source, encoder, on_length, start)
