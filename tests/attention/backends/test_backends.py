"""Backends against the formula; the registry: what is chosen, what is refused, what the log says."""

import logging

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import vit_tucker as vt
from vit_tucker.attention.attend import attend
from vit_tucker.attention.backends import (
    AUTO,
    Backend,
    Facts,
    choose,
    flash,
    flex,
    get_backend,
    list_backends,
    register_backend,
    registry,
    sdpa,
)
from vit_tucker.attention.backends import blocked as blocked_backend
from vit_tucker.attention.backends import blocked_products as blocked
from vit_tucker.attention.backends.base import facts_of, fast_bfloat16
from vit_tucker.attention.backends.heads import expand_heads, pack_heads, unpack_heads
from vit_tucker.errors import ConfigError, PatchError

CPU = Facts("cpu", torch.float32, 12, 1, 16, 16)
CUDA = CPU._replace(device="cuda", dtype=torch.bfloat16)
WHOLE = CPU._replace(ranks=(16, 16, 16, 16), grad=True)
GENERIC = ("sdpa", "blocked", "eager", "flex")


def tensors(kv_heads=1, heads=4, tokens=7, widths=(16, 24), dtype=torch.float64, batch=2):
    g = torch.Generator().manual_seed(heads + tokens)
    shapes = (
        (batch, heads, tokens, widths[0]),
        (batch, kv_heads, tokens, widths[0]),
        (batch, kv_heads, tokens, widths[1]),
    )
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def formula(q, k, v, scale=0.3, mask=None):
    scores = scale * q @ expand_heads(k, q.shape[1]).mT
    return (scores if mask is None else scores + mask).softmax(-1) @ expand_heads(v, q.shape[1])


def run(name, q, k, v, attn_mask=None, is_causal=False, dropout=0.0):
    return get_backend(name).attend(q, k, v, attn_mask, is_causal, 0.3, dropout)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_formula(name, kv_heads):
    results = []
    for compute in (formula, lambda *args: run(name, *args)):
        inputs = [t.requires_grad_(name != "flex") for t in tensors(kv_heads)]  # flex has no backward pass on the CPU
        y = compute(*inputs)
        grads = torch.autograd.grad(y.square().sum(), inputs) if name != "flex" else ()
        results.append([y, *grads])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)  # float64, sums of a few dozen products
    assert not torch.allclose(results[1][0], formula(*tensors(kv_heads), scale=0.31))


BOOLEAN = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.4
BOOLEAN |= torch.eye(7, dtype=torch.bool)
ADDITIVE = torch.linspace(-2, 2, 4 * 49, dtype=torch.float64).reshape(4, 7, 7)
TRIANGLE = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["sdpa", "eager", "flex"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_masks(name, kv_heads):
    q, k, v = tensors(kv_heads)
    additive = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~BOOLEAN, float("-inf"))
    cases = (({"attn_mask": BOOLEAN}, additive), ({"attn_mask": ADDITIVE}, ADDITIVE), ({"is_causal": True}, TRIANGLE))
    for given, mask in cases:
        y = run(name, q, k, v, **given)
        torch.testing.assert_close(y, formula(q, k, v, mask=mask), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(y, formula(q, k, v))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_dropout(name):
    torch.manual_seed(0)
    first, second = (run(name, *tensors(), dropout=0.5) for _ in range(2))
    assert not torch.allclose(first, second)


def test_packing_is_a_view_of_what_a_projection_leaves_and_can_be_undone():
    x = torch.randn(2, 7, 4 * 6)
    q = x.unflatten(2, (4, 6)).transpose(1, 2)  # (B, H, N, D)
    packed = pack_heads(q, 1)
    assert packed.shape == (2, 1, 28, 6)
    assert packed.data_ptr() == x.data_ptr()
    for kv_heads in (1, 2, 4):
        assert torch.equal(unpack_heads(pack_heads(q, kv_heads), 4), q)
    assert torch.equal(pack_heads(q, 2)[:, 1, :2], q[:, 2:, 0])  # the first token's heads of the second group


class TestBlocked:
    @pytest.mark.parametrize("room", [1, 300, 1000, 1 << 20])
    @pytest.mark.parametrize("kv_heads", [1, 4])
    @pytest.mark.parametrize("keep", [False, True])
    def test_any_size_of_blocks_gives_the_same(self, room, kv_heads, keep, monkeypatch):
        """From single rows of one image to all images at once; with the maps kept or computed again."""
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.setattr(blocked, "BLOCK_BYTES", room)
        monkeypatch.setattr(blocked_backend, "room_for_maps", lambda *_: keep)
        results = []
        for compute in (formula, lambda *args: run("blocked", *args)):
            inputs = [t.requires_grad_() for t in tensors(kv_heads, batch=3)]
            y = compute(*inputs)
            (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            results.append([y, *(t.grad for t in inputs)])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(results[0][1], 1.001 * results[1][1])

    def test_blocks_cover_each_row_once_and_fit(self, monkeypatch):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        q, k = torch.empty(5, 100, 8), torch.empty(5, 10, 8)
        for room in (1, 400, 3999, 4000, 9000, 1 << 20):
            monkeypatch.setattr(blocked, "BLOCK_BYTES", room)
            count = torch.zeros(5, 100)
            for images, rows, (scores, maps) in blocked.blocks(q, k, 2):
                count[images, rows] += 1
                assert scores.shape == maps.shape == (*count[images, rows].shape, 10)
                assert scores.numel() * 4 <= max(room, 40)
            assert torch.equal(count, torch.ones_like(count)), room

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_error_is_at_most_twice_the_references(self, dtype):
        """flash-attention's rule, for the output and all gradients; the reference is the formula in the same dtype."""
        errors = []
        for compute in (formula, lambda *args: run("blocked", *args)):
            exact = [t.requires_grad_() for t in tensors(tokens=65, widths=(32, 32))]
            low = [t.detach().to(dtype).requires_grad_() for t in exact]
            results = []
            for inputs, function in ((exact, formula), (low, compute)):
                y = function(*inputs)
                y.square().sum().backward()
                results.append([y, *(t.grad for t in inputs)])
            errors.append([(a - b).abs().max().item() for a, b in zip(*results, strict=True)])
        for reference, ours in zip(*errors, strict=True):
            assert 0 < ours <= 2 * reference

    @pytest.mark.parametrize("tokens", [7, 40])
    def test_keeps_maps_where_that_is_no_more_than_dense_attention_keeps(self, tokens):
        """4 H D numbers per token, here 4 * 4 / 0.3^2 = 178; maps alone are 4 N. Plain products keep maps whatever they take."""
        kept = {}
        for name in ("blocked", "eager"):
            sizes = kept[name] = []
            inputs = [t.requires_grad_() for t in tensors(tokens=tokens, widths=(8, 8))]
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
            ):
                run(name, *inputs)
        maps = 2 * 4 * tokens * tokens
        assert (maps in kept["blocked"]) == (tokens == 7)
        assert maps in kept["eager"]

    def test_is_one_operation_to_the_compiler(self):
        torch._dynamo.reset()
        q, k, v = (t[:, 0].contiguous() for t in tensors(4))
        for dynamic in (False, True):
            compiled = torch.compile(blocked.blocked_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            torch.testing.assert_close(
                compiled(q, k, v, 0.3, False)[0], formula(q[:, None], k[:, None], v[:, None])[:, 0]
            )
        inputs = tuple(t.requires_grad_() for t in (q, k, v))
        torch.library.opcheck(blocked.blocked_attention, (*inputs, 0.3, True))


def test_sdpa_leaves_no_thread_idle_in_training():
    q = torch.empty(1, 4, 7, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not sdpa.packs(q, 1)
        assert sdpa.packs(q, 2)
        with torch.no_grad():
            assert sdpa.packs(q, 1)
        torch.set_num_threads(1)
        assert sdpa.packs(q, 1)
    finally:
        torch.set_num_threads(threads)


def test_fused_kernels_get_one_width_on_the_cpu(monkeypatch):
    """Where keys and values differ in width torch would compute in parts."""
    kernels = []
    attention = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        kernels.append(torch._fused_sdp_choice(q, k, v))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for widths in ((16, 24), (24, 16), (16, 16)):
        q, k, v = tensors(widths=widths)
        torch.testing.assert_close(run("sdpa", q, k, v), formula(q, k, v))
        assert torch._fused_sdp_choice(q, *(t.expand(-1, 4, -1, -1) for t in (k, v))) == (widths[0] == widths[1])
    assert kernels == [1, 1, 1]  # SDPBackend.FLASH_ATTENTION


def test_padding():
    padded = sdpa.pad(torch.ones(2, 3, 5, 13), 16)
    assert padded.shape[-1] == 16
    assert padded[..., 13:].abs().max() == 0
    x = torch.ones(2, 16)
    assert sdpa.pad(x, 16) is x


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
        monkeypatch.setattr(flash, "flash_attn_func", lambda: self.flash_attn_func)

    @pytest.mark.parametrize("widths", [(16, 16), (13, 24), (64, 8)])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_is_called_with_what_it_takes(self, widths, kv_heads):
        q, k, v = tensors(kv_heads, widths=widths, dtype=torch.bfloat16)
        for causal in (False, True):
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
    def test_refuses_what_it_does_not_take(self, facts, reason, monkeypatch):
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

    def test_a_good_package_is_taken(self, monkeypatch):
        flash.missing.cache_clear()
        monkeypatch.setattr(flash.importlib.metadata, "version", lambda name: "2.8.3")
        monkeypatch.setattr(flash.importlib, "import_module", lambda name: None)
        assert choose(CUDA, "flash_attn").reason == "asked for"
        flash.missing.cache_clear()
        registry._CHOICES.clear()


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("blocked", CUDA, "for CPUs"),
        ("blocked", CPU._replace(mask="boolean"), "no boolean mask"),
        ("blocked", CPU._replace(mask="causal"), "no causal mask"),
        ("blocked", CPU._replace(dropout=0.1), "no dropout"),
        ("blocked", CPU._replace(own_only=True), "torch's own operations"),
        ("flex", CPU, "for CUDA"),
        ("flex", CUDA._replace(dropout=0.1), "no dropout"),
        ("flex", CUDA._replace(mask="additive", mask_grad=True), "not trained"),
        ("flex", CUDA._replace(key_width=8), "width 8 is below 16"),
        ("triton", CPU, "Tucker Attention as a whole"),
        ("latent", CPU, "Tucker Attention as a whole"),
        ("latent", WHOLE._replace(device="cuda"), "for CPUs"),
        ("latent", WHOLE._replace(mask="causal"), "no causal mask"),
        ("latent", WHOLE._replace(dropout=0.1), "no dropout"),
        ("latent", WHOLE._replace(angles_grad=True), "angles are not trained"),
        ("latent", WHOLE._replace(own_only=True), "torch's own operations"),
    ],
)
def test_refusals_say_why_and_what_can(name, facts, reason):
    with pytest.raises(PatchError, match=f"backend '{name}' can't take this call: .*{reason}.*these can: auto, .*sdpa"):
        choose(facts, name)


def test_flex_takes_masks_and_groups_on_cuda():
    assert flex.refuses(CUDA._replace(mask="boolean", grad=True)) is None


class TestAuto:
    def test_float32_on_the_cpu_runs_on_sdpa(self):
        assert choose(CPU).name == choose(CPU._replace(grad=True, mask="additive", dropout=0.1)).name == "sdpa"

    def test_bfloat16_on_the_cpu_by_what_the_cpu_can(self, monkeypatch):
        low = CPU._replace(dtype=torch.bfloat16)
        monkeypatch.setattr(registry, "fast_bfloat16", lambda: True)
        assert registry.decide(low, AUTO).name == "blocked"
        masked = registry.decide(low._replace(mask="boolean"), AUTO)
        assert masked.name == "eager"
        assert "not blocked: it takes no boolean mask" in masked.reason
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
            ({"dropout": 0.1}, False),
            ({"mask": "additive", "mask_grad": True}, False),
        ],
    )
    def test_the_log_says_where_torch_has_no_kernel(self, change, fused):
        """As torch itself chooses."""
        facts = CPU._replace(grad=True, **change)
        q = torch.randn(2, 4, 7, 8, requires_grad=True)
        mask = {"boolean": BOOLEAN, "additive": torch.zeros(4, 7, 7).unsqueeze(0)}.get(facts.mask)
        mask = mask.requires_grad_() if facts.mask_grad else mask
        chosen = torch._fused_sdp_choice(q, q, q, mask, facts.dropout, facts.mask == "causal")
        assert chosen == fused
        assert registry.decide(facts, AUTO).reason.startswith("fused" if fused else "in parts")
        assert registry.decide(facts, "sdpa").reason.startswith(f"asked for; {'fused' if fused else 'in parts'}")

    def test_cuda_runs_on_sdpa(self):
        assert choose(CUDA).name == "sdpa"

    def test_asks_the_cpu(self):
        assert fast_bfloat16() == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def test_the_log_says_once_what_runs_and_why(caplog):
    registry._CHOICES.clear()
    q, k, v = tensors(dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="vit_tucker.attention"):
        for _ in range(2):
            attend(q, k, v, scale=0.3, attn_drop=nn.Dropout(0.0), fused=True)
        attend(q, k, v, scale=0.3, attn_drop=nn.Dropout(0.0), fused=False)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "attention backend sdpa: fused in torch [cpu, float32, 4 heads of width 16 and 24 on 1 key/value head, inference]",
        "attention backend eager: asked for [cpu, float32, 4 heads of width 16 and 24 on 1 key/value head, inference]",
    ]
    assert [f"attention backend {line}" for line in registry.choices()] == lines


def test_layers_without_memory_are_no_news(caplog):
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
        "attention backend sdpa: fused in torch, compiled [cpu, float32, 4 heads, Tucker ranks (8, 8) and (8, 8), inference]"
    ]


def test_facts_of_a_call():
    q, k, v = tensors(2, dtype=torch.float32)
    bias = torch.zeros(4, 7, 7, requires_grad=True)
    facts = facts_of(q.requires_grad_(), k, v, bias, False, 0.1)
    assert facts == Facts("cpu", torch.float32, 4, 2, 16, 24, "additive", True, 0.1, True)
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

    def test_reaches_the_layers(self):
        model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=4, img_size=32)
        x = torch.randn(2, 3, 32, 32)
        expected = model.eval()(x)
        vt.patch(model, vt.MHAConfig(backend="eager", rules=[{"layers": 1, "backend": "blocked"}]))
        layers = [block.attn for block in model.blocks]
        assert [layer.backend for layer in layers] == ["eager", "blocked"]
        assert [layer.fused_attn for layer in layers] == [False, True]
        torch.testing.assert_close(model(x), expected)

    def test_is_checked(self):
        with pytest.raises(
            ValueError, match="unknown attention backend 'flash', known: auto, .*did you mean 'flash_attn'"
        ):
            vt.MHAConfig(backend="flash")
        with pytest.raises(
            ValueError, match="backend 'triton' computes Tucker Attention as a whole; here: auto, blocked"
        ):
            vt.GQAConfig(num_kv_heads=1, backend="triton")

    def test_a_call_that_it_can_not_take_fails(self):
        layer = vt.MHAConfig().build(vt.HostSpec(16, 4, 4, 16))
        layer.backend = "blocked"
        x = torch.randn(1, 5, 16)
        assert layer(x).shape == x.shape
        with pytest.raises(PatchError, match="'blocked' can't take this call: it takes no boolean mask"):
            layer(x, attn_mask=torch.ones(5, 5, dtype=torch.bool))

    def test_special_cases_keep_it(self):
        layer = vt.MHAConfig().build(vt.HostSpec(16, 4, 4, 16), dtype=torch.float64)
        layer.backend = "blocked"
        tucker = vt.to_tucker(layer)
        assert tucker.backend == "blocked"
        tucker.backend = "triton"
        assert vt.to_mha(tucker).backend == "auto"
