"""`owlfuse chat`: a conversation with a model on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import TextStreamer

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.hf.processing import OwlfuseProcessor
from owlfuse.artifacts.load import load_with_processor
from owlfuse.core.errors import DataError
from owlfuse.core.progress import quiet_libraries
from owlfuse.core.terminal import visible
from owlfuse.data.chat.checks import NOT_TEXT, control_tokens
from owlfuse.data.chat.tokenizer import render
from owlfuse.data.formats.marks import with_pictures
from owlfuse.data.media.images import MAX_PIXELS, open_image
from owlfuse.data.words import with_hidden_words
from owlfuse.evaluation.explain.attention import explained
from owlfuse.evaluation.generation import generate
from owlfuse.model.llm import position_limit

HELP = """\
/image PATH   show a picture with the next question
/new          begin anew
/quit         or Ctrl-D: leave; Ctrl-C stops an answer
"""


class Exchange(NamedTuple):
    """A question with its answer, as the model read and made them."""

    question: str
    inputs: Any
    """What the processor returned for the prompt, which holds all that was said before."""
    answer_ids: Tensor
    """Token ids (L,)."""


class Conversation:
    """Messages and pictures so far, and the model that answers.

    Args:
        thinking: prompts ask for a thought before the answer, where the chat template knows of
            thoughts.
        options: keyword arguments of transformers' `generate`.
    """

    def __init__(
        self,
        model: OwlfuseForConditionalGeneration,
        processor: OwlfuseProcessor,
        thinking: bool = False,
        **options: Any,
    ) -> None:
        self.model = model
        self.processor = processor
        self.thinking = thinking
        self.options = options
        self.control_tokens = control_tokens(processor.tokenizer, processor.image_token)
        self.max_positions = position_limit(model.model.llm)
        """Tokens that the model has positions for, of prompt and answer together; None where
        nothing limits them."""
        self.restart()

    def restart(self) -> None:
        """Forgets all that was said and shown."""
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[Image.Image] = []
        self.next_pictures: list[Image.Image] = []
        """Those that go with the next question."""
        self.last: Exchange | None = None

    def show(self, path: str) -> None:
        """Puts a picture before the next question. Raises DataError where it cannot be read."""
        file = Path(path).expanduser()
        self.next_pictures.append(open_image(file.parent, file.name, "chat", MAX_PIXELS))

    def ask(self, question: str, write: Callable[[str], None], **options: Any) -> str:
        """Returns the answer, each piece of it given to `write` as it comes.

        Pictures stand at the question's `<image>` marks, or first where it has none; `\\<image>` is
        the word. Ctrl-C ends the answer early, and what was said stays said.

        Args:
            options: keyword arguments of `generate` for this answer, before the conversation's.

        Raises:
            DataError: more or fewer `<image>` marks than pictures, a control token or what is no
                text in the question, or the conversation is longer than the model's positions.

        Whatever is raised, nothing of the question is remembered.
        """
        if match := NOT_TEXT.search(question):
            raise DataError(
                f"the question holds the character U+{ord(match[0]):04X}, which is no text; leave "
                "it out"
            )
        for token in self.control_tokens:
            if token in question:
                raise DataError(
                    f"the question holds the tokenizer's control token {token}, which would act as "
                    "one; leave it out"
                )
        content = with_pictures(question, len(self.next_pictures))
        messages = [*self.messages, {"role": "user", "content": content}]
        pictures = [*self.pictures, *self.next_pictures]
        inputs = self.prompt_inputs(messages, pictures)

        tokenizer = self.processor.tokenizer
        answer_format = self.processor.answer_format
        # A mark that is no control token is in the text.
        streamer = AnswerStreamer(tokenizer, write, answer_format.end_mark)
        # A streamer takes one answer, whatever the model's generation_config.json says.
        single = {"num_beams": 1, "num_return_sequences": 1}
        options = {**single, **self.options, **options}
        if self.max_positions is not None:
            free = self.max_positions - inputs["input_ids"].shape[1]
            longest = options.get("max_new_tokens") or self.model.generation_config.max_new_tokens
            options["max_new_tokens"] = min(longest or free, free)
        try:
            generate(self.model, inputs, tokenizer, streamer=streamer, **options)
        except KeyboardInterrupt:
            streamer.end()  # writes what it held back of the last word
        # Only now, so that a question that is refused or that ends in an error changes nothing.
        self.messages, self.pictures, self.next_pictures = messages, pictures, []
        # The type is named: of no ids at all torch would make floating-point numbers.
        self.last = Exchange(question, inputs, torch.tensor(streamer.ids, dtype=torch.long))
        answer = "".join(streamer.pieces)
        # As training has it: a template writes the space before an answer itself. Also of an answer
        # that was stopped: the model has said it.
        said = {"type": "text", "text": answer.strip()}
        self.messages.append({"role": "assistant", "content": [said]})
        return answer

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended where the model has no more positions."""
        if self.last is None or self.max_positions is None:
            return False
        length = self.last.inputs["input_ids"].shape[1] + len(self.last.answer_ids)
        return length >= self.max_positions

    def prompt_inputs(self, messages: list[dict[str, Any]], pictures: list[Image.Image]) -> Any:
        """Return what the model reads of a conversation that ends with a question.

        Raises DataError where it is longer than the model's positions.
        """
        # The word `<image>` in a text must not become a placeholder.
        hidden = with_hidden_words(messages, self.processor.image_token)
        prompt = render(self.processor.tokenizer, hidden, True, self.thinking)
        inputs = self.processor(images=pictures, text=prompt).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        if self.max_positions is not None and length >= self.max_positions:
            raise DataError(
                f"the conversation has {length:,} tokens and the model knows "
                f"{self.max_positions:,}; begin a new one"
            )
        return inputs

    def explain(self) -> Image.Image:
        """Return where the last answer looked, as a picture.

        Raises DataError where there is none, or no picture was shown.
        """
        if self.last is None:
            raise DataError("nothing was asked yet, so there is no answer to explain")
        question, inputs, ids = self.last
        return explained(self.model, self.processor, self.pictures, inputs, ids, question)


class AnswerStreamer(TextStreamer):
    """Collects the answer's text and ids, and hands the text on.

    Args:
        end_mark: a text that ends the answer and is no part of it; empty where a token does.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], end_mark: str = "") -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.end_mark = end_mark
        self.held_back = ""
        """The end of the text so far, where it may be the beginning of the end mark."""
        self.pieces: list[str] = []
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """Collects the ids of a token. See `TextStreamer`; the first call brings the prompt."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Collects and writes a text. See `TextStreamer`."""
        if self.end_mark:
            # The mark may come in several pieces.
            text = self.before_end_mark(text, stream_end)
        if text:
            self.pieces.append(text)
            self.write(text)

    def before_end_mark(self, text: str, stream_end: bool) -> str:
        """Return what of the text is certainly part of the answer, and hold the end back."""
        text, mark, _ = (self.held_back + text).partition(self.end_mark)
        if mark:
            self.held_back = mark  # all that follows is behind it
            return text
        length = 0 if stream_end else longest_overlap(text, self.end_mark)
        self.held_back = text[len(text) - length :]
        return text[: len(text) - length]


def longest_overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text are the beginning of a mark."""
    # The whole mark was looked for before.
    for count in range(len(mark) - 1, 0, -1):
        if text.endswith(mark[:count]):
            return count
    return 0


def to_terminal(text: str) -> None:
    """Writes at once, control characters as escapes."""
    sys.stdout.write(visible(text))
    sys.stdout.flush()  # a piece of a line would wait for its end


def sampling_options(temperature: float) -> dict[str, Any]:
    """Return the arguments of `generate` for a temperature; 0 is the likeliest answer."""
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    return {"do_sample": False}


@quiet_libraries()
def chat(
    folder: Path,
    images: list[str],
    question: str | None,
    max_new_tokens: int,
    temperature: float,
    out: Path | None = None,
    thinking: bool = False,
    which: str = "last",
) -> None:
    """Prints one answer, or leads a conversation where no question is given.

    Args:
        out: the file for where the (last) answer looked.
        which: of a run's checkpoints.
    """
    model, processor = load_with_processor(folder, which)
    # lost in transformers' wrapper
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    # The same for all questions; the demo chooses them for each.
    options = {"max_new_tokens": max_new_tokens, **sampling_options(temperature)}
    conversation = Conversation(model, processor, thinking, **options)
    for image in images:
        conversation.show(image)
    if question is not None:
        answer_question(conversation, question, out)
        return
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            # Ctrl-C stops answers: it should not end a conversation by accident.
            print("\n/quit leaves")
            continue
        except EOFError:
            print()
            return
        if line in ("/quit", "/exit"):
            return
        answer_line(conversation, line, out)


def answer_question(conversation: Conversation, question: str, out: Path | None) -> None:
    """Prints the answer, and writes where it looked into the file `out`, if there is one and a
    picture was shown."""
    answer = conversation.ask(question, to_terminal)
    print("" if answer.strip() else "(the model ended its answer without a word)")
    if conversation.is_full:
        print("(the model has no more positions; begin a new conversation)", file=sys.stderr)
    if out is not None and conversation.pictures:
        conversation.explain().save(out)
        print(f"(where it looked is in {out})", file=sys.stderr)


def answer_line(conversation: Conversation, line: str, out: Path | None = None) -> None:
    """Does a command or answers a question of the conversation.

    A mistake is printed, and the conversation goes on.
    """
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    try:
        if command == "/image":
            conversation.show(argument)
            print(visible(f"({argument} goes with the next question)"))
        elif command == "/new":
            conversation.restart()
            print("(all forgotten)")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            answer_question(conversation, line, out)
    except DataError as error:
        print(visible(str(error)))
