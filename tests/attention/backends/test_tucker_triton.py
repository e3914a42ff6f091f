"""The refusals of the backend of Triton kernels; ``test_triton_tucker`` runs the layers of ``triton_layer_cases`` on it."""

import pytest
import torch

import vit_tucker as vt
from vit_tucker.attention.triton_tucker import available
from vit_tucker.errors import PatchError


@pytest.mark.skipif(available(torch.device("cpu")) is None, reason="Triton interprets here")
def test_the_cpu_is_refused_with_what_can_be_used():
    layer = vt.TuckerConfig(ranks=(2, 8, 8)).build(vt.HostSpec(16, 4, 4, 16))
    layer.backend = "triton"
    with pytest.raises(
        PatchError, match="backend 'triton' does not support this call: .*these can: auto, blocked, eager, latent, sdpa"
    ):
        layer(torch.randn(1, 5, 16))
    assert layer.mix(torch.randn(1, 5, 16)).shape == (1, 5, 32)
