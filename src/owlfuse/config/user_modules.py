"""Modules of the user, which may be in the working folder."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType


def import_user_module(name: str) -> ModuleType:
    """Return the module of that name, installed or in the working folder.

    The working folder is added to the search path only here, when a module is imported that is not
    installed. Otherwise a file in it could replace an optional package that a library looks for,
    and be run by a command that only reads a model.

    Raises:
        ModuleNotFoundError: there is none, or it imports one that is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        working_dir = os.getcwd()
        if error.name != top or working_dir in sys.path:
            raise
        # Last, so that an installed module comes before a file of that name.
        sys.path.append(working_dir)
        # Else a file that was written since the folder was last listed is not found.
        importlib.invalidate_caches()
        return importlib.import_module(name)
