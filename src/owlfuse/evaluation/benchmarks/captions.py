"""Captions in COCO's format: BLEU, ROUGE-L and CIDEr."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.files import read_json
from owlfuse.core.packages import MissingPackage
from owlfuse.evaluation.benchmarks.base import Question, Task, value

MARKS = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
"""What is no word, after PTBTokenizer's list of coco-caption; its brackets, in lower case by
then, stay words there as here."""
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATION = r"\b(?:mr|mrs|ms|dr|st|jr|sr|vs)\.|\b(?:[a-z]\.){2,}"
TOKEN = re.compile(rf"{ABBREVIATION}|\.\.\.|--|\w+(?:[-./:,]\w+)*|[^\w\s]")
IN_TWO = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))\b|\b(?:(can)(not)|(gon)(na)|(got)(ta)|(wan)(na))\b")


def words(caption: str) -> str:
    """A caption in lower case, its words with a space between and without punctuation, near to what
    Stanford's PTBTokenizer makes of plain English: contractions in two (`do n't`, `man 's`, `can
    not`), hyphenated words and numbers whole, the periods of abbreviations kept."""
    text = caption.lower().replace("\u2019", "'").replace("\n", " ")
    kept: list[str] = []
    for piece in IN_TWO.sub(
        lambda found: f" {' '.join(filter(None, found.groups()))} ", text
    ).split():
        kept += [piece] if IN_TWO.fullmatch(piece) else TOKEN.findall(piece)
    return " ".join(BRACKETS.get(token, token) for token in kept if token not in MARKS)


def tokenized(captions: dict[str, list[str]], tokens: str) -> dict[str, list[str]]:
    """All captions by the tokeniser's name, see `Captions`."""
    if tokens == "words":
        return {key: [words(one) for one in mine] for key, mine in captions.items()}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize(
        {key: [{"caption": one} for one in mine] for key, mine in captions.items()}
    )


def caption_metrics(
    expected: dict[str, list[str]], found: dict[str, list[str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """BLEU-1 to 4, ROUGE-L and CIDEr of tokenised captions by image, and CIDEr of each image:
    COCO's own code (arXiv 1504.00325), as the package pycocoevalcap keeps it. CIDEr's document
    frequencies are those of `expected`."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(expected, found, verbose=0)
    rouge, _ = Rouge().compute_score(expected, found)
    cider, each = Cider().compute_score(expected, found)
    names = {f"bleu_{n}": float(score) for n, score in enumerate(bleu, 1)}
    return {**names, "rouge_l": float(rouge), "cider": float(cider)}, dict(
        zip(expected, map(float, each))
    )


@dataclass(kw_only=True)
class Captions(Task):
    """Captions of pictures: captions_val2014.json of COCO, or Flickr30k and NoCaps in its format. A
    caption for each picture that has expected ones.

    Args:
        tokens: `words`: by `captions.words`, which needs nothing; `ptb`: by Stanford's PTBTokenizer
            as COCO's server does, which needs Java and its jar. Figures of the two differ a little.

    Raises:
        ConfigError: `ptb` without a Java.
        MissingPackage: pycocoevalcap is not installed.
    """

    tokens: Literal["words", "ptb"] = "words"

    has_question: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            import pycocoevalcap.cider.cider  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingPackage(
                "captions are scored by pycocoevalcap; pip install 'owlfuse[eval]'"
            ) from error
        if self.tokens == "ptb" and shutil.which("java") is None:
            raise ConfigError(
                "task.tokens: ptb needs Java, and there is no java on the PATH; install it, or "
                "task.tokens=words"
            )

    def open(self) -> Sequence[Any]:
        """See `Task`."""
        content = read_json(self.file, dict)
        self.captions: dict[int, list[str]] = {}
        for number, annotation in enumerate(value(content, "annotations", list, f"{self.file}")):
            where = f"{self.file}: annotation {number + 1}"
            caption = value(annotation, "caption", str, where)
            self.captions.setdefault(value(annotation, "image_id", int, where), []).append(caption)
        images = value(content, "images", list, f"{self.file}")
        known = {image.get("id") for image in images if isinstance(image, dict)}
        if missing := [identity for identity in self.captions if identity not in known]:
            raise DataError(
                f"{self.file}: 'images' has no image_id {missing[0]}, which has captions in "
                "'annotations'"
            )
        return images

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """See `Task`."""
        identity, image = value(record, "id", int, where), value(record, "file_name", str, where)
        if identity in self.captions:
            yield Question(str(identity), self.asked("", [image]), [image], self.captions[identity])

    def score(self, line: dict[str, Any]) -> None:
        """None: a caption's CIDEr depends on those of all pictures."""
        return None

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """`bleu_1` to `bleu_4`, `rouge_l`, `cider`; a line's score becomes its CIDEr."""
        expected = tokenized({line["id"]: line["expected"] for line in lines}, self.tokens)
        found = tokenized({line["id"]: [line["answer"]] for line in lines}, self.tokens)
        metrics, each = caption_metrics(expected, found)
        for line in lines:
            line["score"] = each[line["id"]]
        return metrics
