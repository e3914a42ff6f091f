"""Masks: queries that may attend to nothing get zeros from every backend, additive masks get the layer's dtype."""

import pytest
import torch

from tests.attention.backends.test_backends import run, tensors
from vit_tucker.attention.backends.masks import cast_mask, masked_softmax
from vit_tucker.errors import ExplainError, PatchError
from vit_tucker.explain.map_modules import check_rows

NEGATIVE = float("-inf")
TOKENS = 7
PADDED = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
PADDED[0] = False  # an image without a single key
ROW = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
ROW[3] = False
HEADS = torch.ones(1, 4, TOKENS, TOKENS, dtype=torch.bool)
HEADS[:, 1, 5] = False
CAUSAL = ROW.tril() & (torch.arange(TOKENS) > 1)  # causal order with padding on the left
ALLOWED = {"padding": PADDED, "row": ROW, "one head": HEADS, "causal and padding": CAUSAL}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = [
    *((name, allowed, dtype) for name in ("sdpa", "eager") for allowed in ALLOWED for dtype in DTYPES),
    *(("flex", allowed, dtype) for allowed, dtype in zip(ALLOWED, DTYPES, strict=True)),
]
"""Each mask and each dtype once on flex_attention, which compiles each call and reads masks alike in all dtypes."""


def additive(allowed, dtype):
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, NEGATIVE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("name", "allowed", "dtype"), CASES, ids=str)
def test_queries_that_may_attend_to_nothing_get_zeros(name, allowed, dtype):
    allowed = ALLOWED[allowed]
    blind = ~allowed.expand(2, 4, TOKENS, TOKENS).any(-1)
    assert blind.any()
    assert not blind.all()
    for mask in (allowed, additive(allowed, dtype)):
        for trained in (False, True) if mask.is_floating_point() and name != "flex" else (False,):
            inputs = [
                t.requires_grad_(name != "flex") for t in tensors(1, dtype=dtype)
            ]  # flex: no backward pass on CPUs
            given = mask.clone().requires_grad_() if trained else mask
            y = run(name, *inputs, attn_mask=given)
            assert not y[blind].any()
            assert y[~blind].abs().amax(-1).min() > 0
            open_rows = run(name, *inputs, attn_mask=allowed | ~allowed.any(-1, keepdim=True))
            torch.testing.assert_close(y[~blind], open_rows[~blind], rtol=0, atol=8 * torch.finfo(dtype).eps)
            assert open_rows[blind].any()  # the same row with keys is not zero
            if name != "flex":
                y.square().sum().backward()
                grads = [t.grad for t in (*inputs, given) if t.grad is not None]
                assert all(grad.isfinite().all() for grad in grads)
                assert not inputs[0].grad[blind].any()
                assert len(grads) == 3 + trained


def test_maps_have_rows_of_zeros_and_finite_gradients():
    scores = torch.randn(2, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    maps = masked_softmax(scores, ROW, False)
    assert not maps[:, :, 3].any()
    torch.testing.assert_close(maps.sum(-1)[:, :, :3], torch.ones(2, 4, 3))
    maps.square().sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[:, :, :3].any()
    assert scores.masked_fill(~ROW, NEGATIVE).softmax(-1).isnan().any()  # the plain formula has none
    assert torch.equal(
        masked_softmax(scores, ROW, True), masked_softmax(scores, None, True)
    )  # causal order takes precedence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_additive_masks_get_the_layers_dtype(given, dtype):
    mask, x = additive(CAUSAL, given), torch.zeros(1, dtype=dtype)
    assert torch.equal(cast_mask(mask, x), additive(CAUSAL, dtype))
    assert cast_mask(mask, x).dtype == dtype
    assert (cast_mask(mask, x) is mask) == (given == dtype)
    assert cast_mask(CAUSAL, x) is CAUSAL


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32], ids=str)
def test_integers_are_no_mask(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(PatchError, match=rf"attn_mask is {name}; it must be bool \(True: attend\), as mask.bool\(\)"):
        cast_mask(CAUSAL.to(dtype), torch.zeros(1))


def test_explained_maps_may_have_rows_of_zeros():
    scores = torch.randn(2, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))
    check_rows("attn", masked_softmax(scores, ROW, False))
    with pytest.raises(ExplainError, match="rows of its map don't sum to 1"):
        check_rows("attn", 0.5 * masked_softmax(scores, ROW, False))
