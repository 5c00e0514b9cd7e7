"""`owlfuse demo OUT [OUT2 ...]`."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from owlfuse.artifacts.runs import split_which
from owlfuse.core.errors import COMMAND_LINE, ConfigError, DataError
from owlfuse.core.folder_kinds import check_exported, describe_path
from owlfuse.core.packages import missing
from owlfuse.core.terminal import visible

WARNING = """\
WARNING: this page is not on loopback. Everyone who can reach {address} can upload pictures and ask,
without a password, and what they send is not encrypted. Ctrl-C ends it; without --host it is for
this machine alone.
"""


def demo_command(folders: list[str], host: str, port: int | None) -> None:
    """Loads the models, then serves the page until Ctrl-C.

    Raises:
        ModuleNotFoundError: the extra `demo` is not installed.
        DataError, ConfigError: a folder is no model's, or the port cannot be had; before anything
            is loaded.
    """
    if find_spec("gradio") is None:
        raise missing("gradio", "owlfuse demo")
    which, folders = split_which(folders)
    places = check_folders(folders)
    from owlfuse.serving.demo.limits import is_loopback
    from owlfuse.serving.demo.server import listen
    from owlfuse.serving.demo.talkers import load_talkers

    local = is_loopback(host)
    with (
        listen(host, port) as bound,
        tempfile.TemporaryDirectory(prefix="owlfuse-demo-") as uploads,
    ):
        os.environ.update(
            GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1"
        )  # before it is imported
        talkers = load_talkers(places, lambda line: print(visible(line), flush=True), which)
        from owlfuse.serving.demo.page import make_page
        from owlfuse.serving.demo.server import serve
        from owlfuse.serving.demo.visitors import Visitors

        visitors = Visitors(talkers)
        page = make_page(talkers, visitors, Path(uploads))
        name, number = bound.getsockname()[:2]
        address = f"http://{f'[{name}]' if ':' in name else name}:{number}"
        if not local:
            print(WARNING.format(address=address), file=sys.stderr, flush=True)
        print(f"the demo is at {address} (Ctrl-C ends it)", flush=True)
        serve(page, bound, Path(uploads), local, visitors.end)
    print("the demo has ended")


def check_folders(folders: list[str]) -> list[Path]:
    """The folders, if each may be a model's; no weights are read.

    Raises:
        DataError: one is no run and no exported or imported folder.
        ConfigError: one is named twice.
    """
    places = [Path(folder).expanduser() for folder in folders]
    for place in places:
        if not place.is_dir():
            if kind := describe_path(place):
                raise DataError(f"{place} {kind}")
            raise DataError(
                f"{place} is not a folder; name a run, or what `owlfuse export` or `owlfuse "
                "import` wrote"
            )
        if not (place / "config.yaml").exists():
            check_exported(place)
    resolved = [place.resolve() for place in places]
    for place, real in zip(places, resolved):
        if resolved.count(real) > 1:
            raise ConfigError(f"{COMMAND_LINE}: {place} is named twice; name each model once")
    return places
