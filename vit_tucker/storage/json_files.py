"""Reads JSON files from elsewhere strictly, and checks them against a model of their contents; each fault is one line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vit_tucker.errors import CheckpointError, VitTuckerError, reason_of
from vit_tucker.validation.mistakes import describe_mistake

MAX_BYTES = 1 << 26
"""Longer files are no JSON of ours or of timm's: the names and descriptions of 22,000 classes take 2 MB."""
NEWER = "; was it written by a newer vit_tucker?"


class Strict(BaseModel):
    """Base of models of JSON contents: no booleans for numbers, no fractions for whole numbers, nothing unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Lenient(Strict):
    """The same where others may add entries, which are not read here."""

    model_config = ConfigDict(extra="ignore")


M = TypeVar("M", bound=BaseModel)


def read_object(file: Path, error: type[VitTuckerError] = CheckpointError, all_finite: bool = True) -> dict[str, Any]:
    """Reads the mapping in a JSON file.

    Args:
        file: UTF-8, no larger than ``MAX_BYTES``.
        error: what to raise.
        all_finite: refuse NaN and infinities, which Python writes and JSON does not have; scores may be such.

    Raises:
        VitTuckerError: missing, unreadable, or something else; a key is there twice, or a number is not finite.
    """
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise error(f"{file}: {size:,} bytes are too many for such a file")
        return parse_object(file.read_text(encoding="utf-8"), str(file), error, all_finite)
    except UnicodeDecodeError:
        raise error(f"{file}: can't be read as JSON: it is not UTF-8") from None
    except OSError as fault:
        raise error(f"{file}: can't be read: {fault.strerror or type(fault).__name__}") from None


def parse_object(
    text: str, where: str, error: type[VitTuckerError] = CheckpointError, all_finite: bool = True
) -> dict[str, Any]:
    """Returns the mapping in a JSON text.

    Args:
        text: JSON.
        where: names the text, for messages.
        error, all_finite: see ``read_object``.

    Raises:
        VitTuckerError: see ``read_object``.
    """

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
            raise ValueError(f"the key {twice!r} is there twice")
        return values

    try:
        strict: dict[str, Any] = {"parse_float": finite, "parse_constant": refuse_constant} if all_finite else {}
        values = json.loads(text, object_pairs_hook=unique, **strict)
        json.dumps(values, ensure_ascii=False).encode("utf-8")  # halves of characters, which can't be printed
    except UnicodeEncodeError:
        raise error(f"{where}: can't be read as JSON: it contains half of a surrogate pair") from None
    except RecursionError:
        raise error(f"{where}: can't be read as JSON: it is nested too deep") from None
    except ValueError as fault:
        raise error(f"{where}: can't be read as JSON: {reason_of(fault)}") from None
    if not isinstance(values, dict):
        raise error(f"{where}: contains a {kind_of(values)}, not an object")
    return values


def finite(text: str) -> float:
    """Returns a number; raises ValueError if it is too large for one."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def refuse_constant(text: str) -> NoReturn:
    """Raises ValueError for NaN and infinities."""
    raise ValueError(f"{text} is no finite number")


def kind_of(value: Any) -> str:
    """Returns what a JSON value is, in JSON's words."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def checked(kind: type[M], values: Any, where: str, error: type[VitTuckerError] = CheckpointError) -> M:
    """Returns JSON values as a pydantic model.

    Args:
        kind: the model.
        values: to be checked.
        where: names the file, for messages.
        error: what to raise.

    Raises:
        VitTuckerError: names the entry, what was found and what is allowed; the nearest name for an unknown one.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as fault:
        unknown = any(mistake["type"] == "extra_forbidden" for mistake in fault.errors(include_url=False))
        raise error(describe_mistake(fault, kind, values, lambda path: where) + (NEWER if unknown else "")) from None
    except RecursionError:
        raise error(f"{where}: is nested too deep") from None
