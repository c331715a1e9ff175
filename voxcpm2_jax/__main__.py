"""`python -m voxcpm2_jax`: the command line."""

import sys

from voxcpm2_jax.main import main

sys.exit(main())
