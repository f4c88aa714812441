"""`python -m compiled_sparse`: the command line, see `compiled_sparse.cli`."""

from __future__ import annotations

import sys

from compiled_sparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
