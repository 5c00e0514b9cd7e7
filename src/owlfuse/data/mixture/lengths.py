"""The token counts of a source's samples, made once and cached in a file beside the data."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from owlfuse.core.checkpoint_files import ZIP_ERRORS
from owlfuse.core.errors import DataError
from owlfuse.core.files import atomic_write
from owlfuse.core.progress import Progress
from owlfuse.core.types import without_keys
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.truncation import OnLength
from owlfuse.data.formats.base import Source
from owlfuse.data.identity import pictures_fingerprint
from owlfuse.data.media.pictures import Pictures
from owlfuse.data.notes import text_of
from owlfuse.data.workers import DataWorkers, ignore_signals

CACHE_FOLDER = ".owlfuse"
# Samples that a process encodes at a time.
CHUNK = 512
# Samples up to which a source is counted in this process: starting others would take longer.
SMALL_SOURCE = 2048
# Raised when a record is read or encoded otherwise than before, so that it is counted anew.
CACHE_VERSION = 6
# Options of a source that do not change its chats.
KEYS_NOT_OF_CHATS = ("name", "weight", "on_error", "max_skips", "image_root", "file")


@dataclass
class Lengths:
    """Token counts of a source of N samples, as the encoder makes them. Pictures are opened where
    they are tiled, and a video's frames counted; what cannot be read counts as one view."""

    tokens: np.ndarray
    """(N,) int32 positions in the row, placeholders expanded; 0 for a sample that is wrong."""
    supervised: np.ndarray
    """(N,) int32 of these, those that the loss counts."""
    wrong: dict[int, str]
    """Why a sample is left out, by its index."""
    too_long: set[int] = field(default_factory=set)
    """Of these, those that the policy for long chats leaves out, whatever the source's `on_error`
    is."""
    notes: dict[str, int] = field(default_factory=dict)
    """Sentences about what of the records is not used or was assumed, with their samples."""
    unread: int = 0
    """Samples with pictures or videos that could not be read, which count as one view each."""

    @property
    def total_supervised(self) -> int:
        """Supervised tokens of all samples."""
        return int(self.supervised.sum(dtype=np.int64))


class SampleLengths(NamedTuple):
    """Token counts of one sample: its part of `Lengths`."""

    tokens: int = 0
    supervised: int = 0
    reason: str | None = None
    """Why it is left out, where it is wrong."""
    too_long: bool = False
    notes: Collection[str] = ()
    unread: bool = False
    """Whether a picture or a video could not be read."""


def count_lengths(
    source: Source,
    encoder: ChatEncoder,
    pictures: Pictures,
    workers: int | None = None,
    on_length: OnLength = "error",
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
    path = cache_path(source, encoder, pictures, on_length)
    # Ranks of torchrun begin at once: one counts on all cores, and the others read what it wrote.
    with locked(path.parent):
        lengths = read_cache(path, len(source))
        if lengths is None:
            processes = workers or usable_cores()
            lengths = encode_all(source, encoder, pictures, processes, on_length)
            # A picture that comes later may have other views.
            if lengths.unread == 0:
                write_cache(path, lengths)
            else:
                print(
                    f"owlfuse: the token counts of {source.name} are not kept: pictures or videos "
                    f"of {lengths.unread:,} samples cannot be read",
                    file=sys.stderr,
                )
    return lengths


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, against other processes of this machine;
    nothing is held where it cannot be made or locked."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def usable_cores() -> int:
    """Return the cores that this process may use, of which a cluster gives it some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no such limit


def cache_path(
    source: Source, encoder: ChatEncoder, pictures: Pictures, on_length: OnLength = "error"
) -> Path:
    """Return the path of a source's cached counts."""
    tokenizer = encoder.tokenizer
    options = without_keys(source.__getstate__(), KEYS_NOT_OF_CHATS)
    limits = {}
    for key, value in vars(encoder).items():
        # Plain values alone: the text of an object may hold its address.
        if isinstance(value, str | int | float | bool | None):
            limits[key] = value
    file = Path(source.file)
    # What decides how many views pictures and videos have.
    views: list[Any] = [str(source.video or pictures.video)]
    views.append(os.path.relpath(source.root, file.parent))
    if source.tile:
        views += [pictures.seed, pictures.preprocess.size, pictures_fingerprint(source)]
    parts = [
        CACHE_VERSION,
        views,
        on_length,
        source.fingerprint(),
        type(source).__qualname__,
        options,
        limits,
        tokenizer.chat_template,
        tokenizer_text(tokenizer),
    ]
    content = json.dumps(parts, sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()
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
            too_long = set(arrays["too_long"].tolist())
            # JSON has made texts of the indices.
            reasons = {int(index): reason for index, reason in wrong.items()}
    except (*ZIP_ERRORS, KeyError):
        return None
    if not len(tokens) == len(supervised) == samples:
        return None
    return Lengths(tokens, supervised, reasons, too_long, notes)


def write_cache(path: Path, lengths: Lengths) -> None:
    """Write the counts atomically."""
    # JSON as bytes: an array of texts would need pickle
    wrong = np.frombuffer(json.dumps(lengths.wrong).encode(), np.uint8)
    notes = np.frombuffer(json.dumps(lengths.notes).encode(), np.uint8)
    try:
        with atomic_write(path, "wb") as file:
            np.savez_compressed(
                file,
                tokens=lengths.tokens,
                supervised=lengths.supervised,
                wrong=wrong,
                too_long=np.array(sorted(lengths.too_long), np.int64),
                notes=notes,
            )
    except OSError as error:
        print(
            f"owlfuse: the token counts cannot be kept in {path.parent}: {error.strerror}",
            file=sys.stderr,
        )


def encode_all(
    source: Source,
    encoder: ChatEncoder,
    pictures: Pictures,
    workers: int,
    on_length: OnLength,
) -> Lengths:
    """Count the tokens of every sample, in several processes where there are many samples, with a
    progress bar."""
    size = len(source)
    samples = EncodedLengths(source, encoder, pictures, on_length)
    options: dict[str, Any] = {}
    processes = DataWorkers()
    if size > SMALL_SOURCE and workers > 1:
        # As the workers of training: Ctrl-C is this process's to answer.
        options = {
            "num_workers": workers,
            "worker_init_fn": ignore_signals,
            "multiprocessing_context": processes.context,
        }
    # `list` leaves samples as they are, of which torch would make tensors. Chunks come in their
    # order, whichever worker is done first.
    loader: DataLoader = DataLoader(samples, CHUNK, collate_fn=list, **options)
    zeros = np.zeros(size, np.int32)
    lengths = Lengths(zeros, zeros.copy(), {})
    notes: Counter[str] = Counter()
    index = 0
    progress_bar = Progress(f"counting tokens of {source.name}", size)
    with progress_bar as progress, processes.failures_told("run the command again"):
        for chunk in loader:
            for sample in chunk:
                lengths.tokens[index] = sample.tokens
                lengths.supervised[index] = sample.supervised
                if sample.reason is not None:
                    lengths.wrong[index] = sample.reason
                if sample.too_long:
                    lengths.too_long.add(index)
                notes.update(sample.notes)
                lengths.unread += sample.unread
                index += 1
            progress.advance(len(chunk))
    lengths.notes.update(notes)
    return lengths


@dataclass
class EncodedLengths(Dataset):
    """The counts of a source's samples."""

    source: Source
    encoder: ChatEncoder
    pictures: Pictures
    on_length: OnLength

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> SampleLengths:
        try:
            sample = self.source[index]
            views, unread = None, False
            # A file that is missing is told in training; it may come until then.
            try:
                views = self.pictures.count_views(sample, self.source)
            except DataError:
                unread = True
            encoded = self.encoder.encode(sample, views, self.on_length)
        except DataError as error:
            record = self.source.first_record(index)
            reason = str(self.source.with_location(error, record))
            return SampleLengths(reason=reason, too_long=error.leave_out)
        supervised = int((encoded.labels != -100).sum())
        notes = {text_of(note) for note in sample.notes}
        return SampleLengths(len(encoded.input_ids), supervised, notes=notes, unread=unread)
