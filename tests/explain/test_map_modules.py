"""Layers that show no maps, and what is no map."""

import math

import pytest
import torch
from torch import nn

from vit_tucker.errors import ExplainError
from vit_tucker.explain.capture import attention_maps
from vit_tucker.explain.map_modules import check_rows


class Blind(nn.Module):
    """An attention layer with nothing for hooks."""

    num_heads = 1

    def forward(self, x, **_):
        return x


def test_layers_that_show_nothing(make_vit, images):
    model = make_vit()
    model.blocks[1].attn = type("BlindAttention", (Blind,), {})()
    assert list(attention_maps(model, images)) == ["blocks.0.attn", "blocks.2.attn"]
    with pytest.raises(ExplainError, match=r"blocks\.1\.attn: BlindAttention has neither attn_drop nor softmax"):
        attention_maps(model, images, 1)
    with pytest.raises(ExplainError, match="no attention layer that vit_tucker knows"):
        attention_maps(nn.Linear(2, 2), images)


def test_what_is_no_softmax_is_refused(make_vit, images):
    check_rows("x", torch.rand(1, 2, 50, 50).softmax(-1).bfloat16())
    for wrong in (torch.full((1, 1, 2, 2), 0.49), torch.tensor([[[[1.5, -0.5]]]]), torch.full((1, 1, 1, 2), math.nan)):
        with pytest.raises(ExplainError, match="no softmax is the last step"):
            check_rows("x", wrong)
