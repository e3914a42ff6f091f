"""How docstrings become pages: the package writes plain text in them, and names that share a description on one line."""

import ast
import re
from typing import Any

import griffe

SHARED = re.compile(r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$", re.MULTILINE)
SECTIONS = re.compile(r"^(?:Args|Attributes):$", re.MULTILINE)
LITERAL = re.compile(r"``(?P<code>.+?)``")
SPECIAL = re.compile(r"(?<!\\)([*\[\]<>^~$]|(?<!\w)_|_(?!\w))")
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
            parts.append(SPECIAL.sub(r"\\\1", line[end : match.start()]))
            code = match["code"]
            target = references.get(code.partition("(")[0])
            parts.append(f"[`{code}`][{target}]" if target else f"`{code}`")
            end = match.end()
        parts.append(SPECIAL.sub(r"\\\1", line[end:]))
        return "".join(parts)

    in_section = [False]
    return "\n".join(converted(line) for line in text.splitlines())


class PlainDocstrings(griffe.Extension):
    """Reads docstrings as plain text, and a pydantic field's description as its docstring."""

    def __init__(self) -> None:
        import vit_tucker

        self.references = {name: f"vit_tucker.{name}" for name in vit_tucker.__all__}

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(split_names(obj.docstring.value), self.references)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Give a pydantic field its description."""
        value = attr.value
        if attr.docstring is None and isinstance(value, griffe.ExprCall) and str(value.function) == "Field":
            for argument in value.arguments:
                if isinstance(argument, griffe.ExprKeyword) and argument.name == "description":
                    text = ast.literal_eval(str(argument.value))
                    attr.docstring = griffe.Docstring(as_markdown(text, self.references), parent=attr)
