"""The data of a run: a run keeps its tokenizer, so that it goes on and is evaluated with the one
that it was trained with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from owlfuse.artifacts.resume import Past
from owlfuse.artifacts.runs import TOKENIZER_FOLDER
from owlfuse.config.build import build
from owlfuse.config.compose import origin_of, read_run
from owlfuse.config.identity import digest
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.core.files import atomic_directory
from owlfuse.data.chat.tokenizer import chat_tokenizer

KEYS = ("tokenizer", "chat_template")


def build_data(config: DictConfig) -> Any:
    """Returns the data module of a configuration; of a run that is resumed or evaluated, with the
    run's own tokenizer.

    Raises:
        ConfigError: another tokenizer or chat template is asked for than the run has.
    """
    run_tokenizer_dir = Path(config.resume) / TOKENIZER_FOLDER if config.resume else None
    if run_tokenizer_dir is None or not run_tokenizer_dir.is_dir():
        return build(config.data)
    saved = read_run(Path(config.resume))["data"]
    for key in KEYS:
        if config.data.get(key) != saved.get(key):
            raise ConfigError(
                f"{origin_of(config, f'data.{key}')}: data.{key}: the run {config.resume} keeps "
                "the tokenizer and "
                "chat template that it was trained with; leave the key out, or start another run "
                "from it by init_from"
            )
    # its template is in the folder, as its tokens are
    return build(config.data, tokenizer=str(run_tokenizer_dir), chat_template=None)


@rank_zero_only
def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a run's tokenizer with its chat template into the run, once."""
    if not (folder / TOKENIZER_FOLDER).exists():
        with atomic_directory(folder / TOKENIZER_FOLDER) as temporary:
            tokenizer.save_pretrained(temporary)


def run_tokenizer(folder: Path, data: dict[str, Any]) -> Any:
    """Returns the tokenizer of a run, its own where it keeps one; runs of before named theirs
    alone.

    Args:
        data: the run's configuration of its data.
    """
    if (folder / TOKENIZER_FOLDER).is_dir():
        return chat_tokenizer(str(folder / TOKENIZER_FOLDER))
    return chat_tokenizer(data["tokenizer"], data.get("chat_template"))


def check_tokenizer(folder: Path, past: Past) -> None:
    """Raises DataError where a run's tokenizer is not, or no longer, the one that it was trained
    with."""
    if past.tokenizer is None:  # of a checkpoint from before it was recorded
        return
    found = tokenizer_hash(folder)
    if found != past.tokenizer:
        what = "is missing" if found is None else "is another than it was"
        raise DataError(
            f"{folder / TOKENIZER_FOLDER} {what} until step {past.step}, and the run was trained "
            "with that; give it back"
        )


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a run's tokenizer, none of a run of before."""
    return sorted(file for file in (folder / TOKENIZER_FOLDER).glob("*") if file.is_file())


def tokenizer_hash(folder: Path) -> str | None:
    """12 hexadecimal digits of the sha256 over a run's tokenizer, None for a run of before."""
    files = tokenizer_files(folder)
    content = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return digest(content) if files else None
