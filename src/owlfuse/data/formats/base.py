"""The base class of all sources: a file of records, its share of the mixture, and the policy for
samples that are wrong."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from owlfuse.core.errors import DataError
from owlfuse.core.files import expand_files, fingerprint
from owlfuse.core.packages import packaged
from owlfuse.core.types import JsonObject, Note, Sample, without_keys
from owlfuse.data.formats.records import has_chat, read_chat
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

    tile: ClassVar[float] = 0.0  # a field of sources whose pictures may be tiled
    video: ClassVar[VideoSampling | None] = None

    def __post_init__(self) -> None:
        self.file = Path(packaged(str(self.file))).expanduser()
        self.image_root = (
            Path(self.image_root).expanduser() if self.image_root else self.file.parent
        )
        # ChatData sets the name that the configuration gives; alone, a source is known by its file.
        self.name = self.file.stem

    @property
    def root(self) -> Path:
        """The folder that image paths start from."""
        return self.image_root or self.file.parent

    @cached_property
    def records(self) -> Sequence[Any]:
        """The file's records, opened at first use: data that `prepare` writes exist by then."""
        records = self.open()
        if not len(records):
            raise DataError(f"{self.file}: holds no record")
        return records

    def open(self) -> Sequence[Any]:
        """Return the records by number.

        Raises DataError; a record that is wrong by itself raises when it is asked for.
        """
        # A file of one object may be a single record, which only its keys tell from a wrapped list.
        return open_records(self.file, has_chat)

    def files(self) -> list[Path]:
        """Return the files that the source reads, in order. Raises DataError where one is
        missing."""
        return expand_files(str(self.file))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at `index`.

        Raises DataError, naming source and sample, where the record is not what it should be.
        """
        record = self.records[index]
        try:
            if not isinstance(record, dict):
                raise DataError(
                    f"{self.name}: a record is a {type(record).__name__}, expected an object"
                )
            sample = self.sample(record, f"{self.name}:{identity_of(record.get('id'), index)}")
        except DataError as error:
            raise self.with_location(error, index) from None
        # Only a file that is parsed as a whole has keys around its list of records.
        if isinstance(self.records, Records):
            for key in self.records.unused:
                sample.notes.append(Note("unused", f"the file's '{key}' beside its records"))
        return sample

    def location(self, index: int) -> str:
        """Return the line or the record's number, from 1, that the record at `index` has in its
        file."""
        if isinstance(self.records, JsonLines):
            return f"line {self.records.lines.number(index)} of {self.file.name}"
        return f"record {index + 1} of {self.file.name}"

    def with_location(self, error: DataError, index: int) -> DataError:
        """Return an error of the sample at `index` whose message says where its record is."""
        # An error of opening the file is of no record.
        if "records" not in vars(self):
            return error
        location = self.location(index)
        if location not in str(error) and self.file.name not in str(error):
            error.args = (f"{error} ({location})",)
        return error

    def first_record(self, index: int) -> int:
        """Return the index of the first record of the sample at `index`."""
        return index

    def ids(self, indices: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Yield the index and the id of each record of some samples, without wrong records; a
        record without an id goes by its index."""
        for index in indices:
            # A wrong record has no id to compare; it is reported when it is drawn.
            with suppress(DataError):
                record = self.records[index]
                if isinstance(record, dict):
                    yield index, identity_of(record.get("id"), index)

    def sample(self, record: JsonObject, name: str) -> Sample:
        """Return the record as a sample called `name`."""
        raise NotImplementedError(f"{type(self).__name__} reads no records")

    def fingerprint(self) -> str:
        """Return a hash of the content: SHA-256, above 1 GB of sizes and ends (see
        `files.fingerprint`)."""
        return fingerprint(self.files())

    def __getstate__(self) -> JsonObject:
        # Open files and parsed records do not travel to data workers, each of which opens its own.
        return without_keys(vars(self), ["records"])


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

    # a VideoSampling after __post_init__
    video: VideoSampling | JsonObject | None = None  # type: ignore[misc, assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.video = None if self.video is None else VideoSampling.of(self.video)
        except DataError as error:
            raise DataError(f"{self.file}: {error}") from None


class ChatSource(VideoSource):
    """A source whose records hold a chat each, as `records` tells."""

    chat_key: ClassVar[str] = "conversations"
    """Where the format has its turns."""

    def sample(self, record: JsonObject, name: str) -> Sample:
        """See `Source`."""
        return read_chat(record, name, self.name, self.chat_key)


def identity_of(identity: Any, index: int) -> str:
    """Return a record's id as a text, or where it has none or an empty one, its index."""
    return str(index if identity in (None, "") else identity)


def field(record: JsonObject, key: str, kind: type, name: str) -> Any:
    """Return a record's field. Raises DataError where it is not there or of another kind."""
    if key not in record:
        raise DataError(
            f"sample {name} has no '{key}'; it has {', '.join(sorted(record)) or 'nothing'}"
        )
    if not isinstance(record[key], kind):
        raise DataError(
            f"sample {name}: '{key}' is a {type(record[key]).__name__}, expected {kind.__name__}"
        )
    return record[key]
