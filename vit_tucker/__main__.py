"""python -m vit_tucker"""

import sys

from vit_tucker.cli import main

if __name__ == "__main__":
    sys.exit(main())
