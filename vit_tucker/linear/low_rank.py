"""A linear layer of low rank in the place of ``nn.Linear``: y = x V S^T U^T + b, of U (O, r), S (r, r), V (I, r).

From pretrained weights it is the truncated singular value decomposition (Eckart and Young), exact at full rank: U and V have
orthonormal columns then, and S is diagonal. The core S stands by itself because dynamical low-rank training moves bases and core
in turn (arXiv 2410.18720, 2505.08022, 2601.08882).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from vit_tucker.attention.base import ParameterCount
from vit_tucker.attention.host import DENSE_INIT_STD
from vit_tucker.attention.linear import resized
from vit_tucker.attention.options import Calibration, Rank
from vit_tucker.errors import PatchError
from vit_tucker.linear.base import (
    InputMoments,
    LinearConfig,
    LinearModule,
    LinearSpec,
    LinearWeights,
    register_linear_method,
)
from vit_tucker.tensor.metric import covariance, metric_root
from vit_tucker.tensor.resize import grow


class LowRankLinear(LinearModule):
    """Computes y = x V S^T U^T + b.

    Args:
        spec: shape of the layer to replace.
        rank: r, at most the smaller of both widths.
        **factory: ``device`` and ``dtype``.

    Attributes:
        left: U, (O, r).
        core: S, (r, r).
        right: V, (I, r).
        bias: (O,) or None.
    """

    def __init__(self, spec: LinearSpec, rank: int, **factory: Any) -> None:
        super().__init__(spec)
        self.left = nn.Parameter(torch.empty(spec.out_features, rank, **factory))
        self.core = nn.Parameter(torch.empty(rank, rank, **factory))
        self.right = nn.Parameter(torch.empty(spec.in_features, rank, **factory))
        self.bias = nn.Parameter(torch.empty(spec.out_features, **factory)) if spec.bias else None
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """Returns r, the number of columns of both bases."""
        return self.core.shape[0]

    def reset_parameters(self) -> None:
        """Draws random orthonormal bases and a normal core: the product's entries have timm's standard deviation for Linears."""
        for basis in (self.left, self.right):  # QR decompositions are of float32 at least
            basis.data.copy_(nn.init.orthogonal_(torch.empty_like(basis, dtype=torch.float32)))
        nn.init.normal_(self.core, std=DENSE_INIT_STD * (self.in_features * self.out_features) ** 0.5 / self.rank)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., I) to (..., O), or (B, I, height, width) to (B, O, height, width); r numbers per token in between."""
        if self.spec.channels_first:
            core, left, right = (part[..., None, None] for part in (self.core, self.left, self.right.mT))
            return F.conv2d(F.conv2d(F.conv2d(input, right), core), left, self.bias)
        return F.linear(F.linear(F.linear(input, self.right.mT), self.core), self.left, self.bias)

    def convert_from(self, weights: LinearWeights) -> None:
        """Truncates the singular value decomposition of the host's weight, the nearest of its rank in the Frobenius norm."""
        self.set_product(weights.weight)
        if self.bias is not None and weights.bias is not None:
            self.bias.copy_(weights.bias)

    def convert_calibrated(self, weights: LinearWeights, moments: InputMoments, damping: float) -> None:
        """Truncates the SVD of the weight between the roots of both metrics; a bias makes up for the mean of the tokens."""
        bias = None if self.bias is None else weights.bias
        inputs = moments.inputs if bias is None else covariance(moments.inputs, moments.mean)
        rows, columns = metric_root(moments.outputs, damping), metric_root(inputs, damping)
        left, values, right = torch.linalg.svd(rows.root @ weights.weight @ columns.root, full_matrices=False)
        kept = rows.inverse @ (left[:, : self.rank] * values[: self.rank]) @ right[: self.rank] @ columns.inverse
        self.set_product(kept)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias + (weights.weight - kept) @ moments.mean)

    def set_product(self, weight: Tensor) -> None:
        """Sets the factors to the nearest product of the layer's rank.

        Args:
            weight: (O, I), float64.
        """
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        self.left.copy_(left[:, : self.rank])
        self.core.copy_(values[: self.rank].diag())
        self.right.copy_(right[: self.rank].mT)

    def dense_weights(self) -> LinearWeights:
        """Returns U S V^T and the bias, float64, detached."""
        left, core, right = (part.detach().double() for part in (self.left, self.core, self.right))
        return LinearWeights(left @ core @ right.mT, None if self.bias is None else self.bias.detach().double())

    def factors(self) -> dict[str, Tensor]:
        """Returns the live parameters U, S and V by role: left, core, right."""
        return {"left": self.left, "core": self.core, "right": self.right}

    def rank_options(self) -> dict[str, Any]:
        """Returns the present rank as an option of the config."""
        return {"rank": self.rank}

    def _resize(self, **options: Any) -> None:
        rank = options["rank"]
        refuse_rank(self.spec, rank)
        if rank == self.rank:
            return
        left, core, right = (part.detach().double() for part in (self.left, self.core, self.right))
        weight = left @ core @ right.mT
        for name, factor in (("left", self.left), ("core", self.core), ("right", self.right)):
            shape = (rank, rank) if name == "core" else (factor.shape[0], rank)
            setattr(self, name, resized(factor, shape))
        if rank < core.shape[0]:
            self.set_product(weight)
            return
        self.left.copy_(grow(left, rank).factor)
        self.right.copy_(grow(right, rank).factor)
        self.core.zero_()
        self.core[: core.shape[0], : core.shape[0]].copy_(core)

    def extra_repr(self) -> str:
        """Returns widths and rank for print(model)."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def refuse_rank(spec: LinearSpec, rank: int) -> None:
    """Raises PatchError for a rank above the smaller width.

    Args:
        spec: of the layer to replace.
        rank: r.
    """
    full = min(spec.in_features, spec.out_features)
    if rank > full:
        raise PatchError(
            f"rank={rank} is above the full rank {full} of a layer {spec.in_features} -> {spec.out_features}"
        )


@register_linear_method("lowrank_linear")
class LowRankLinearConfig(LinearConfig):
    """Low-rank linear layers: U S V^T + bias in place of any ``nn.Linear``, from pretrained weights by SVD."""

    convolutions: ClassVar[bool] = True
    method: Literal["lowrank_linear"] = "lowrank_linear"
    rank: Rank = Field(description="Rank r of the weight; the smaller width of a layer is full rank, which is exact.")
    calibration: Calibration | None = Field(
        default=None, description="Fit the conversion to images or tokens; null: the weights alone."
    )

    @property
    def fitted_to(self) -> Calibration | None:
        """Returns the images that the conversion looks at; None for a conversion by weights alone."""
        return self.calibration

    def check(self, spec: LinearSpec) -> None:
        """Raises PatchError for a rank above the full one of a layer of this shape."""
        refuse_rank(spec, self.rank)

    @classmethod
    def full_rank(cls, spec: LinearSpec) -> Self:
        """Returns the config of the smaller width, which is exact."""
        return cls(rank=min(spec.in_features, spec.out_features))

    @classmethod
    def example(cls, spec: LinearSpec) -> Self:
        """Returns the config of a quarter of the full rank."""
        return cls(rank=max(1, min(spec.in_features, spec.out_features) // 4))

    def build(self, spec: LinearSpec, **factory: Any) -> LowRankLinear:
        """Returns the layer, randomly initialised."""
        return LowRankLinear(spec, self.rank, **factory)

    def unconverted(self) -> Self:
        """Returns the config of the same layers from their own initialisation, without calibration."""
        return super().unconverted().model_copy(update={"calibration": None})

    def rank_options(self) -> dict[str, Any]:
        """Returns the rank as an option of the layer."""
        return {"rank": self.rank}

    def count_parameters(self, spec: LinearSpec) -> ParameterCount:
        """Returns r (I + O + r) weights, and the bias."""
        weights = self.rank * (spec.in_features + spec.out_features + self.rank)
        return ParameterCount(weights, spec.bias * spec.out_features)

    def count_flops(self, spec: LinearSpec, num_tokens: int) -> int:
        """Returns 2 N r (I + O + r)."""
        return 2 * num_tokens * self.rank * (spec.in_features + spec.out_features + self.rank)
