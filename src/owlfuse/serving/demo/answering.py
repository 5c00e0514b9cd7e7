"""One answer of one model, piece by piece, from a thread of its own. T text positions."""

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

BETWEEN = 0.08
"""Seconds between two looks of the page at a growing answer."""
ONE_AT_A_TIME = threading.Lock()
"""The models share one processor or GPU, and their times are compared: no two answers are made
at once."""


class Watch(StoppingCriteria):
    """Counts an answer's tokens, and ends it early where that is asked or the model's positions are
    used up.

    Args:
        stop: ends the answer when it is set.
        longest: positions (T) that the model knows, prompt and answer together; None: no limit is
            known.
        seconds: that the answer may take; None: any.
    """

    def __init__(
        self, stop: threading.Event, longest: int | None, seconds: float | None = None
    ) -> None:
        self.stop = stop
        self.longest = longest
        self.seconds = seconds
        self.late = False
        self.tokens = 0
        self.full = False
        self.begun = self.first = self.last = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """See `StoppingCriteria`; called after each token."""
        self.last = time.perf_counter()
        if not self.tokens:
            self.first = self.last
        self.tokens += 1
        self.full = self.longest is not None and input_ids.shape[1] >= self.longest
        self.late = self.seconds is not None and self.last - self.begun > self.seconds
        ends = self.full or self.late or self.stop.is_set()
        return torch.full((len(input_ids),), ends, device=input_ids.device)

    def told(self) -> str:
        """Time and speed, for below the answer."""
        seconds = self.last - self.begun
        after = f" (first {self.first - self.begun:.2f} s)" if self.tokens > 1 else ""
        rate = f" · {self.tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
        ended = " · stopped" if self.stop.is_set() else ""
        ended += " · the model's longest text is reached" if self.full else ""
        ended += f" · {self.seconds:.0f} s are over, the most for one answer" if self.late else ""
        return (
            f"{self.tokens} {'token' if self.tokens == 1 else 'tokens'} in {seconds:.2f} "
            f"s{after}{rate}{ended}"
        )


def answer(conversation: Conversation, question: str, watch: Watch) -> Iterator[str]:
    """The answer so far, again and again, and at last the whole of it.

    Abandoned half-way (a visitor leaves, the page is closed), it goes on until `watch.stop` is set.

    Raises:
        Exception: what asking raised, in the thread that reads.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()

    def ask() -> None:
        try:
            with ONE_AT_A_TIME:
                watch.begun = time.perf_counter()
                conversation.ask(question, pieces.put)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    conversation.options["stopping_criteria"] = StoppingCriteriaList([watch])
    thread = threading.Thread(target=ask, name="answer", daemon=True)
    thread.start()
    text, shown = "", 0.0
    while True:
        piece = pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            thread.join()
            yield text
            return
        text += piece
        if time.perf_counter() - shown >= BETWEEN:
            shown = time.perf_counter()
            yield text
