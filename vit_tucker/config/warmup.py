"""The warm-up of a recipe whose epochs are overridden: where it is longer than the training, it keeps its share of the epochs.

A preset with 3 epochs of warm-up in 30 has a tenth of an epoch of it in a run with ``train.epochs=1``. A warm-up that is given
together with fewer epochs, in one file or on one command line, is a contradiction and refused.
"""

from collections.abc import Mapping
from typing import Any

from vit_tucker.config.train_section import TrainConfig

EPOCHS, WARMUP = "epochs", "warmup_epochs"


def chosen_for(
    base: Mapping[str, Any], top: Mapping[str, Any], base_epochs: float | None, top_epochs: float | None
) -> float | None:
    """Returns for how many epochs the warm-up of two merged configs was chosen; None while that is not known.

    Args:
        base, top: values; ``top`` overrides ``base``.
        base_epochs, top_epochs: the same of each of them, as far as it is known.
    """
    low, high = _recipe(base), _recipe(top)
    if WARMUP in high:
        return top_epochs if top_epochs is not None else _number(high.get(EPOCHS, low.get(EPOCHS)))
    if WARMUP in low and EPOCHS in high and base_epochs is None:
        return _number(low.get(EPOCHS, TrainConfig.model_fields[EPOCHS].default))
    return base_epochs


def shortened_warmup(values: Mapping[str, Any], chosen: float | None) -> tuple[float, str] | None:
    """Returns the warm-up that a training has in place of a longer one, and a line for the log; None where it fits.

    Args:
        values: of a whole config.
        chosen: see ``chosen_for``; a warm-up that did not fit there either stays.
    """
    recipe = _recipe(values)
    epochs, warmup = _number(recipe.get(EPOCHS)), _number(recipe.get(WARMUP))
    if chosen is None or epochs is None or warmup is None or not 0 < epochs < warmup <= chosen:
        return None
    fitting = float(f"{warmup * epochs / chosen:.4g}")
    note = f"train.warmup_epochs: {warmup:g} of {chosen:g} epochs is shortened to {fitting:g}, since train.epochs={epochs:g}"
    return fitting, note


def _recipe(values: Mapping[str, Any]) -> Mapping[str, Any]:
    recipe = values.get("train")
    return recipe if isinstance(recipe, dict) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
