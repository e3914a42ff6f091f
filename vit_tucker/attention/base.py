"""Defines what an attention method is: the base of its config, and how its parameters are counted.

Letters, used in every shape comment of the package:
B batch, N tokens, C embed_dim, O output width (C in nearly every host), H heads, G key/value heads, D head_dim, R rank.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field, field_validator
from typing_extensions import Self

from vit_tucker.attention.attend import attend_flops
from vit_tucker.attention.backends import AUTO, get_backend, is_whole, list_backends
from vit_tucker.attention.host import CALL_FEATURES, REASONS, HostSpec
from vit_tucker.attention.options import Calibration, MethodConfig
from vit_tucker.errors import ConfigError, PatchError
from vit_tucker.show.methods import MethodDisplay
from vit_tucker.tensor.allocation import Ranks

if TYPE_CHECKING:
    from vit_tucker.attention.module import AttentionModule


class ParameterCount(NamedTuple):
    """Parameters of one layer: the paper's tables count weights only.

    Attributes:
        weights: entries of projections, cores and factors.
        biases: entries of biases, and of the host's norms and gates that the method carries.
    """

    weights: int
    biases: int

    @property
    def total(self) -> int:
        """Returns the number of weights and biases together."""
        return self.weights + self.biases


class AttentionConfig(MethodConfig):
    """Base of the configs of all attention methods: what a method must be able to do.

    A new method derives from this class, is decorated with ``@register_method("name")`` and sets
    ``method: Literal["name"] = "name"``.
    """

    carries: ClassVar[frozenset[str]] = frozenset()
    """Features of the host (``HostSpec.features``) that the method supports; it refuses hosts with others."""

    whole_kernels: ClassVar[bool] = False
    """Backends that compute Tucker Attention only can be requested."""

    latent_rope: ClassVar[bool] = False
    """On hosts with RoPE one latent key rotates for all heads, instead of each head's own."""

    display: ClassVar[MethodDisplay] = MethodDisplay()
    """How tables and figures show the method: its name, place, colour and marker, and what its conversions are called."""

    calibration: Calibration | None = Field(
        default=None,
        description="Convert the pretrained weights for the tokens of some training images; null: by weights alone.",
    )
    backend: str = Field(
        default=AUTO,
        json_schema_extra={"enum": [AUTO, *list_backends()]},
        description="What computes the attention; auto chooses by device and precision. Any other takes every call or fails.",
    )

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, name: str) -> str:
        """Refuses names that are no backend, and backends that do not compute this method."""
        if is_whole(name) and not cls.whole_kernels:
            able = [AUTO, *(other for other in list_backends() if not is_whole(other))]
            raise ConfigError(f"backend '{name}' computes Tucker Attention only; other methods have: {', '.join(able)}")
        if name != AUTO:
            get_backend(name)
        return name

    def set_options(self, module: AttentionModule) -> None:
        """Sets the backend of a built layer; a backend by name overrides the host's fused_attn.

        Args:
            module: changed in place.
        """
        module.backend = self.backend
        if self.backend != AUTO:  # an explicit backend overrides the host's setting
            module.fused_attn = self.backend != "eager"

    @property
    def fitted_to(self) -> Calibration | None:
        """Returns the images that the conversion looks at; None for a conversion by weights alone."""
        return self.calibration

    def with_ranks(self, pre: Ranks, post: Ranks | None = None) -> Self:
        """Returns the config with other ranks [head, query/output, key/value] of the pre- and the post-softmax tensor.

        Args:
            pre: of the pre-softmax tensor.
            post: of the post-softmax tensor; None: the same.

        Raises:
            PatchError: the method has no such ranks.
        """
        raise PatchError(f"{self.method} has no ranks of two tensors")

    def unconverted(self) -> Self:
        """Returns the config of the same layers from their own initialisation, without calibration."""
        return super().unconverted().model_copy(update={"calibration": None})

    def portable(self) -> Self:
        """Returns the config as another machine needs it: without the backend."""
        return self.model_copy(update={"backend": AUTO})

    @abstractmethod
    def check(self, spec: HostSpec) -> None:
        """Raises PatchError with the reason if the method with these options can't replace such a host.

        Args:
            spec: the host.
        """

    @abstractmethod
    def build(self, spec: HostSpec, **factory: Any) -> AttentionModule:
        """Returns the module with the method's own random initialisation.

        Args:
            spec: the host.
            **factory: ``device`` and ``dtype`` of its parameters.
        """

    @abstractmethod
    def count_parameters(self, spec: HostSpec) -> ParameterCount:
        """Returns the number of parameters of the built module, from the formula alone.

        Args:
            spec: the host.
        """

    @classmethod
    @abstractmethod
    def full_rank(cls, spec: HostSpec) -> Self:
        """Returns the config whose conversion of such a host is exact, which the contract tests check for every method.

        Args:
            spec: the host.
        """

    @classmethod
    @abstractmethod
    def example(cls, spec: HostSpec) -> Self:
        """Returns a config that compresses such a host (or is as small as the method gets): for tests, benchmarks and docs.

        Args:
            spec: the host.
        """

    def refuse_features(self, spec: HostSpec) -> None:
        """Raises PatchError for a feature of the host that the method can't carry.

        Args:
            spec: the host.
        """
        for feature in spec.features:
            if feature not in self.carries:
                reason = REASONS.get(feature, "unknown").format(method=self.method)
                raise PatchError(f"{self.method} can't carry the host's {feature}: {reason}")


class PerHeadConfig(AttentionConfig):
    """Base of methods that form each head's query, key and output of width D: they carry all features of the host."""

    carries: ClassVar[frozenset[str]] = CALL_FEATURES | {"rope", "qk_norm", "scale_norm", "gate"}

    def count_flops(self, spec: HostSpec, num_tokens: int) -> int:
        """Counts each weight once per token, then the attention itself, then the host's gate.

        Args:
            spec: the host.
            num_tokens: N.
        """
        projections = 2 * num_tokens * self.count_parameters(spec).weights
        gate = 2 * num_tokens * spec.embed_dim * spec.attn_dim if "gate" in spec.extras else 0
        return projections + attend_flops(spec.num_heads, num_tokens, spec.head_dim, spec.head_dim) + gate
