"""Defines what conversions, reports and special cases use of an attention layer: its weights as tensors, and how they are set."""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from vit_tucker.attention.effective import is_adapter
from vit_tucker.attention.host import HostSpec, MHAWeights
from vit_tucker.attention.linear import linear_bias
from vit_tucker.attention.moments import Moments, Needs
from vit_tucker.errors import PatchError
from vit_tucker.tensor.metric import Root
from vit_tucker.tensor.mode_ranks import mode_ranks
from vit_tucker.tensor.regression import LinearMoments
from vit_tucker.tensor.rotary import RotaryPairs
from vit_tucker.tensor.tucker import Pairs, Tucker, hosvd


class ConvertibleModule(nn.Module):
    """Base of attention layers that are converted from dense ones; for what computes with their weights see ``AttentionModule``.

    Methods that a layer does not implement raise PatchError.
    """

    spec: HostSpec

    @abstractmethod
    def convert_from(self, weights: MHAWeights) -> None:
        """Converts dense attention ``weights`` (float64), exactly where the ranks allow; called under no_grad."""

    def convert_calibrated(self, weights: MHAWeights, moments: Moments, damping: float) -> None:
        """Converts dense attention weights so that the error on the tokens is least; called under no_grad.

        Args:
            weights, moments: float64; the moments are those of the layer's tokens.
            damping: of the moments, relative to their mean eigenvalue.
        """
        raise PatchError(f"{type(self).__name__} has no activation-aware conversion; leave calibration out")

    @property
    def needs(self) -> Needs:
        """Returns which moments ``convert_calibrated`` reads, by default all: those of every head cost the most."""
        return Needs()

    @property
    def has_out_bias(self) -> bool:
        """Returns whether the read-out has a bias, which can absorb means."""
        return getattr(getattr(self, "proj", None), "bias", None) is not None

    def fit_readout(self, moments: LinearMoments, out_root: Root, damping: float) -> None:
        """Fits what follows ``mix`` to the host's output; called under no_grad.

        Args:
            moments: of f = ``mix(x)`` and y, the host's output.
            out_root: root of the output metric (O, O).
            damping: ridge towards the present read-out, relative to the mean variance of f.
        """

    def orthonormalise(self) -> None:
        """Rewrites the layer's factors so that bases have orthonormal columns, under no_grad: the layer's function stays.

        Conversions for tokens leave them in coordinates of unit variance, in which equal steps of an optimizer are far too large
        for some directions. Here, without factors: nothing.
        """

    def input_projections(self) -> list[nn.Linear]:
        """Returns the Linears that read the layer's input x: refinement steps are taken in whitened coordinates there."""
        return []

    def output_projections(self) -> list[nn.Linear]:
        """Returns the Linears that write the layer's output, likewise. Here: ``proj`` if there is one."""
        proj = getattr(self, "proj", None)
        return [proj] if isinstance(proj, nn.Linear) else []

    def folded_out_bias(self) -> Tensor | None:
        """Returns the output bias with the value biases in it, (O,), float64, or None; here that of ``proj``."""
        proj: Any = getattr(self, "proj", None)
        return linear_bias(proj) if isinstance(proj, nn.Linear) or is_adapter(proj) else None

    def tucker_form(self) -> tuple[Tucker, Tucker]:
        """Returns exact Tucker decompositions of both tensors, float64; here HOSVDs at the numerical ranks."""
        pre, post = self.pre_pairs(), self.post_pairs()
        return hosvd(pre, mode_ranks(pre)), hosvd(post, mode_ranks(post))

    @abstractmethod
    def pre_pairs(self) -> Pairs:
        """Returns the pre-softmax tensor (H, C or C + 1, C), see ``MHAWeights.pre_pairs``; with RoPE where nothing rotates."""

    def pre_tensor(self) -> Pairs | RotaryPairs:
        """Returns the pre-softmax tensor with its rotations, if there are any."""
        return self.pre_pairs() if self.spec.rope is None else self.rotary_pairs()

    def rotary_pairs(self) -> RotaryPairs:
        """Returns the pre-softmax tensor with its rotations, of a layer with RoPE: see ``MHAWeights.rotary_pairs``."""
        lacks = "has no RoPE here" if self.spec.rope is None else "does not implement rotary_pairs()"
        raise PatchError(f"{type(self).__name__} {lacks}")

    def latent_rotations(self) -> Tensor:
        """Returns the numbers (R3/2,) of the rotations of the pairs of ``tucker_form``'s key basis, of a layer with RoPE."""
        raise PatchError(f"{type(self).__name__} does not implement latent_rotations()")

    @abstractmethod
    def post_pairs(self) -> Pairs:
        """Returns the layer's post-softmax tensor (H, O, C): see ``MHAWeights.post_pairs``."""
