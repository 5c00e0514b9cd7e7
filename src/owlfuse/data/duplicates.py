"""Samples of a source that bear the id of another: they are delivered like any other, and told."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from owlfuse.data.formats.base import Source
from owlfuse.data.mixture import Mixture
from owlfuse.progress import track

LOOKED_AT = 2**20
"""Samples of a source whose ids are read and compared: the first that are drawn."""
LONG = 2**15
"""Samples whose reading shows its progress."""


def duplicate_ids(mixture: Mixture, source: Source, drawn: int) -> dict[str, Any]:
    """How many records of the samples that a source gave bear an id that one before them in the file bears too.

    Ids are compared by hashes of 64 bits, 16 bytes of memory a record; a record without an id is called by its place.

    Args:
        drawn: how many times the source was drawn from.

    Returns:
        `count`; `looked_at`: samples that were compared; `first`: `{"id", "samples"}`, the indices of the first two, or None.
    """
    looked_at = min(drawn, len(source), LOOKED_AT)
    found: dict[str, Any] = {"count": 0, "looked_at": looked_at, "first": None}
    if not looked_at:
        return found
    shuffle = mixture.shuffles[mixture.names.index(source.name)]
    hashes, owners = hashed_ids(source, np.sort(shuffle.between(0, looked_at)).tolist())
    order = np.argsort(hashes, kind="stable")  # of equal ones the earlier stays before the later
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if len(again):
        first = again[order[again + 1].argmin()]
        pair = owners[order[first : first + 2]].tolist()
        shared = Counter(identity for _, identity in source.ids(sorted(set(pair)))).most_common(1)[0][0]
        found.update(count=len(again), first={"id": shared, "samples": pair})
    return found


def hashed_ids(source: Source, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each record's id, uint64, and the index of the sample that it is in; a record that is wrong is left out."""
    hashes, owners = array("Q"), array("q")
    found: Iterable[tuple[int, str]] = source.ids(indices)
    if len(indices) >= LONG:
        title = f"comparing ids of {source.name}"
        found = track(found, title, len(indices))
    for index, identity in found:
        hashes.append(hash(identity) & 2**64 - 1)
        owners.append(index)
    return np.frombuffer(hashes, dtype=np.uint64), np.frombuffer(owners, dtype=np.int64)
