"""Tables of the site that are made from the code: the configuration's keys, the package's parts."""

import ast
import html
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.hooks import ROOT

SLIP = 10_000
"""Larger bounds guard against slips; they tell a reader nothing."""
CODE_WITH_BAR = re.compile(r"`([^`|]*\|[^`]*)`")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """Text of a cell; a bar ends it, even in code, unless it is escaped."""
    text = CODE_WITH_BAR.sub(lambda match: f"<code>{html.escape(match[1]).replace('|', '&#124;')}</code>", text)
    return text.replace("|", "\\|")


def plain(text: str) -> str:
    """Text whose signs Markdown leaves alone: 'runs/<name>' is no tag."""
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*").replace("``", "`")


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML would say it: 'int or null', 'list of 3 int', 'one of a, b'."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (Union, types.UnionType):
        names = [type_name(argument) for argument in arguments]
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        count = f"{len(inner)} " if origin is tuple and Ellipsis not in arguments else ""
        return f"list of {count}{type_name(inner[0])}" if inner else "list"
    if origin is dict:
        return "mapping"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"section {annotation.__name__.removesuffix('Config')}"
    return {bool: "true or false", str: "text", Any: "any"}.get(annotation, getattr(annotation, "__name__", "any"))


def limits(info: FieldInfo) -> str:
    """'>= 1, <= 8' of a field's constraints."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {value:g}" for part in info.metadata for name, sign in signs.items()
             if (value := getattr(part, name, None)) is not None and value < SLIP]  # fmt: skip
    return ", ".join(found)


def default_text(info: FieldInfo) -> str:
    """The default as YAML has it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else "`''`"


def field_rows(model: type[BaseModel], skip: Iterable[str] = ()) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of each field of a model."""
    for name, info in model.model_fields.items():
        if name in skip:
            continue
        bounds = limits(info)
        kind = type_name(info.annotation) + (f", {bounds}" if bounds else "")
        yield f"`{name}`", kind, default_text(info), plain(info.description or "")


def fields_table(model: type[BaseModel], skip: Iterable[str] = ()) -> str:
    """Keys of a model as a Markdown table."""
    return markdown_table(("key", "type", "default", "what it does"), field_rows(model, skip))


def config_reference() -> str:
    """Reference of a run's config, as Markdown: a section for each of its sections and methods."""
    import vit_tucker
    from vit_tucker.config import schema, train_section

    shared = list(vit_tucker.AttentionConfig.model_fields)
    parts = ["## A run's file\n", fields_table(schema.RunConfig)]
    sections = (("model", schema.ModelConfig), ("data", schema.DataConfig), ("train", schema.TrainConfig))
    for name, model in (*sections, ("train.distill", train_section.DistillConfig)):
        parts += [f"## `{name}`\n", f"{_summary(model)}\n", fields_table(model)]
    parts += ["## `attention`\n", "Keys of all methods:\n", fields_table(vit_tucker.AttentionConfig, ["method"])]
    for name in vit_tucker.list_methods():
        method = vit_tucker.get_method(name)
        own = [key for key in method.model_fields if key not in shared]
        table = fields_table(method, shared) if own else "No keys of its own.\n"
        parts += [f"### `method: {name}`\n", f"{_summary(method)}\n", table]
    for key, option in (("calibration", vit_tucker.Calibration), ("ranks: a rule", vit_tucker.RankRule)):
        parts += [f"### `attention.{key}`\n", f"{_summary(option)}\n", fields_table(option)]
    parts += ["### `attention.rules`\n", f"A list. {_summary(vit_tucker.Rule)}\n"]
    return "\n".join(parts)


def sweep_reference() -> str:
    """Reference of a sweep's file, as Markdown."""
    from vit_tucker.sweep import schema

    cell = ["### An entry of `cells`\n", f"{_summary(schema.CellConfig)}\n", fields_table(schema.CellConfig)]
    return "\n".join(
        ["## A sweep's file\n", f"{_summary(schema.SweepConfig)}\n", fields_table(schema.SweepConfig), *cell]
    )


def _summary(model: type[BaseModel]) -> str:
    text = " ".join((model.__doc__ or "").partition("\n\n")[0].split())
    return text.replace("``", "`")


def layering() -> dict[str, set[str]]:
    """What each part of the package may import: the map that ``tests/test_layering.py`` holds the code to."""
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text())
    value = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "ALLOWED"
    )
    allowed: dict[str, set[str]] = eval(compile(ast.Expression(value), "ALLOWED", "eval"))  # a literal of our own tests
    return allowed


def layering_table() -> str:
    """Parts of the package, what they are for and what they may import, lowest first."""
    rows = []
    for part, allowed in layering().items():
        package = ROOT / "vit_tucker" / part
        file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
        if part in ("__init__", "__main__"):
            continue
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        purpose = " ".join(docstring.partition("\n\n")[0].split()).replace("``", "`").removesuffix(".")
        known = ", ".join(f"`{name or 'vit_tucker'}`" for name in layering() if name in allowed) or "nothing"
        if "" in allowed:
            known += ", `vit_tucker`"
        rows.append((f"`{part}`", purpose, known))
    return markdown_table(("part", "what it is for", "may import"), rows)


GENERATED = {
    "config": config_reference,
    "sweep": sweep_reference,
    "layering": layering_table,
}
"""What ``<!-- generated: NAME -->`` in a page stands for; ``hooks.py`` adds the commands."""
