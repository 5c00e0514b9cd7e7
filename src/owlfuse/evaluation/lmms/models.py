"""The two model classes that lmms-eval makes, `owlfuse` and `owlfuse_chat`."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger

from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.progress import Progress
from owlfuse.evaluation.benchmarks.answering import Talker
from owlfuse.evaluation.benchmarks.options import check_model
from owlfuse.evaluation.lmms.answers import Options, Request, answer, batches
from owlfuse.evaluation.lmms.likelihoods import Likelihoods
from owlfuse.evaluation.lmms.prompts import Opener, Prompt

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

DTYPES = ("float32", "saved", "bfloat16", "float16")
ARGUMENTS = ("pretrained", "batch_size", "device", "dtype", "frames")


@contextmanager
def told() -> Iterator[None]:
    """What is wrong with the user's words or data ends the program with a line and exit code 1.
    lmms-eval would print a traceback and end with 0."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise SystemExit(
            "owlfuse: error: a batch is more than the GPU's memory holds; take a smaller "
            "--batch_size"
        ) from None
    except (DataError, ConfigError, ModuleNotFoundError) as error:
        words = " ".join(str(error).removeprefix("command line: ").split())
        raise SystemExit(f"owlfuse: error: {words}") from None


class Measured(tuple):
    """(number, bool) that lmms-eval's response cache takes for an empty answer and so does not
    keep: it would give the pair back as a text, which no task can score."""

    def strip(self) -> str:
        """What the cache asks an answer for."""
        return ""


class Owlfuse(lmms):
    """A run, an exported or an imported model, for generation and log-likelihood.

    Args:
        pretrained: the model's folder.
        batch_size: requests answered at a time; in float32 it does not change the answers.
        device: by default the GPU, of several processes each its own, or the CPU.
        dtype: one of DTYPES; `saved`: as the folder has its weights.
        frames: of a video.

    Raises:
        SystemExit: with one line, for a wrong argument or folder.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        frames: int = 8,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        with told():
            check_arguments(unknown, pretrained, dtype, frames)
            self.batch_size = number(batch_size, "batch_size")
            self.device = self.place(device)
            self.talker = Talker(check_model(str(pretrained)), dtype, self.device)
        self.opener = Opener(frames)
        self.cut = 0

    def place(self, device: str | None) -> torch.device:
        """Where the model goes. Raises DataError for no such device."""
        if self._world_size > 1 or device is None:
            return self.accelerator.device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
            raise DataError(f"--device: {device}: {str(error).splitlines()[0]}") from error
        return torch.device(device)

    @property
    def chat_template(self) -> str:
        """What lmms-eval asks for with `--apply_chat_template`."""
        raise SystemExit(
            "owlfuse: error: --apply_chat_template: leave it out, the model's own template is "
            "always applied"
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request; greedily, unless the task's generation_kwargs ask for
        sampling."""
        turns: Counter[str] = Counter()
        asked = []
        with told():
            for request in requests:
                name, prompt, options = self.asked(request)
                asked.append(Request(name, len(request.args[0]), prompt, options, turns[name]))
                turns[name] += 1
            return self.answered(asked)

    def asked(self, request: Instance) -> tuple[str, Callable[[], Prompt], Options]:
        """A request's name, its prompt when it is wanted, and how it is answered.

        Raises DataError.
        """
        text, generation, visuals, *where = request.args
        name = name_of(*where)
        return (
            name,
            partial(self.question, name, text, visuals, *where),
            Options.of(generation or {}, name),
        )

    def question(
        self, name: str, text: str, visuals: Callable | None, doc_id: int, task: str, split: str
    ) -> Prompt:
        """A document's question, by its text and the task's doc_to_visual. Raises DataError."""
        return self.opener.question(
            name, text, visuals(self.task_dict[task][split][doc_id]) if visuals else None
        )

    def answered(self, requests: list[Request]) -> list[str]:
        """The answers in the requests' order. Raises DataError."""
        answers = [""] * len(requests)
        with Progress("owlfuse", len(requests), shown=self.rank == 0) as progress:
            for places in batches(requests, self.batch_size):
                found, cut = answer(
                    self.talker, [requests[place] for place in places], torch.initial_seed()
                )
                self.cut += cut
                for place, text in zip(places, found, strict=True):
                    answers[place] = text
                progress.advance(len(places))
        if self.cut:
            logger.warning(
                f"owlfuse: {self.cut} answers were cut where the model has no more positions"
            )
            self.cut = 0
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(number, whether greedy generation begins so) of each request's continuation, as the text
        of a `GenerationResult`: lmms-eval 0.7 makes a text of any other pair.

        The number is the log-likelihood in nats. Of a `multiple_choice` task, whose continuations
        are texts, it has the other sign, since lmms-eval takes the choice of the least (its own
        models give the loss there).
        """
        results: list[Any] = [None] * len(requests)
        with told(), Progress("owlfuse", len(requests), shown=self.rank == 0) as progress:
            measure = Likelihoods(self.talker)
            order = sorted(range(len(requests)), key=lambda place: -len(requests[place].args[0]))
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                made = [self.continued(requests[place]) for place in places]
                measured = measure.measure(
                    [measure.encode(prompt, text) for prompt, text, _ in made]
                )
                for place, (_, _, sign), (number, greedy) in zip(
                    places, made, measured, strict=True
                ):
                    results[place] = GenerationResult(Measured((sign * number, greedy)))
                progress.advance(len(places))
        return results

    def continued(self, request: Instance) -> tuple[Prompt, str, int]:
        """A request's prompt, its continuation, and the sign that lmms-eval expects.

        Raises DataError.
        """
        text, target, *rest = request.args
        if not rest:  # a choice without its question
            return (
                self.opener.question(name_of(request.doc_id, request.task_name), text, None),
                target,
                -1,
            )
        visuals, doc_id, task, split = rest
        prompt = self.question(name_of(doc_id, task), text, visuals, doc_id, task, split)
        if isinstance(target, str):
            return prompt, target, -1
        return prompt, str(target(self.task_dict[task][split][doc_id])), 1

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each request's rounds. After a round the task's doc_to_text says what
        comes next, or that it was the last."""
        with told():
            rounds = [Rounds(self, request) for request in requests]
            while going := [one for one in rounds if one.next is not None]:
                for one, text in zip(
                    going,
                    self.answered([one.next for one in going if one.next is not None]),
                    strict=True,
                ):
                    one.go_on(text)
            return [one.answers for one in rounds]

    def clean(self) -> None:
        """Frees the model's memory, once all is answered."""
        del self.talker
        super().clean()


class OwlfuseChat(Owlfuse):
    """The same for tasks that give messages (`doc_to_messages`): pictures wherever they stand,
    several turns, a system's."""

    is_simple = False

    def asked(self, request: Instance) -> tuple[str, Callable[[], Prompt], Options]:
        """See `Owlfuse`."""
        _, messages, generation, *where = request.args
        name = name_of(*where)
        return name, partial(self.chat, name, messages, *where), Options.of(generation or {}, name)

    def chat(self, name: str, messages: Callable, doc_id: int, task: str, split: str) -> Prompt:
        """A document's chat. Raises DataError."""
        return self.opener.chat(name, messages(self.task_dict[task][split][doc_id]))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """See `Owlfuse`."""
        raise SystemExit(
            "owlfuse: error: owlfuse_chat: a task of several rounds is answered by --model owlfuse"
        )


def number(given: Any, name: str) -> int:
    """A whole number of at least 1. Raises DataError."""
    if not str(given).isdecimal() or int(given) < 1:
        raise DataError(f"{name} is {given}, expected a whole number of at least 1")
    return int(given)


def check_arguments(unknown: dict[str, Any], pretrained: str, dtype: str, frames: Any) -> None:
    """Raises DataError for what --model_args cannot be."""
    for name in unknown:
        match = difflib.get_close_matches(name, ARGUMENTS, n=1)
        guess = f"did you mean '{match[0]}'?" if match else f"expected {', '.join(ARGUMENTS)}"
        raise DataError(f"--model_args: {name}: no such argument; {guess}")
    if not pretrained:
        raise DataError("--model_args: name the model's folder: pretrained=OUT")
    if dtype not in DTYPES:
        raise DataError(f"--model_args: dtype is {dtype}, expected {', '.join(DTYPES)}")
    number(frames, "--model_args: frames")


class Rounds:
    """A request of several rounds on its way.

    Attributes:
        answers: so far.
        next: the round to come, None after the last.
    """

    def __init__(self, model: Owlfuse, request: Instance) -> None:
        text, generation, visuals, self.said, *self.where = request.args
        self.model = model
        self.name = name_of(*self.where)
        self.options = Options.of(generation or {}, self.name)
        self.answers: list[str] = []
        self.info: Any = None
        make = partial(model.question, self.name, text, visuals, *self.where)
        self.next: Request | None = Request(self.name, len(text), make, self.options)

    def go_on(self, text: str) -> None:
        """Takes the round's answer, and asks the task for the next."""
        self.answers.append(text)
        doc_id, task, split = self.where
        step = {"round_idx": len(self.answers), "previous_round_info": self.info}
        visuals, question, last, answers, self.info = self.said(
            self.model.task_dict[task][split][doc_id], previous_output=list(self.answers), **step
        )
        if last:
            self.answers, self.next = list(answers), None
            return
        make = partial(self.model.opener.question, self.name, question, visuals)
        self.next = Request(self.name, len(question), make, self.options, turn=len(self.answers))


def name_of(doc_id: Any, task: Any, split: Any = None) -> str:
    """A document's name in messages."""
    return f"task {task}, document {doc_id}" + (f" of {split}" if split else "")
