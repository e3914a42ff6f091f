#!/usr/bin/env python
"""The report over all kept studies: what was run, what came out, what holds of the paper's claim.

python experiments/report.py experiments/results
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vit_tucker.cli.tables import report_main

if __name__ == "__main__":
    sys.exit(report_main())
