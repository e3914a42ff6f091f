"""The YAML schema of a run, as frozen pydantic models. Reading, merging and error lines are in load.py and source.py.

Names are timm's wherever timm has one. Every field's description ends up in the JSON schema, and so in the user's editor.
"""

from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field, InstanceOf, create_model

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.registry import get_method, list_methods
from vit_tucker.config.data_section import DataConfig as DataConfig
from vit_tucker.config.model_section import ModelConfig as ModelConfig
from vit_tucker.config.run_sections import RunSections
from vit_tucker.config.train_section import TrainConfig as TrainConfig
from vit_tucker.linear.base import LINEAR_METHODS, LinearConfig


def describe_key(name: str) -> str | None:
    """Returns the description of a key of the run."""
    return RunSections.model_fields[name].description


class RunConfig(RunSections):
    """One run: everything that decides its result."""

    attention: InstanceOf[AttentionConfig] | None = Field(default=None, description=describe_key("attention"))
    linear: InstanceOf[LinearConfig] | None = Field(default=None, description=describe_key("linear"))


def run_config_model() -> type[RunConfig]:
    """Returns RunConfig with unions of the registered methods as its sections of methods, discriminated by ``method``."""
    linear = tuple(LINEAR_METHODS.get(name) for name in LINEAR_METHODS.names())
    return _run_config_model(tuple(get_method(name) for name in list_methods()), linear)


@lru_cache
def _run_config_model(methods: tuple[Any, ...], linear: tuple[Any, ...]) -> type[RunConfig]:
    """Returns one class per set of methods, so that equal configs compare equal."""
    sections: dict[str, Any] = {}
    for name, known in (("attention", methods), ("linear", linear)):
        union: Any = reduce(or_, known)
        if len(known) > 1:
            union = Annotated[union, Field(discriminator="method")]
        described = Field(default=None, description=describe_key(name))
        sections[name] = (union | None, described)
    return create_model("RunConfig", __base__=RunConfig, __module__=__name__, **sections)


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of a config file, for editors: the run's keys and ``base``."""
    schema = run_config_model().model_json_schema()
    schema["title"] = "vit_tucker run"
    schema["required"] = []  # a file with a base need not repeat what the base says
    schema["$defs"]["ModelConfig"].pop("required", None)
    schema["properties"]["base"] = {
        "description": "Config file(s) that this one starts from; relative to this file, or to the shipped configs.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return schema
