"""`owlfuse chat`: a conversation with a model on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from owlfuse.data.images import MAX_PIXELS, open_image
from owlfuse.hub.export import load_exported, load_run, processor_of, wrap
from owlfuse.hub.modeling import OwlfuseForConditionalGeneration
from owlfuse.hub.processing import OwlfuseProcessor
from owlfuse.types import DataError

HELP = """\
/image PATH   show a picture with the next question
/new          begin anew
/quit         or Ctrl-D: leave; Ctrl-C stops an answer
"""


def load_talker(folder: Path) -> tuple[OwlfuseForConditionalGeneration, OwlfuseProcessor]:
    """Model and processor of an exported or imported folder, or of a run.

    Raises:
        DataError: neither, or a folder without a tokenizer.
    """
    if (folder / "config.yaml").exists():
        trained = load_run(folder)
        return wrap(trained), processor_of(trained)
    model, processor = load_exported(folder)
    if processor is None:
        raise DataError(f"{folder} has no tokenizer, so there is nothing to chat with; import it from a folder with one")
    return model, processor


class Conversation:
    """Messages and pictures so far, and the model that answers.

    Args:
        options: keyword arguments of transformers' `generate`.
    """

    def __init__(self, model: OwlfuseForConditionalGeneration, processor: OwlfuseProcessor, **options: Any) -> None:
        self.model = model
        self.processor = processor
        self.options = options
        self.longest: int | None = getattr(model.config.text_config, "max_position_embeddings", None)
        self.last: tuple[Any, Tensor] | None = None
        """Of the last answer that was not broken off: the model's inputs, and the answer's ids (L,)."""
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[Any] = []
        self.shown: list[Any] = []

    def show(self, path: str) -> None:
        """Puts a picture before the next question. Raises DataError where it cannot be read."""
        place = Path(path).expanduser()
        self.shown.append(open_image(place.parent, place.name, "chat", MAX_PIXELS))

    def restart(self) -> None:
        """Forgets all that was said and shown."""
        self.messages, self.pictures, self.shown, self.last = [], [], [], None

    def ask(self, question: str, write: Callable[[str], None]) -> str:
        """The answer, each piece of it given to `write` as it comes. Ctrl-C ends it early, and what was said stays said.

        Raises:
            DataError: the question holds an `<image>`, or the conversation is longer than the model's positions; nothing of it
                is remembered.
        """
        content = [*({"type": "image"} for _ in self.shown), {"type": "text", "text": question}]
        messages, pictures = [*self.messages, {"role": "user", "content": content}], [*self.pictures, *self.shown]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=pictures, text=prompt).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        if self.longest is not None and length >= self.longest:
            raise DataError(f"the conversation has {length:,} tokens and the model knows {self.longest:,}; begin a new one")
        self.messages, self.pictures, self.shown, self.last = messages, pictures, [], None
        streamer = Pieces(self.processor.tokenizer, write)
        try:
            with torch.inference_mode():
                rows = self.model.generate(**inputs, streamer=streamer, **self.options)
            self.last = inputs, rows[0, length:]
        except KeyboardInterrupt:
            streamer.end()
        answer = "".join(streamer.pieces)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer


class Pieces(TextStreamer):
    """Collects the answer's text, and hands it on."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See `TextStreamer`."""
        self.pieces.append(text)
        self.write(text)


def to_terminal(text: str) -> None:
    """Writes at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def chat(folder: Path, images: list[str], question: str | None, max_new_tokens: int, temperature: float) -> None:
    """One answer, or a conversation where no question is given."""
    model, processor = load_talker(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    conversation = Conversation(model, processor, max_new_tokens=max_new_tokens, **sampling)
    for image in images:
        conversation.show(image)
    if question is not None:
        conversation.ask(question, to_terminal)
        print()
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
        answer_line(conversation, line)


def answer_line(conversation: Conversation, line: str) -> None:
    """A command or a question of the conversation. A mistake is told, and the conversation goes on."""
    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            conversation.show(rest.strip())
            print(f"({rest.strip()} goes with the next question)")
        elif command == "/new":
            conversation.restart()
            print("(all forgotten)")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            conversation.ask(line, to_terminal)
            print()
    except DataError as error:
        print(f"{error}")
