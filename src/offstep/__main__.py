"""`python -m offstep` is the command `offstep`."""

import sys

from offstep.cli import main

sys.exit(main())
