"""Parquet and Arrow tables with chats, through Hugging Face `datasets`: rows stay on disk and
are mapped into memory."""

from __future__ import annotations

import json
import mmap
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import pyarrow
from datasets import Dataset, Features
from pyarrow.parquet import ParquetFile

from owlfuse.core.errors import DataError
from owlfuse.core.files import MAX_RECORD, check_record
from owlfuse.core.types import Note, Sample
from owlfuse.data.formats.base import VideoSource
from owlfuse.data.formats.records import (
    CHATS,
    EXPECTED,
    IMAGES,
    KNOWN,
    LOOKS_LIKE_FILE,
    QUESTION_KEYS,
    QUESTIONS,
    TEXT,
    TOOLS,
    VIDEOS,
    read_chat,
)
from owlfuse.data.formats.turn_keys import SYSTEM_KEYS

IDS_AT_ONCE = 4096
ROWS_PER_BATCH = 50_000
MAX_PICTURES = 2**29
"""Of the Arrow copy. Opening touches each batch's header and the pages around it: with the 1000
that `datasets` takes, ten million rows of text would be in memory wholly."""


@dataclass(eq=False)
class Parquet(VideoSource):
    """Rows of Parquet files, Arrow files, or a folder that `Dataset.save_to_disk` wrote.

    Parquet is written once as Arrow into a cache (the columns used alone), from which a row is
    reached without reading those before it; the next opening finds it there. A picture is bytes,
    `{"bytes", "path"}` or a path below the image root, or a list of these.

    Args:
        file: a path, a glob (`train-*.parquet`) or braces.
        messages_column: chats as `turns.chat` takes them; by default `messages`, `conversations`,
            `conversation` or `texts` (the_cauldron, FineVision), whichever is there, or a question
            and its answer as `records` tells.
        question_column: with `answer_column` and instead of messages, a chat of one turn; pictures
            come first where the question has no `<image>`. Of a list of answers the most frequent
            is learned.
        answer_column: see `question_column`.
        system_column: a text for the system turn; by default `system` if it is there.
        image_column: by default `images` or `image`, whichever is there, or none.
        id_column: what samples are called; by default `id` if it is there, else their place.
        cache_dir: where the Arrow copy of Parquet is kept; by default Hugging Face's own cache
            (HF_DATASETS_CACHE).
        others: see `Source`.

    Raises:
        DataError: at first use, a missing or damaged file, a column that a file lacks, no row, or
            no `datasets` to import.
    """

    messages_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    system_column: str | None = None
    image_column: str | None = None
    id_column: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.question_column is None) != (self.answer_column is None) or (
            self.question_column and self.messages_column
        ):
            raise DataError(
                f"{self.file}: expected messages_column, or question_column and answer_column "
                "together"
            )

    def files(self) -> list[Path]:
        """See `Source`; of a folder, the Arrow files that its `state.json` names."""
        if not self.file.is_dir():
            return super().files()
        try:
            state = json.loads((self.file / "state.json").read_text())
            return [self.file / str(data["filename"]) for data in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.file}: expected a folder that Dataset.save_to_disk wrote, with a state.json"
            ) from error

    def open(self) -> Sequence[Any]:
        """See `Source`."""
        try:
            import datasets
            import pyarrow
        except ImportError as error:
            raise DataError(
                f"{self.file}: reading it needs the package datasets, which is not here: {error}"
            ) from error
        files = self.files()
        try:
            if files[0].suffix == ".arrow":
                parts = [open_arrow(file) for file in files]
                places, unread = self.places(files, [part.data.schema for part in parts])
                whole = datasets.concatenate_datasets(
                    [part.select_columns(columns_of(places)) for part in parts]
                )
                return Rows(whole, places, unread, files, [len(part) for part in parts])
            counts, schemas = parquet_schemas(files)
            places, unread = self.places(files, schemas)
            check_cells(files, places)
            if not sum(counts):
                return []
            whole = open_parquet(files, schemas, columns_of(places), self.cache_dir)
            return Rows(whole, places, unread, files, counts)
        except DataError:
            raise
        except (
            pyarrow.ArrowException,
            OSError,
            ValueError,
            datasets.exceptions.DatasetGenerationError,
        ) as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise DataError(f"{self.file} cannot be read as one table: {reason}") from error

    def places(self, files: list[Path], schemas: list[Any]) -> tuple[dict[str, str], list[Note]]:
        """Which column each key of a record is in, given the schema of each file, and which are
        not read. Raises DataError."""
        have = schemas[0].names
        asked = {
            "messages": self.messages_column,
            "question": self.question_column,
            "answer": self.answer_column,
            "system": self.system_column,
            "images": self.image_column,
            "id": self.id_column,
        }
        found = {key: column for key, column in asked.items() if column is not None}
        there = {column for column in have if column in KNOWN}
        if self.messages_column or self.question_column:
            there -= {*CHATS, *QUESTION_KEYS}
        elif there & {*CHATS} or any(there.issuperset(pair) for pair in QUESTIONS):
            pass
        elif TEXT in have:
            there.add(TEXT)
        else:
            raise DataError(
                f"{files[0]} has no chat among its columns {', '.join(have)}; {EXPECTED}; other "
                "names are told by "
                "messages_column, or question_column and answer_column"
            )
        there -= {*IMAGES} if self.image_column else set()
        there -= {*SYSTEM_KEYS} if self.system_column else set()
        there -= {"id"} if self.id_column else set()
        found |= {column: column for column in have if column in there}
        for file, schema in zip(files, schemas, strict=True):
            for column in found.values():
                if column not in schema.names:
                    raise DataError(
                        f"{file} has no column {column!r}; it has {', '.join(schema.names)}"
                    )
        unread = [column for column in have if column not in found.values()]
        if not self.image_column:
            check_pictures(files[0], schemas[0], unread, bool(there & {*IMAGES}))
        return found, [Note("unused", f"the column '{column}'") for column in unread]

    def ids(self, indices: Iterable[int]) -> Iterator[tuple[int, str]]:
        """See `Source`; of other columns nothing is read."""
        rows: Any = self.records
        indices = list(indices)
        if "id" not in rows.places:
            yield from ((index, str(index)) for index in indices)
            return
        column = rows.table.select_columns([rows.places["id"]])
        for start in range(0, len(indices), IDS_AT_ONCE):
            block = indices[start : start + IDS_AT_ONCE]
            values = column[block].column(0).to_pylist()
            yield from (
                (i, str(i if value is None else value))
                for i, value in zip(block, values, strict=True)
            )

    def place(self, index: int) -> str:
        """See `Source`."""
        return cast("Rows", self.records).place(index)

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        for key in TOOLS:
            if key in record:
                record[key] = without_nulls(record[key])
        sample = read_chat(record, name, self.name, "messages")
        for message in sample.messages:
            if "tool_calls" in message:
                message["tool_calls"] = without_nulls(message["tool_calls"])
        sample.notes += cast("Rows", self.records).unread
        return sample


def without_nulls(value: Any) -> Any:
    """A value without the None of other rows: a column has the keys of all its rows, and `datasets`
    fills in those that a row has not."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def check_pictures(file: Path, schema: Any, unread: list[str], has_images: bool) -> None:
    """Raises DataError for columns of pictures that are not read, where none is called `image` or
    `images`, or where they are numbered beside one that is."""
    pictures = []
    for column in unread:
        like = LOOKS_LIKE_FILE.fullmatch(column.lower())
        if (like and (like["number"] or not has_images)) or (
            not has_images and holds_files(schema.field(column).type)
        ):
            pictures.append(column)
    if pictures:
        raise DataError(
            f"{file} has the columns {', '.join(pictures)} with pictures, videos or sound, which "
            "are not read; expected image, "
            "images, video or videos, or name a column of pictures: image_column"
        )


def holds_files(kind: Any) -> bool:
    """Whether an Arrow type is that of a picture or a video:

    `{"bytes", "path"}`, or a list of these.
    """
    while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        kind = kind.value_type
    if pyarrow.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


class Rows(Sequence[dict[str, Any]]):
    """The rows of a `datasets.Dataset`, as they are stored: pictures stay bytes.

    Args:
        places: the column of each key of a record.
        unread: the columns that are not read.
        files: that the rows come from, in order.
        counts: the rows of each file.
    """

    def __init__(
        self,
        dataset: Any,
        places: dict[str, str],
        unread: list[Note],
        files: list[Path],
        counts: list[int],
    ) -> None:
        self.unread = unread
        self.files = files
        self.ends = list(accumulate(counts))
        self.table = dataset.select_columns(columns_of(places)).with_format("arrow")
        self.places = places

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        row = self.table[range(len(self))[index]]
        for key, column in self.places.items():
            limit = MAX_PICTURES if key in (*IMAGES, *VIDEOS) else MAX_RECORD
            check_record(row.column(column).nbytes, f"{self.place(index)}: {column}", limit)
        values = row.to_pylist()[0]
        return {key: values[column] for key, column in self.places.items()}

    def place(self, index: int) -> str:
        """Which row of which file a row is, from 1."""
        file = bisect_right(self.ends, index)
        before = self.ends[file - 1] if file else 0
        return f"row {index - before + 1} of {self.files[file].name}"


def columns_of(places: dict[str, str]) -> list[str]:
    """The columns that hold some field, each once."""
    return list(dict.fromkeys(places.values()))


def parquet_schemas(files: list[Path]) -> tuple[list[int], list[Any]]:
    """The rows and the schema of each file, from their footers."""
    counts, schemas = [], []
    for file in files:
        with ParquetFile(file) as parquet:
            counts.append(parquet.metadata.num_rows)
            schemas.append(parquet.schema_arrow)
    return counts, schemas


def check_cells(files: list[Path], places: dict[str, str]) -> None:
    """Raises DataError for a column whose cells are too large on the average of a row group,
    before any is read."""
    visual = {places[key] for key in (*IMAGES, *VIDEOS) if key in places}
    for file in files:
        with ParquetFile(file) as parquet:
            for number in range(parquet.metadata.num_row_groups):
                group = parquet.metadata.row_group(number)
                sizes: Counter[str] = Counter()
                for part in map(group.column, range(group.num_columns)):
                    sizes[part.path_in_schema.partition(".")[0]] += part.total_uncompressed_size
                for column in columns_of(places):
                    limit = MAX_PICTURES if column in visual else MAX_RECORD
                    check_record(
                        sizes[column] // max(1, group.num_rows),
                        f"{file}: row group {number + 1}: a cell of {column}",
                        limit,
                    )


def open_parquet(
    files: list[Path], schemas: list[Any], columns: list[str], cache_dir: str | None
) -> Any:
    """Parquet as a memory-mapped `datasets.Dataset`, by way of its Arrow copy."""
    names = [str(file) for file in files]
    options: dict[str, Any] = {}
    if len(files) > 1:
        # a shard without a picture has a column of the type null, and `datasets` takes the types of
        # the first
        parts = [pyarrow.schema([schema.field(column) for column in columns]) for schema in schemas]
        options["features"] = Features.from_arrow_schema(pyarrow.unify_schemas(parts))
    return Dataset.from_parquet(
        names, columns=columns, cache_dir=cache_dir, writer_batch_size=ROWS_PER_BATCH, **options
    )


def open_arrow(file: Path) -> Any:
    """An Arrow file of either kind (a stream, as `datasets` writes; a file, as others do), mapped
    into memory.

    The pages that its batches' headers lie on are given back while they are read: of many small
    batches they are the whole file.
    """
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if mapped[:6] == b"ARROW1":
        reader = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped))
        each = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        each = reader = pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped))
    batches = []
    for number, batch in enumerate(each):
        batches.append(batch)
        if number % 256 == 255:
            mapped.madvise(mmap.MADV_DONTNEED)
    mapped.madvise(mmap.MADV_DONTNEED)
    table = pyarrow.Table.from_batches(batches, reader.schema)
    # without one, it would pickle the table for its hash
    return Dataset(table, fingerprint=file.name)
