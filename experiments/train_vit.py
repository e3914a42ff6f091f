#!/usr/bin/env python
"""Train, continue or evaluate one run.

accelerate launch experiments/train_vit.py --cfg tucker_r16.yaml train.epochs=5 seed=1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vit_tucker.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
