"""Defines what a method for ``nn.Linear`` consists of: its config, the layer that it builds, and what both know of the host."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from vit_tucker.attention.base import ParameterCount
from vit_tucker.attention.linear import renewed
from vit_tucker.attention.options import MethodConfig, Selection, refuse_rank_options
from vit_tucker.attention.registry import MethodRegistry, Own
from vit_tucker.errors import PatchError


@dataclass(frozen=True)
class LinearSpec:
    """Shape of a linear layer: (..., in_features) -> (..., out_features).

    Attributes:
        in_features, out_features: widths.
        bias: whether there is one.
        channels_first: a convolution of one pixel: (B, in_features, height, width) -> (B, out_features, height, width).
    """

    in_features: int
    out_features: int
    bias: bool
    channels_first: bool = False

    @property
    def embed_dim(self) -> int:
        """Returns the width of the tokens, by the name that it has in attention."""
        return self.in_features


@dataclass(frozen=True)
class LinearWeights:
    """Weights of a linear layer, y = x weight^T + bias.

    Attributes:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
    """

    weight: Tensor
    bias: Tensor | None

    def double(self) -> LinearWeights:
        """Returns the weights in float64, detached."""
        bias = None if self.bias is None else self.bias.detach().double()
        return LinearWeights(self.weight.detach().double(), bias)


class InputMoments(NamedTuple):
    """Moments of a layer's tokens x and of the probes g that measure its errors, float64.

    Attributes:
        mean: E[x], (I,).
        inputs: E[x x^T], (I, I).
        outputs: E[g g^T], (O, O).
    """

    mean: Tensor
    inputs: Tensor
    outputs: Tensor


class LinearModule(nn.Module):
    """Base of all layers that stand in place of ``nn.Linear``: ``forward(input)``, (..., in_features) -> (..., out_features)."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features

    def rank_options(self) -> dict[str, Any]:
        """Returns the options of the config with the layer's present ranks, where they can change. Here: none."""
        return {}

    def factors(self) -> dict[str, Tensor]:
        """Returns the live weights by role, of any shapes. Here: none."""
        return {}

    def resize(self, **options: Any) -> dict[Tensor, Tensor]:
        """Changes the layer's ranks in place: growth leaves its function as it is, truncation keeps the nearest weight.

        Args:
            **options: those of ``rank_options`` that change.

        Returns:
            New parameters by the old ones that they replace, which optimizers still have; a parameter of the same shape stays.

        Raises:
            PatchError: the method has no such option, or the ranks are impossible; nothing has changed.
        """
        current = self.rank_options()
        refuse_rank_options(type(self).__name__, options, current)
        return renewed(self, partial(self._resize, **current | options))

    def _resize(self, **options: Any) -> None:
        """Changes the ranks; called under no_grad, only of methods with ``rank_options``."""

    @abstractmethod
    def convert_from(self, weights: LinearWeights) -> None:
        """Approximates the host's weights as well as the layer can; called under no_grad.

        Args:
            weights: (out_features, in_features) and a bias or None, float64.
        """

    def convert_calibrated(self, weights: LinearWeights, moments: InputMoments, damping: float) -> None:
        """Approximates the host's weights on the tokens that it sees; called under no_grad.

        Args:
            weights: (out_features, in_features) and a bias or None, float64.
            moments: of the tokens.
            damping: of the metrics, relative to their mean eigenvalue.

        Raises:
            PatchError: the layer has no such conversion.
        """
        raise PatchError(f"{type(self).__name__} has no activation-aware conversion: leave out calibration")

    @abstractmethod
    def dense_weights(self) -> LinearWeights:
        """Returns the dense weights that the layer is equal to, float64, detached."""


class LinearConfig(MethodConfig):
    """Base of the configs of all linear methods.

    A new method derives from this class, is decorated with ``@register_linear_method("name")`` and sets
    ``method: Literal["name"] = "name"``. One whose layers compute ``LinearSpec.channels_first`` sets ``convolutions``.
    """

    convolutions: ClassVar[bool] = False
    layers: Selection | None = Field(
        default=None,
        description="Which linear layers: full names with wildcards, 're:' patterns, indices, '0-5'. All outside of attention "
        "but heads if null; heads by their full name; projections of attention, and convolutions of one pixel, by patterns that "
        "match none of these.",
    )
    exclude: Selection | None = Field(default=None, description="Linear layers to leave alone, written as in layers.")

    def refuse_features(self, spec: LinearSpec) -> None:
        """Raises PatchError for a convolution of one pixel, unless the class sets ``convolutions``.

        Args:
            spec: shape of the layer to replace.
        """
        if spec.channels_first and not self.convolutions:
            raise PatchError(f"{self.method} does not replace convolutions, and this is one of one pixel")

    def check(self, spec: LinearSpec) -> None:
        """Raises PatchError with the reason if the method with these options can't replace such a layer.

        Args:
            spec: shape of the layer to replace.
        """

    @classmethod
    def full_rank(cls, spec: LinearSpec) -> Self:
        """Returns the config whose conversion of such a layer is exact, for contract tests. Here: the method's defaults.

        Args:
            spec: shape of the layer to replace.
        """
        return cls()  # type: ignore[call-arg]

    @classmethod
    def example(cls, spec: LinearSpec) -> Self:
        """Returns a config that compresses such a layer, for contract tests and docs. Here: the method's defaults.

        Args:
            spec: shape of the layer to replace.
        """
        return cls()  # type: ignore[call-arg]

    @abstractmethod
    def build(self, spec: LinearSpec, **factory: Any) -> LinearModule:
        """Returns the layer with the method's own random initialisation.

        Args:
            spec: shape of the layer to replace.
            **factory: ``device`` and ``dtype`` of its parameters.
        """

    @abstractmethod
    def count_parameters(self, spec: LinearSpec) -> ParameterCount:
        """Returns the number of parameters of the built layer, from the formula alone.

        Args:
            spec: shape of the layer to replace.
        """

    @abstractmethod
    def count_flops(self, spec: LinearSpec, num_tokens: int) -> int:
        """Returns the floating point operations (2 per multiply-add) of the matrix products for N tokens.

        Args:
            spec: shape of the layer to replace.
            num_tokens: N.
        """


LINEAR_METHODS = MethodRegistry("linear method", LinearConfig)  # type: ignore[type-abstract]


def register_linear_method(name: str) -> Callable[[type[Own]], type[Own]]:
    """Returns a class decorator that makes a linear method available by name, in Python and in the YAML's ``linear.method``.

    Args:
        name: the method's name; the class must say ``method: Literal[name] = name``.

    Returns:
        The decorator; it gives the class back as it is.

    Raises:
        ConfigError: the name is taken by another class, or the class's ``method`` field differs.
    """
    return LINEAR_METHODS.register(name)
