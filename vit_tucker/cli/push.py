"""``push``: a model to the Hugging Face hub."""

import argparse
from typing import Any

from vit_tucker.cli.common import MODEL_HELP, add_json, emit, to_json


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "push",
        help="upload a model to the Hugging Face hub",
        description="Upload a model to the Hugging Face hub by timm's own function, as safetensors. The token is that of "
        "'hf auth login' or HF_TOKEN.",
    )
    parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository; created if missing")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--message", default="Add model", metavar="TEXT", help="message of the commit")
    add_json(parser)
    parser.set_defaults(run=push)


def push(args: argparse.Namespace) -> int:
    """Uploads the model and prints its address."""
    from vit_tucker.checkpoint.hub import unreachable
    from vit_tucker.checkpoint.save import push_to_hub
    from vit_tucker.errors import ConfigError, FailedError
    from vit_tucker.inference.predict import open_model

    owner, _, name = args.repo.partition("/")
    if not owner or not name or "/" in name:
        raise ConfigError(f"{args.repo}: a repository is written OWNER/NAME")
    model = open_model(args.model)
    if (reason := unreachable()) is not None:
        raise FailedError(f"{args.repo}: not uploaded: {reason}")
    try:
        address = push_to_hub(model, args.repo, private=args.private, commit_message=args.message)
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors: no connection, no token, no right
        if type(error).__module__.startswith("vit_tucker"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise FailedError(f"{args.repo}: not uploaded: {type(error).__name__}: {lines[0] if lines else ''}") from None
    emit(to_json({"repository": args.repo, "commit": str(address)}) if args.json else f"{args.repo}: {address}")
    return 0
