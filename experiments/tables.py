#!/usr/bin/env python
"""Tables and figures of finished runs, from their results alone.

python experiments/tables.py runs/fig3_digits --out experiments/results/fig3_digits
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vit_tucker.cli.tables import tables_main

if __name__ == "__main__":
    sys.exit(tables_main())
