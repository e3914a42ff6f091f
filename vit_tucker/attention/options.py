"""Options that all methods share: where a method goes, rules for some layers, rules that choose ranks, and calibration."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from typing_extensions import Self

from vit_tucker.errors import PatchError, nearest
from vit_tucker.validation.checked import MAX_INTEGER, Checked, refuse_unusable

MAX_RANK = 2**20
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
"""A rank, a width or a number of heads; what a host allows is for ``AttentionConfig.check``."""
_Layer = Annotated[int, Field(ge=-10_000, le=10_000)]
Selection = _Layer | str | tuple[_Layer | str, ...]
"""Modules by name, pattern, index or range."""


def refuse_rank_options(layer: str, given: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises PatchError for ranks that a layer's ``resize`` can't have.

    Args:
        layer: name of its class.
        given: ranks by option.
        current: all of the layer's options with its present ranks: a number, or a tuple of them.
    """
    for option, ranks in given.items():
        if option not in current:
            known = f"what can be resized: {', '.join(current)}" if current else "it has no ranks"
            raise PatchError(f"{layer} can't resize '{option}', {known}{nearest(option, list(current))}")
        length = len(current[option]) if isinstance(current[option], tuple) else 1
        entries = ranks if isinstance(current[option], tuple) and isinstance(ranks, tuple | list) else (ranks,)
        if len(entries) != length or not all(type(rank) is int and rank >= 1 for rank in entries):
            wanted = "a whole number" if length == 1 else f"{length} whole numbers"
            raise PatchError(f"{option}={ranks!r}: must be {wanted} above 0")


class RankRule(Checked):
    """Ranks chosen by vit_tucker, over all layers that have the rule: give one of budget, flops, energy and cache.

    A cache may have a budget beside it: the cache decides about key and value ranks, the budget about the other ones.
    """

    budget: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Parameters to spend, as a share of the layers' dense attention parameters.",
    )
    flops: float | None = Field(
        default=None, gt=0, le=1, description="Operations to spend, as a share of the layers' dense attention's."
    )
    energy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of the attention tensors' squared norms to keep, with as few parameters as possible.",
    )
    cache: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Numbers in a KV cache to spend, as a share of those of the layers' own key/value heads: decides about key "
        "and value ranks. The other ranks are as large as these can fill, or spend the budget of parameters beside it.",
    )
    multiple_of: int = Field(
        default=8,
        ge=1,
        le=MAX_RANK,
        description="Steps of the query/output and key/value ranks, for kernels; at most 128 steps, so wide layers take "
        "larger multiples.",
    )

    @model_validator(mode="after")
    def _one_goal(self) -> RankRule:
        given = [name for name in ("budget", "flops", "energy", "cache") if getattr(self, name) is not None]
        if len(given) != 1 and given != ["budget", "cache"]:
            counted = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"give one of budget, flops, energy, cache, or budget and cache{counted}")
        return self

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def __str__(self) -> str:
        return "{" + ", ".join(f"{name}: {value}" for name, value in self if value is not None) + "}"


class Rule(Checked):
    """Options for some of the layers, in place of the method's own: ``layers`` and any option of the method.

    ``chosen_by`` marks the ranks that a rank rule chose; they hold as long as the layer has that very rule.
    """

    model_config = ConfigDict(extra="allow")
    layers: Selection
    chosen_by: RankRule | None = Field(
        default=None, description="Written by vit_tucker: the rank rule that chose them."
    )

    @model_validator(mode="after")
    def _usable_options(self) -> Rule:
        refuse_unusable(self.options)
        return self

    @model_serializer(mode="wrap")
    def _mark_choices_only(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name != "chosen_by" or value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options that the rule sets."""
        return dict(self.model_extra or {})


class Calibration(Checked):
    """Activation-aware conversion: how the pretrained weights are fitted to the tokens that each layer sees. No labels."""

    images: int = Field(
        default=256,
        ge=1,
        le=10_000_000,
        description="Images to look at, from the training set in a YAML run; of a language model sequences of any length.",
    )
    batch_size: int = Field(
        default=32,
        ge=1,
        le=1_000_000,
        description="Images per forward and backward pass; passes of language models have about 512 tokens.",
    )
    objective: Literal["features", "likelihood", "layer"] = Field(
        default="features",
        description="What an error costs: what it does to the model's final features, or to the likelihood of classes or tokens "
        "(one backward pass per batch each), or its size in the layer's own output.",
    )
    damping: float = Field(
        default=1e-3,
        gt=0,
        le=1,
        description="Added to the second moments, relative to their mean eigenvalue; the ridge of the read-out is the one of "
        "1, 10, 100 and 1000 times this that is best for held-out images.",
    )
    fold_rotations: bool = Field(
        default=True,
        description="On hosts with RoPE, pairs of a narrow latent key may stand for several rotations that the tokens can't tell "
        "apart: calibrate on sequences as long as those to come.",
    )
    sequential: bool = Field(
        default=False,
        description="Fit each layer's read-out, and its refinement, to what the layers before it, converted already, hand it; "
        "where blocks add their layers' outputs to the tokens it also makes up for their errors.",
    )
    refine_steps: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Adam steps per layer on its output error, kept only where held-out images gain.",
    )
    refine_lr: float = Field(
        default=2e-3, gt=0, le=1, description="Step of the refinement, relative to each factor's size."
    )
    seed: int = Field(default=0, ge=0, le=MAX_INTEGER, description="Of the choice of images and of the random probes.")


class MethodConfig(Checked):
    """Base of the configs of all methods, whatever kind of module they replace: where a method goes, and how it starts."""

    method: str
    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="Start from the host's weights (converted), or from the method's own initialisation.",
    )
    layers: Selection | None = Field(
        default=None,
        description="Which attention modules: full names with wildcards, 're:' patterns, indices, '0-5'. All if null.",
    )
    exclude: Selection | None = Field(
        default=None, description="Attention modules to leave alone, written as in layers."
    )
    rules: tuple[Rule, ...] = Field(
        default=(), description="Other options for some layers, in order: the last match wins."
    )

    @property
    def rank_rule(self) -> RankRule | None:
        """Returns the rule by which the ranks are yet to be chosen; None where they are given."""
        return None

    @property
    def fitted_to(self) -> Calibration | None:
        """Returns the images that the conversion looks at; None for a conversion by weights alone."""
        return None

    def rank_options(self) -> dict[str, Any]:
        """Returns the options that a layer's ``resize`` can change, in full: see ``AttentionModule.rank_options``. Here: none."""
        return {}

    def without_choices(self) -> Self:
        """Returns the config as its author wrote it: without the ranks that rank rules chose."""
        return self.model_copy(update={"rules": tuple(rule for rule in self.rules if rule.chosen_by is None)})

    def unconverted(self) -> Self:
        """Returns the same layers from their own initialisation: for structures, and for weights that come from elsewhere."""
        return self.model_copy(update={"init": "random"})

    def portable(self) -> Self:
        """Returns the config as another machine needs it."""
        return self

    def check(self, spec: Any) -> None:
        """Raises PatchError with the reason if the method with these options can't replace such a host."""

    @abstractmethod
    def build(self, spec: Any, **factory: Any) -> Any:
        """Returns the layer with the method's own random initialisation; ``factory``: device, dtype."""

    @abstractmethod
    def count_parameters(self, spec: Any) -> Any:
        """Returns the number of parameters of the built layer, from the formula alone: a ``ParameterCount``."""

    @abstractmethod
    def count_flops(self, spec: Any, num_tokens: int) -> int:
        """Counts floating point operations (2 per multiply-add) of the matrix products for one sequence of N tokens."""

    def set_options(self, module: Any) -> None:
        """Sets the options of a built module that all modules of its kind have."""

    def refuse_features(self, spec: Any) -> None:
        """Raises PatchError for a feature of the host that the method can't carry."""
