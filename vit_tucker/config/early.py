"""Finds mistakes in a run's config before torch is imported, which takes seconds.

The sections of model, data and recipe are validated as they are; options of methods by stand-ins with the same keys, which are
made of the shipped JSON schema.
"""

import json
import sys
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from vit_tucker.config.find import package_configs
from vit_tucker.config.run_sections import RunSections
from vit_tucker.config.source import Source
from vit_tucker.errors import ConfigError
from vit_tucker.validation.mistakes import describe_mistake


class StandIn(BaseModel):
    """Base of stand-ins: the keys of a section, with any values."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def refuse_early(source: Source) -> None:
    """Refuses what can be known to be wrong without torch; does nothing where it has been imported.

    Args:
        source: all values of a run's config. Where it names plug-ins, what these may register is not looked at.

    Raises:
        ConfigError: the line that ``vit_tucker.config.load.validate`` would raise.
    """
    if "torch" not in sys.modules:  # nor have plug-ins registered anything
        check_sections(source.fitted()[0])


def check_sections(source: Source) -> None:
    """Raises ConfigError for mistakes that ``refuse_early`` finds, whatever has been imported."""
    values = source.values
    if values.get("plugins"):
        values = {key: value for key, value in values.items() if key not in ("attention", "linear")}
        if isinstance(recipe := values.get("train"), dict):
            values["train"] = {key: value for key, value in recipe.items() if key not in ("penalties", "step_rule")}
    model = sections_model()
    try:
        model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(describe_mistake(error, model, values, source.where)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source.where(())}: {error}") from None


@cache
def sections_model() -> type[RunSections]:
    """Returns the sections of a run with stand-ins for the options of the shipped attention methods."""
    schema = json.loads((package_configs() / "schema.json").read_text())
    mapping = schema["properties"]["attention"]["anyOf"][0]["discriminator"]["mapping"]
    methods: list[Any] = [stand_in(schema["$defs"], reference) for reference in mapping.values()]
    union: Any = Annotated[reduce(or_, methods), Field(discriminator="method")] | None
    return create_model("Sections", __base__=RunSections, attention=(union, None))


def stand_in(definitions: dict[str, Any], reference: str) -> type[BaseModel]:
    """Returns the stand-in of an object of the schema.

    Args:
        definitions: ``$defs`` of the schema.
        reference: '#/$defs/NAME', of an object.
    """
    name = reference.rpartition("/")[2]
    found = definitions[name]
    fields: dict[str, Any] = {}
    for key, entry in found["properties"].items():
        parts = entry.get("anyOf", ())
        if "const" in entry:
            kind: Any = Literal[entry["const"]]
        elif [part for part in parts if "$ref" in part] and len(parts) == 2 and {"type": "null"} in parts:
            kind = stand_in(definitions, next(part["$ref"] for part in parts if "$ref" in part)) | None
        elif entry.get("type") == "string" and "enum" in entry:
            kind = Literal[tuple(entry["enum"])]
        else:
            kind = Any
        fields[key] = (kind, ... if key in found.get("required", ()) else entry.get("default"))
    made: type[BaseModel] = create_model(name, __base__=StandIn, **fields)
    return made
