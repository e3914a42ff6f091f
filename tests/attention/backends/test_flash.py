"""The flash-attn package, by a stand-in with its contract."""

import pytest
import torch
from torch.nn import functional as F

from tests.attention.backends.test_backends import CPU, CUDA, TRIANGLE, formula, run, tensors
from vit_tucker.attention.backends import (
    choose,
    flash,
    recorded_choices,
)
from vit_tucker.attention.backends.base import facts_of
from vit_tucker.errors import PatchError


class TestFlash:
    """The package can't run here: a stand-in with its contract, from its documentation, takes its place."""

    @staticmethod
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.shape[3] == k.shape[3] == v.shape[3] <= 256
        assert q.shape[3] % 8 == 0
        assert q.shape[2] % k.shape[2] == 0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale)
        return y.transpose(1, 2)

    @pytest.fixture(autouse=True)
    def package(self, monkeypatch):
        monkeypatch.setattr(flash, "flash_attn_func", self.flash_attn_func)

    @pytest.mark.parametrize("widths", [(16, 16), (13, 24), (64, 8)])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_package_is_called_with_supported_widths(self, widths, kv_heads):
        q, k, v = tensors(kv_heads, widths=widths, dtype=torch.bfloat16)
        for causal in (False, True):
            facts = facts_of(q, k, v, None, causal, 0.0)
            assert set(flash.widths(facts)) == {-(-max(widths) // 8) * 8}
            y = run("flash_attn", q, k, v, is_causal=causal)
            exact = formula(q.double(), k.double(), v.double(), mask=TRIANGLE if causal else None)
            assert y.shape == exact.shape
            reference = formula(q, k, v, mask=TRIANGLE.bfloat16() if causal else None)
            assert (y - exact).abs().max() <= 2 * (reference - exact).abs().max()

    @pytest.mark.parametrize(
        ("facts", "reason"),
        [
            (CPU, "for CUDA"),
            (CUDA._replace(dtype=torch.float32), "float16 and bfloat16 only"),
            (CUDA._replace(mask="additive"), "no additive mask"),
            (CUDA._replace(key_width=264), "264 is above 256"),
            (CUDA._replace(value_width=257), "264 is above 256"),
            (CUDA._replace(own_only=True), "torch's own operations"),
            (CUDA, "pip install 'vit_tucker\\[flash\\]'"),
        ],
    )
    def test_refuses_unsupported_calls(self, facts, reason, monkeypatch):
        flash.missing.cache_clear()
        with pytest.raises(PatchError, match=reason):
            choose(facts, "flash_attn")

    @pytest.mark.parametrize(
        ("version", "wrong"),
        [
            ("1.0.9", "2.1 or later"),
            ("2.0.8", "2.1 or later"),
            ("3.0.0b1", "below 3"),
            ("2.8.3.post1", "can't be imported"),
        ],
    )
    def test_versions(self, version, wrong, monkeypatch):
        flash.missing.cache_clear()
        monkeypatch.setattr(flash.importlib.metadata, "version", lambda name: version)
        assert wrong in flash.missing()
        flash.missing.cache_clear()

    def test_a_supported_version_is_used(self, monkeypatch):
        flash.missing.cache_clear()
        monkeypatch.setattr(flash.importlib.metadata, "version", lambda name: "2.8.3")
        monkeypatch.setattr(flash.importlib, "import_module", lambda name: self)
        with recorded_choices():
            assert choose(CUDA, "flash_attn").reason == "asked for"
        flash.missing.cache_clear()
