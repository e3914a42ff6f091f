"""What torch's counter says of our own kernels, against the same products in plain torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vit_tucker as vt
from tests.attention.backends.test_backends import formula, tensors
from tests.attention.backends.test_backends import run as run_heads
from vit_tucker.attention.backends import flops


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocked_products(kv_heads):
    """A backward pass of plain products has two for each; the blocked one computes the scores again."""
    q, k, v = (t.requires_grad_() for t in tensors(kv_heads))
    products = 2 * 2 * 4 * 7 * 7
    for compute, again in ((formula, 0), (lambda *given: run_heads("blocked", *given), products * 16)):
        assert counted(lambda f=compute: f(q, k, v)) == products * (16 + 24)
        assert counted(lambda f=compute: f(q, k, v).sum().backward()) == 3 * products * (16 + 24) + again


def test_a_layer_costs_what_its_config_says_on_every_backend():
    """Heads by heads the counter sees plain products, in one go our formula."""
    spec, config = vt.HostSpec(24, 3, 8, 24), vt.TuckerConfig(ranks=(2, 8, 16))
    layer, x = config.build(spec), torch.randn(1, 9, 24)
    for backend in ("eager", "blocked", "latent"):
        layer.backend, layer.fused_attn = backend, backend != "eager"
        assert counted(lambda: layer(x)) == config.count_flops(spec, 9)


def test_training_steps_of_the_whole():
    """Twice the forward pass of plain products, and the scores and queries again."""
    spec, config = vt.HostSpec(24, 3, 8, 24), vt.TuckerConfig(ranks=(2, 8, 16))
    layer, x = config.build(spec), torch.randn(2, 9, 24, requires_grad=True)
    steps = {}
    for backend in ("eager", "latent"):
        layer.backend, layer.fused_attn = backend, backend != "eager"
        steps[backend] = counted(lambda: layer(x).sum().backward())
    again = 2 * 2 * 9 * 3 * 16 * (8 + 9)  # images, tokens, heads, r3: times r2 for the queries, times N for the scores
    assert steps["latent"] - steps["eager"] == again


def test_the_triton_kernels_by_hand():
    """B=1 N=2 H=3, r2 r3 r2t r3t = 5 7 11 13."""
    p, k, v, pre, post = (1, 2, 5), (1, 2, 7), (1, 2, 13), (3, 5, 7), (3, 11, 13)
    queries, outputs, keys, values = 2 * 3 * 5 * 7, 2 * 3 * 11 * 13, 3 * 2 * 2 * 7, 3 * 2 * 2 * 13
    assert flops.whole_flops(p, k, v, pre, post) == 2 * (queries + outputs + keys + values)
    backward = flops.triton_backward_flops((1, 2, 11), (1, 3, 2), p, k, v, pre, post)
    assert backward == 2 * (3 * queries + 2 * outputs + 5 * keys + 4 * values)
