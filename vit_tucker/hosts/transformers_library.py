"""Imports transformers, the optional extra ``hf``, where a model of it comes in; and keeps what it prints off the terminal."""

import importlib
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

from vit_tucker.errors import ConfigError, VitTuckerError, how_to_install

OLDEST = (5, 10)
"""First version of transformers whose attention and caches are called as layers of ours are."""
OLDEST_PYTHON = (3, 11)


def import_transformers(what: str, error: type[VitTuckerError] = ConfigError) -> Any:
    """Returns the package transformers, imported when it is first needed.

    Args:
        what: needs it: the name of a model, for the message.
        error: what to raise.

    Raises:
        VitTuckerError: it isn't installed, or too old; names the extra.
    """
    try:
        package = importlib.import_module("transformers")
    except ImportError:
        python = "" if sys.version_info >= OLDEST_PYTHON else f" and Python {'.'.join(map(str, OLDEST_PYTHON))}"
        raise error(f"{what}: language models need transformers{python}: {how_to_install('hf')}") from None
    found = package.__version__
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise error(f"{what}: language models need transformers {oldest} or newer, not {found}: {how_to_install('hf')}")
    return package


@contextmanager
def quiet_transformers(progress: bool) -> Iterator[None]:
    """Makes a context in which transformers logs errors only, with or without its own progress bars.

    Args:
        progress: whether they are shown; they would go into pipes and logs too.
    """
    from transformers.utils import logging

    # the bar of GGUF files has no switch
    silent = nullcontext() if progress else redirect_stderr(io.StringIO())
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        with silent:
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
