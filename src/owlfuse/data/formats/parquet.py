"""Parquet and Arrow tables with chats, through Hugging Face `datasets`: rows stay on disk and
are mapped into memory."""

from __future__ import annotations

import glob
import json
import mmap
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
from datasets import ClassLabel, Dataset, Features, concatenate_datasets
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from pyarrow.parquet import ParquetFile

from owlfuse.core.errors import DataError, first_line
from owlfuse.core.files import MAX_RECORD, check_distinct, check_record, fingerprint, read_json
from owlfuse.core.types import JsonObject, Note, Sample
from owlfuse.data.formats.base import ChatSource, identity_of
from owlfuse.data.formats.records import (
    CHATS,
    EXPECTED,
    MEDIA_ID,
    MEDIA_KEY,
    QUESTION_KEYS,
    QUESTIONS,
    READ_KEYS,
    TEXT,
    TOOLS,
)
from owlfuse.data.formats.turn_keys import IMAGES, SYSTEM_KEYS, VIDEOS

IDS_AT_ONCE = 4096
# Rows of Parquet that are decoded at a time: with MAX_RECORD, the largest are 4 GB.
ROWS_AT_ONCE = 256
# Rows in a batch of the Arrow copy. Opening touches each batch's header and the pages around it:
# with the 1000 that `datasets` takes, ten million rows of text would be in memory wholly.
ROWS_PER_BATCH = 50_000
# Bytes of a row's pictures.
MAX_PICTURES = 2**29


@dataclass(eq=False)
class Parquet(ChatSource):
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
        id_column: the samples' ids; by default `id` if it is there, else their row numbers.
        cache_dir: where the Arrow copy of Parquet is kept; by default Hugging Face's own cache
            (HF_DATASETS_CACHE).
        others: see `Source`.

    Raises:
        DataError: at first use, a missing or damaged file, a column that a file lacks, or no
            row.
    """

    messages_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    system_column: str | None = None
    image_column: str | None = None
    id_column: str | None = None
    cache_dir: str | None = None

    chat_key = "messages"

    def __post_init__(self) -> None:
        super().__post_init__()
        has_half = (self.question_column is None) != (self.answer_column is None)
        if has_half or (self.question_column and self.messages_column):
            raise DataError(
                f"{self.file}: expected messages_column, or question_column and answer_column "
                "together"
            )

    def files(self) -> list[Path]:
        """See `Source`; of a folder, the Arrow files that its `state.json` names."""
        if not self.file.is_dir():
            return super().files()
        try:
            state = read_json(self.file / "state.json")
            # a name of `datasets` that it has written since its first version
            return [self.file / str(data["filename"]) for data in state["_data_files"]]
        except (DataError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.file}: expected a folder that Dataset.save_to_disk wrote, with a state.json"
            ) from error

    def open(self) -> Sequence[Any]:
        """See `Source`."""
        files = self.files()
        try:
            return self.open_files(files)
        except DataError:
            raise
        except (
            pyarrow.ArrowException,
            OSError,
            ValueError,
            DatasetGenerationError,
        ) as error:
            # `datasets` wraps a reason in an error of its own that does not tell it.
            reason = first_line(error.__cause__ or error)
            raise DataError(f"{self.file} cannot be read as one table: {reason}") from error

    def open_files(self, files: list[Path]) -> Sequence[Any]:
        """Return the rows of files of one format. Raises DataError, and what `datasets` raises."""
        # Arrow is mapped as it is; Parquet is compressed, and a row of it cannot be reached alone.
        if files[0].suffix == ".arrow":
            tables = [open_arrow(file) for file in files]
            schemas = [table.data.schema for table in tables]
            columns, unread = self.find_columns(files, schemas)
            labels = class_labels(files, schemas, columns)
            names = distinct_columns(columns)
            rows = concatenate_datasets([table.select_columns(names) for table in tables])
            return Rows(rows, columns, unread, files, [len(table) for table in tables], labels)
        counts, schemas = parquet_schemas(files)
        columns, unread = self.find_columns(files, schemas)
        labels = class_labels(files, schemas, columns)
        check_cells(files, columns)
        if not sum(counts):
            return []
        rows = open_parquet(files, schemas, distinct_columns(columns), self.cache_dir)
        if len(rows) != sum(counts):
            raise DataError(
                f"{self.file}: its Arrow copy has {len(rows):,} rows, expected the "
                f"{sum(counts):,} that the files have; remove {rows.cache_files[0]['filename']}"
            )
        return Rows(rows, columns, unread, files, counts, labels)

    def find_columns(
        self, files: list[Path], schemas: list[Any]
    ) -> tuple[dict[str, str], list[Note]]:
        """Return the column of each key of a record, given the schema of each file, and notes of
        the columns that are not read. Raises DataError."""
        for file, schema in zip(files, schemas, strict=True):
            check_distinct(schema.names, file)
        names = schemas[0].names
        chosen = {
            "messages": self.messages_column,
            "question": self.question_column,
            "answer": self.answer_column,
            "system": self.system_column,
            "images": self.image_column,
            "id": self.id_column,
        }
        columns = {key: column for key, column in chosen.items() if column is not None}
        defaults = self.default_columns(files[0], names)
        for column in names:
            if column in defaults:
                columns[column] = column
        unread: dict[str, None] = {}  # in the place of a set, for its order
        for file, schema in zip(files, schemas, strict=True):
            for column in columns.values():
                if column not in schema.names:
                    raise DataError(
                        f"{file} has no column {column!r}; it has {', '.join(schema.names)}"
                    )
            # The first file decides what is read, so that these would be left out.
            if further := self.default_columns(file, schema.names) - defaults:
                raise DataError(
                    f"{file} has the column {', '.join(sorted(further))}, which {files[0]} does "
                    "not have; expected the same columns in all files of a source"
                )
            unread_here = [column for column in schema.names if column not in columns.values()]
            if not self.image_column:
                check_pictures(file, schema, unread_here, bool(defaults & {*IMAGES}))
            unread |= dict.fromkeys(unread_here)
        return columns, [Note("unused", f"the column '{column}'") for column in unread]

    def default_columns(self, file: Path, names: list[str]) -> set[str]:
        """Return the columns that are read by their names, without those in whose place an option
        names another. Raises DataError where there is no chat."""
        columns = {column for column in names if column in READ_KEYS}
        if self.messages_column or self.question_column:
            columns -= {*CHATS, *QUESTION_KEYS}
        elif columns.isdisjoint(CHATS) and not any(columns.issuperset(pair) for pair in QUESTIONS):
            if TEXT not in names:
                raise DataError(
                    f"{file} has no chat among its columns {', '.join(names)}; {EXPECTED}; other "
                    "names are told by messages_column, or question_column and answer_column"
                )
            columns.add(TEXT)
        if self.image_column:
            columns -= {*IMAGES}
        if self.system_column:
            columns -= {*SYSTEM_KEYS}
        if self.id_column:
            columns -= {"id"}
        return columns

    def ids(self, indices: Iterable[int]) -> Iterator[tuple[int, str]]:
        """See `Source`; of other columns nothing is read."""
        rows: Any = self.records
        indices = list(indices)
        if "id" not in rows.columns:
            for index in indices:
                yield index, str(index)
            return
        column = rows.table.select_columns([rows.columns["id"]])
        for start in range(0, len(indices), IDS_AT_ONCE):
            block = indices[start : start + IDS_AT_ONCE]
            values = column[block].column(0).to_pylist()
            for index, value in zip(block, values, strict=True):
                yield index, identity_of(value, index)

    def location(self, index: int) -> str:
        """See `Source`."""
        return cast("Rows", self.records).location(index)

    def sample(self, record: JsonObject, name: str) -> Sample:
        """See `Source`."""
        for key in TOOLS:
            if key in record:
                record[key] = without_nulls(record[key])
        sample = super().sample(record, name)
        for message in sample.messages:
            if "tool_calls" in message:
                message["tool_calls"] = without_nulls(message["tool_calls"])
        sample.notes += cast("Rows", self.records).unread
        return sample


def without_nulls(value: Any) -> Any:
    """Return a value without the None of other rows: a column has the keys of all its rows, and
    `datasets` fills in those that a row does not have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def check_pictures(
    file: Path,
    schema: Any,
    unread: list[str],
    has_images: bool,
) -> None:
    """Raise DataError for columns of pictures that are not read, where none is called `image` or
    `images`, or where they are numbered beside one that is."""
    pictures = []
    for column in unread:
        match = MEDIA_KEY.fullmatch(column.lower())
        is_numbered = bool(match and match["number"])
        is_media = (
            bool(match)
            or bool(MEDIA_ID.fullmatch(column.lower()))
            or holds_files(schema.field(column).type)
        )
        if is_numbered or (is_media and not has_images):
            pictures.append(column)
    if pictures:
        raise DataError(
            f"{file} has the columns {', '.join(pictures)} with pictures, videos or sound, which "
            "are not read; expected image, images, video or videos, or name a column of pictures: "
            "image_column"
        )


def holds_files(kind: Any) -> bool:
    """Whether an Arrow type is that of a picture or a video: bytes, `{"bytes", "path"}`, or a list
    of these."""
    while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        kind = kind.value_type
    # The type that `datasets` stores pictures and videos as.
    if pyarrow.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


class Rows(Sequence[JsonObject]):
    """The rows of a `datasets.Dataset`, as they are stored: pictures stay bytes.

    Args:
        dataset: has the columns that are read, and no others.
        columns: the column of each key of a record.
        unread: notes of the columns that are not read.
        files: that the rows come from, in order.
        counts: the rows of each file.
        labels: of columns that hold classes, whose numbers are stored: their names.
    """

    def __init__(
        self,
        dataset: Any,
        columns: dict[str, str],
        unread: list[Note],
        files: list[Path],
        counts: list[int],
        labels: dict[str, list[str]],
    ) -> None:
        self.unread = unread
        self.labels = labels
        self.files = files
        self.ends = list(accumulate(counts))
        self.table = dataset.with_format("arrow")
        self.columns = columns
        features = self.table.features
        self.with_json = {
            column: features[column] for column in columns.values() if has_json(features[column])
        }

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> JsonObject:  # type: ignore[override]  # no slices
        # range() checks the index and turns a negative one.
        row = self.table[range(len(self))[index]]
        # Before the row becomes Python objects, which take many times the memory.
        for key, column in self.columns.items():
            limit = MAX_PICTURES if key in (*IMAGES, *VIDEOS) else MAX_RECORD
            check_record(row.column(column).nbytes, f"{self.location(index)}: {column}", limit)
        values = row.to_pylist()[0]
        for column, feature in self.with_json.items():
            values[column] = from_json_type(values[column], feature)
        for column, names in self.labels.items():
            number = values[column]
            # `datasets` writes -1 where there is no class.
            if number is not None and not 0 <= number < len(names):
                raise DataError(
                    f"{self.location(index)}: {column} is class {number}, expected one of the "
                    f"{len(names)} from 0"
                )
            values[column] = None if number is None else names[number]
        return {key: values[column] for key, column in self.columns.items()}

    def location(self, index: int) -> str:
        """Return the number of a row in its file, from 1, and the file."""
        file = bisect_right(self.ends, index)
        before = self.ends[file - 1] if file else 0
        return f"row {index - before + 1} of {self.files[file].name}"


JSON_TYPE: Any = getattr(datasets, "Json", ())
"""How `datasets` from 5 stores values of several types, as contents that are texts and lists of
parts."""


def inner_features(feature: Any) -> Iterable[Any]:
    """Return the features inside of one of `datasets`: of a list's items, or of an object's
    keys."""
    if isinstance(feature, dict):
        return feature.values()
    if isinstance(feature, list):
        return feature
    inner = getattr(feature, "feature", None)
    return [] if inner is None else [inner]


def has_json(feature: Any) -> bool:
    """Whether values of a feature have to be read by `from_json_type`."""
    if JSON_TYPE and isinstance(feature, JSON_TYPE):
        return True
    return any(has_json(inner) for inner in inner_features(feature))


def from_json_type(value: Any, feature: Any) -> Any:
    """Return a stored value with the JSON texts of `datasets.Json` read.

    A text that spells a number or a truth value stays a text: which of the two it was is not
    stored.
    """
    if value is None:
        return None
    if isinstance(feature, JSON_TYPE):
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return value if isinstance(read, int | float) else read
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: from_json_type(value[key], feature[key]) for key in value}
    if isinstance(value, list):
        (inner,) = inner_features(feature)
        return [from_json_type(item, inner) for item in value]
    return value


def distinct_columns(columns: dict[str, str]) -> list[str]:
    """Return the columns that hold some key, each once."""
    return list(dict.fromkeys(columns.values()))


def class_labels(
    files: list[Path], schemas: list[Any], columns: dict[str, str]
) -> dict[str, list[str]]:
    """Return the names of the classes of each column that is read and holds their numbers
    (`datasets.ClassLabel`).

    Raises DataError for files whose classes differ, and lists of classes.
    """
    labels: dict[str, list[str]] = {}
    for number, (file, schema) in enumerate(zip(files, schemas, strict=True)):
        features = Features.from_arrow_schema(schema)
        for column in distinct_columns(columns):
            feature = features[column]
            if isinstance(getattr(feature, "feature", None), ClassLabel):
                raise DataError(
                    f"{file}: {column} holds lists of class numbers, which are not read; write "
                    "their names"
                )
            names = list(feature.names) if isinstance(feature, ClassLabel) else None
            if number and names != labels.get(column):
                raise DataError(
                    f"{file}: {column} has other classes than in {files[0]}; expected the same in "
                    "all files of a source"
                )
            if names is not None:
                labels[column] = names
    return labels


def parquet_schemas(files: list[Path]) -> tuple[list[int], list[Any]]:
    """Return the number of rows and the schema of each file, from their footers."""
    counts, schemas = [], []
    for file in files:
        with ParquetFile(file) as parquet:
            counts.append(parquet.metadata.num_rows)
            schemas.append(parquet.schema_arrow)
    return counts, schemas


def check_cells(files: list[Path], columns: dict[str, str]) -> None:
    """Raise DataError for a column whose cells are too large on the average of a row group, before
    any is read."""
    visual = {columns[key] for key in (*IMAGES, *VIDEOS) if key in columns}
    for file in files:
        with ParquetFile(file) as parquet:
            for number in range(parquet.metadata.num_row_groups):
                group = parquet.metadata.row_group(number)
                sizes: Counter[str] = Counter()
                for chunk in map(group.column, range(group.num_columns)):
                    # A nested column is stored in parts, such as `images.list.element.bytes`.
                    column = chunk.path_in_schema.partition(".")[0]
                    sizes[column] += chunk.total_uncompressed_size
                for column in distinct_columns(columns):
                    limit = MAX_PICTURES if column in visual else MAX_RECORD
                    mean_size = sizes[column] // max(1, group.num_rows)
                    name = f"{file}: row group {number + 1}: a cell of {column}"
                    check_record(mean_size, name, limit)


def open_parquet(
    files: list[Path],
    schemas: list[Any],
    columns: list[str],
    cache_dir: str | None,
) -> Any:
    """Return Parquet as a memory-mapped `datasets.Dataset`, by way of its Arrow copy."""
    options: JsonObject = {}
    if len(files) > 1:
        # A shard without a picture has a column of the type null, and `datasets` takes the types of
        # the first.
        selected = []
        for schema in schemas:
            selected.append(pyarrow.schema([schema.field(column) for column in columns]))
        options["features"] = Features.from_arrow_schema(pyarrow.unify_schemas(selected))
    # `datasets` knows a copy by paths and times, which rsync -t keeps for other contents.
    folder = f"owlfuse-{fingerprint(files).rpartition(':')[2][:32]}"
    return Dataset.from_parquet(
        # It takes a path for a pattern.
        [glob.escape(str(file)) for file in files],
        columns=columns,
        # Else a whole row group is in memory, whose cells a dictionary may hold once.
        batch_size=ROWS_AT_ONCE,
        cache_dir=str(Path(cache_dir or HF_DATASETS_CACHE).expanduser() / folder),
        writer_batch_size=ROWS_PER_BATCH,
        **options,
    )


def open_arrow(file: Path) -> Any:
    """Return an Arrow file of either kind (a stream, as `datasets` writes; a file, as others do),
    mapped into memory.

    The pages that its batches' headers are on are freed while they are read: of many small batches
    they are the whole file.
    """
    with file.open("rb") as stream:
        # Python's map and not pyarrow's, whose pages cannot be freed.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    reader: Any
    # The magic bytes of Arrow's file format; its stream format has none.
    if mapped[:6] == b"ARROW1":
        reader = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped))
        stored = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        stored = reader = pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped))
    batches = []
    for number, batch in enumerate(stored):
        batches.append(batch)
        if number % 256 == 255:
            mapped.madvise(mmap.MADV_DONTNEED)
    mapped.madvise(mmap.MADV_DONTNEED)
    table = pyarrow.Table.from_batches(batches, reader.schema)
    # Without a fingerprint, it would pickle the table for its hash.
    return Dataset(table, fingerprint=file.name)
