#!/usr/bin/env python
"""Run a sweep: methods x options x seeds from one YAML file, all from one dense model per seed.

python experiments/sweep.py --cfg sweeps/fig3_digits.yaml --jobs 2 --only 'gqa*'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vit_tucker.cli.sweep import sweep_main

if __name__ == "__main__":
    sys.exit(sweep_main())
