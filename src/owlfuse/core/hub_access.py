"""Whether the hub has a model: it is asked once, with a short timeout, since its libraries try for
a minute and then name neither the model nor a remedy."""

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

# Seconds until an answer; the hub is asked twice.
TIMEOUT = 3.0
CACHED_FILES = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors",
    "pytorch_model.bin",
)
# HTTPError of httpx, or of the package that this version of huggingface_hub uses instead.
TRANSPORT_ERROR: Any = HfHubHTTPError.__bases__[0]


@cache
def check_hub_has(name: str, instead: str) -> None:
    """Ask the hub for a model. Where it does not answer and the model is in the cache, the hub is
    not asked again.

    Args:
        name: as `owner/name`; a local path is not asked for.
        instead: the remedy, for the error.

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
        # as the environment's variable of this name does: transformers would wait for the hub too
        constants.HF_HUB_OFFLINE = True


def resolved_file(name: str, files: tuple[str, ...]) -> Path | None:
    """Return the first of some files of a model that the hub or the cache has, in the cache's
    folder of its commit; None for a local path."""
    if looks_local(name):
        return None
    try:
        # Without an answer, huggingface_hub would try for a quarter of a minute at each file.
        cached_only = ask(name) is not None
    except HFValidationError:
        return None
    for file in files:
        try:
            return Path(
                hf_hub_download(name, file, etag_timeout=TIMEOUT, local_files_only=cached_only)
            )
        # A connection's errors and the absence of a mode or file in the cache are OSErrors.
        except (HFValidationError, EntryNotFoundError, TRANSPORT_ERROR, OSError):
            continue  # whoever loads the model says what is wrong
    return None


@cache
def ask(name: str) -> str | None:
    """Return why the hub does not give a model; None where it does, and where its libraries have a
    better message."""
    # A single timeout may be chance.
    for _ in range(2):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=TIMEOUT)
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
            # There is such a model, or the hub is busy, for which its libraries try again.
            return None
        except (TRANSPORT_ERROR, OSError) as error:
            failure = type(error).__name__
    return f"no connection to the hub ({constants.ENDPOINT}, {failure})"
