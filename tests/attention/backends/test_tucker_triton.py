"""Tucker layers on the Triton kernels: ``triton_layer_cases`` in a process whose Triton interprets, and in one with a GPU."""

from pathlib import Path

import pytest
import torch

import vit_tucker as vt
from tests.attention.test_triton_tucker import run_cases
from vit_tucker.attention.triton_tucker import available
from vit_tucker.errors import PatchError

CASES = Path(__file__).with_name("triton_layer_cases.py")


@pytest.mark.parametrize("interpreted", [True, False])
def test_layers(interpreted, tmp_path):
    pytest.importorskip("triton")
    if not interpreted and (not torch.cuda.is_available() or available(torch.device("cuda"))):
        pytest.skip("no GPU that the kernels run on")
    counts, output = run_cases(tmp_path, CASES, TRITON_INTERPRET=str(int(interpreted)))
    assert counts["tests"] > 10, output
    assert counts == {"tests": counts["tests"], "failures": 0, "errors": 0, "skipped": 0}, output


@pytest.mark.skipif(available(torch.device("cpu")) is None, reason="Triton interprets here")
def test_the_cpu_is_refused_with_what_can_be_used():
    layer = vt.TuckerConfig(ranks=(2, 8, 8)).build(vt.HostSpec(16, 4, 4, 16))
    layer.backend = "triton"
    with pytest.raises(
        PatchError, match="backend 'triton' can't take this call: .*these can: auto, blocked, eager, latent, sdpa"
    ):
        layer(torch.randn(1, 5, 16))
    assert layer.mix(torch.randn(1, 5, 16)).shape == (1, 5, 32)
