"""`owlfuse chat`: a conversation with a model on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import TextStreamer

from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.hf.processing import OwlfuseProcessor
from owlfuse.artifacts.load import load_talker
from owlfuse.core.errors import DataError
from owlfuse.core.progress import quiet_libraries
from owlfuse.core.terminal import visible
from owlfuse.data.chat.tokenizer import render
from owlfuse.data.formats.marks import with_pictures
from owlfuse.data.media.images import MAX_PIXELS, open_image
from owlfuse.data.words import with_hidden_words
from owlfuse.evaluation.explain.attention import explained

HELP = """\
/image PATH   show a picture with the next question
/new          begin anew
/quit         or Ctrl-D: leave; Ctrl-C stops an answer
"""


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
        self.longest: int | None = getattr(
            model.config.text_config, "max_position_embeddings", None
        )
        """Tokens that the model knows places for, of prompt and answer together; None where
        nothing limits them."""
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[Any] = []
        self.shown: list[Any] = []
        self.last: tuple[str, Any, Tensor] | None = None
        """The last question, what the processor gave for the whole prompt, and the answer's ids
        (L,)."""

    def show(self, path: str) -> None:
        """Puts a picture before the next question. Raises DataError where it cannot be read."""
        place = Path(path).expanduser()
        self.shown.append(open_image(place.parent, place.name, "chat", MAX_PIXELS))

    def restart(self) -> None:
        """Forgets all that was said and shown."""
        self.messages, self.pictures, self.shown, self.last = [], [], [], None

    def ask(self, question: str, write: Callable[[str], None]) -> str:
        """The answer, each piece of it given to `write` as it comes. Pictures stand at the
        question's `<image>` marks, or first where it has none; `\\<image>` is the word. Ctrl-C
        ends it early, and what was said stays said.

        Raises:
            DataError: as many `<image>` marks are not there as pictures, or the conversation is
                longer than the model's positions; nothing of it is remembered.
        """
        content = with_pictures(question, len(self.shown))
        messages, pictures = (
            [*self.messages, {"role": "user", "content": content}],
            [*self.pictures, *self.shown],
        )
        hidden = with_hidden_words(messages, self.processor.image_token)
        prompt = render(self.processor.tokenizer, hidden, True, self.thinking)
        inputs = self.processor(images=pictures, text=prompt).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        if self.longest is not None and length >= self.longest:
            raise DataError(
                f"the conversation has {length:,} tokens and the model knows {self.longest:,}; "
                "begin a new one"
            )
        self.messages, self.pictures, self.shown = messages, pictures, []
        tokenizer = self.processor.tokenizer
        answer_format = self.processor.answer_format
        streamer = Pieces(tokenizer, write, "" if answer_format.end_ids else answer_format.end_mark)
        try:
            with torch.inference_mode():
                self.model.generate(
                    **inputs, streamer=streamer, tokenizer=tokenizer, **self.options
                )
        except KeyboardInterrupt:
            streamer.end()
        self.last = question, inputs, torch.tensor(streamer.ids, dtype=torch.long)
        answer = "".join(streamer.pieces)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer

    def explain(self) -> Image.Image:
        """Where the last answer looked, as a picture.

        Raises DataError where there is none, or no picture was shown.
        """
        if self.last is None:
            raise DataError("nothing was asked yet, so there is no answer to explain")
        question, inputs, ids = self.last
        return explained(self.model, self.processor, self.pictures, inputs, ids, question)


class Pieces(TextStreamer):
    """Collects the answer's text and ids, and hands the text on.

    Args:
        end_mark: a text that ends the answer and is no part of it; empty where a token does.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], end_mark: str = "") -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.end_mark = end_mark
        self.held_back = ""
        self.pieces: list[str] = []
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """See `TextStreamer`; the first call brings the prompt."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See `TextStreamer`; what may be the beginning of the end mark is held back."""
        if self.end_mark:
            text, ended, _ = (self.held_back + text).partition(self.end_mark)
            kept = 0 if ended or stream_end else longest_overlap(text, self.end_mark)
            text, self.held_back = (
                text[: len(text) - kept],
                self.end_mark if ended else text[len(text) - kept :],
            )
        if text:
            self.pieces.append(text)
            self.write(text)


def longest_overlap(text: str, mark: str) -> int:
    """How many characters at the end of a text are the beginning of a mark."""
    return next((count for count in range(len(mark) - 1, 0, -1) if text.endswith(mark[:count])), 0)


def to_terminal(text: str) -> None:
    """Writes at once, control characters as what they are."""
    sys.stdout.write(visible(text))
    sys.stdout.flush()


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
    """One answer, or a conversation where no question is given. `out`: the file for where the
    (last) answer looked. `which`: of a run's checkpoints."""
    model, processor = load_talker(folder, which)
    # lost in transformers' wrapper
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    conversation = Conversation(
        model, processor, thinking, max_new_tokens=max_new_tokens, **sampling
    )
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
            print("\n/quit leaves")
            continue
        except EOFError:
            print()
            return
        if line in ("/quit", "/exit"):
            return
        answer_line(conversation, line, out)


def answer_question(conversation: Conversation, question: str, out: Path | None) -> None:
    """The answer on the terminal, and where it looked in the file `out`, if there is one and a
    picture was shown."""
    answer = conversation.ask(question, to_terminal)
    print("" if answer.strip() else "(the model ended its answer without a word)")
    if out is not None and conversation.pictures:
        conversation.explain().save(out)
        print(f"(where it looked is in {out})", file=sys.stderr)


def answer_line(conversation: Conversation, line: str, out: Path | None = None) -> None:
    """A command or a question of the conversation.

    A mistake is told, and the conversation goes on.
    """
    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            conversation.show(rest.strip())
            print(visible(f"({rest.strip()} goes with the next question)"))
        elif command == "/new":
            conversation.restart()
            print("(all forgotten)")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            answer_question(conversation, line, out)
    except DataError as error:
        print(visible(str(error)))
