"""`python -m owlfuse` is the command `owlfuse`."""

import sys

from owlfuse.cli import main

sys.exit(main())
