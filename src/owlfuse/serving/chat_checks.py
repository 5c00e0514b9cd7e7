"""What of a command `owlfuse chat` is checked before a library is imported and a model is
read."""

from __future__ import annotations

from pathlib import Path

from owlfuse.core.errors import DataError


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
