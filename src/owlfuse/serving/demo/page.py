"""The page: what Gradio shows, and what happens at each button."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from owlfuse.core.errors import DataError
from owlfuse.serving.demo import transcript
from owlfuse.serving.demo.limits import MAX_CHARACTERS, MAX_NEW_TOKENS, MAX_WAITING, is_loopback
from owlfuse.serving.demo.talkers import Talker
from owlfuse.serving.demo.uploads import check_uploaded, remove
from owlfuse.serving.demo.visitors import Visitor, Visitors

HERE = Path(__file__).parent
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]
THEME = gr.themes.Default(primary_hue="blue", neutral_hue="gray", font=FONT, font_mono=MONO)
"""Fonts of the visitor's own system; Gradio's themes would ask Google for some."""
FREE: dict[str, Any] = {"submit_btn": "Ask", "stop_btn": False}
BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": "Stop"}
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def make_page(talkers: list[Talker], visitors: Visitors, uploads: Path) -> gr.Blocks:
    """The page for these models; `visitors` keeps what is said, and `uploads` is the folder of
    uploaded files."""
    with gr.Blocks(title="owlfuse demo", analytics_enabled=False, fill_width=False) as page:
        with gr.Row(elem_id="title"):
            gr.HTML("<h1>owlfuse demo</h1>")
            anew = gr.Button("New conversation", size="sm", scale=0, min_width=160)
        gr.HTML(transcript.heads(talkers))
        with gr.Row(elem_id="settings"):
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", buttons=[])
            longest = gr.Slider(1, MAX_NEW_TOKENS, 256, step=1, label="Max tokens", buttons=[])
            look = gr.Checkbox(False, label="Show where it looked", elem_id="look")
        with gr.Column(elem_id="conversation"):
            history = gr.HTML(transcript.history(Visitor(talkers)))
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
                **FREE,
            )
        parts = Parts(visitors, uploads, history, current, notice, question)
        shown = [history, current, notice, question]
        asked = question.submit(parts.begin, question, shown, queue=False, **HIDDEN)
        asked.then(
            parts.answer,
            [temperature, longest, look],
            shown,
            concurrency_limit=MAX_WAITING,
            **HIDDEN,
        )
        question.stop(parts.stop, None, shown, queue=False, **HIDDEN)
        anew.click(parts.restart, None, shown, queue=False, **HIDDEN)
        page.unload(parts.leave)
    page.queue(max_size=2 * MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def session(request: gr.Request) -> str:
    """Of whom an open page is."""
    return request.session_hash or ""


def address_of(request: gr.Request) -> str:
    """Of the machine that a page is open on; empty for this machine."""
    host = request.client.host if request.client else ""
    return "" if is_loopback(host) else host


class Parts:
    """What changes on the page, and how."""

    def __init__(
        self,
        visitors: Visitors,
        uploads: Path,
        history: Any,
        current: Any,
        notice: Any,
        question: Any,
    ) -> None:
        self.visitors = visitors
        self.uploads = uploads
        self.history, self.current, self.notice, self.question = history, current, notice, question

    def begin(self, value: dict[str, Any], request: gr.Request) -> dict[Any, Any]:
        """A question was sent: it is shown, or a sentence says why not, and then the text stays
        where it was."""
        paths = list(value.get("files") or [])
        try:
            checked = [str(check_uploaded(path, self.uploads)) for path in paths]
            visitor = self.visitors.begin(
                session(request), value.get("text") or "", checked, address_of(request)
            )
        except DataError as error:
            busy = self.visitors.of(session(request)).pending is not None
            box = gr.MultimodalTextbox(
                {"text": value.get("text") or "", "files": []}, **(BUSY if busy else FREE)
            )
            return {self.notice: transcript.notice(str(error)), self.question: box}
        finally:
            remove(paths, self.uploads)
        return self.all(visitor, gr.MultimodalTextbox(None, **BUSY))

    def answer(
        self, temperature: float, longest: float, look: bool, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        """The answers as they grow."""
        visitor = self.visitors.of(session(request))
        try:
            for _ in self.visitors.answers(session(request), temperature, int(longest), look):
                yield {self.current: transcript.current(visitor)}
        except GeneratorExit:  # the page is gone, and takes nothing more
            visitor.halt()
            raise
        if not visitor.pending:
            yield self.all(visitor, gr.MultimodalTextbox(**FREE), keep_notice=True)

    def stop(self, request: gr.Request) -> dict[Any, Any]:
        """Ends the answer under way; what was said stays."""
        visitor = self.visitors.of(session(request))
        visitor.halt()
        return (
            {self.current: transcript.current(visitor)}
            if visitor.pending
            else self.all(visitor, gr.MultimodalTextbox(**FREE))
        )

    def restart(self, request: gr.Request) -> dict[Any, Any]:
        """Forgets all."""
        visitor = self.visitors.of(session(request))
        visitor.restart()
        return self.all(visitor, gr.MultimodalTextbox(None, **FREE))

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.visitors.leave(session(request))

    def all(self, visitor: Visitor, box: Any, keep_notice: bool = False) -> dict[Any, Any]:
        """The whole conversation as it is now."""
        changed = {
            self.history: transcript.history(visitor),
            self.current: transcript.current(visitor),
            self.question: box,
        }
        return changed if keep_notice else {**changed, self.notice: ""}
