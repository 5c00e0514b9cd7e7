"""A visitor's conversation with every model at once, and the visitors who are here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from owlfuse.core.errors import DataError
from owlfuse.core.terminal import print_exception
from owlfuse.serving.chat import Conversation
from owlfuse.serving.demo import limits
from owlfuse.serving.demo.answering import ONE_AT_A_TIME, Watch, answer
from owlfuse.serving.demo.pictures import Look, data_uri, fitted, looked_at
from owlfuse.serving.demo.talkers import Talker

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
    """Whether a page waits for the answers."""
    sent: float = field(default_factory=time.monotonic)
    """When the question came."""

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
        self.address = ""
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

    @property
    def waits(self) -> bool:
        """Whether a page waits for answers.

        A question alone does not count: whoever sent it may never ask for them.
        """
        turn = self.pending
        return turn is not None and turn.begun

    def give_up(self) -> None:
        """Ends a question whose answers no page has asked for."""
        turn = self.pending
        if (
            turn is not None
            and not turn.begun
            and time.monotonic() - turn.sent > limits.UNASKED_SECONDS
        ):
            self.halt()

    def halt(self) -> None:
        """Ends the answer under way after the token that is being made, and those that have not
        begun at once."""
        if turn := self.pending:
            turn.stop.set()
            if not turn.begun:
                turn.end("stopped before its turn came; the model has not read the question")

    def begin(self, text: str, paths: list[str], waiting: int) -> None:
        """Takes a question, which `answers` then answers. Raises DataError with a sentence, and
        nothing is taken.

        Args:
            paths: of the uploaded pictures.
            waiting: questions of all visitors whose answers are waited for.
        """
        self.seen = time.monotonic()
        self.give_up()
        if self.pending:
            raise DataError("the last question is still being answered; wait for it, or press Stop")
        if waiting >= limits.MAX_WAITING:
            raise DataError(
                f"{waiting} questions of others are waiting already; try again in a moment"
            )
        question = limits.check_question(text, {one.processor.image_token for one in self.talkers})
        taken = sum(p.width * p.height for turn in self.turns for p in turn.pictures)
        pictures = limits.read_pictures(paths, taken)
        answers = [Answer() for _ in self.talkers]
        self.turns.append(
            Turn(question, pictures, [data_uri(fitted(picture)) for picture in pictures], answers)
        )

    def answers(
        self, temperature: float, max_new_tokens: int, look: bool, waiting: int = 0
    ) -> Iterator[int]:
        """Answers the question that `begin` took, model after model, so that their times can be
        compared. Gives the number of the model whose answer has grown.

        Args:
            look: also draw where each answer looked.
            waiting: questions of all visitors whose answers are waited for.
        """
        turn = self.pending
        if turn is None or turn.begun:
            return
        if waiting >= limits.MAX_WAITING:
            turn.stop.set()
            turn.end(f"{waiting} questions of others are waiting already; ask again in a moment")
            return
        turn.begun = True
        conversations = self.conversations  # `restart` makes new ones
        try:
            yield from wait_for_turn(turn)
            for number, conversation in enumerate(conversations):
                if turn.stop.is_set():
                    break
                conversation.options = options_of(temperature, max_new_tokens)
                conversation.shown = list(turn.pictures)
                for _ in answered(conversation, turn, turn.answers[number], look):
                    yield number
                yield number
        finally:
            TURNS.leave(turn)
            turn.stop.set()
            turn.end("stopped before its turn came; the model has not read the question")
            self.seen = time.monotonic()


class Turns:
    """The order in which questions are answered: as their pages asked for the answers, one
    question at a time."""

    def __init__(self) -> None:
        self.queue: list[Turn] = []
        self.changed = threading.Condition()

    def join(self, turn: Turn) -> None:
        """Goes to the end of the queue."""
        with self.changed:
            self.queue.append(turn)

    def is_first(self, turn: Turn, seconds: float) -> bool:
        """Waits until it is this question's turn, for so many seconds at most; says whether it
        is."""
        with self.changed:
            return self.changed.wait_for(lambda: self.first() is turn, seconds)

    def first(self) -> Turn | None:
        """Whose turn it is.

        A question that is stopped is passed over, whether its page has left the queue or not.
        """
        return next((turn for turn in self.queue if not turn.stop.is_set()), None)

    def leave(self, turn: Turn) -> None:
        """Leaves the queue, wherever in it the question is."""
        with self.changed:
            self.queue = [other for other in self.queue if other is not turn]
            self.changed.notify_all()


TURNS = Turns()


def wait_for_turn(turn: Turn) -> Iterator[int]:
    """Ends when it is this question's turn, or it is stopped.

    Halts often, so that a page that is gone is noticed.
    """
    TURNS.join(turn)
    while not turn.stop.is_set() and not TURNS.is_first(turn, seconds=0.5):
        yield 0


def options_of(temperature: float, max_new_tokens: int) -> dict[str, Any]:
    """What `generate` is given; numbers outside the page's sliders are brought inside."""
    tokens = int(min(max(max_new_tokens, 1), limits.MAX_NEW_TOKENS))
    temperature = min(float(temperature), 2.0)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    return {"max_new_tokens": tokens, **sampling}


def answered(conversation: Conversation, turn: Turn, into: Answer, look: bool) -> Iterator[None]:
    """Fills one answer, and halts wherever it has grown. A failure of one model is told below its
    question, and the others go on; its traceback is on the terminal."""
    into.state = ANSWERING
    watch = Watch(turn.stop, conversation.longest, limits.ANSWER_SECONDS)
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
    """What a visitor is told.

    Of what is no mistake of the visitor's, the terminal gets the traceback.
    """
    if isinstance(error, DataError):
        return " ".join(str(error).split())
    print_exception(type(error), error, error.__traceback__)
    first = (str(error).splitlines() or [""])[0][:200]
    return f"the model failed, {type(error).__name__}: {first}; the terminal tells more"


class Visitors:
    """Those whose page is open, by the key of their page."""

    def __init__(self, talkers: list[Talker]) -> None:
        self.talkers = talkers
        self.here: dict[str, Visitor] = {}
        self.lock = threading.Lock()

    def of(self, key: str) -> Visitor:
        """The visitor of a page, a new one where there is none.

        Of too many, one who waits for nothing is forgotten.
        """
        with self.lock:
            if key not in self.here:
                for visitor in self.here.values():
                    visitor.give_up()
                idle = sorted((v.seen, k) for k, v in self.here.items() if not v.pending)
                for _, other in idle[: max(0, len(self.here) + 1 - limits.MAX_VISITORS)]:
                    del self.here[other]
                self.here[key] = Visitor(self.talkers)
            return self.here[key]

    def waiting(self, address: str | None = None) -> int:
        """Questions whose answers are waited for, of all visitors or of those at one address."""
        with self.lock:
            return sum(
                other.waits for other in self.here.values() if address in (None, other.address)
            )

    def begin(self, key: str, text: str, paths: list[str], address: str = "") -> Visitor:
        """`Visitor.begin` of a page.

        Args:
            address: of the page's machine; empty for this one, whose visitors are not told apart.
        """
        visitor = self.of(key)
        visitor.address = address
        if address and self.waiting(address) >= limits.MAX_OF_ONE_ADDRESS:
            raise DataError(
                f"{limits.MAX_OF_ONE_ADDRESS} questions from your address are waiting already; "
                "try again in a moment"
            )
        visitor.begin(text, paths, self.waiting())
        return visitor

    def answers(
        self, key: str, temperature: float, max_new_tokens: int, look: bool
    ) -> Iterator[int]:
        """`Visitor.answers` of a page."""
        return self.of(key).answers(temperature, max_new_tokens, look, self.waiting())

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
