"""The report of a mixture: the contents of `mixture.json`."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from owlfuse.core.progress import track
from owlfuse.data.formats.base import Source
from owlfuse.data.mixture.lengths import Lengths
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.data.mixture.shuffle import Shuffle
from owlfuse.data.notes import NoteCounts
from owlfuse.data.packing import Padding

# (source, sample, reason) of each draw that was left out, or a Counter of them.
Skips = Iterable[tuple[str, str, str]]


def mixture_report(
    mixture: Mixture,
    sources: dict[str, Source],
    step_positions: StepPositions,
    steps: int,
    skipped: Skips,
    truncated: dict[str, int] | None = None,
    notes: NoteCounts | None = None,
    padding: Padding | None = None,
    lengths: dict[str, Lengths] | None = None,
) -> dict[str, Any]:
    """Return what `mixture.json` holds after some steps: the sources, their hashes, the shares that
    were asked for and the realised ones, skips, cuts, notes and padding.

    Args:
        notes: in how many draws a key was not used or something was assumed.
        lengths: tokens of the sources' samples where they were counted; the realised shares of
            supervised tokens are computed from them, and are None without.
    """
    positions = mixture.available(step_positions.position(steps))
    counts = mixture.counts(positions)
    asked_shares = mixture.asked_shares(positions)
    skips = Counter(skipped)
    rows = {}
    for name, source in sources.items():
        row = source_row(mixture, source, counts.get(name, 0), positions)
        row["asked_share"] = asked_shares.get(name, 0.0) if positions else None
        skipped_samples = set()
        row["skipped"] = 0
        for (skip_source, sample, _), times in skips.items():
            if skip_source == name:
                row["skipped"] += times
                skipped_samples.add(sample)
        row["skipped_samples"] = len(skipped_samples)
        row["truncated"] = (truncated or {}).get(name, 0)
        row["notes"] = {}
        for (note_source, text), draws in sorted((notes or {}).items()):
            if note_source == name:
                row["notes"][text] = draws
        rows[name] = row
    add_token_shares(rows, mixture, counts, lengths)
    padding_shares = None
    if padding and padding.positions:
        # as plain numbers, for JSON
        padding_shares = Padding(*padding.counts()).shares()
    return {
        "steps": steps,
        "samples": positions,
        "global_batch_size": step_positions.changes[-1][2],
        "global_batch_sizes": [
            {"step": step, "sample": position, "size": size}
            for step, position, size in step_positions.changes
        ],
        "seed": mixture.seed,
        "weights_by": mixture.weights_by,
        "phases": phase_rows(mixture, step_positions),
        "sources": rows,
        "padding": padding_shares,
        "skipped": skip_rows(skips),
    }


def phase_rows(mixture: Mixture, step_positions: StepPositions) -> list[dict[str, Any]]:
    """Return the first step of each phase, the shares that were asked for, of what `weights_by`
    says, and the shares of samples that the schedule follows."""
    rows = []
    phases = zip(mixture.phases, mixture.sample_phases, strict=True)
    for (start, shares), (_, sample_shares) in phases:
        row = {
            "step": step_positions.step(start),
            "shares": as_floats(shares),
            "sample_shares": as_floats(sample_shares),
        }
        rows.append(row)
    return rows


def as_floats(shares: Mapping[str, Fraction]) -> dict[str, float]:
    """Return exact shares as JSON can have them."""
    return {name: float(share) for name, share in shares.items()}


def source_row(
    mixture: Mixture,
    source: Source,
    draws: int,
    positions: int,
) -> dict[str, Any]:
    """Return the row of a source that gave `draws` of the first `positions` samples."""
    size = len(source)
    return {
        "file": str(source.file),
        "sha256": source.fingerprint(),
        "samples": size,
        "weight": source.weight,
        "share": float(mixture.phases[0][1].get(source.name, 0)),
        "drawn": draws,
        "drawn_share": draws / positions if positions else None,
        "passes": draws / size,
        # nothing where a pass has just ended
        "left_of_last_pass": size - draws if draws < size else -draws % size,
        "at_end": mixture.at_end[source.name],
        "duplicate_ids": duplicate_ids(mixture, source, draws),
    }


def add_token_shares(
    rows: dict[str, dict[str, Any]],
    mixture: Mixture,
    counts: dict[str, int],
    lengths: dict[str, Lengths] | None,
) -> None:
    """Add the mean supervised tokens of each source's samples, the supervised tokens of its draws
    and their share of all sources', or None where tokens were not counted."""
    for name, row in rows.items():
        row["mean_supervised"] = row["supervised_tokens"] = row["supervised_share"] = None
        if lengths is None:
            continue
        row["mean_supervised"] = lengths[name].total_supervised / max(row["samples"], 1)
        row["supervised_tokens"] = 0
        if name in counts:
            shuffle = mixture.shuffles[name]
            row["supervised_tokens"] = supervised_tokens(lengths[name], shuffle, counts[name])
    total = sum(row["supervised_tokens"] or 0 for row in rows.values())
    if total:
        for row in rows.values():
            row["supervised_share"] = row["supervised_tokens"] / total


def supervised_tokens(lengths: Lengths, shuffle: Shuffle, draws: int) -> int:
    """Return the supervised tokens of a source's first draws."""
    epochs, remainder = divmod(draws, shuffle.size)
    # Earlier epochs hold every sample once, so that their draws need no looking up.
    last_epoch = lengths.supervised[shuffle.between(draws - remainder, draws)]
    return epochs * lengths.total_supervised + int(last_epoch.sum(dtype=np.int64))


def validation_report(
    sources: dict[str, Source],
    skipped: Collection[tuple[str, str, str]],
    truncated: Collection[tuple[str, str, int]],
) -> dict[str, Any]:
    """Return the validation sources, and what was left out of them or cut."""
    skip_counts = Counter(source for source, _, _ in skipped)
    cut_counts = Counter(source for source, _, _ in truncated)
    rows = {}
    for name, source in sources.items():
        rows[name] = {
            "file": str(source.file),
            "sha256": source.fingerprint(),
            "samples": len(source),
            "skipped": skip_counts[name],
            "truncated": cut_counts[name],
        }
    cuts = [
        {"source": source, "sample": sample, "turns_removed": turns}
        for source, sample, turns in truncated
    ]
    return {"sources": rows, "skipped": skip_rows(skipped), "truncated": cuts}


def skip_rows(skipped: Skips) -> list[dict[str, Any]]:
    """Return a row for each sample that was left out, with how many times it was drawn."""
    return [
        {"source": source, "sample": sample, "reason": reason, "times": times}
        for (source, sample, reason), times in Counter(skipped).items()
    ]


# Samples of a source whose ids are read and compared: the first that are drawn.
MAX_COMPARED = 2**20
# Samples from which on reading ids shows its progress.
PROGRESS_FROM = 2**15


def duplicate_ids(mixture: Mixture, source: Source, draws: int) -> dict[str, Any]:
    """Return how many records of the samples that a source gave have the id of an earlier record.

    Ids are compared by hashes of 64 bits, 16 bytes of memory a record; a record without an id goes
    by its number in the file.

    Args:
        draws: how many times the source was drawn from.

    Returns:
        `count`; `looked_at`: samples that were compared; `first`: `{"id", "samples"}`, the indices
            of the first two, or None.
    """
    compared = min(draws, len(source), MAX_COMPARED)
    report: dict[str, Any] = {"count": 0, "looked_at": compared, "first": None}
    if not compared:
        return report
    shuffle = mixture.shuffles[source.name]
    # in the order of the file, so that the first pair is the file's first
    samples = np.sort(shuffle.between(0, compared)).tolist()
    hashes, sample_of = hashed_ids(source, samples)
    repeated = pd.Series(hashes).duplicated().to_numpy()
    if repeated.any():
        later = repeated.argmax()  # the first record that bears the id of one before
        earlier = (hashes == hashes[later]).argmax()
        pair = [int(sample_of[earlier]), int(sample_of[later])]
        ids = [identity for _, identity in source.ids(sorted(set(pair)))]
        shared_id = statistics.mode(ids)
        report["count"] = int(repeated.sum())
        report["first"] = {"id": shared_id, "samples": pair}
    return report


def hashed_ids(source: Source, samples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of each record's id, uint64, and the index of the sample that it is in, int64;
    a record that is wrong is left out."""
    hashes, sample_of = array("Q"), array("q")
    ids: Iterable[tuple[int, str]] = source.ids(samples)
    if len(samples) >= PROGRESS_FROM:
        ids = track(ids, f"comparing ids of {source.name}", len(samples))
    for sample, identity in ids:
        # 64 bits: among a million ids, two different ones collide with a chance of 3e-8.
        hashes.append(hash(identity) & 2**64 - 1)
        sample_of.append(sample)
    return np.frombuffer(hashes, dtype=np.uint64), np.frombuffer(sample_of, dtype=np.int64)
