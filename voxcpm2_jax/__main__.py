"""`python -m voxcpm2_jax`: the command line."""

import sys

from voxcpm2_jax.cli.main import main

sys.exit(main())
