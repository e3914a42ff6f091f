"""Forwards without values: the shapes that torch would give, and its refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vit_tucker.hosts.dry_run import ShapesAlone, dry_run


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.linear(meta(2, 5, 8), meta(3, 8), meta(3)),
        lambda: F.linear(meta(2, 5, 8), meta(8)),
        lambda: F.layer_norm(meta(2, 5, 8, dtype=torch.float64), (5, 8), weight=meta(5, 8, dtype=torch.float64)),
        lambda: F.gelu(meta(2, 5, dtype=torch.bfloat16), approximate="tanh"),
        lambda: F.scaled_dot_product_attention(
            meta(2, 3, 5, 8), meta(2, 3, 7, 8), meta(2, 3, 7, 6), attn_mask=meta(5, 7)
        ),
        lambda: F.scaled_dot_product_attention(meta(2, 4, 5, 8), meta(2, 2, 5, 8), meta(2, 2, 5, 8), enable_gqa=True),
        lambda: nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.GELU()).to("meta")(meta(3, 8)),
    ],
    ids=["linear", "a vector of weights", "layer norm", "gelu", "attention", "grouped attention", "modules"],
)
def test_shapes_and_dtypes_are_torchs(call):
    expected = call()
    with ShapesAlone():
        got = call()
    assert (got.shape, got.dtype, got.device.type) == (expected.shape, expected.dtype, "meta")


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.linear(meta(2, 8), meta(3, 7)),
        lambda: F.layer_norm(meta(2, 8), (7,)),
        lambda: F.scaled_dot_product_attention(meta(1, 5, 8), meta(1, 7, 6), meta(1, 7, 6)),
        lambda: F.scaled_dot_product_attention(meta(1, 5, 8), meta(1, 7, 8), meta(1, 6, 8)),
        lambda: F.scaled_dot_product_attention(meta(1, 5, 8), meta(1, 7, 8), meta(1, 7, 8), meta(5, 5)),
    ],
    ids=["features", "normalised", "keys", "values", "mask"],
)
def test_what_torch_refuses_is_refused(call):
    for mode in (torch.no_grad(), ShapesAlone()):
        with mode, pytest.raises((RuntimeError, ValueError)):
            call()


def test_a_model_runs_or_says_that_the_size_is_wrong():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)).to("meta")
    dry_run(model, (3, 4, 4))
    with pytest.raises(RuntimeError, match=r"weight of \(2, 48\) for an input of \(1, 75\)"):
        dry_run(model, (3, 5, 5))
