"""How docstrings become pages: the package writes plain text in them, and names that share a description on one line."""

import ast
import importlib
import inspect
import re
from typing import Any

import griffe

SHARED = re.compile(r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$", re.MULTILINE)
SECTIONS = re.compile(r"^(?:Args|Attributes):$", re.MULTILINE)
LITERAL = re.compile(r"``(?P<code>.+?)``")
SPECIAL = re.compile(r"(?<!\\)([*\[\]]|(?<!\w)_|_(?!\w))")
ENTITIES = {"<": "&lt;", ">": "&gt;", "$": "&#36;"}
ENTRY = re.compile(r"^ {4}\*{0,2}\w+: ")


def split_names(text: str) -> str:
    """'a, b: text' in the Args and Attributes sections as an entry for each name; what follows on further lines goes to all."""
    lines, result, index, inside = text.splitlines(), [], 0, False
    while index < len(lines):
        line = lines[index]
        if line and not line.startswith(" "):
            inside = SECTIONS.fullmatch(line) is not None
        match = SHARED.match(line) if inside else None
        if match is None or len(match["indent"]) != 4:
            result.append(line)
            index += 1
            continue
        more = index + 1
        while more < len(lines) and lines[more].startswith(" " * 8):
            more += 1
        for name in match["names"].split(", "):
            result += [f"{match['indent']}{name}: {match['text']}", *lines[index + 1 : more]]
        index = more
    return "\n".join(result)


def plain(text: str) -> str:
    """Text whose signs mean nothing to Markdown."""
    text = SPECIAL.sub(r"\\\1", text)
    return "".join(ENTITIES.get(sign, sign) for sign in text)


def as_markdown(text: str, references: dict[str, str]) -> str:
    """Plain text with ``literals`` as Markdown: signs of formulas stay what they are, names of the package become links.

    Args:
        text: a docstring, its indented blocks are code.
        references: link targets by name.
    """

    def converted(line: str) -> str:
        if line.startswith(" " * 4) and not in_section[0]:
            return line  # an indented block
        if line and not line.startswith(" "):
            in_section[0] = bool(re.fullmatch(r"(?:Args|Attributes|Returns|Yields|Raises):", line))
        parts, end = [], 0
        if in_section[0] and (entry := ENTRY.match(line)):
            parts, end = [entry.group()], entry.end()
        for match in LITERAL.finditer(line, end):
            parts.append(plain(line[end : match.start()]))
            code = match["code"]
            target = references.get(code.partition("(")[0])
            parts.append(f"[`{code}`][{target}]" if target else f"`{code}`")
            end = match.end()
        parts.append(plain(line[end:]))
        return "".join(parts)

    in_section = [False]
    return "\n".join(converted(line) for line in text.splitlines())


class PlainDocstrings(griffe.Extension):
    """Reads docstrings as plain text, and a pydantic field's description as its docstring."""

    def __init__(self) -> None:
        import vit_tucker
        import vit_tucker.explain
        import vit_tucker.export

        packages = vit_tucker.explain, vit_tucker.export, vit_tucker
        names = [(package, name) for package in packages for name in package.__all__]
        self.references = {
            name: f"{package.__name__}.{name}"
            for package, name in names
            if not inspect.ismodule(getattr(package, name))
        }

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(split_names(obj.docstring.value), self.references)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Show a pydantic field as a reader thinks of it: type, default, description."""
        value = attr.value
        if not isinstance(value, griffe.ExprCall) or str(value.function) != "Field":
            return
        given = {part.name: part.value for part in value.arguments if isinstance(part, griffe.ExprKeyword)}
        attr.value, attr.labels = given.get("default"), set()
        attr.annotation = bare_type(attr.annotation)
        if "description" in given:
            text = described(attr, str(given["description"]))
            attr.docstring = griffe.Docstring(as_markdown(text, self.references), parent=attr)


def described(attr: griffe.Attribute, source: str) -> str:
    """The description of a pydantic field: a literal of the source, or what its class has where the source computes it."""
    try:
        return str(ast.literal_eval(source))
    except ValueError:
        model = getattr(importlib.import_module(attr.module.path), str(attr.parent.name if attr.parent else ""))
        return str(model.model_fields[attr.name].description)


def bare_type(annotation: Any) -> Any:
    """A type without what only pydantic reads: ``X`` for ``Annotated[X, ...]``."""
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Annotated":
        inner = annotation.slice
        return bare_type(inner.elements[0] if isinstance(inner, griffe.ExprTuple) else inner)
    if isinstance(annotation, griffe.ExprBinOp):
        return griffe.ExprBinOp(bare_type(annotation.left), annotation.operator, bare_type(annotation.right))
    return annotation
