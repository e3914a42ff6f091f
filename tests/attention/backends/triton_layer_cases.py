"""Tucker layers on the Triton kernels, in a process whose Triton interprets (or with a GPU): see ``test_triton_tucker``.

The truth is the layer in float64 on plain products. In bfloat16 the error may be twice that of the layer on plain products in
bfloat16; in float32 sums of some hundred terms leave about 1e-6.
"""

import copy
import os

import pytest
import timm
import torch
from torch import nn

import vit_tucker as vt
from vit_tucker.attention.rope import RopeSpec
from vit_tucker.errors import PatchError

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SPECS = {
    "plain": vt.HostSpec(24, 3, 8, 24),
    "rope": vt.HostSpec(24, 3, 8, 24, rope=RopeSpec(num_prefix_tokens=1)),
    "mixed rope": vt.HostSpec(24, 3, 8, 24, rope=RopeSpec(half=True, per_head=True)),
}
PAIRS = (("plain", "none"), ("plain", "boolean"), ("rope", "additive"), ("mixed rope", "causal"))
"""Each kind of host and each mask once: the kernels see all masks and rotations together in ``triton_tucker_cases``."""
N = 9


def layer_of(spec, **options):
    torch.manual_seed(0)
    layer = vt.TuckerConfig(ranks=(2, 10, 12), **options).build(SPECS[spec]).double().to(DEVICE)
    with torch.no_grad():
        for p in layer.parameters():  # random biases too
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return layer


def call_of(spec, mask):
    g = torch.Generator().manual_seed(1)
    given = {}
    rope = SPECS[spec].rope
    if rope is not None:
        tokens = N - rope.num_prefix_tokens
        angle = torch.rand(3 if rope.per_head else 1, tokens, 4, generator=g, dtype=torch.float64) * 6
        halves = [f(angle) for f in (torch.sin, torch.cos)]
        table = torch.cat([torch.cat([h, h], -1) if rope.half else h.repeat_interleave(2, -1) for h in halves], -1)
        given["rope"] = (table if rope.per_head else table[0]).to(DEVICE)
    if mask == "boolean":
        given["attn_mask"] = (torch.rand(N, N, generator=g) > 0.4).logical_or(torch.eye(N, dtype=torch.bool)).to(DEVICE)
    if mask == "additive":
        given["attn_mask"] = torch.randn(1, 3, N, N, generator=g, dtype=torch.float64).to(DEVICE)
    return given | ({"is_causal": True} if mask == "causal" else {})


def results(layer, dtype, backend, given):
    """The output, and the gradients of the input and of all parameters, as float64."""
    layer = copy.deepcopy(layer).to(dtype)
    layer.backend = backend
    layer.fused_attn = backend != "eager"
    x = torch.randn(1, N, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(DEVICE, dtype)
    given = {
        name: t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype == torch.float64 else t
        for name, t in given.items()
    }
    y = layer(x.requires_grad_(), **given)
    y.square().sum().backward()
    return [t.double() for t in (y.detach(), x.grad, *(p.grad for p in layer.parameters()))]


@pytest.mark.parametrize(("spec", "mask"), PAIRS)
def test_layer_is_the_float64_layer(spec, mask):
    layer, given = layer_of(spec), call_of(spec, mask)
    truth = results(layer, torch.float64, "eager", given)
    single = results(layer, torch.float32, "triton", given)
    for a, b in zip(single, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    reference = results(layer, torch.bfloat16, "eager", given)
    ours = results(layer, torch.bfloat16, "triton", given)
    for a, b, exact in zip(ours, reference, truth, strict=True):
        rounding = (
            exact.norm() * 2**-9
        )  # of the result itself: a head factor has six entries, which may round well by chance
        assert (a - exact).norm() <= 2 * (b - exact).norm() + rounding
    if given:
        plain = results(layer, torch.float64, "eager", call_of(spec, "none") if mask != "none" else {})
        assert not torch.allclose(plain[0], truth[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{"shared_kv": True}, {"post_ranks": (3, 8, 17)}], ids=str)
def test_other_forms_of_the_layer(options):
    layer = layer_of("plain", **options)
    for a, b in zip(
        *(results(layer, *how, {}) for how in ((torch.float32, "triton"), (torch.float64, "eager"))), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_a_patched_model_trains_and_its_maps_can_be_seen():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3, img_size=32).to(DEVICE).eval()
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    vt.patch(model, vt.TuckerConfig(ranks=(3, 10, 10), backend="triton"))
    y = model(x)
    y.sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    seen = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert [maps.shape for maps in seen] == [(1, 3, 5, 5)]


def test_a_compiled_layer_keeps_the_kernel():
    torch._dynamo.reset()
    layer = layer_of("rope").float()
    layer.backend = "triton"
    x, given = torch.randn(1, N, 24, device=DEVICE), call_of("rope", "none")
    given = {"rope": given["rope"].float()}
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **given), layer(x, **given))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "attn_drop", nn.Dropout(0.1)), "no dropout"),
        (lambda layer: layer.double(), "not torch.float64"),
    ],
)
def test_refusals(change, reason):
    layer = layer_of("plain").float().train()
    layer.backend = "triton"
    change(layer)
    x = torch.randn(1, N, 24, device=DEVICE, dtype=layer.pre_core.dtype)
    with pytest.raises(PatchError, match=f"'triton' does not support this call: .*{reason}"):
        layer(x)
