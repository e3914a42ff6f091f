"""Command lines: parse, call one function, turn errors into one line and an exit status. One file per command.

Exit status: 0 done, 1 failed, 2 bad config or arguments, 130 interrupted.
"""

from vit_tucker.cli.common import parse_with_overrides
from vit_tucker.cli.main import build_parser, main
from vit_tucker.cli.train import train_main

__all__ = ["build_parser", "main", "parse_with_overrides", "train_main"]
