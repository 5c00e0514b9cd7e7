"""What every benchmark has: its file, its pictures, its prompt, what a wrong record does; and
the questions it asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from owlfuse.core.errors import ConfigError, DataError, one_line
from owlfuse.core.files import KIND_NAMES, expand_files, fingerprint
from owlfuse.data.formats.marks import with_pictures
from owlfuse.data.media.images import MAX_PIXELS
from owlfuse.data.subset import stratified_sample

QUESTION = "{question}"


@dataclass
class Question:
    """One prompt and what is expected of its answer."""

    id: str
    """Unique in the benchmark; predictions are known by it."""
    messages: list[dict[str, Any]]
    """As `Sample` has them, the user's turn last."""
    images: list[str | bytes]
    """In the order of their placeholders: paths below the image root, or encoded bytes."""
    expected: Any
    """What the rule compares with; JSON."""
    group: str = ""
    """What metrics are also told by: a category, a question's type."""
    unit: str = ""
    """Questions of one unit count together, as the rotations of a multiple choice do; by default
    the id."""
    place: str = ""
    """Where its record stands in the file, for messages."""

    @property
    def size(self) -> tuple[int, int]:
        """How long it is, roughly: pictures and characters."""
        parts = [part for message in self.messages for part in message["content"]]
        return len(self.images), sum(len(part.get("text", "")) for part in parts)


@dataclass(kw_only=True)
class Task:
    """A benchmark. Subclasses are dataclasses; their fields are the keys of a yaml, behind those
    here.

    Args:
        file: as it was published.
        image_root: the folder that pictures lie in and cannot leave; by default the file's own.
        prompt: what is asked, `{question}` in it.
        max_new_tokens: of an answer.
        on_error: what a wrong record or picture does: `error` stops, `skip` leaves it out and
            counts it.
        max_skips: with `skip`, how many are left out before it is an error all the same.
        max_pixels: of a picture; one with more is refused before it is decoded.

    Raises:
        ConfigError: a prompt without `{question}`.
    """

    file: Path
    image_root: Path | None = None
    prompt: str = QUESTION
    max_new_tokens: int = 16
    on_error: Literal["error", "skip"] = "error"
    max_skips: int = 100
    max_pixels: int = MAX_PIXELS

    generates: ClassVar[bool] = True
    """Whether answers are written; else the likelihood of those that are there is measured."""
    has_question: ClassVar[bool] = True
    """Whether the file has something that is asked, beside the pictures."""

    @property
    def root(self) -> Path:
        """The folder that pictures lie in."""
        return self.image_root or self.file.parent

    def __post_init__(self) -> None:
        self.file = Path(self.file).expanduser()
        self.image_root = (
            Path(self.image_root).expanduser() if self.image_root else self.file.parent
        )
        if self.has_question and QUESTION not in self.prompt:
            raise ConfigError(
                f"task.prompt: {self.prompt!r} has no {QUESTION}, where the question goes"
            )

    def files(self) -> list[Path]:
        """The files that are read. Raises DataError where one is missing."""
        return expand_files(str(self.file))

    def fingerprint(self) -> str:
        """What the files' contents are known by (see `data.files.fingerprint`)."""
        return fingerprint(self.files())

    def open(self) -> Sequence[Any]:
        """The records by number. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} reads no records")

    def place(self, number: int) -> str:
        """How a message names the record of a number from 0: as one counts in the file, from 1."""
        return f"record {number + 1}"

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """The questions of a record. Raises DataError that begins with `where`."""
        raise NotImplementedError(f"{type(self).__name__} asks nothing")

    def pictures(self, question: Question) -> list[str | bytes]:
        """The pictures of a question, as `open_image` takes them."""
        return question.images

    def score(self, line: dict[str, Any]) -> float | None:
        """What a prediction is worth by itself; None where the rule looks at all of them
        together."""
        raise NotImplementedError(f"{type(self).__name__} has no score")

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """The benchmark's figures of its predictions, at least one, in the order of its
        questions."""
        raise NotImplementedError(f"{type(self).__name__} has no metrics")

    def asked(self, question: str, images: list[str | bytes]) -> list[dict[str, Any]]:
        """The user's turn: the question in the prompt's words, the pictures at its `<image>` marks,
        or first where it has none. Raises DataError for another number of them."""
        return [
            {
                "role": "user",
                "content": with_pictures(self.prompt.replace(QUESTION, question), len(images)),
            }
        ]

    def questions(self) -> tuple[list[Question], list[tuple[str, str]]]:
        """All questions in their own order, and (record, reason) of the records that are left out.

        Raises:
            DataError: a wrong record where the policy is to stop, more than `max_skips`, two
                questions of one id, none at all.
        """
        records = self.open()
        found: dict[str, Question] = {}
        wrong: list[tuple[str, str]] = []
        for number in range(len(records)):
            where = f"{self.file}: {self.place(number)}"
            try:
                for question in list(self.ask(records[number], where)):
                    question.place = self.place(number)
                    if found.setdefault(question.id, question) is not question:
                        raise DataError(
                            f"{where}: a question with the id {question.id} stands before it; ids "
                            "are unique"
                        )
            except DataError as error:
                message = str(error)
                reason = one_line(
                    message if message.startswith(str(self.file)) else f"{where}: {message}"
                )
                if self.on_error == "error":
                    raise DataError(reason) from error
                wrong.append((f"{self.file.name}:{number + 1}", reason))
                self.check_skips(len(wrong), reason)
        if not found:
            raise DataError(
                f"{self.file}: holds no question"
                + (f"; the last record: {wrong[-1][1]}" if wrong else "")
            )
        return list(found.values()), wrong

    def check_skips(self, count: int, reason: str) -> None:
        """Raises DataError where more is left out than may be."""
        if count > self.max_skips:
            raise DataError(
                f"{self.file}: {count} wrong records, and max_skips is {self.max_skips}; the "
                f"last: {reason}"
            )


def spread(questions: list[Question], limit: int | None) -> list[Question]:
    """The questions of at most `limit` units: a sample by a fixed seed, of each group in
    proportion, spread over the pictures."""
    firsts: dict[str, Question] = {}
    for question in questions:
        firsts.setdefault(question.unit or question.id, question)
    if limit is None or limit >= len(firsts):
        return questions
    units = list(firsts)
    groups = [question.group for question in firsts.values()]
    pictures = [
        question.images[0] if question.images else question.id for question in firsts.values()
    ]
    kept = {units[index] for index in stratified_sample(groups, pictures, limit)}
    return [question for question in questions if (question.unit or question.id) in kept]


def value(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A record's field, of the kind that it must have.

    Raises DataError that begins with `where`.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(record, dict):
        raise DataError(f"{where} is a {type(record).__name__}, expected an object with '{key}'")
    if key not in record:
        raise DataError(
            f"{where} has no '{key}'; it has {', '.join(sorted(map(str, record))) or 'nothing'}"
        )
    found = record[key]
    if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
        wanted = " or ".join(KIND_NAMES[one] for one in kinds)
        raise DataError(f"{where}: '{key}' is a {type(found).__name__}, expected {wanted}")
    return found


def texts(record: Any, key: str, where: str) -> list[str]:
    """A field that is a list of texts, at least one. Raises DataError."""
    found = value(record, key, list, where)
    if not found or not all(isinstance(one, str) for one in found):
        raise DataError(f"{where}: '{key}' is {str(found)[:80]}, expected a list of texts")
    return found


def image_file(pattern: str, **facts: Any) -> str:
    """A picture's file of a record, by the task's `image_name`.

    Raises ConfigError for a pattern of other fields.
    """
    try:
        return pattern.format(**facts)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = ", ".join(f"{{{name}}}" for name in facts)
        raise ConfigError(
            f"task.image_name: {pattern!r} cannot be filled in ({error!r}); its fields are {known}"
        ) from error


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def by_group(lines: list[dict[str, Any]], name: str) -> dict[str, float]:
    """The mean score, `name`, and that of each group, `name/<group>`."""
    groups = sorted({line["group"] for line in lines} - {""})
    return {name: mean([line["score"] for line in lines])} | {
        f"{name}/{group}": mean([line["score"] for line in lines if line["group"] == group])
        for group in groups
    }
