"""Runs the command line: ``python -m vit_tucker``."""

import sys
from pathlib import Path

from vit_tucker.config.stored import is_stored

if __name__ == "__main__":
    if is_stored(Path.cwd()):  # "python -m" would import from it, and it is data
        sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != Path.cwd().resolve()]
    from vit_tucker.cli import main

    sys.exit(main())
