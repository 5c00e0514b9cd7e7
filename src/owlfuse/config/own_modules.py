"""Modules of the user's own, which may lie in the working folder."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType


def import_own(name: str) -> ModuleType:
    """The module of that name, installed or in the working folder.

    The working folder becomes a place for modules only here, when one is asked for that is not
    installed. Otherwise a file in it could stand for an optional package that a library looks for,
    and be run by a command that only reads a model.

    Raises:
        ModuleNotFoundError: there is none, or it imports one that is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        here = os.getcwd()
        if error.name != top or here in sys.path:
            raise
        sys.path.append(here)
        importlib.invalidate_caches()
        return importlib.import_module(name)
