"""Parquet and Arrow tables with chats, through Hugging Face `datasets`: rows stay on disk and are mapped into memory."""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owlfuse.data.formats.base import IMAGE, VideoSource
from owlfuse.data.lines import MAX_RECORD, check_record
from owlfuse.data.turns import brief, chat, pictures_of
from owlfuse.types import DataError, Sample

CHATS = ("messages", "conversations")
IMAGES = ("images", "image")
IDS_AT_ONCE = 4096
ROWS_PER_BATCH = 50_000
MAX_PICTURES = 2**29
"""Of the Arrow copy. Opening touches each batch's header and the pages around it: with the 1000 that `datasets` takes, ten
million rows of text would be in memory wholly."""


@dataclass(eq=False)
class Parquet(VideoSource):
    """Rows of Parquet files, Arrow files, or a folder that `Dataset.save_to_disk` wrote.

    Parquet is written once as Arrow into a cache (the columns used alone), from which a row is reached without reading those
    before it; the next opening finds it there. A picture is bytes, `{"bytes", "path"}` or a path below the image root, or a
    list of these.

    Args:
        file: a path, a glob (`train-*.parquet`) or braces.
        messages_column: chats as `turns.chat` takes them; by default `messages` or `conversations`, whichever is there.
        question_column: with `answer_column` and instead of messages, a chat of one turn; pictures come first where the
            question has no `<image>`.
        answer_column: see `question_column`.
        system_column: a text for the system turn.
        image_column: by default `images` or `image`, whichever is there, or none.
        id_column: what samples are called; by default `id` if it is there, else their place.
        cache_dir: where the Arrow copy of Parquet is kept; by default Hugging Face's own cache (HF_DATASETS_CACHE).
        others: see `Source`.

    Raises:
        DataError: at first use, a missing or damaged file, a column that a file lacks, no row, or no `datasets` to import.
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
        if (self.question_column is None) != (self.answer_column is None) or (self.question_column and self.messages_column):
            raise DataError(f"{self.file}: expected messages_column, or question_column and answer_column together")

    def files(self) -> list[Path]:
        """See `Source`; of a folder, the Arrow files that its `state.json` names."""
        if not self.file.is_dir():
            return super().files()
        try:
            state = json.loads((self.file / "state.json").read_text())
            return [self.file / str(data["filename"]) for data in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.file}: expected a folder that Dataset.save_to_disk wrote, with a state.json") from error

    def open(self) -> Sequence[Any]:
        """See `Source`."""
        try:
            import datasets
            import pyarrow
        except ImportError as error:
            raise DataError(f"{self.file}: reading it needs the package datasets, which is not here: {error}") from error
        files = self.files()
        try:
            if files[0].suffix == ".arrow":
                parts = [open_arrow(file) for file in files]
                places = self.places(files, [part.column_names for part in parts])
                return Rows(datasets.concatenate_datasets([part.select_columns(columns_of(places)) for part in parts]), places)
            rows, columns = parquet_schema(files)
            places = self.places(files, columns)
            check_cells(files, places)
            return Rows(open_parquet(files, columns_of(places), self.cache_dir), places) if rows else []
        except DataError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise DataError(f"{self.file} cannot be read as one table: {reason}") from error

    def places(self, files: list[Path], columns: list[list[str]]) -> dict[str, str]:
        """Which column each field is in, given those of each file. Raises DataError."""
        have = columns[0]
        asked = {
            "messages": self.messages_column,
            "question": self.question_column,
            "answer": self.answer_column,
            "system": self.system_column,
            "images": self.image_column,
            "id": self.id_column,
        }
        found = {key: column for key, column in asked.items() if column is not None}
        if "question" not in found:
            found.setdefault("messages", next((c for c in CHATS if c in have), "messages"))
        if image := next((c for c in IMAGES if c in have), None):
            found.setdefault("images", image)
        if "id" in have:
            found.setdefault("id", "id")
        for file, names in zip(files, columns, strict=True):
            for key, column in found.items():
                if column not in names:
                    hint = "; name it in the source's yaml, as messages_column or question_column" if key == "messages" else ""
                    raise DataError(f"{file} has no column {column!r}; it has {', '.join(names)}{hint}")
        return found

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
            yield from ((i, str(i if value is None else value)) for i, value in zip(block, values, strict=True))

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """See `Source`."""
        pictures = pictures_of({"images": record.get("images")}, name)
        turns = record.get("messages")
        if "question" in record:
            question, answer = record["question"], record["answer"]
            if not isinstance(question, str) or not isinstance(answer, str):
                raise DataError(f"sample {name}: question is {brief(question)}, answer {brief(answer)}, expected texts")
            shown = "" if not pictures or IMAGE in question else IMAGE * len(pictures) + "\n"
            turns = [{"role": "user", "content": shown + question}, {"role": "assistant", "content": answer}]
        if isinstance(turns, dict):
            turns = turns_of_columns(turns)
        if not isinstance(turns, list):
            raise DataError(f"sample {name}: its chat is {brief(turns)}, expected a list of turns")
        system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        messages, images, videos = chat([*system, *turns], pictures, name)
        return Sample(name, self.name, messages, images, {}, videos)


class Rows(Sequence[dict[str, Any]]):
    """The rows of a `datasets.Dataset`, as they are stored: pictures stay bytes."""

    def __init__(self, dataset: Any, places: dict[str, str]) -> None:
        self.table = dataset.select_columns(columns_of(places)).with_format("arrow")
        self.places = places

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        row = self.table[range(len(self))[index]]
        for key, column in self.places.items():
            limit = MAX_PICTURES if key == "images" else MAX_RECORD
            check_record(row.column(column).nbytes, f"row {index}: {column}", limit)
        values = row.to_pylist()[0]
        return {key: values[column] for key, column in self.places.items()}


def turns_of_columns(columns: dict[str, Any]) -> Any:
    """A dict of lists of the same length, as `datasets` stores a Sequence of dicts, as a list of dicts; others as they are."""
    lists = [column for column in columns.values() if isinstance(column, list)]
    if len(lists) < len(columns) or len({len(column) for column in lists}) != 1:
        return columns
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*lists, strict=True)]


def columns_of(places: dict[str, str]) -> list[str]:
    """The columns that hold some field, each once."""
    return list(dict.fromkeys(places.values()))


def parquet_schema(files: list[Path]) -> tuple[int, list[list[str]]]:
    """Rows in all, and the column names of each file, from their footers."""
    from pyarrow.parquet import ParquetFile

    rows, columns = 0, []
    for file in files:
        with ParquetFile(file) as parquet:
            rows += parquet.metadata.num_rows
            columns.append(parquet.schema_arrow.names)
    return rows, columns


def check_cells(files: list[Path], places: dict[str, str]) -> None:
    """Raises DataError for a column whose cells are too large on the average of a row group, before any is read."""
    from pyarrow.parquet import ParquetFile

    pictures = places.get("images")
    for file in files:
        with ParquetFile(file) as parquet:
            for number in range(parquet.metadata.num_row_groups):
                group = parquet.metadata.row_group(number)
                sizes: Counter[str] = Counter()
                for part in map(group.column, range(group.num_columns)):
                    sizes[part.path_in_schema.partition(".")[0]] += part.total_uncompressed_size
                for column in columns_of(places):
                    limit = MAX_PICTURES if column == pictures else MAX_RECORD
                    check_record(
                        sizes[column] // max(1, group.num_rows), f"{file}: row group {number}: a cell of {column}", limit
                    )


def open_parquet(files: list[Path], columns: list[str], cache_dir: str | None) -> Any:
    """Parquet as a memory-mapped `datasets.Dataset`, by way of its Arrow copy."""
    from datasets import Dataset

    names = [str(file) for file in files]
    return Dataset.from_parquet(names, columns=columns, cache_dir=cache_dir, writer_batch_size=ROWS_PER_BATCH)


def open_arrow(file: Path) -> Any:
    """An Arrow file of either kind (a stream, as `datasets` writes; a file, as others do), mapped into memory.

    The pages that its batches' headers lie on are given back while they are read: of many small batches they are the whole
    file.
    """
    import pyarrow
    from datasets import Dataset

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
    return Dataset(table, fingerprint=file.name)  # without one, it would pickle the table for its hash
