"""Errors that a user can mend: one clear line each, exit status 2 on the command line."""

import difflib
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager

MAX_MESSAGE = 2000
"""Characters of a message: what a user gave may be of any length."""


class VitTuckerError(ValueError):
    """Base of all errors about what the user gave us. The message is one line of printable characters, whatever was given."""

    def __str__(self) -> str:
        return shorten(super().__str__(), MAX_MESSAGE)


class PatchError(VitTuckerError):
    """A model or module that can't be patched as asked; nothing has been changed."""


class WeightsError(PatchError):
    """Weights that are not what their module computes with, or are NaN or infinite; nothing has been changed."""


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Prepends a module's full name to the message of a PatchError that is raised inside."""
    try:
        yield
    except PatchError as error:
        raise type(error)(f"{module}: {error}") from None


class ConfigError(VitTuckerError):
    """A config file, key or value that can't be used."""


class DataError(VitTuckerError):
    """A data set that is missing or not of the expected format."""


class CheckpointError(VitTuckerError):
    """A checkpoint that is missing, torn, or of another model."""


class ExportError(VitTuckerError):
    """A model that can't be exported as asked; nothing has been written."""


class ExplainError(VitTuckerError):
    """A model or an image whose attention can't be shown as asked."""


class FailedError(RuntimeError):
    """A run that failed for no mistake of the user's: one line, exit status 1."""


class DivergedError(FailedError):
    """The loss became NaN or infinite."""


class SaveError(FailedError):
    """A checkpoint that can't be written; those before it are intact."""


class MismatchError(FailedError):
    """An exported file that does not compute what the model does; it did not get its name."""


class PeerError(FailedError):
    """Another process of the run failed; its message is here."""


class StoppedError(RuntimeError):
    """A signal stopped the run; its state is saved, exit status 130."""


def shorten(text: object, most: int = 120) -> str:
    """Returns the text in one line of at most so many characters, its middle left out; control characters as escapes."""
    line = str(text)
    if len(line) > most:
        half = (most - 3) // 2
        line = f"{line[: most - 3 - half]}...{line[-half:]}"
    if line.isprintable():
        return line
    line = " ".join(part for part in line.splitlines() if part.strip())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def one_line(text: object, most: int | None = None) -> str:
    """Returns another library's message in one line, each white space one blank, cut after so many characters."""
    return " ".join(str(text).split())[:most]


def reason_of(error: BaseException, most: int = 200) -> str:
    """Returns an error's message in one line of at most so many characters; its class if it has none."""
    return one_line(error, most) or type(error).__name__


def how_to_install(extra: str) -> str:
    """Returns how the packages of an extra of setup.cfg are installed, for messages."""
    return f"pip install 'vit_tucker[{extra}]' (in a clone: ./run.sh setup {extra})"


def and_more(names: Sized, shown: int = 1) -> str:
    """Returns ' (and 3 more)' where a message names only the first of several things; '' where it names all."""
    return f" (and {len(names) - shown} more)" if len(names) > shown else ""


def nearest_match(name: str, valid: Iterable[str]) -> str | None:
    """Returns the valid name nearest to ``name``, or None where none is near."""
    if len(name) > 100:
        return None
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.55)
    return matches[0] if matches else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns '; did you mean X?' for the valid name nearest to ``name``, or '' where none is near."""
    match = nearest_match(name, valid)
    return "" if match is None else f"; did you mean '{match}'?"
