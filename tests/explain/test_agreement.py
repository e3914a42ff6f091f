"""Distances of maps by hand, over layers worked off in groups, and models that can't be compared."""

import copy

import pytest
import torch

import vit_tucker as vt
from vit_tucker.conversion.observe import groups_within
from vit_tucker.errors import ExplainError
from vit_tucker.explain.agreement import compare_attention, cosine, total_variation
from vit_tucker.explain.capture import attention_maps

SAME = torch.tensor([[1.0, 0], [0.5, 0.5]])
MOVED = torch.tensor([[0.0, 1], [0.5, 0.5]])


def test_by_hand():
    a, b = torch.stack([SAME, SAME])[None], torch.stack([SAME, MOVED])[None]
    assert total_variation(a, b).tolist() == [0, 0.5]  # one of two queries attends elsewhere entirely
    assert total_variation(a, b, torch.tensor([[True, False]])).tolist() == [0, 1]
    assert cosine(a, b).tolist() == pytest.approx([1, 0.5 / 1.5])


def test_a_patched_model_beside_its_host(make_vit, images):
    dense = make_vit()
    exact, small = copy.deepcopy(dense), copy.deepcopy(dense)
    vt.patch(exact, vt.full_rank_config(dense, "tucker"))
    vt.patch(small, vt.TuckerConfig(ranks=(2, 4, 4)))
    layers = ["blocks.0.attn", "blocks.2.attn"]
    x = images[0]
    same = compare_attention((dense, x), (exact, x), layers, {})
    assert [(row.layer, row.head) for row in same] == [(name, head) for name in layers for head in range(4)]
    assert all(row.total_variation < 1e-6 and row.cosine > 1 - 1e-6 for row in same)  # compared in float32
    other = compare_attention((dense, x), (small, x), layers, {})
    a, b = (attention_maps(model, images[:1])["blocks.2.attn"][0, 1] for model in (dense, small))
    assert other[5].total_variation == pytest.approx(((a - b).abs().sum(-1) / 2).mean().item(), abs=1e-6)
    assert min(row.total_variation for row in other) > 1e-3


def test_groups_within_the_memory():
    sizes = {"a": 40, "b": 60, "c": 2, "d": 1000, "e": 2}
    assert list(groups_within("abcde", sizes.get, 100)) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(groups_within([], len, 100)) == []


def test_other_heads_or_tokens(make_vit, images):
    with pytest.raises(
        ExplainError, match=r"blocks\.0\.attn: maps of 4 heads and 17 tokens and of 2 heads and 17 tokens"
    ):
        compare_attention((make_vit(), images[0]), (make_vit(num_heads=2), images[0]), ["blocks.0.attn"], {})
