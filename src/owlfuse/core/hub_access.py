"""Whether the hub has a model, asked once and without patience: its libraries try for a minute and
then name neither the model nor what can be done."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from owlfuse.core.errors import DataError
from owlfuse.core.packages import looks_local

log = logging.getLogger(__name__)

SECONDS = 3.0
"""For which an answer is waited for, twice."""
CACHED_FILES = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors",
    "pytorch_model.bin",
)
TRANSPORT_ERROR: Any = HfHubHTTPError.__bases__[0]
"""httpx's HTTPError, in whichever of httpx's packages this version of the hub's library uses."""


@cache
def check_hub_has(name: str, instead: str) -> None:
    """Asks the hub for a model. Where it does not answer and the model is in the cache, the hub is
    not asked again.

    Args:
        name: as `owner/name`; a local path is not asked for.
        instead: what to set in its place, for the error.

    Raises:
        DataError: no such model, no permission, or no answer and nothing in the cache.
    """
    if looks_local(name):
        return
    try:
        reason = ask(name)
    except HFValidationError:
        reason = "it is neither a folder here nor a name that the hub can have (owner/name)"
    if reason is None:
        return
    try:
        cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in CACHED_FILES)
    except HFValidationError:
        cached = False
    if not cached:
        raise DataError(f"{name}: {reason}, and it is not in the cache; {instead}")
    if not constants.HF_HUB_OFFLINE:
        log.warning("%s: %s; it is taken from the cache (%s)", name, reason, constants.HF_HUB_CACHE)
        # what the environment's variable of this name sets: no more waiting for it
        constants.HF_HUB_OFFLINE = True


def resolved_file(name: str, files: tuple[str, ...]) -> Path | None:
    """The first of some files of a model that can be had, in the cache's folder of its commit;
    None for a local path."""
    if looks_local(name):
        return None
    try:
        # Its libraries would try for a quarter of a minute at each file.
        cached_only = ask(name) is not None
    except HFValidationError:
        return None
    for file in files:
        try:
            return Path(
                hf_hub_download(name, file, etag_timeout=SECONDS, local_files_only=cached_only)
            )
        except (
            HFValidationError,
            OfflineModeIsEnabled,
            EntryNotFoundError,
            HfHubHTTPError,
            TRANSPORT_ERROR,
            OSError,
        ):
            continue  # whoever loads the model says what is wrong
    return None


@cache
def ask(name: str) -> str | None:
    """Why the model cannot be had from the hub; None where it can, and where its libraries know
    better what is wrong."""
    for _ in range(2):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=SECONDS)
            return None
        except GatedRepoError:
            return (
                f"the hub ({constants.ENDPOINT}) asks for its terms to be accepted there, and "
                "for a login by `hf auth login`"
            )
        except RepositoryNotFoundError:
            return (
                f"the hub ({constants.ENDPOINT}) has no such model, or only for those who are "
                "logged in (`hf auth login`)"
            )
        except OfflineModeIsEnabled:
            return "HF_HUB_OFFLINE is set"
        except (EntryNotFoundError, HfHubHTTPError):
            # there is such a model, or the hub is busy, for which its libraries have patience
            return None
        except (TRANSPORT_ERROR, OSError) as error:
            failure = type(error).__name__
    return f"no connection to the hub ({constants.ENDPOINT}, {failure})"
