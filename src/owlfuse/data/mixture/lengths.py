"""How many tokens each sample of a source has, counted once and kept in a file beside the data."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
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

FOLDER = ".owlfuse"
CHUNK = 512
FEW = 2048
"""Samples that are counted in this process: starting others would take longer."""
READING = 3
"""Raised when a record is read or encoded otherwise than before, so that counts from before are
made anew."""
SHARES = ("name", "weight", "on_error", "max_skips", "image_root", "file")
"""Of a source, what does not change its chats."""


@dataclass
class Lengths:
    """Counts of a source of N samples, as the encoder makes them; pictures are not opened."""

    tokens: np.ndarray
    """(N,) int32 positions in the row, placeholders expanded; 0 for a sample that is wrong."""
    supervised: np.ndarray
    """(N,) int32 of these, those that the loss counts."""
    wrong: dict[int, str]
    """Why a sample is left out, by its index."""
    notes: dict[str, int] = field(default_factory=dict)
    """What of the records is not used or was assumed, as sentences, and of how many samples."""


def count_lengths(
    source: Source, encoder: ChatEncoder, workers: int | None = None, on_length: OnLength = "error"
) -> Lengths:
    """The counts of a source, from the file where they were kept, else by encoding every sample,
    with a progress bar.

    They are kept in `.owlfuse/` beside the source's file, under a name made of its fingerprint, the
    tokenizer, the template and what else changes a chat; where that folder cannot be written, they
    are counted each time.

    Args:
        workers: processes that encode; by default one for each core.
        on_length: what becomes of a chat over the length; one that is cut has the counts of what is
            left.
    """
    path = kept_path(source, encoder, on_length)
    try:
        with np.load(path, allow_pickle=False) as kept:
            wrong = {
                int(index): reason for index, reason in json.loads(kept["wrong"].tobytes()).items()
            }
            notes = json.loads(kept["notes"].tobytes())
            if len(kept["tokens"]) == len(kept["supervised"]) == len(source):
                return Lengths(kept["tokens"], kept["supervised"], wrong, notes)
    except (OSError, ValueError, KeyError, EOFError):
        pass
    found = count(source, encoder, workers or os.cpu_count() or 1, on_length)
    keep(path, found)
    return found


def kept_path(source: Source, encoder: ChatEncoder, on_length: OnLength = "error") -> Path:
    """The file of the counts."""
    tokenizer = encoder.tokenizer
    options = {key: value for key, value in source.__getstate__().items() if key not in SHARES}
    limits = {
        key: value
        for key, value in vars(encoder).items()
        if isinstance(value, str | int | float | bool | None)
    }
    key = [
        READING,
        on_length,
        source.fingerprint(),
        type(source).__qualname__,
        options,
        limits,
        tokenizer.chat_template,
        tokenizer_text(tokenizer),
    ]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return Path(source.file).parent / FOLDER / f"{Path(source.file).name}.{digest[:16]}.lengths.npz"


def tokenizer_text(tokenizer: Any) -> str:
    """All of a fast tokenizer: vocabulary, merges, added tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(
        {key: value for key, value in backend.items() if key not in ("padding", "truncation")},
        sort_keys=True,
    )


def keep(path: Path, lengths: Lengths) -> None:
    """Writes the counts, whole or not at all."""
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


def count(
    source: Source, encoder: ChatEncoder, workers: int, on_length: OnLength = "error"
) -> Lengths:
    """Encodes every sample, in other processes where there are many."""
    starts = range(0, len(source), CHUNK)
    lengths = Lengths(np.zeros(len(source), np.int32), np.zeros(len(source), np.int32), {})

    def take(parts: Any) -> None:
        with Progress(f"counting tokens of {source.name}", len(source)) as progress:
            for start, (tokens, supervised, wrong, notes) in zip(starts, parts):
                lengths.tokens[start : start + len(tokens)] = tokens
                lengths.supervised[start : start + len(tokens)] = supervised
                lengths.wrong.update(wrong)
                for text, samples in notes.items():
                    lengths.notes[text] = lengths.notes.get(text, 0) + samples
                progress.advance(len(tokens))

    if workers < 2 or len(source) <= FEW:
        take(count_part(source, encoder, on_length, start) for start in starts)
        return lengths
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with multiprocessing.get_context(method).Pool(
        workers, begin_worker, (source, encoder, on_length)
    ) as pool:
        take(pool.imap(count_part_here, starts))
    return lengths


def count_part(
    source: Source, encoder: ChatEncoder, on_length: OnLength, start: int
) -> tuple[list[int], list[int], dict[int, str], dict[str, int]]:
    """Tokens, supervised tokens, what is wrong, and notes with their counts, of CHUNK samples
    from `start` on."""
    tokens, supervised, wrong = [], [], {}
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


WORK: list[Any] = []
"""What a worker process counts: the source, the encoder and the policy for the length."""


def begin_worker(source: Source, encoder: ChatEncoder, on_length: OnLength) -> None:
    """Ctrl-C is the main process's to answer: it ends its workers, by a SIGTERM that no handler
    of its own may swallow."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    WORK[:] = [source, encoder, on_length]


def count_part_here(start: int) -> tuple[list[int], list[int], dict[int, str], dict[str, int]]:
    """`count_part` in a worker process."""
    source, encoder, on_length = WORK
    return count_part(source, encoder, on_length, start)
