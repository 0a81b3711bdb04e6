"""`python -m any4_jax`: the command `any4`."""

import sys

from any4_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
