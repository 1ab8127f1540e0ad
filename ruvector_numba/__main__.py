"""`python -m ruvector_numba`: the command `ruvector-numba`."""

import sys

from .cli import main

if __name__ == "__main__":  # the processes that `bench` starts import this file as well
    sys.exit(main())
