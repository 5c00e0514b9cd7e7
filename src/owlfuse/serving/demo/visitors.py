"""A visitor's conversation with every model at once, and the visitors who are here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from owlfuse.core.errors import DataError, error_summary
from owlfuse.core.terminal import print_exception
from owlfuse.serving.chat import Conversation, sampling_options
from owlfuse.serving.demo import limits
from owlfuse.serving.demo.answering import MODEL_LOCK, AnswerLimits, stream_answer
from owlfuse.serving.demo.models import DemoModel
from owlfuse.serving.demo.pictures import AttentionPicture, attention_pictures, data_uri, fitted

WAITING, ANSWERING, DONE = "waiting", "answering", "done"
NOT_READ = "stopped before its turn came; the model has not read the question"


@dataclass
class Answer:
    """One model's answer to a question, as far as it has come."""

    state: str = WAITING
    text: str = ""
    note: str = ""
    """Time and speed, or why there is no answer."""
    attention: list[AttentionPicture] = field(default_factory=list)
    """Where it looked, of each picture of the conversation."""


@dataclass
class Turn:
    """A question with its pictures, and an answer of each model."""

    question: str
    pictures: list[Image.Image]
    picture_uris: list[str]
    """The pictures, small, as data URIs."""
    answers: list[Answer]
    stop: threading.Event = field(default_factory=threading.Event)
    begun: bool = False
    """Whether a page waits for the answers."""
    sent: float = field(default_factory=time.monotonic)
    """When the question came."""

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return all(answer.state == DONE for answer in self.answers)

    def end(self, note: str) -> None:
        """Closes the answers that are not complete."""
        for answer in self.answers:
            if answer.state != DONE:
                answer.state = DONE
                answer.note = answer.note or note


class Visitor:
    """What one open page has asked and heard.

    Args:
        models: each hears every question, in this order.
    """

    def __init__(self, models: list[DemoModel]) -> None:
        self.models = models
        self.last_seen = time.monotonic()
        self.turns: list[Turn] = []
        self.conversations: list[Conversation] = []
        self.restart()

    def restart(self) -> None:
        """Forgets all; an answer under way is ended."""
        self.halt()  # before its turn is forgotten
        self.turns = []
        self.conversations = [Conversation(model.model, model.processor) for model in self.models]

    @property
    def pending(self) -> Turn | None:
        """The question that is not answered yet."""
        if self.turns and not self.turns[-1].done:
            return self.turns[-1]
        return None

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
        if turn is None or turn.begun:
            return
        if time.monotonic() - turn.sent > limits.UNASKED_SECONDS:
            self.halt()

    def halt(self) -> None:
        """Ends the answer under way after the token that is being made, and those that have not
        begun at once."""
        if turn := self.pending:
            turn.stop.set()
            if not turn.begun:
                turn.end(NOT_READ)

    def begin(self, text: str, paths: list[str], waiting: int) -> None:
        """Takes a question, which `answers` then answers. Raises DataError with a sentence, and
        nothing is taken.

        Args:
            paths: of the uploaded pictures.
            waiting: questions of all visitors whose answers are waited for.
        """
        self.last_seen = time.monotonic()
        # A page that was closed while it sent a question must not block the visitor.
        self.give_up()
        if self.pending:
            raise DataError("the last question is still being answered; wait for it, or press Stop")
        if waiting >= limits.MAX_WAITING:
            raise DataError(
                f"{waiting} questions of others are waiting already; try again in a moment"
            )
        # Any of them would open a placeholder without a picture.
        image_tokens = {model.processor.image_token for model in self.models}
        question = limits.check_question(text, image_tokens)
        pixels = 0
        for turn in self.turns:
            pixels += sum(picture.width * picture.height for picture in turn.pictures)
        pictures = limits.read_pictures(paths, pixels)
        uris = [data_uri(fitted(picture)) for picture in pictures]
        self.turns.append(Turn(question, pictures, uris, [Answer() for _ in self.models]))

    def answers(
        self,
        temperature: float,
        max_new_tokens: int,
        look: bool,
        waiting: int = 0,
    ) -> Iterator[int]:
        """Answers the question that `begin` took, model after model, so that their times can be
        compared. Yields the number of the model whose answer has grown.

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
        # `restart` makes new ones meanwhile, which know nothing of this question.
        conversations = self.conversations
        options = generate_options(temperature, max_new_tokens)
        try:
            yield from QUEUE.wait(turn)
            for number, conversation in enumerate(conversations):
                if turn.stop.is_set():
                    break
                conversation.next_pictures = list(turn.pictures)
                for _ in fill_answer(conversation, turn, turn.answers[number], look, options):
                    yield number
                yield number
        # Also when the page is gone, which closes this generator.
        finally:
            QUEUE.leave(turn)
            # The thread that asks the model goes on until this is set.
            turn.stop.set()
            turn.end(NOT_READ)
            self.last_seen = time.monotonic()


class TurnQueue:
    """The order in which questions are answered: as their pages asked for the answers, one
    question at a time."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.changed = threading.Condition()

    def wait(self, turn: Turn) -> Iterator[int]:
        """Puts a question at the end, and ends when it is its turn, or it is stopped.

        Yields often, so that a page that is gone is noticed.
        """
        with self.changed:
            self.turns.append(turn)
        while not turn.stop.is_set():
            with self.changed:
                if self.changed.wait_for(lambda: self.first() is turn, timeout=0.5):
                    return
            # outside of the lock, which others need meanwhile
            yield 0

    def first(self) -> Turn | None:
        """Return whose turn it is.

        A question that is stopped is passed over, whether its page has left the queue or not.
        """
        for turn in self.turns:
            if not turn.stop.is_set():
                return turn
        return None

    def leave(self, turn: Turn) -> None:
        """Removes a question, wherever in the queue it is."""
        # Another page waits for the change.
        with self.changed:
            self.turns = [queued for queued in self.turns if queued is not turn]
            self.changed.notify_all()


QUEUE = TurnQueue()


def generate_options(temperature: float, max_new_tokens: int) -> dict[str, Any]:
    """Return the arguments of `generate`; numbers outside the page's sliders are brought inside."""
    tokens = int(min(max(max_new_tokens, 1), limits.MAX_NEW_TOKENS))
    return {"max_new_tokens": tokens, **sampling_options(min(float(temperature), 2.0))}


def fill_answer(
    conversation: Conversation,
    turn: Turn,
    answer: Answer,
    look: bool,
    options: dict[str, Any],
) -> Iterator[None]:
    """Fills one answer, and yields wherever it has grown.

    A failure of one model is a note below its question, and the others go on; its traceback is on
    the terminal.
    """
    answer.state = ANSWERING
    answer_limits = AnswerLimits(turn.stop, limits.ANSWER_SECONDS)
    try:
        yield
        for text in stream_answer(conversation, turn.question, answer_limits, **options):
            answer.text = text
            yield
        answer.note = answer_limits.summary(conversation.is_full)
        if look and conversation.pictures and not turn.stop.is_set():
            yield  # the page shows the answer while its pictures are drawn
            # The attention is captured by a change of the model, which others may be using.
            with MODEL_LOCK:
                answer.attention = attention_pictures(conversation)
    except Exception as error:  # of any model, which others share the page with
        answer.note = " · ".join(filter(None, [answer.note, visitor_message(error)]))
    answer.state = DONE


def visitor_message(error: Exception) -> str:
    """Return a sentence for the visitor; the terminal gets the traceback of what is no mistake of
    the visitor's."""
    if isinstance(error, DataError):
        return " ".join(str(error).split())
    print_exception(type(error), error, error.__traceback__)
    return f"the model failed, {error_summary(error)}; the terminal tells more"


class Visitors:
    """Those whose page is open, by the key of their page."""

    def __init__(self, models: list[DemoModel]) -> None:
        self.models = models
        self.by_key: dict[str, Visitor] = {}
        self.lock = threading.Lock()

    def of(self, key: str) -> Visitor:
        """Return the visitor of a page, a new one where there is none.

        Of too many, those who wait for nothing are forgotten.
        """
        with self.lock:
            # Two requests of one page may come at once.
            if key not in self.by_key:
                self.forget_idle(len(self.by_key) + 1 - limits.MAX_VISITORS)
                self.by_key[key] = Visitor(self.models)
            return self.by_key[key]

    def forget_idle(self, count: int) -> None:
        """Forgets so many visitors, those first who were silent longest."""
        for visitor in self.by_key.values():
            visitor.give_up()
        # Who waits for an answer stays, however silent.
        idle = [key for key, visitor in self.by_key.items() if not visitor.pending]
        idle.sort(key=lambda key: self.by_key[key].last_seen)
        for key in idle[: max(0, count)]:
            del self.by_key[key]

    def waiting(self) -> int:
        """Return the questions whose answers are waited for, of all visitors."""
        with self.lock:
            # Pages come and go in other threads meanwhile.
            return sum(visitor.waits for visitor in self.by_key.values())

    def begin(self, key: str, text: str, paths: list[str]) -> Visitor:
        """Takes a question of a page, see `Visitor.begin`."""
        visitor = self.of(key)
        # Outside of the lock: pictures are read here, which takes time.
        visitor.begin(text, paths, self.waiting())
        return visitor

    def answers(
        self,
        key: str,
        temperature: float,
        max_new_tokens: int,
        look: bool,
    ) -> Iterator[int]:
        """Answers the question of a page, see `Visitor.answers`."""
        return self.of(key).answers(temperature, max_new_tokens, look, self.waiting())

    def leave(self, key: str | None) -> None:
        """Forgets one whose page is closed, and ends the answer that nobody reads."""
        with self.lock:
            visitor = self.by_key.pop(key or "", None)
        if visitor:
            visitor.halt()

    def end(self) -> None:
        """Ends all answers."""
        # A copy: pages may come and go meanwhile.
        for visitor in list(self.by_key.values()):
            visitor.halt()
