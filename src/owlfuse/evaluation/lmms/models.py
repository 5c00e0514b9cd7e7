"""The two model classes that lmms-eval makes, `owlfuse` and `owlfuse_chat`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger

from owlfuse.artifacts.runs import check_model
from owlfuse.core.errors import ConfigError, DataError, first_line, hint
from owlfuse.core.progress import Progress
from owlfuse.evaluation.benchmarks.answering import LoadedModel
from owlfuse.evaluation.lmms.answers import Cuts, Options, Request, answer, batches
from owlfuse.evaluation.lmms.likelihoods import Likelihoods
from owlfuse.evaluation.lmms.prompts import Prompt, PromptMaker

DTYPES = ("float32", "saved", "bfloat16", "float16")
ARGUMENTS = ("pretrained", "batch_size", "device", "dtype", "frames")


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the program with one line and exit code 1 where the user's words or data are wrong;
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


class UncachedPair(tuple):
    """A pair (number, bool) that lmms-eval's response cache takes for an empty answer and so does
    not store: it would give the pair back as a text, which no task can score."""

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

    # lmms-eval asks which kind of requests a model takes
    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        frames: int = 8,
        # lmms-eval gives it to every model; batches are of one size here
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        # names that lmms-eval's base class reads
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        with exit_on_user_error():
            check_arguments(unknown, pretrained, dtype, frames)
            self.batch_size = positive_int(batch_size, "batch_size")
            self.device = self.find_device(device)
            self.loaded = LoadedModel(check_model(str(pretrained)), dtype, self.device)
        self.prompt_maker = PromptMaker(frames)
        self.cuts = Cuts()

    def find_device(self, device: str | None) -> torch.device:
        """Returns the device that the model goes to. Raises DataError for no such device."""
        # several processes have a GPU each, whatever --device says
        if self._world_size > 1 or device is None:
            return self.accelerator.device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
            raise DataError(f"--device: {device}: {first_line(error)}") from error
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
        parsed = []
        with exit_on_user_error():
            for request in requests:
                item = self.parse(request)
                # tasks may repeat a request for several samples, each with its own random numbers
                item.turn = turns[item.name]
                turns[item.name] += 1
                parsed.append(item)
            return self.answer_all(parsed)

    def parse(self, request: Instance) -> Request:
        """Returns what lmms-eval asks, in the form in which it is answered. Raises DataError."""
        text, generation, visuals, *document = request.args
        return self.text_request(text, generation, visuals, document)

    def text_request(
        self,
        text: str,
        generation: dict[str, Any] | None,
        visuals: Callable | None,
        document: list[Any],
    ) -> Request:
        """Returns the request to answer a text about a document. Raises DataError."""
        name = document_name(*document)
        make_prompt = partial(self.question, name, text, visuals, *document)
        return Request(name, len(text), make_prompt, Options.of(generation or {}, name))

    def question(
        self,
        name: str,
        text: str,
        visuals: Callable | None,
        doc_id: int,
        task: str,
        split: str,
    ) -> Prompt:
        """Returns a document's question, by its text and the task's doc_to_visual. Raises
        DataError."""
        pictures = visuals(self.task_dict[task][split][doc_id]) if visuals else None
        task_config = getattr(getattr(visuals, "__self__", None), "config", None)
        if pictures and getattr(task_config, "num_fewshot", None):
            raise DataError(
                f"{name}: the task has examples (num_fewshot) without their pictures, and the "
                "question's would be shown before them; take --num_fewshot 0"
            )
        return self.prompt_maker.question(name, text, pictures)

    def answer_all(self, requests: list[Request]) -> list[str]:
        """Returns the answers in the requests' order. Raises DataError."""
        answers = [""] * len(requests)
        with Progress("owlfuse", len(requests), shown=self.rank == 0) as progress:
            for indices in batches(requests, self.batch_size):
                batch = [requests[index] for index in indices]
                texts = answer(self.loaded, batch, torch.initial_seed(), self.cuts)
                for index, text in zip(indices, texts, strict=True):
                    answers[index] = text
                progress.advance(len(indices))
        for line in self.cuts.describe():
            logger.warning(f"owlfuse: {line}")
        self.cuts = Cuts()
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(number, whether greedy generation begins so) of each request's continuation, as the text
        of a `GenerationResult`: lmms-eval 0.7 makes a text of any other pair.

        The number is the log-likelihood in nats. Of a `multiple_choice` task, whose continuations
        are texts, it has the other sign, since lmms-eval takes the choice of the least (its own
        models give the loss there).
        """
        results: list[Any] = [None] * len(requests)
        with (
            exit_on_user_error(),
            Progress("owlfuse", len(requests), shown=self.rank == 0) as progress,
        ):
            likelihoods = Likelihoods(self.loaded)
            # by length, so that little is padded
            order = sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0]))
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                encoded, signs = [], []
                for index in indices:
                    prompt, continuation, sign = self.parse_continuation(requests[index])
                    encoded.append(likelihoods.encode(prompt, continuation))
                    signs.append(sign)
                pairs = likelihoods.measure(encoded)
                for index, sign, (number, greedy) in zip(indices, signs, pairs, strict=True):
                    results[index] = GenerationResult(UncachedPair((sign * number, greedy)))
                progress.advance(len(indices))
        return results

    def parse_continuation(self, request: Instance) -> tuple[Prompt, str, int]:
        """Returns a request's prompt, its continuation, and the sign that lmms-eval expects.

        Raises DataError.
        """
        text, target, *document = request.args
        if not document:  # a choice without its question
            name = document_name(request.doc_id, request.task_name)
            return self.prompt_maker.question(name, text, None), target, -1
        visuals, doc_id, task, split = document
        prompt = self.question(document_name(doc_id, task), text, visuals, doc_id, task, split)
        if isinstance(target, str):
            return prompt, target, -1
        return prompt, str(target(self.task_dict[task][split][doc_id])), 1

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each request's rounds. After a round the task's doc_to_text says what
        comes next, or that it was the last."""
        with exit_on_user_error():
            rounds = [Rounds(self, request) for request in requests]
            # round by round over all requests, so that batches stay full
            while open_rounds := [item for item in rounds if item.next is not None]:
                requests_now = [item.next for item in open_rounds if item.next is not None]
                for item, text in zip(open_rounds, self.answer_all(requests_now), strict=True):
                    item.advance(text)
            return [item.answers for item in rounds]

    def clean(self) -> None:
        """Frees the model's memory, once all is answered."""
        del self.loaded
        super().clean()


class OwlfuseChat(Owlfuse):
    """The same for tasks that give messages (`doc_to_messages`): pictures wherever they stand,
    several turns, a system's."""

    is_simple = False

    def parse(self, request: Instance) -> Request:
        """Returns what `Owlfuse.parse` does, of a task's messages."""
        text, messages, generation, *document = request.args
        name = document_name(*document)
        check_messages_alone(messages, name)
        make_prompt = partial(self.chat, name, messages, *document)
        return Request(name, len(text), make_prompt, Options.of(generation or {}, name))

    def chat(self, name: str, messages: Callable, doc_id: int, task: str, split: str) -> Prompt:
        """Returns a document's chat. Raises DataError."""
        return self.prompt_maker.chat(name, messages(self.task_dict[task][split][doc_id]))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Ends the program: tasks of several rounds give no messages."""
        raise SystemExit(
            "owlfuse: error: owlfuse_chat: a task of several rounds is answered by --model owlfuse"
        )


def check_messages_alone(messages: Callable, name: str) -> None:
    """Raises DataError for a task with examples or a description before its question, which
    lmms-eval writes into the text and not into the messages."""
    # `messages` is a method of the task.
    task_config = getattr(getattr(messages, "__self__", None), "config", None)
    for key in ("num_fewshot", "description"):
        if getattr(task_config, key, None):
            raise DataError(
                f"{name}: the task has {key}, which its messages leave out; take --model owlfuse"
            )


def positive_int(value: Any, name: str) -> int:
    """Returns a whole number of at least 1. Raises DataError for another value."""
    if not str(value).isdecimal() or int(value) < 1:
        raise DataError(f"{name} is {value}, expected a whole number of at least 1")
    return int(value)


def check_arguments(unknown: dict[str, Any], pretrained: str, dtype: str, frames: Any) -> None:
    """Raises DataError for what --model_args cannot be."""
    for name in unknown:
        raise DataError(f"--model_args: {name}: no such argument{hint(name, ARGUMENTS)}")
    if not pretrained:
        raise DataError("--model_args: name the model's folder: pretrained=OUT")
    if dtype not in DTYPES:
        raise DataError(f"--model_args: dtype is {dtype}, expected {', '.join(DTYPES)}")
    positive_int(frames, "--model_args: frames")


class Rounds:
    """A request of several rounds on its way.

    Attributes:
        answers: so far.
        next: the round to come, None after the last.
    """

    def __init__(self, model: Owlfuse, request: Instance) -> None:
        text, generation, visuals, self.doc_to_text, *self.document = request.args
        self.model = model
        self.answers: list[str] = []
        self.round_info: Any = None
        self.first = model.text_request(text, generation, visuals, self.document)
        self.next: Request | None = self.first

    def advance(self, text: str) -> None:
        """Takes the round's answer, and gets the next round from the task."""
        self.answers.append(text)
        doc_id, task, split = self.document
        visuals, question, is_last, answers, self.round_info = self.doc_to_text(
            self.model.task_dict[task][split][doc_id],
            previous_output=list(self.answers),
            round_idx=len(self.answers),
            previous_round_info=self.round_info,
        )
        if is_last:
            self.answers, self.next = list(answers), None
            return
        make_prompt = partial(self.model.prompt_maker.question, self.first.name, question, visuals)
        size, turn = len(question), len(self.answers)
        self.next = replace(self.first, size=size, make=make_prompt, turn=turn)


def document_name(doc_id: Any, task: Any, split: Any = None) -> str:
    """Returns what messages call a document."""
    return f"task {task}, document {doc_id}" + (f" of {split}" if split else "")
