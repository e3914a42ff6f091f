"""Registries of what a plug-in adds to a recipe by name: penalties of the loss, and rules of an optimizer step."""

import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from vit_tucker.errors import ConfigError
from vit_tucker.validation.checked import Checked
from vit_tucker.validation.mistakes import describe_mistake
from vit_tucker.validation.registry import Registry

PENALTIES: Registry[Callable[..., Any]] = Registry(
    "penalty", reserved=("label", "distill", "features"), identifiers=True
)
"""Functions of the model; the reserved names are those of the loss's other terms."""
STEP_RULES: Registry[type[Any]] = Registry("step rule", identifiers=True)
"""Classes, each made from its options: an instance of its attribute ``Options``, a ``Checked``."""


def step_options(given: dict[str, Any]) -> Checked:
    """Validates the options of a step rule strictly, as all of a config is.

    Args:
        given: ``name``, and the options.

    Raises:
        ConfigError: unknown name or option, or a wrong value.
    """
    options = {key: value for key, value in given.items() if key != "name"}
    model: type[Checked] = STEP_RULES.get(given["name"]).Options
    try:
        return model.model_validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        line = describe_mistake(error, model, options, lambda path: given["name"])
        raise ConfigError(line) from None
