"""`python -m deepspec_core` is the `deepspec` command: what workers of one run are started as."""

import sys

from deepspec_core.cli.main import main

sys.exit(main())
