"""What of a command `owlfuse chat` is checked before a library is imported and a model is
read."""

from __future__ import annotations

import math
from pathlib import Path

from owlfuse.core.errors import DataError


def check_numbers(max_new_tokens: int, temperature: float) -> None:
    """Raises DataError for numbers that no answer can be written by."""
    if max_new_tokens < 1:
        raise DataError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
    if not 0 <= temperature < math.inf:
        raise DataError(f"--temperature {temperature}: expected a number of at least 0")


def check_images(paths: list[str]) -> None:
    """Raises DataError for a picture that is not there."""
    for path in paths:
        if not Path(path).expanduser().is_file():
            raise DataError(f"--image {path}: there is no such file")


def explanation_file(path: str, pictures: bool) -> Path:
    """Return the file of the explanation. Raises DataError, before a model is loaded, where it
    cannot be written or there is nothing to look at."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise DataError(
            f"--explain {path}: a picture is written as .png, .jpg or .webp; name the file so"
        )
    if not file.parent.is_dir():
        raise DataError(f"--explain {path}: there is no folder {file.parent}; make it first")
    if not pictures:
        raise DataError(
            f"--explain {path}: it shows where the answer looked in a picture; give one by "
            "--image PATH"
        )
    return file
