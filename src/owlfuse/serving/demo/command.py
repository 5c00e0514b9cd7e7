"""`owlfuse demo OUT [OUT2 ...]`."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from owlfuse.artifacts.runs import check_model, split_which
from owlfuse.core.errors import COMMAND_LINE, ConfigError
from owlfuse.core.packages import missing
from owlfuse.core.terminal import visible


def demo_command(folders: list[str], port: int | None) -> None:
    """Loads the models, then serves the page until Ctrl-C.

    Raises:
        ModuleNotFoundError: the extra `demo` is not installed.
        DataError, ConfigError: a folder is no model's, or the port cannot be had; before anything
            is loaded.
    """
    # Before the folders: without it nothing else helps.
    if find_spec("gradio") is None:
        raise missing("gradio", "owlfuse demo")
    which, folders = split_which(folders)
    model_folders = check_folders(folders)
    from owlfuse.serving.demo.models import load_models
    from owlfuse.serving.demo.server import listen

    with (
        listen(port) as server_socket,
        tempfile.TemporaryDirectory(prefix="owlfuse-demo-") as uploads,
    ):
        # Gradio reads these when it is imported.
        os.environ.update(
            GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1"
        )
        models = load_models(model_folders, report, which)
        from owlfuse.serving.demo.page import make_page
        from owlfuse.serving.demo.server import serve
        from owlfuse.serving.demo.visitors import Visitors

        visitors = Visitors(models)
        page = make_page(models, visitors, Path(uploads))
        name, number = server_socket.getsockname()
        print(f"the demo is at http://{name}:{number} (Ctrl-C ends it)", flush=True)
        serve(page, server_socket, Path(uploads), visitors.end)
    print("the demo has ended")


def report(line: str) -> None:
    """Prints a line at once."""
    print(visible(line), flush=True)


def check_folders(folders: list[str]) -> list[Path]:
    """Return the folders, if each may be a model's; no weights are read.

    Raises:
        DataError: one is no run and no exported or imported folder.
        ConfigError: one is named twice.
    """
    paths = [check_model(folder) for folder in folders]
    # `out` and `out/.` are one model, which would answer twice.
    resolved = [path.resolve() for path in paths]
    for path in paths:
        if resolved.count(path.resolve()) > 1:
            raise ConfigError(f"{COMMAND_LINE}: {path} is named twice; name each model once")
    return paths
