"""A visitor's conversation with every model at once, and the visitors who are here."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from owlfuse.chat import Conversation
from owlfuse.demo import limits
from owlfuse.demo.answering import ONE_AT_A_TIME, Watch, answer
from owlfuse.demo.looking import Look, looked_at
from owlfuse.demo.pictures import data_uri, fitted
from owlfuse.demo.talkers import Talker
from owlfuse.types import DataError

WAITING, ANSWERING, DONE = "waiting", "answering", "done"


@dataclass
class Answer:
    """One model's answer to a question, as far as it has come."""

    state: str = WAITING
    text: str = ""
    note: str = ""
    """Time and speed, or why there is no answer."""
    looks: list[Look] = field(default_factory=list)
    """Where it looked, of each picture of the conversation."""


@dataclass
class Turn:
    """A question with its pictures, and an answer of each model."""

    question: str
    pictures: list[Any]
    shown: list[str]
    """The pictures as small data URIs."""
    answers: list[Answer]
    stop: threading.Event = field(default_factory=threading.Event)
    begun: bool = False

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return all(one.state == DONE for one in self.answers)

    def end(self, note: str) -> None:
        """Closes the answers that are not there yet."""
        for one in self.answers:
            if one.state != DONE:
                one.state, one.note = DONE, one.note or note


class Visitor:
    """What one open page has asked and heard.

    Args:
        talkers: the models; each hears every question, in this order.
    """

    def __init__(self, talkers: list[Talker]) -> None:
        self.talkers = talkers
        self.seen = time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Forgets all; an answer under way is ended."""
        self.halt()
        self.turns: list[Turn] = []
        self.conversations = [Conversation(one.model, one.processor) for one in self.talkers]

    @property
    def pending(self) -> Turn | None:
        """The question that is not answered yet."""
        turns = getattr(self, "turns", [])
        return turns[-1] if turns and not turns[-1].done else None

    def halt(self) -> None:
        """Ends the answer under way after the token that is being made, and those that have not begun at once."""
        if turn := self.pending:
            turn.stop.set()
            if not turn.begun:
                turn.end("stopped before its turn came; the model has not read the question")

    def begin(self, text: str, paths: list[str], waiting: int) -> None:
        """Takes a question, which `answers` then answers. Raises DataError with a sentence, and nothing is taken.

        Args:
            paths: of the uploaded pictures.
            waiting: questions of all visitors that are not answered.
        """
        self.seen = time.monotonic()
        if self.pending:
            raise DataError("the last question is still being answered; wait for it, or press Stop")
        if waiting >= limits.MAX_WAITING:
            raise DataError(f"{waiting} questions of others are waiting already; try again in a moment")
        question = limits.check_question(text, {one.processor.image_token for one in self.talkers})
        taken = sum(p.width * p.height for turn in self.turns for p in turn.pictures)
        pictures = limits.read_pictures(paths, taken)
        answers = [Answer() for _ in self.talkers]
        self.turns.append(Turn(question, pictures, [data_uri(fitted(picture)) for picture in pictures], answers))

    def answers(self, temperature: float, max_new_tokens: int, look: bool) -> Iterator[int]:
        """Answers the question that `begin` took, model after model, so that their times can be compared. Gives the number of
        the model whose answer has grown.

        Args:
            look: also draw where each answer looked.
        """
        turn = self.pending
        if turn is None or turn.begun:
            return
        turn.begun = True
        conversations = self.conversations  # `restart` makes new ones
        try:
            for number, conversation in enumerate(conversations):
                if turn.stop.is_set():
                    break
                conversation.options = options_of(temperature, max_new_tokens)
                conversation.shown = list(turn.pictures)
                for _ in answered(conversation, turn, turn.answers[number], look):
                    yield number
                yield number
        finally:
            turn.stop.set()
            turn.end("stopped before its turn came; the model has not read the question")
            self.seen = time.monotonic()


def options_of(temperature: float, max_new_tokens: int) -> dict[str, Any]:
    """What `generate` is given; numbers outside the page's sliders are brought inside."""
    tokens = int(min(max(max_new_tokens, 1), limits.MAX_NEW_TOKENS))
    temperature = min(float(temperature), 2.0)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    return {"max_new_tokens": tokens, **sampling}


def answered(conversation: Conversation, turn: Turn, into: Answer, look: bool) -> Iterator[None]:
    """Fills one answer, and halts wherever it has grown. A failure of one model is told below its question, and the others
    go on; its traceback is on the terminal."""
    into.state = ANSWERING
    watch = Watch(turn.stop, conversation.longest)
    try:
        yield
        for text in answer(conversation, turn.question, watch):
            into.text = text
            yield
        into.note = watch.told()
        if look and conversation.pictures and not turn.stop.is_set():
            yield
            with ONE_AT_A_TIME:
                into.looks = looked_at(conversation)
    except Exception as error:
        into.note = " · ".join(filter(None, [into.note, sentence_of(error)]))
    into.state = DONE


def sentence_of(error: Exception) -> str:
    """What a visitor is told. Of what is no mistake of the visitor's, the terminal gets the traceback."""
    if isinstance(error, DataError):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    first = (str(error).splitlines() or [""])[0][:200]
    return f"the model failed, {type(error).__name__}: {first}; the terminal tells more"


class Visitors:
    """Those whose page is open, by the key of their page."""

    def __init__(self, talkers: list[Talker]) -> None:
        self.talkers = talkers
        self.here: dict[str, Visitor] = {}
        self.lock = threading.Lock()

    def of(self, key: str) -> Visitor:
        """The visitor of a page, a new one where there is none. Of too many, one who waits for nothing is forgotten."""
        with self.lock:
            if key not in self.here:
                idle = sorted((v.seen, k) for k, v in self.here.items() if not v.pending)
                for _, other in idle[: max(0, len(self.here) + 1 - limits.MAX_VISITORS)]:
                    del self.here[other]
                self.here[key] = Visitor(self.talkers)
            return self.here[key]

    def begin(self, key: str, text: str, paths: list[str]) -> Visitor:
        """`Visitor.begin` of a page."""
        visitor = self.of(key)
        with self.lock:
            waiting = sum(other.pending is not None for other in self.here.values())
        visitor.begin(text, paths, waiting)
        return visitor

    def leave(self, key: str | None) -> None:
        """Forgets one whose page is closed, and ends the answer that nobody reads."""
        with self.lock:
            visitor = self.here.pop(key or "", None)
        if visitor:
            visitor.halt()

    def end(self) -> None:
        """Ends all answers."""
        for visitor in list(self.here.values()):
            visitor.halt()
