"""Attention of some tokens with a past, against plain products in float64."""

import pytest
import torch
from torch import Tensor

from vit_tucker.attention.decoding import attend_past

B, H, D = 2, 6, 16
MASKS = ("none", "boolean", "additive", "heads", "blind")


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    k, v = (x.double().repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0) @ v


def make_mask(kind: str, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    mask = torch.rand(B, H if kind == "heads" else 1, queries, keys) > 0.4
    if kind == "none":
        return None
    if kind == "blind":  # left padding: the first token of the second text sees nothing
        mask[1, :, 0] = False
        return mask
    mask[..., 0] = True
    return torch.where(mask, 0.0, float("-inf")).to(dtype) if kind == "additive" else mask


def make_heads(
    queries: int, keys: int, groups: int, value_width: int = D, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = ((B, H, queries, D), (B, groups, keys, D), (B, groups, keys, value_width))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 33), (2, 33), (8, 8), (8, 70)])
@pytest.mark.parametrize("value_width", [D, 24])
def test_few_queries_against_many_keys(kind: str, groups: int, queries: int, keys: int, value_width: int) -> None:
    q, k, v = make_heads(queries, keys, groups, value_width)
    mask = make_mask(kind, queries, keys)
    y = attend_past(q, k, v, attn_mask=mask, is_causal=False, scale=0.3)
    torch.testing.assert_close(y, reference(q, k, v, mask, 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (5, 5), (5, 9)])
def test_a_decoder_without_a_mask_attends_to_earlier_tokens_or_one_token_to_all(
    groups: int, queries: int, keys: int
) -> None:
    """The keys beyond the queries are those of an empty static cache."""
    q, k, v = make_heads(queries, keys, groups)
    order = torch.ones(queries, keys, dtype=torch.bool).tril() if queries > 1 else None
    y = attend_past(q, k, v, attn_mask=None, is_causal=True, scale=0.3)
    torch.testing.assert_close(y, reference(q, k, v, order, 0.3), rtol=0, atol=1e-12)
