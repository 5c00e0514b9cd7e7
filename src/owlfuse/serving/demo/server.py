"""The server: one port on this machine alone, and nothing from or to anywhere else."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from owlfuse.core.errors import COMMAND_LINE, ConfigError
from owlfuse.core.signals import signals_handled
from owlfuse.serving.demo.limits import MAX_STORED, MAX_UPLOAD
from owlfuse.serving.demo.uploads import remove_old, stored_bytes, uploads_only

HOST = "127.0.0.1"
PORT = 7860
PORT_COUNT = 40
"""Ports from PORT on that are tried where none is named."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
POLICY = "; ".join(
    [
        "default-src 'self'",
        # Gradio's page has inline scripts, and templates that it compiles
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self' blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def listen(port: int | None) -> socket.socket:
    """Return a socket that listens; without a port the first free one from PORT on.

    Raises:
        ConfigError: the port is taken or may not be had.
    """
    ports = range(PORT, PORT + PORT_COUNT) if port is None else [port]
    for number in ports:
        try:
            # Bound before models are loaded: a port that is taken is reported at once.
            return socket.create_server((HOST, number), backlog=128)
        except OverflowError:
            raise ConfigError(
                f"{COMMAND_LINE}: --port {number}: expected a number from 0 to 65535"
            ) from None
        except OSError as error:
            reason = os.strerror(error.errno or 0)
    if port is None:
        raise ConfigError(
            f"{COMMAND_LINE}: no port of {HOST} from {ports[0]} to {ports[-1]} is free "
            f"({reason}); give --port N"
        )
    raise ConfigError(
        f"{COMMAND_LINE}: --port {port} of {HOST}: {reason}; name another, or none for the next "
        "free one"
    )


class Guard:
    """Stands before the page: adds headers that keep the browser from asking elsewhere, and refuses
    what is not the page's.

    Refused are requests that another web site has a visitor's browser send, files and pages of
    other servers, and uploads beyond what is stored at most.

    Args:
        uploads: the folder where uploaded files lie.
    """

    def __init__(self, app: Callable, uploads: Path) -> None:
        self.app = app
        self.uploads = uploads

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Passes a request on, or refuses it. See ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # no web socket is the page's
        refusal = self.refusal(scope)
        if refusal:
            status, sentence = refusal
            headers = encoded({"content-type": "text/plain"})
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": sentence.encode()})
            return

        async def send_guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = encoded(HEADERS)
                for name, value in message["headers"]:
                    # A header of Gradio's would be a second one of that name.
                    if name.decode().lower() not in HEADERS:
                        headers.append((name, value))
                message["headers"] = headers
            await send(message)

        await self.app(scope, receive, send_guarded)

    def refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Return status and sentence for a request that is not answered."""
        headers = {}
        for name, value in scope["headers"]:
            headers[name.decode().lower()] = value.decode("latin-1")
        host, origin = headers.get("host", ""), headers.get("origin")
        # A name that a foreign web site had its own DNS resolve to this machine.
        # The slashes have urlsplit take the text for a host and its port.
        if urlsplit(f"//{host}").hostname not in LOCAL_NAMES:
            return 403, "this demo answers to this machine alone"
        # Browsers send the origin with every request that changes something.
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "another web site asked, and only the demo's own page may"
        path = unquote(scope["path"]).lower()  # as Gradio reads it
        if "/proxy=" in path or re.search("file[=/]https?:", path):
            return 403, "this demo fetches nothing from other servers"
        if path.rstrip("/").endswith("/upload"):
            # Here, so that no thread has to watch the folder.
            remove_old(self.uploads)
            if stored_bytes(self.uploads) > MAX_STORED:
                return 507, "too many files were uploaded; try again later"
        return None


def encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as ASGI takes them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def mount(page: Any, server_socket: socket.socket, uploads: Path) -> Any:
    """Return the FastAPI application that has Gradio's page at its root, and of Gradio nothing that
    the page does not need."""
    import fastapi
    import gradio

    from owlfuse.serving.demo.page import FOLDER, THEME

    host, port = server_socket.getsockname()
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gradio.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        server_port=port,
        allowed_paths=[],
        blocked_paths=[],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        theme=THEME,
        # `css` would be rewritten
        head=f"<style>{(FOLDER / 'page.css').read_text(encoding='utf-8')}</style>",
        js=(FOLDER / "page.js").read_text(encoding="utf-8"),
    )
    uploads_only(page, uploads)
    return app


def serve(
    page: Any,
    server_socket: socket.socket,
    uploads: Path,
    on_shutdown: Callable[[], None],
) -> None:
    """Serves the page until Ctrl-C or SIGTERM, then returns.

    Args:
        on_shutdown: called once when it ends, before connections are closed.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Ends without a log line: an open page holds a connection, which is cut after a second."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Ends all answers first. See `uvicorn.Server`."""
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
            on_shutdown()
            await super().shutdown(sockets)

    app = Guard(mount(page, server_socket, uploads), uploads)
    config = uvicorn.Config(
        app, log_level="error", access_log=False, timeout_graceful_shutdown=1, lifespan="on"
    )
    # uvicorn raises the signal again when it has ended
    with (
        suppress(KeyboardInterrupt),
        signals_handled({signal.SIGTERM: signal.default_int_handler}),
    ):
        Server(config).run(sockets=[server_socket])
