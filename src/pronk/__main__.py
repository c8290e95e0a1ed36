"""`python -m pronk`: the command `pronk`, for who starts modules, as torchrun does."""

import sys

from pronk.server.cli import main

sys.exit(main())
