"""What docstrings say of arguments, attributes and errors, against the code itself."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from pydantic import BaseModel

SECTION = re.compile(r"^(?P<name>Args|Attributes|Returns|Yields|Raises):$")
ENTRY = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*): (?P<text>.*)$")


def sections(text: str) -> dict[str, dict[str, str]]:
    """Entries of a Google-style docstring by section and name; entries go on over indented lines."""
    found: dict[str, dict[str, str]] = {}
    section: dict[str, str] | None = None
    names: list[str] = []
    for line in text.splitlines():
        if heading := SECTION.match(line):
            section = found.setdefault(heading["name"], {})
        elif line and not line.startswith(" "):
            section = None
        elif section is not None and (entry := ENTRY.match(line)):
            names = [name.lstrip("*") for name in entry["names"].split(", ")]
            section.update(dict.fromkeys(names, entry["text"]))
        elif section is not None and line:
            section.update({name: f"{section[name]} {line.strip()}" for name in names if name in section})
    return found


def problems(name: str, thing: Any) -> Iterator[str]:
    """What is missing in the docstring of a public class or function, a line each."""
    text = inspect.getdoc(thing) or ""
    if not text:
        yield f"{name}: no docstring"
    elif inspect.isclass(thing):
        yield from class_problems(name, thing, sections(text))
    elif callable(thing):
        yield from function_problems(name, thing, sections(text))


def function_problems(name: str, function: Any, said: dict[str, dict[str, str]]) -> Iterator[str]:
    """Arguments that are not documented, tensors without a shape, errors that are raised without a word."""
    arguments = said.get("Args", {})
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if parameter.name not in arguments:
            yield f"{name}: argument {parameter.name} is not documented"
        elif "Tensor" in str(parameter.annotation) and "(" not in arguments[parameter.name]:
            yield f"{name}: argument {parameter.name} is a tensor without a shape"
    for extra in arguments.keys() - parameters.keys():
        yield f"{name}: there is no argument {extra}"
    named = " ".join(f"{error}: {text}" for error, text in said.get("Raises", {}).items())
    for error in raised(function):
        if error not in named:
            yield f"{name}: raises {error} without saying so"


def raised(function: Any) -> set[str]:
    """Names of the errors that a function's own body raises by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def class_problems(name: str, cls: type, said: dict[str, dict[str, str]]) -> Iterator[str]:
    """Fields that are not documented, tensors among them without a shape; public methods without a docstring."""
    if issubclass(cls, BaseModel):
        yield from (f"{name}: key {key} has no description" for key, info in cls.model_fields.items()
                    if not info.description and key not in ("method", "layers"))  # fmt: skip
    elif is_dataclass(cls) or hasattr(cls, "_fields"):
        attributes = said.get("Attributes", {})
        for field, annotation in inspect.get_annotations(cls).items():
            if field not in attributes:
                yield f"{name}: attribute {field} is not documented"
            elif "Tensor" in str(annotation) and "(" not in attributes[field]:
                yield f"{name}: attribute {field} is a tensor without a shape"
    for member, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not member.startswith("_") and inspect.isfunction(function) and not function.__doc__:
            yield f"{name}.{member}: no docstring"
