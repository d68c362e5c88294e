"""`python -m chalot` is the command `chalot`."""

import sys

from chalot.cli import main

sys.exit(main())
