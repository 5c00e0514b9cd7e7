"""VQAv2 and TextVQA: the agreement with ten people's answers, each benchmark by its own
normalisation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from owlfuse.core.errors import DataError
from owlfuse.core.files import read_json
from owlfuse.evaluation.benchmarks.base import (
    Question,
    Task,
    image_file,
    require_field,
    require_texts,
)

CONTRACTED = """
aren't ain't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in CONTRACTED.split()
    for index, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction that lacks one apostrophe -> with it; the last is the official table's own slip,
kept."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# the official pattern means to spare one after a digit too, and does not
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")


def without_punctuation(text: str) -> str:
    """Each mark goes where it stands beside a space anywhere in the text, or where a number has a
    comma; else it becomes a space. Periods go unless a digit follows (`processPunctuation` of VQA's
    vqaEval.py)."""
    # of the whole text, as the official script does: 1,000 becomes 1000
    numeric = COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or numeric else " ")
    return PERIOD.sub("", out)


def without_articles(text: str) -> str:
    """Lower case, number words as digits, articles dropped, apostrophes of contractions put back
    (`processDigitArticle`)."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalized(text: str) -> str:
    """VQA's normalisation of an answer."""
    return without_articles(without_punctuation(text))


def on_one_line(text: str) -> str:
    """Line breaks and tabs as spaces, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def agreement(answer: str, answers: Sequence[str]) -> float:
    """min(people who gave the answer / 3, 1), averaged over all ways to leave one person out
    (visualqa.org/evaluation)."""
    agrees = [text == answer for text in answers]
    return sum(min((sum(agrees) - left_out) / 3, 1.0) for left_out in agrees) / len(agrees)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy of an answer, 0 to 1 (github.com/GT-Vision-Lab/VQA, vqaEval.py). Nothing is
    normalised where all people gave the same answer, as there."""
    # before the comparison, as the script does
    answer, answers = on_one_line(answer), [on_one_line(text) for text in answers]
    # as the official script does, an oddity that scores depend on
    if len(set(answers)) > 1:
        answer, answers = normalized(answer), [normalized(text) for text in answers]
    return agreement(answer, answers)


def textvqa_normalized(text: str) -> str:
    """TextVQA's normalisation (`EvalAIAnswerProcessor` of facebookresearch/mmf): commas and
    question marks are dropped and the possessive set apart before VQA's own."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalized(on_one_line(text))


def textvqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy of an answer, 0 to 1 (`TextVQAAccuracyEvaluator` of
    facebookresearch/mmf)."""
    return agreement(textvqa_normalized(answer), [textvqa_normalized(text) for text in answers])


@dataclass(kw_only=True)
class VQAv2(Task):
    """VQA v2.0 (arXiv 1612.00837), balanced real images:
    v2_OpenEnded_mscoco_<subset>_questions.json and, as `annotations`,
    v2_mscoco_<subset>_annotations.json. `accuracy` is also by the type of answer: yes/no, number,
    other.

    Args:
        image_name: a picture's file, from the questions' `{subset}` and `{image_id}`.
    """

    file_fields: ClassVar = ("file", "annotations")

    annotations: Path
    image_name: str = "COCO_{subset}_{image_id:012d}.jpg"

    def open(self) -> Sequence[Any]:
        """Returns the records of the file."""
        content = read_json(self.file)
        self.subset = require_field(content, "data_subtype", str, f"{self.file}")
        annotations = require_field(
            read_json(self.annotations),
            "annotations",
            list,
            f"{self.annotations}",
        )
        # by question: both files are in different orders
        self.answers = {}
        for number, annotation in enumerate(annotations):
            where = f"{self.annotations}: record {number + 1}"
            identity = require_field(annotation, "question_id", int, where)
            self.answers[identity] = (number, annotation)
        return require_field(content, "questions", list, f"{self.file}")

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the record's question."""
        identity = require_field(record, "question_id", int, where)
        if identity not in self.answers:
            raise DataError(
                f"{where}: {self.annotations} has no answers for question_id {identity}; are both "
                "of one split?"
            )
        number, annotation = self.answers[identity]
        annotation_name = f"{self.annotations}: record {number + 1}"
        answers = []
        for item in require_field(annotation, "answers", list, annotation_name):
            answers.append(require_field(item, "answer", str, f"{annotation_name}: an answer"))
        check_ten(answers, annotation_name)
        image_id = require_field(record, "image_id", int, where)
        image = image_file(self.image_name, subset=self.subset, image_id=image_id)
        messages = self.user_turn(require_field(record, "question", str, where), [image])
        answer_type = require_field(annotation, "answer_type", str, annotation_name)
        yield Question(str(identity), messages, [image], answers, answer_type)

    def score(self, line: dict[str, Any]) -> float:
        """Returns the score of one answer."""
        return vqa_accuracy(line["answer"], line["expected"])


@dataclass(kw_only=True)
class TextVQA(Task):
    """TextVQA (arXiv 1904.08920): TextVQA_0.5.1_val.json. No OCR tokens are given with the
    question.

    Args:
        image_name: a picture's file, from the record's `{image_id}`.
    """

    image_name: str = "{image_id}.jpg"

    def open(self) -> Sequence[Any]:
        """Returns the records of the file."""
        return require_field(read_json(self.file), "data", list, f"{self.file}")

    def ask(self, record: Any, where: str) -> Iterator[Question]:
        """Yields the record's question."""
        identity = str(require_field(record, "question_id", (int, str), where))
        answers = require_texts(record, "answers", where)
        check_ten(answers, where)
        image = image_file(self.image_name, image_id=require_field(record, "image_id", str, where))
        messages = self.user_turn(require_field(record, "question", str, where), [image])
        yield Question(identity, messages, [image], answers)

    def score(self, line: dict[str, Any]) -> float:
        """Returns the score of one answer."""
        return textvqa_accuracy(line["answer"], line["expected"])


def check_ten(answers: list[str], where: str) -> None:
    """Raises DataError for another number of people than ten, which the rule counts with."""
    if len(answers) != 10:
        raise DataError(f"{where}: 'answers' has {len(answers)} answers, expected ten people's")
