"""One answer of one model, piece by piece, from a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from owlfuse.serving.chat import Conversation

REFRESH_SECONDS = 0.08
"""Between two states of a growing answer that the page shows."""
MODEL_LOCK = threading.Lock()
"""The models share one processor or GPU, and their times are compared: no two answers are made
at once."""


class AnswerLimits(StoppingCriteria):
    """Counts an answer's tokens, and ends it early where that is requested or its time is over.

    Args:
        stop: ends the answer when it is set.
        seconds: that the answer may take.
    """

    def __init__(self, stop: threading.Event, seconds: float) -> None:
        self.stop = stop
        self.seconds = seconds
        self.late = False
        self.tokens = 0
        self.begun = self.first_token = self.last_token = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether the answer ends. See `StoppingCriteria`; called after each token."""
        self.last_token = time.perf_counter()
        # The first token includes the reading of the prompt.
        if not self.tokens:
            self.first_token = self.last_token
        self.tokens += 1
        self.late = self.last_token - self.begun > self.seconds
        ends = self.late or self.stop.is_set()
        return torch.full((len(input_ids),), ends, device=input_ids.device)

    def summary(self, is_full: bool) -> str:
        """Return time and speed, for below the answer.

        Args:
            is_full: whether the answer ended where the model has no more positions.
        """
        seconds = self.last_token - self.begun
        unit = "token" if self.tokens == 1 else "tokens"
        text = f"{self.tokens} {unit} in {seconds:.2f} s"
        if self.tokens > 1:
            text += f" (first {self.first_token - self.begun:.2f} s)"
        if seconds > 0:
            text += f" · {self.tokens / seconds:.1f} tokens/s"
        if self.stop.is_set():
            text += " · stopped"
        if is_full:
            text += " · the model's longest text is reached"
        if self.late:
            text += f" · {self.seconds:.0f} s are over, the most for one answer"
        return text


def stream_answer(
    conversation: Conversation, question: str, limits: AnswerLimits, **options: Any
) -> Iterator[str]:
    """Yields the answer so far, again and again, and at last all of it.

    Abandoned half-way (a visitor leaves, the page is closed), it goes on until `limits.stop` is
    set.

    Args:
        options: keyword arguments of `generate`.

    Raises:
        Exception: what asking raised, in the thread that reads.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    criteria = StoppingCriteriaList([limits])

    def ask() -> None:
        try:
            with MODEL_LOCK:
                limits.begun = time.perf_counter()  # the time of waiting is not the model's
                conversation.ask(question, pieces.put, stopping_criteria=criteria, **options)
            pieces.put(None)
        # Whatever ends the thread: the reader would wait for ever.
        except BaseException as error:
            pieces.put(error)

    thread = threading.Thread(target=ask, name="answer", daemon=True)
    thread.start()
    text = ""
    refreshed = 0.0
    while True:
        piece = pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            thread.join()
            yield text
            return
        text += piece
        # Each state is sent whole: one for every token would be too many.
        if time.perf_counter() - refreshed >= REFRESH_SECONDS:
            refreshed = time.perf_counter()
            yield text
