"""What every source has: where it lies, its share of the mixture, and what happens to a sample
that is wrong."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from owlfuse.core.errors import DataError
from owlfuse.core.files import expand_files, fingerprint
from owlfuse.core.packages import packaged
from owlfuse.core.types import Note, Sample
from owlfuse.data.formats.records import has_chat
from owlfuse.data.media.video import VideoSampling
from owlfuse.data.readers.lines import JsonLines, Records, open_records


@dataclass(eq=False)
class Source:
    """A file of records, each a chat. Subclasses read a record in `sample`, and open other kinds of
    files in `open`. They are dataclasses too: their fields are the keys of a yaml, behind those
    here.

    The file is opened at first use, in each process that uses it: a source that was sent to another
    is its arguments alone.

    Args:
        file: JSON (a list of records, or an object with one such list, parsed whole) or JSON Lines
            (a record a line, found by an index of offsets, each parsed when it is drawn), which its
            contents tell apart; UTF-8. `package:<package>/<path>` is a file of an installed
            package.
        image_root: the folder that image paths start from and cannot leave; by default the file's
            own.
        weight: the share of the mixture, relative to the other sources'.
        on_error: what a wrong sample does: `error` stops, `skip` leaves it out and counts it.
        max_skips: with `skip`, how many are left out before it is an error all the same.

    Raises:
        DataError: at first use, a file that is missing, is not valid, or holds no record.
    """

    file: Path
    image_root: Path | None = None
    weight: float = 1.0
    on_error: Literal["error", "skip"] = "error"
    max_skips: int = 100

    tile: ClassVar[float] = 0.0  # of those whose pictures may be tiled, a field
    video: ClassVar[VideoSampling | None] = None

    def __post_init__(self) -> None:
        self.file = Path(packaged(str(self.file))).expanduser()
        self.image_root = (
            Path(self.image_root).expanduser() if self.image_root else self.file.parent
        )
        self.name = self.file.stem

    @property
    def root(self) -> Path:
        """The folder that image paths start from."""
        return self.image_root or self.file.parent

    @cached_property
    def records(self) -> Sequence[Any]:
        """The file's records, opened at first use: data that are made on the spot exist by then."""
        records = self.open()
        if not len(records):
            raise DataError(f"{self.file}: holds no record")
        return records

    def open(self) -> Sequence[Any]:
        """The records by number.

        Raises DataError; a record that is wrong by itself raises when it is asked for.
        """
        return open_records(self.file, has_chat)

    def files(self) -> list[Path]:
        """The files that the source reads, in order. Raises DataError where one is missing."""
        return expand_files(str(self.file))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises DataError, naming source and sample, where the record is not what it should be.
        """
        return self.read(index)

    def read(self, index: int) -> Sample:
        """The record at `index` as a sample."""
        record = self.records[index]
        try:
            if not isinstance(record, dict):
                raise DataError(
                    f"{self.name}: a record is a {type(record).__name__}, expected an object"
                )
            identity = record.get("id")
            sample = self.sample(record, f"{self.name}:{index if identity is None else identity}")
        except DataError as error:
            raise self.placed(error, index) from None
        if isinstance(self.records, Records):
            sample.notes += [
                Note("unused", f"the file's '{key}' beside its records")
                for key in self.records.unused
            ]
        return sample

    def place(self, index: int) -> str:
        """Where the record at `index` stands, as its file counts: a line, or a record's number
        from 1."""
        if isinstance(self.records, JsonLines):
            return f"line {self.records.lines.number(index)} of {self.file.name}"
        return f"record {index + 1} of {self.file.name}"

    def placed(self, error: DataError, index: int) -> DataError:
        """An error of the sample at `index` that says where its record stands."""
        if "records" not in vars(self):
            return error
        place = self.place(index)
        if place not in str(error) and self.file.name not in str(error):
            error.args = (f"{error} ({place})",)
        return error

    def first_record(self, index: int) -> int:
        """The first record of the sample at `index`."""
        return index

    def ids(self, indices: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Index and id of each record of those samples, its place where it has no id; without
        those of wrong records."""
        for index in indices:
            with suppress(DataError):
                record = self.records[index]
                if isinstance(record, dict):
                    identity = record.get("id")
                    yield index, str(index if identity is None else identity)

    def sample(self, record: dict[str, Any], name: str) -> Sample:
        """The record as a sample called `name`."""
        raise NotImplementedError(f"{type(self).__name__} reads no records")

    def fingerprint(self) -> str:
        """What `mixture.json` knows the content by:

        SHA-256, above 1 GB of sizes and ends (see `files.fingerprint`).
        """
        return fingerprint(self.files())

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "records"}


@dataclass(eq=False)
class PictureSource(Source):
    """A source with pictures.

    Args:
        tile: the share of samples, 0 to 1, whose pictures become a global view and tiles (see
            `tiles`).

    Raises:
        DataError: another `tile`.
    """

    tile: float = 0.0  # type: ignore[misc]  # a constant of other sources, a field of this

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tile <= 1:
            raise DataError(f"{self.file}: tile is {self.tile}, expected a share from 0 to 1")


@dataclass(eq=False)
class VideoSource(PictureSource):
    """A source with pictures and videos.

    Args:
        video: how frames of videos are chosen, the keys of a `VideoSampling`; by default as
            `ChatData` says.

    Raises:
        DataError: a `video` that is no such thing.
    """

    # VideoSampling once it is made
    video: VideoSampling | dict[str, Any] | None = None  # type: ignore[misc, assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.video = None if self.video is None else VideoSampling.of(self.video)
        except DataError as error:
            raise DataError(f"{self.file}: {error}") from None


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    """What a record has beside `id` and `keys`, for a sample's metadata."""
    return {key: value for key, value in record.items() if key != "id" and key not in keys}


def field(record: dict[str, Any], key: str, kind: type, name: str) -> Any:
    """A record's field, of the kind that it must have."""
    if key not in record:
        raise DataError(
            f"sample {name} has no '{key}'; it has {', '.join(sorted(record)) or 'nothing'}"
        )
    if not isinstance(record[key], kind):
        raise DataError(
            f"sample {name}: '{key}' is a {type(record[key]).__name__}, expected {kind.__name__}"
        )
    return record[key]
