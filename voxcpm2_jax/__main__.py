"""`python -m voxcpm2_jax COMMAND ...`: the command line."""

import sys

from voxcpm2_jax.cli.main import main

sys.exit(main())
