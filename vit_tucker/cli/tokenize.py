"""``tokenize``: text files as files of tokens, which a language model is trained and evaluated on."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import add_json, emit, to_json

EXAMPLES = """examples:
  tokenize book.txt --out data/book                                      (a token for each byte)
  tokenize texts/*.txt --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --validation 0.02 --out data/texts
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "tokenize",
        help="turn text files into the tokens that language models are trained on",
        description="Write the tokens of UTF-8 text files as train.bin and validation.bin, flat arrays that are mapped into "
        "memory, each with a .json file that describes it: what data.dataset=tokens data.root=FOLDER reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="TEXT", help="UTF-8 text files, in their order")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="folder or hub name with a tokenizer of transformers, or bytes, the default: the 256 bytes of UTF-8",
    )
    parser.add_argument(
        "--validation",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the text, its end, for validation; 0.05 if left out",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add_json(parser)
    parser.set_defaults(run=tokenize)


def tokenize(args: argparse.Namespace) -> int:
    """Writes the files and prints how many tokens they have."""
    from vit_tucker.inference.tokenize import tokenize_files

    found = tokenize_files(args.files, args.tokenizer, args.out, validation=args.validation)
    if args.json:
        emit(to_json({"folder": args.out, **{split: facts.model_dump() for split, facts in found.items()}}))
        return 0
    for split, facts in found.items():
        length = "" if not facts.bytes or not facts.tokens else f" of {facts.bytes / facts.tokens:.2f} bytes each"
        print(f"{args.out / split}.bin: {facts.tokens:,} tokens{length}, {facts.dtype}")
    return 0
