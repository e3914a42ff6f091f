"""The registry: what is chosen, what is refused, what the log says; the option of the configs."""

import logging
from contextlib import suppress

import pytest
import timm
import torch
from torch import nn

import vit_tucker as vt
from tests.attention.backends.test_backends import BOOLEAN, CPU, CUDA, WHOLE, tensors
from vit_tucker.attention.attend import attend
from vit_tucker.attention.backends import (
    AUTO,
    Backend,
    Facts,
    choose,
    flex,
    get_backend,
    list_backends,
    recorded_choices,
    register_backend,
    registry,
)
from vit_tucker.attention.backends.base import facts_of, fast_bfloat16
from vit_tucker.errors import ConfigError, PatchError


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("blocked", CUDA, "for CPUs"),
        ("blocked", CPU._replace(mask="boolean"), "no boolean mask"),
        ("blocked", CPU._replace(mask="causal"), "no causal mask"),
        ("blocked", CPU._replace(dropout=True), "no dropout"),
        ("blocked", CPU._replace(own_only=True), "torch's own operations"),
        ("flex", CPU, "for CUDA"),
        ("flex", CUDA._replace(dropout=True), "no dropout"),
        ("flex", CUDA._replace(mask="additive", mask_grad=True), "not trained"),
        ("flex", CUDA._replace(key_width=8), "width 8 is below 16"),
        ("triton", CPU, "Tucker Attention as a whole"),
        ("latent", CPU, "Tucker Attention as a whole"),
        ("latent", WHOLE._replace(device="cuda"), "for CPUs"),
        ("latent", WHOLE._replace(mask="causal"), "no causal mask"),
        ("latent", WHOLE._replace(dropout=True), "no dropout"),
        ("latent", WHOLE._replace(angles_grad=True), "angles are not trained"),
        ("latent", WHOLE._replace(own_only=True), "torch's own operations"),
    ],
)
def test_refusals_say_why_and_what_can(name, facts, reason):
    with pytest.raises(
        PatchError, match=f"backend '{name}' does not support this call: .*{reason}.*these can: auto, .*sdpa"
    ):
        choose(facts, name)


def test_flex_supports_masks_and_groups_on_cuda():
    assert flex.refuses(CUDA._replace(mask="boolean", grad=True)) is None


class TestAuto:
    def test_float32_on_the_cpu_runs_on_sdpa(self):
        assert choose(CPU).name == choose(CPU._replace(grad=True, mask="additive", dropout=True)).name == "sdpa"

    def test_bfloat16_on_the_cpu_by_what_the_cpu_can(self, monkeypatch):
        low = CPU._replace(dtype=torch.bfloat16)
        monkeypatch.setattr(registry, "fast_bfloat16", lambda: True)
        assert registry.decide(low, AUTO).name == "blocked"
        masked = registry.decide(low._replace(mask="boolean"), AUTO)
        assert masked.name == "eager"
        assert "not blocked: it supports no boolean mask" in masked.reason
        assert registry.decide(low._replace(own_only=True), AUTO).name == "sdpa"
        assert registry.decide(low._replace(dtype=torch.float16), AUTO).name == "sdpa"
        monkeypatch.setattr(registry, "fast_bfloat16", lambda: False)
        assert registry.decide(low, AUTO).name == "sdpa"

    def test_high_ranks_train_with_less_memory(self):
        assert registry.decide(WHOLE, AUTO).name == "sdpa"
        more = WHOLE._replace(keeps_more=True)
        assert registry.decide(more, AUTO).name == "latent"
        assert registry.decide(more._replace(grad=False), AUTO).name == "sdpa"
        assert registry.decide(more._replace(mask="boolean"), AUTO).name == "sdpa"

    @pytest.mark.parametrize(
        ("change", "fused"),
        [
            ({}, True),
            ({"mask": "boolean"}, True),
            ({"mask": "additive"}, True),
            ({"mask": "causal"}, True),
            ({"dropout": True}, False),
            ({"mask": "additive", "mask_grad": True}, False),
        ],
    )
    def test_the_log_says_where_torch_has_no_kernel(self, change, fused):
        """As torch itself chooses."""
        facts = CPU._replace(grad=True, **change)
        q = torch.randn(2, 4, 7, 8, requires_grad=True)
        mask = {"boolean": BOOLEAN, "additive": torch.zeros(4, 7, 7).unsqueeze(0)}.get(facts.mask)
        mask = mask.requires_grad_() if facts.mask_grad else mask
        chosen = torch._fused_sdp_choice(q, q, q, mask, 0.1 * facts.dropout, facts.mask == "causal")
        assert chosen == fused
        assert registry.decide(facts, AUTO).reason.startswith("fused" if fused else "in parts")
        assert registry.decide(facts, "sdpa").reason.startswith(f"asked for; {'fused' if fused else 'in parts'}")

    def test_cuda_runs_on_sdpa(self):
        assert choose(CUDA).name == "sdpa"

    def test_fast_bfloat16_depends_on_the_cpu(self):
        assert fast_bfloat16() == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def call(fused=True, dtype=torch.float32):
    q, k, v = tensors(dtype=dtype)
    attend(q, k, v, scale=0.3, attn_drop=nn.Dropout(0.0), fused=fused)


def test_a_recording_has_the_calls_inside_and_each_is_logged_once(caplog):
    call()  # what ran before is no news to the first recording alone
    with caplog.at_level(logging.INFO, logger="vit_tucker.attention"), recorded_choices() as choices:
        for _ in range(2):
            call()
        call(fused=False)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "attention backend sdpa: fused in torch, padded to 24 columns "
        "[cpu, float32, 4 heads of width 16 and 24 on 1 key/value head, inference]",
        "attention backend eager: asked for [cpu, float32, 4 heads of width 16 and 24 on 1 key/value head, inference]",
    ]
    assert [f"attention backend {line}" for line in choices.lines()] == lines
    call(dtype=torch.float64)
    assert len(choices) == 2  # it is over


def test_recordings_nest_and_end_with_errors():
    with recorded_choices() as outer:
        call()
        with suppress(RuntimeError), recorded_choices() as inner:
            call(fused=False)
            raise RuntimeError
        with recorded_choices() as none:
            pass
        call(dtype=torch.float64)
    assert [line.partition(":")[0] for line in inner.lines()] == ["eager"]
    assert [line.partition(":")[0] for line in outer.lines()] == ["sdpa", "eager", "sdpa"]
    assert not none


def test_each_recording_has_the_choices_of_compiled_layers():
    """Two runs in one process: the second one's model is like the first one's, and its code would be the same."""
    lines = []
    for _ in range(2):
        layer = vt.TuckerConfig(ranks=(2, 8, 8)).build(vt.HostSpec(16, 4, 4, 16))
        compiled = torch.compile(layer, backend="eager")
        with recorded_choices() as choices:
            for _ in range(2):
                compiled(torch.randn(2, 5, 16))
        lines.append(choices.lines())
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1
    assert "dense attention, compiled [cpu" in lines[0][0]


def test_calls_on_the_meta_device_are_not_logged(caplog):
    layer = vt.TuckerConfig(ranks=(2, 8, 8)).build(vt.HostSpec(16, 4, 4, 16), device="meta")
    with caplog.at_level(logging.INFO, logger="vit_tucker.attention"):
        assert layer(torch.randn(1, 5, 16, device="meta")).is_meta
    assert not caplog.records


def test_a_compiled_layer_logs_too(caplog):
    torch._dynamo.reset()
    layer = vt.TuckerConfig(ranks=(2, 8, 8)).build(vt.HostSpec(16, 4, 4, 16))
    with caplog.at_level(logging.INFO, logger="vit_tucker.attention"), torch.no_grad():
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(1, 5, 16))
    assert [r.getMessage() for r in caplog.records if "compiled" in r.getMessage()] == [
        "attention backend sdpa: fused in torch, padded to 16 columns, compiled "
        "[cpu, float32, 4 heads, Tucker ranks (8, 8) and (8, 8), inference]"
    ]


def test_facts_of_a_call():
    q, k, v = tensors(2, dtype=torch.float32)
    bias = torch.zeros(4, 7, 7, requires_grad=True)
    facts = facts_of(q.requires_grad_(), k, v, bias, False, 0.1)
    assert facts == Facts("cpu", torch.float32, 4, 2, 16, 24, "additive", True, True, True)
    with torch.no_grad():
        assert facts_of(q, k, v, bias, True, 0.0) == Facts("cpu", torch.float32, 4, 2, 16, 24, "causal")


class TestRegistry:
    def test_unknown_names(self):
        with pytest.raises(ConfigError, match="unknown attention backend 'sdp', known: auto, .*; did you mean 'sdpa'"):
            get_backend("sdp")

    @pytest.mark.parametrize("name", ["sdpa", "auto"])
    def test_names_are_unique(self, name):
        with pytest.raises(ConfigError, match=f"'{name}' is already registered"):
            register_backend(Backend(name, lambda facts: None, None))
        assert list_backends() == ["blocked", "eager", "flash_attn", "flex", "latent", "sdpa", "triton"]


class TestOption:
    """``backend`` of a method's config."""

    def test_backend_of_the_config_is_set_on_the_layers(self):
        model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=4, img_size=32)
        x = torch.randn(2, 3, 32, 32)
        expected = model.eval()(x)
        vt.patch(model, vt.MHAConfig(backend="eager", rules=[{"layers": 1, "backend": "blocked"}]))
        layers = [block.attn for block in model.blocks]
        assert [layer.backend for layer in layers] == ["eager", "blocked"]
        assert [layer.fused_attn for layer in layers] == [False, True]
        torch.testing.assert_close(model(x), expected)

    def test_unknown_backend_in_the_config_is_refused(self):
        with pytest.raises(
            ValueError, match="unknown attention backend 'flash', known: auto, .*did you mean 'flash_attn'"
        ):
            vt.MHAConfig(backend="flash")
        with pytest.raises(
            ValueError, match="backend 'triton' computes Tucker Attention only; other methods have: auto, blocked"
        ):
            vt.GQAConfig(num_kv_heads=1, backend="triton")

    def test_calls_that_the_backend_does_not_support_fail(self):
        layer = vt.MHAConfig().build(vt.HostSpec(16, 4, 4, 16))
        layer.backend = "blocked"
        x = torch.randn(1, 5, 16)
        assert layer(x).shape == x.shape
        with pytest.raises(PatchError, match="'blocked' does not support this call: it supports no boolean mask"):
            layer(x, attn_mask=torch.ones(5, 5, dtype=torch.bool))

    def test_special_cases_keep_the_backend(self):
        layer = vt.MHAConfig().build(vt.HostSpec(16, 4, 4, 16), dtype=torch.float64)
        layer.backend = "blocked"
        tucker = vt.to_tucker(layer)
        assert tucker.backend == "blocked"
        tucker.backend = "triton"
        assert vt.to_mha(tucker).backend == "auto"
