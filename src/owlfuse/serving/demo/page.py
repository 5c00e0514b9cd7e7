"""The page: what Gradio shows, and what happens at each button."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from owlfuse.core.errors import DataError
from owlfuse.serving.demo import transcript
from owlfuse.serving.demo.limits import MAX_CHARACTERS, MAX_NEW_TOKENS, MAX_WAITING
from owlfuse.serving.demo.models import DemoModel
from owlfuse.serving.demo.uploads import check_uploaded, remove
from owlfuse.serving.demo.visitors import Visitor, Visitors

FOLDER = Path(__file__).parent
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]
THEME = gr.themes.Default(primary_hue="blue", neutral_hue="gray", font=FONT, font_mono=MONO)
"""Fonts of the visitor's own system; Gradio's themes would ask Google for some."""
IDLE: dict[str, Any] = {"submit_btn": "Ask", "stop_btn": False}
BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": "Stop"}
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
Updates = dict[Any, Any]
"""New values by the component of the page that shows them."""


def make_page(models: list[DemoModel], visitors: Visitors, uploads: Path) -> gr.Blocks:
    """Return the page for these models; `visitors` keeps what is said, and `uploads` is the folder
    of uploaded files."""
    with gr.Blocks(title="owlfuse demo", analytics_enabled=False, fill_width=False) as page:
        with gr.Row(elem_id="title"):
            gr.HTML("<h1>owlfuse demo</h1>")
            restart = gr.Button("New conversation", size="sm", scale=0, min_width=160)
        gr.HTML(transcript.heads(models))
        with gr.Row(elem_id="settings"):
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", buttons=[])
            max_tokens = gr.Slider(1, MAX_NEW_TOKENS, 256, step=1, label="Max tokens", buttons=[])
            look = gr.Checkbox(False, label="Show where it looked", elem_id="look")
        with gr.Column(elem_id="conversation"):
            history = gr.HTML(transcript.history(Visitor(models)))
            current = gr.HTML("")
        with gr.Column(elem_id="composer"):
            notice = gr.HTML("")
            question = gr.MultimodalTextbox(
                label="Question and pictures",
                show_label=False,
                placeholder="Ask; add, drop or paste pictures",
                file_count="multiple",
                file_types=["image"],
                sources=["upload"],
                max_lines=6,
                max_plain_text_length=MAX_CHARACTERS,
                autofocus=True,
                elem_id="question",
                **IDLE,
            )
        handlers = Handlers(visitors, uploads, history, current, notice, question)
        outputs = [history, current, notice, question]
        # Not queued: a refusal or the question is shown at once, whatever else is answered.
        sent = question.submit(handlers.begin, question, outputs, queue=False, **HIDDEN)
        sent.then(
            handlers.answer,
            [temperature, max_tokens, look],
            outputs,
            # As many pages as may wait: the models answer one question at a time anyway.
            concurrency_limit=MAX_WAITING,
            **HIDDEN,
        )
        question.stop(handlers.stop, None, outputs, queue=False, **HIDDEN)
        restart.click(handlers.restart, None, outputs, queue=False, **HIDDEN)
        page.unload(handlers.leave)
    page.queue(max_size=2 * MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def session_key(request: gr.Request) -> str:
    """Return the key of an open page."""
    return request.session_hash or ""


# eq=False: Gradio's components compare and hash by identity, and so do these
@dataclass(eq=False)
class Handlers:
    """What changes on the page, and how."""

    visitors: Visitors
    uploads: Path
    history: Any
    current: Any
    notice: Any
    question: Any

    def begin(self, value: dict[str, Any], request: gr.Request) -> Updates:
        """Shows a question that was sent, or a sentence why not, and then the text stays where it
        was."""
        key = session_key(request)
        text = value.get("text") or ""
        paths = list(value.get("files") or [])
        try:
            files = [str(check_uploaded(path, self.uploads)) for path in paths]
            visitor = self.visitors.begin(key, text, files)
        except DataError as error:
            # The refused question may have come while an earlier one is answered.
            busy = self.visitors.of(key).pending is not None
            box = gr.MultimodalTextbox({"text": text, "files": []}, **(BUSY if busy else IDLE))
            return {self.notice: transcript.notice(str(error)), self.question: box}
        # Pictures are in memory by now, and nothing of a visitor stays on the disk.
        finally:
            remove(paths, self.uploads)
        return self.all_parts(visitor, gr.MultimodalTextbox(None, **BUSY))

    def answer(
        self,
        temperature: float,
        max_tokens: float,
        look: bool,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Shows the answers as they grow."""
        key = session_key(request)
        visitor = self.visitors.of(key)
        try:
            for _ in self.visitors.answers(key, temperature, int(max_tokens), look):
                yield {self.current: transcript.current(visitor)}
        except GeneratorExit:  # the page is gone, and takes nothing more
            visitor.halt()
            raise
        if not visitor.pending:
            updates = self.all_parts(visitor, gr.MultimodalTextbox(**IDLE))
            del updates[self.notice]  # why a question was refused meanwhile
            yield updates

    def stop(self, request: gr.Request) -> Updates:
        """Ends the answer under way; what was said stays."""
        visitor = self.visitors.of(session_key(request))
        visitor.halt()
        if visitor.pending:
            return {self.current: transcript.current(visitor)}
        return self.all_parts(visitor, gr.MultimodalTextbox(**IDLE))

    def restart(self, request: gr.Request) -> Updates:
        """Forgets all."""
        visitor = self.visitors.of(session_key(request))
        visitor.restart()
        return self.all_parts(visitor, gr.MultimodalTextbox(None, **IDLE))

    def leave(self, request: gr.Request) -> None:
        """Forgets the visitor of a page that was closed."""
        self.visitors.leave(session_key(request))

    def all_parts(self, visitor: Visitor, box: Any) -> Updates:
        """Return the conversation as it is now, without a notice."""
        return {
            self.history: transcript.history(visitor),
            self.current: transcript.current(visitor),
            self.question: box,
            self.notice: "",
        }
