"""``perplexity``: how well a language model predicts a text."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import add_device, add_json, choose_device, emit, positive, to_json

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "perplexity",
        help="measure how well a language model predicts a text",
        description="Perplexity of a causal language model on a text file, by windows with a stride, as in Hugging Face's guide; "
        "bits per byte, which models with different tokenizers share.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of vit_tucker.save, run folder, folder or GGUF file of transformers, or owner/name on the hub",
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text file, UTF-8")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="folder or hub name with a tokenizer, or bytes; the model's own if left out"
    )
    parser.add_argument(
        "--window", type=positive, metavar="N", help="tokens of a forward pass; 1024, or the model's positions if fewer"
    )
    parser.add_argument("--stride", type=positive, metavar="N", help="tokens from one window to the next; the window")
    parser.add_argument("--tokens", type=positive, metavar="N", help="score the first tokens of the text only")
    parser.add_argument("--batch-size", type=positive, metavar="N", default=1, help="windows per pass")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each window with the tokenizer's first token; by default as the tokenizer begins a text",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; as they are stored if left out")
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=perplexity)


def perplexity(args: argparse.Namespace) -> int:
    """Computes the perplexity and prints it."""
    import torch

    from vit_tucker.inference.text import perplexity_of_text

    found = perplexity_of_text(
        args.model,
        args.text,
        tokenizer=args.tokenizer,
        window=args.window,
        stride=args.stride,
        tokens=args.tokens,
        batch_size=args.batch_size,
        bos=args.bos,
        dtype=args.dtype and getattr(torch, args.dtype),
        device=choose_device(args.device),
    )
    values = {"model": args.model, "text": str(args.text), **found.to_dict()}
    bits = "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f} bits per byte, "
    windows = f"windows of {found.window} tokens every {found.stride}"
    line = f"perplexity {found.perplexity:.4g}, {bits}loss {found.loss:.4f}, {found.tokens:,} tokens scored, {windows}"
    emit(to_json(values) if args.json else f"{args.model} on {args.text}: {line}")
    return 0
