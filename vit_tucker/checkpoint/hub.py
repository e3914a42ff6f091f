"""Finds out whether the Hugging Face hub can be reached, before its client retries for a minute or longer.

A file that is in the hub's cache needs no network: the client asks once whether it has changed, and uses it.
"""

import socket
from collections.abc import Sequence
from importlib.util import find_spec
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from timm.models import get_pretrained_cfg
from timm.models._hub import has_hf_hub, hf_split

from vit_tucker.errors import CheckpointError, reason_of

SCHEMES = ("hf-hub", "hf_hub")
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Names of weights in a repository: timm looks for these."""
WAYS_OUT = "model.pretrained=false starts from random weights, model.checkpoint=FILE from weights of yours"
OFFLINE = "HF_HUB_OFFLINE is set"
CACHED = "models that are in the cache need no network, and with HF_HUB_OFFLINE=1 the hub is not even asked"


def refuse_missing_host(name: str, pretrained: bool) -> None:
    """Raises CheckpointError at once if what timm needs from the hub for a model is neither in the cache nor to be had.

    Args:
        name: timm's, of the model; 'hf-hub:owner/name' for a stored one.
        pretrained: its weights are needed too, from where timm has them.
    """
    if not has_hf_hub():
        return  # timm reports it: it can't use what is in the cache either
    scheme, colon, repo = name.partition(":")
    files: tuple[str, ...] = WEIGHT_FILES
    if scheme in SCHEMES:
        refuse_missing(repo, ("config.json",), f"model.name: {name}")
    elif colon:  # of this machine
        return
    elif pretrained:
        repo, files = weights_of(name)
    if pretrained and repo:
        refuse_missing(repo, files, f"model.pretrained: no weights for {name}", WAYS_OUT)


def weights_of(name: str) -> tuple[str, tuple[str, ...]]:
    """Returns the repository of timm's weights for a model and what they may be called in it; '' if they are not on the hub."""
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:  # no such tag, which timm reports
        cfg = None
    if cfg is None or cfg.file or not cfg.hf_hub_id:
        return "", ()
    file = cfg.hf_hub_filename
    return cfg.hf_hub_id, WEIGHT_FILES if file is None else (file, f"{file.rpartition('.')[0]}.safetensors")


def refuse_missing(repo: str, files: Sequence[str], what: str, *ways: str) -> None:
    """Raises CheckpointError if none of a repository's files is in the hub's cache and the hub can't be reached.

    Args:
        repo: OWNER/NAME, perhaps with @REVISION.
        files: names in it.
        what: names them, for the message.
        ways: what would help, beside a cache.
    """
    if find_spec("huggingface_hub") is None:
        return  # which timm and transformers report
    from huggingface_hub import try_to_load_from_cache

    owner_name, revision = hf_split(repo)
    if any(isinstance(try_to_load_from_cache(owner_name, file, revision=revision), str) for file in files):
        return
    if (reason := unreachable()) is not None:
        advice = "; ".join([*ways, *([] if reason == OFFLINE else [CACHED])])
        raise CheckpointError(f"{what}: not in the hub's cache ({repo}), and {reason}{advice and f'; {advice}'}")


def unreachable() -> str | None:
    """Returns why the hub can't be reached; None where it can be, or where a proxy alone knows."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return OFFLINE
    place, proxies = urlsplit(constants.ENDPOINT), getproxies()
    host = place.hostname or ""
    if (place.scheme in proxies or "all" in proxies) and not proxy_bypass(host):
        return None
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        with socket.create_connection((host, port), timeout=constants.HF_HUB_ETAG_TIMEOUT):
            return None
    except OSError as error:
        return f"{host} can't be reached ({reason_of(error)})"
