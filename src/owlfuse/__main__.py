"""`python -m owlfuse` is the command `owlfuse`."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]  # which `python -m` puts there: the command `owlfuse` runs no code of the working folder by itself either

from owlfuse.cli import main

sys.exit(main())
