"""attend against the formula, for all numbers of key/value heads and masks, fused and unfused."""

import pytest
import torch
from torch import nn

from vit_tucker.attention.attend import attend, attend_flops

B, H, N, DK, DV = 2, 4, 5, 6, 3


def tensors(kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(kv_heads)
    shapes = ((B, H, N, DK), (B, kv_heads, N, DK), (B, kv_heads, N, DV))
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)


def formula(q, k, v, scale, mask=None):
    group = H // k.shape[1]
    out = torch.empty(B, H, N, DV, dtype=torch.float64)
    for i in range(H):
        scores = scale * q[:, i] @ k[:, i // group].mT
        if mask is not None:
            scores = scores + mask.expand(B, H, N, N)[:, i]
        out[:, i] = scores.softmax(-1) @ v[:, i // group]
    return out


BOOL = torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(0)) > 0.4
BOOL |= torch.eye(N, dtype=torch.bool)
MASKS = {
    "none": (None, None),
    "boolean": (BOOL, torch.zeros(B, 1, N, N).masked_fill(~BOOL, float("-inf")).double()),
    "additive": (torch.linspace(-2, 2, H * N * N).reshape(1, H, N, N).double(),) * 2,
    "two-dimensional": (torch.linspace(-2, 2, N * N).reshape(N, N).double(),) * 2,
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_matches_the_formula(fused, kv_heads, mask):
    q, k, v = tensors(kv_heads)
    given, additive = MASKS[mask]
    result = attend(q, k, v, scale=0.3, attn_drop=nn.Dropout(0.0), fused=fused, attn_mask=given)
    torch.testing.assert_close(result, formula(q, k, v, 0.3, additive), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(result, formula(q, k, v, 0.31, additive))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_takes_precedence_over_a_mask(fused, kv_heads):
    q, k, v = tensors(kv_heads)
    triangle = torch.full((N, N), float("-inf")).triu(1).double()
    expected = formula(q, k, v, 0.3, triangle)
    for mask in (None, torch.ones(N, N).double()):
        result = attend(q, k, v, scale=0.3, attn_drop=nn.Dropout(0.0), fused=fused, attn_mask=mask, is_causal=True)
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_agree_between_paths(kv_heads):
    grads = []
    for fused in (True, False):
        inputs = [t.clone().requires_grad_() for t in tensors(kv_heads)]
        attend(*inputs, scale=0.3, attn_drop=nn.Dropout(0.0), fused=fused).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for fused, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_acts_in_training_only(fused):
    q, k, v = tensors(1)
    drop = nn.Dropout(0.5)
    torch.manual_seed(0)
    trained = [attend(q, k, v, scale=1.0, attn_drop=drop.train(), fused=fused) for _ in range(2)]
    assert not torch.allclose(*trained)
    torch.testing.assert_close(attend(q, k, v, scale=1.0, attn_drop=drop.eval(), fused=fused), formula(q, k, v, 1.0))


def test_unfused_path_shows_the_maps_to_hooks():
    seen = []
    drop = nn.Dropout(0.0)
    drop.register_forward_hook(lambda module, args, output: seen.append(output))
    attend(*tensors(2), scale=0.3, attn_drop=drop, fused=False)
    assert seen[0].shape == (B, H, N, N)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(B, H, N).double())


def test_flops_by_hand():
    assert attend_flops(num_heads=3, num_tokens=5, key_dim=4, value_dim=2) == 2 * 3 * 25 * 6
