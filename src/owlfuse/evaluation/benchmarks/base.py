"""What every benchmark has: its file, its pictures, its prompt, what a wrong record does; and
the questions it asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from owlfuse.core.errors import ConfigError, DataError, one_line
from owlfuse.core.files import KIND_NAMES, expand_files, fingerprint
from owlfuse.core.types import Note
from owlfuse.data.formats.marks import with_pictures
from owlfuse.data.media.images import MAX_PIXELS, check_max_pixels, opened
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
    """What metrics are also reported by: a category, a question's type."""
    unit: str = ""
    """Questions of one unit count together, as the rotations of a multiple choice do; by default
    the id."""
    record_name: str = ""
    """What messages call its record (see `Task.record_name`)."""
    tools: list[Any] | None = None
    """What the chat template is told of tools."""
    has_pages: bool = False
    """Whether one of its pictures, once opened, has several pages, of which the first is shown."""

    @property
    def size(self) -> tuple[int, int]:
        """The number of pictures and of characters, by which questions are sorted."""
        characters = 0
        for message in self.messages:
            characters += sum(len(part.get("text", "")) for part in message["content"])
        return len(self.images), characters


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
        ConfigError: a prompt without `{question}`, a number below the least that makes sense, a
            `max_pixels` that PIL does not open.
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
    file_fields: ClassVar[tuple[str, ...]] = ("file",)
    """Fields that locate the files that are read, whose contents are hashed instead."""
    unhashed_fields: ClassVar[tuple[str, ...]] = ("on_error", "max_skips")
    """Other fields that change no answer."""
    metric: ClassVar[str] = "accuracy"
    """What the mean score is called."""
    ids_repeat: ClassVar[bool] = False
    """Whether records may have one id, as those of LLaVA-665k do: the later ones' get the record's
    number."""
    has_question: ClassVar[bool] = True
    """Whether the file has something that is asked, beside the pictures."""

    @property
    def root(self) -> Path:
        """The folder that pictures lie in."""
        return self.image_root or self.file.parent

    def __post_init__(self) -> None:
        # of the records that were read: (file, record, note, 1)
        self.notes: list[tuple[str, str, Note, int]] = []
        # Hydra gives texts
        for name in self.file_fields:
            setattr(self, name, Path(getattr(self, name)).expanduser())
        self.image_root = (
            Path(self.image_root).expanduser() if self.image_root else self.file.parent
        )
        check_max_pixels(self.max_pixels, "task.max_pixels")
        for name, least in {"max_new_tokens": 1, "max_skips": 0}.items():
            number = getattr(self, name)
            if number < least:
                raise ConfigError(f"task.{name} is {number}, expected at least {least}")
        if self.has_question and QUESTION not in self.prompt:
            raise ConfigError(
                f"task.prompt: {self.prompt!r} has no {QUESTION}, where the question goes"
            )

    def files(self) -> list[Path]:
        """Returns the files that are read. Raises DataError where one is missing."""
        files = []
        for name in self.file_fields:
            files += expand_files(str(getattr(self, name)))
        return files

    def fingerprint(self) -> str:
        """Returns a hash of the files' contents (see `core.files.fingerprint`)."""
        return fingerprint(self.files())

    def open(self) -> Sequence[Any]:
        """Returns the records by number. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} reads no records")

    def record_name(self, number: int) -> str:
        """Returns what messages call the record of a number from 0; people count from 1."""
        return f"record {number + 1}"

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the questions of a record. Raises DataError that begins with `where`."""
        raise NotImplementedError(f"{type(self).__name__} asks nothing")

    def pictures(self, question: Question) -> list[str | bytes]:
        """Returns the pictures of a question, as `open_image` takes them."""
        return question.images

    def question_hash(self, question: Question) -> str | None:
        """Returns a hash of what the model is asked, its pictures' contents included, by which an
        answer of an earlier run is known to be one to this question; None where a picture cannot
        be read."""
        prompt = [question.messages, question.tools, len(question.images)]
        text = json.dumps(prompt, default=str)
        digest = hashlib.sha256(text.encode())
        try:
            for picture in self.pictures(question):
                if isinstance(picture, str):
                    with opened(self.root, picture, question.id) as file:
                        content = file.read()
                else:
                    content = picture
                digest.update(hashlib.sha256(content).digest())
        # whoever opens the picture says what is wrong with it
        except (DataError, OSError, ValueError):
            return None
        return digest.hexdigest()[:16]

    def score(self, line: dict[str, Any]) -> float | None:
        """Returns what a prediction is worth by itself; None where the rule needs all of them
        together."""
        raise NotImplementedError(f"{type(self).__name__} has no score")

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """Returns the benchmark's figures of its predictions, at least one, in the order of its
        questions: the mean score as `metric`, and that of each group as `metric`/<group>."""
        scores: dict[str, list[float]] = {}
        for line in lines:
            if line["group"]:
                scores.setdefault(line["group"], []).append(line["score"])
        metrics = {self.metric: mean([line["score"] for line in lines])}
        for group in sorted(scores):
            metrics[f"{self.metric}/{group}"] = mean(scores[group])
        return metrics

    def user_turn(self, question: str, images: list[str | bytes]) -> list[dict[str, Any]]:
        """Returns the user's turn: the question in the prompt's words, the pictures at its
        `<image>` marks, or first where it has none. Raises DataError for another number of them."""
        # not str.format, to which braces of a question would be fields
        prompt = self.prompt.replace(QUESTION, question)
        return [{"role": "user", "content": with_pictures(prompt, len(images))}]

    def questions(self) -> tuple[list[Question], list[tuple[str, str]]]:
        """Returns all questions in their own order, and (record, reason) of the records that are
        left out.

        Raises:
            DataError: a wrong record where the policy is to stop, more than `max_skips`, two
                questions of one id, none at all.
        """
        records = self.open()
        questions: dict[str, Question] = {}
        skipped: list[tuple[str, str]] = []
        for number in range(len(records)):
            where = f"{self.file}: {self.record_name(number)}"
            try:
                # a list: no question of a record counts where a later one of it is wrong
                for question in list(self.ask(records[number], where)):
                    question.record_name = self.record_name(number)
                    if self.ids_repeat and question.id in questions:
                        question.id = f"{question.id}@{number + 1}"
                    if questions.setdefault(question.id, question) is not question:
                        raise DataError(
                            f"{where}: a question with the id {question.id} stands before it; ids "
                            "are unique"
                        )
            except DataError as error:
                message = str(error)
                # an error of another file, as of annotations, does not say which record it is about
                if not message.startswith(str(self.file)):
                    message = f"{where}: {message}"
                reason = one_line(message)
                if self.on_error == "error":
                    raise DataError(reason) from error
                skipped.append((f"{self.file.name}:{number + 1}", reason))
                self.check_skips(len(skipped), reason)
        if not questions:
            last_reason = f"; the last record: {skipped[-1][1]}" if skipped else ""
            raise DataError(f"{self.file}: holds no question{last_reason}")
        return list(questions.values()), skipped

    def check_skips(self, count: int, reason: str) -> None:
        """Raises DataError where more is left out than may be."""
        if count > self.max_skips:
            raise DataError(
                f"{self.file}: {count} wrong records, and max_skips is {self.max_skips}; the "
                f"last: {reason}"
            )


def sample_units(questions: list[Question], limit: int | None) -> list[Question]:
    """Returns the questions of at most `limit` units: a sample by a fixed seed, of each group in
    proportion, spread over the pictures."""
    first_of_unit: dict[str, Question] = {}
    for question in questions:
        # a unit is sampled as a whole, since its score needs all its questions
        first_of_unit.setdefault(question.unit or question.id, question)
    if limit is None or limit >= len(first_of_unit):
        return questions
    units, groups, pictures = [], [], []
    for unit, question in first_of_unit.items():
        units.append(unit)
        groups.append(question.group)
        pictures.append(question.images[-1] if question.images else question.id)
    sampled = {units[index] for index in stratified_sample(groups, pictures, limit)}
    return [question for question in questions if (question.unit or question.id) in sampled]


def require_field(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Returns a record's field, of the kind that it must have.

    Raises DataError that begins with `where`.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(record, dict):
        raise DataError(f"{where} is a {type(record).__name__}, expected an object with '{key}'")
    if key not in record:
        raise DataError(
            f"{where} has no '{key}'; it has {', '.join(sorted(map(str, record))) or 'nothing'}"
        )
    field = record[key]
    # True is an int to Python, and none to who wrote the file
    if not isinstance(field, kinds) or (isinstance(field, bool) and bool not in kinds):
        expected = " or ".join(KIND_NAMES[kind] for kind in kinds)
        raise DataError(f"{where}: '{key}' is a {type(field).__name__}, expected {expected}")
    return field


def require_texts(record: Any, key: str, where: str) -> list[str]:
    """Returns a field that is a list of texts, at least one. Raises DataError."""
    field = require_field(record, key, list, where)
    if not field or not all(isinstance(text, str) for text in field):
        raise DataError(f"{where}: '{key}' is {str(field)[:80]}, expected a list of texts")
    return field


def image_file(pattern: str, **facts: Any) -> str:
    """Returns a picture's file of a record, by the task's `image_name`.

    Raises ConfigError for a pattern of other fields.
    """
    try:
        return pattern.format(**facts)
    # all that str.format raises for a pattern of a user's
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        fields = ", ".join(f"{{{name}}}" for name in facts)
        raise ConfigError(
            f"task.image_name: {pattern!r} cannot be filled in ({error!r}); its fields are {fields}"
        ) from error


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean."""
    return sum(values) / len(values)
