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
from owlfuse.evaluation.benchmarks.base import Question, Task, require_field

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
    text = IN_TWO.sub(lambda match: f" {' '.join(filter(None, match.groups()))} ", text)
    tokens: list[str] = []
    for piece in text.split():
        # `n't` and `'s` are words, which TOKEN would cut at the apostrophe
        tokens += [piece] if IN_TWO.fullmatch(piece) else TOKEN.findall(piece)
    return " ".join(BRACKETS.get(token, token) for token in tokens if token not in MARKS)


def tokenized(captions: dict[str, list[str]], tokens: str) -> dict[str, list[str]]:
    """Returns all captions by image, tokenised by the tokeniser's name (see `Captions`)."""
    by_image: dict[str, list[Any]] = {}
    if tokens == "words":
        for image, texts in captions.items():
            by_image[image] = [words(text) for text in texts]
        return by_image
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    for image, texts in captions.items():
        # The tokeniser takes a caption a line, and breaks lines at more than a line break.
        by_image[image] = [{"caption": " ".join(text.split())} for text in texts]
    return PTBTokenizer().tokenize(by_image)


def caption_metrics(
    expected: dict[str, list[str]], written: dict[str, list[str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns BLEU-1 to 4, ROUGE-L and CIDEr of tokenised captions by image, and CIDEr of each
    image: COCO's own code (arXiv 1504.00325), as the package pycocoevalcap keeps it. CIDEr's
    document frequencies are those of `expected`."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    # verbose=0: it prints to the terminal otherwise
    bleu, _ = Bleu(4).compute_score(expected, written, verbose=0)
    rouge, _ = Rouge().compute_score(expected, written)
    cider, cider_by_image = Cider().compute_score(expected, written)
    metrics = {f"bleu_{n}": float(score) for n, score in enumerate(bleu, 1)}
    metrics |= {"rouge_l": float(rouge), "cider": float(cider)}
    # CIDEr is given for the images in the order of `expected`
    return metrics, dict(zip(expected, map(float, cider_by_image)))


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
            # before the model is loaded and answers for an hour
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
        """Returns the records of the file."""
        content = read_json(self.file)
        self.captions: dict[int, list[str]] = {}
        annotations = require_field(content, "annotations", list, f"{self.file}")
        for number, annotation in enumerate(annotations):
            where = f"{self.file}: annotation {number + 1}"
            caption = require_field(annotation, "caption", str, where)
            image_id = require_field(annotation, "image_id", int, where)
            self.captions.setdefault(image_id, []).append(caption)
        images = require_field(content, "images", list, f"{self.file}")
        image_ids = set()
        for number, image in enumerate(images):
            if isinstance(image, dict) and "id" in image:
                where = f"{self.file}: {self.record_name(number)}"
                image_ids.add(require_field(image, "id", int, where))
        if missing := [identity for identity in self.captions if identity not in image_ids]:
            raise DataError(
                f"{self.file}: 'images' has no image_id {missing[0]}, which has captions in "
                "'annotations'"
            )
        return images

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the record's question."""
        identity = require_field(record, "id", int, where)
        image = require_field(record, "file_name", str, where)
        if identity in self.captions:
            messages = self.user_turn("", [image])
            yield Question(str(identity), messages, [image], self.captions[identity])

    def score(self, line: dict[str, Any]) -> None:
        """Returns None: a caption's CIDEr depends on those of all pictures."""
        return None

    def metrics(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """Returns `bleu_1` to `bleu_4`, `rouge_l`, `cider`; a line's score becomes its CIDEr."""
        # both by the same tokeniser
        expected = tokenized({line["id"]: line["expected"] for line in lines}, self.tokens)
        written = tokenized({line["id"]: [line["answer"]] for line in lines}, self.tokens)
        metrics, cider_by_image = caption_metrics(expected, written)
        for line in lines:
            line["score"] = cider_by_image[line["id"]]
        return metrics
