"""Tucker Attention as a whole on the CPU against the formula, by the backend that does it in one go and by those that do not."""

import pytest
import torch

import vit_tucker as vt
from tests.contract.test_layer_contract import SPECS, X, rope_of
from vit_tucker.analysis.live_bytes import LiveBytes
from vit_tucker.attention.backends import tucker_cpu
from vit_tucker.attention.backends.base import TuckerCall
from vit_tucker.attention.backends.tucker_call import attend_whole, keeps_more
from vit_tucker.attention.rope import rotate

NAMES = ("p", "k", "v", "pre", "post")


def inputs(ranks=(6, 8, 5, 7), batch=5, tokens=9, heads=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(sum(ranks))
    r2, r3, r2t, r3t = ranks
    shapes = (batch, tokens, r2), (batch, tokens, r3), (batch, tokens, r3t), (heads, r2, r3), (heads, r2t, r3t)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def angles_of(shape):
    angle = 6 * torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return angle.sin(), angle.cos()


def formula(p, k, v, pre, post, scale=0.4, angles=None):
    z = 0
    for core, out in zip(pre, post, strict=True):
        q = p @ core if angles is None else rotate(p @ core, *angles)
        z = z + (scale * q @ k.mT).softmax(-1) @ v @ out.mT
    return z


def run(tensors, backend, angles=None):
    return attend_whole(TuckerCall(*tensors, None, False, 0.4, angles=angles), backend)


def with_gradients(z, tensors):
    weights = torch.arange(z.numel(), dtype=z.dtype).view_as(z) / z.numel()
    return [z, *torch.autograd.grad((z * weights).sum(), tensors)]


@pytest.mark.parametrize("backend", ["latent", "sdpa", "blocked", "eager"])
@pytest.mark.parametrize("ranks", [(6, 8, 5, 8), (6, 8, 5, 7), (3, 4, 9, 13)])
@pytest.mark.parametrize("rotated", [None, (9,), (5, 9)])
def test_outputs_and_gradients_are_those_of_the_formula(backend, ranks, rotated):
    tensors = inputs(ranks)
    angles = None if rotated is None else angles_of((*rotated, ranks[1] // 2))
    expected = with_gradients(formula(*tensors, angles=angles), tensors)
    got = with_gradients(run(tensors, backend, angles), tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64, sums of a few dozen products
    assert not torch.allclose(got[0], formula(*tensors, scale=0.41, angles=angles))
    if angles is not None:
        assert not torch.allclose(got[0], formula(*tensors))


@pytest.mark.parametrize("images", [1, 2, 3, 5, 9])
def test_any_number_of_images_at_a_time_gives_the_same(images, monkeypatch):
    monkeypatch.setattr(tucker_cpu, "IMAGES_PER_THREAD", images)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    tensors = inputs()
    expected = with_gradients(formula(*tensors), tensors)
    for a, b in zip(with_gradients(run(tensors, "latent"), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_error_in_bfloat16_is_at_most_twice_the_references():
    """flash-attention's rule, for the output and all gradients; the reference is the formula in bfloat16."""
    exact, low = inputs(tokens=40), inputs(tokens=40, dtype=torch.bfloat16)
    truth = with_gradients(formula(*exact), exact)
    reference, ours = (with_gradients(z, low) for z in (formula(*low), run(low, "latent")))
    for a, b, true in zip(ours, reference, truth, strict=True):
        assert 0 < (a - true).norm() <= 2 * (b - true).norm()


def test_error_in_float32():
    """torch's kernel exponentiates with about 20 bits: 1e-6 of each map, and gradients are differences of maps."""
    exact, single = inputs(tokens=40), inputs(tokens=40, dtype=torch.float32)
    truth = with_gradients(formula(*exact), exact)
    for a, true in zip(with_gradients(run(single, "latent"), single), truth, strict=True):
        assert 0 < (a - true).norm() <= 1e-5 * true.norm()


def test_backward_pass_stores_outputs_only():
    """Of all heads' queries nothing is kept, where torch's own operations keep them too."""
    tensors = inputs((6, 32, 5, 32), batch=4, tokens=50, heads=6)
    kept = {}
    for backend in ("latent", "sdpa"):
        sizes = kept[backend] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t) or t, lambda t: t):
            run(tensors, backend)
    wide = 4 * 50 * 6 * 32
    storages = {
        name: {t.untyped_storage().data_ptr() for t in found if t.numel() == wide} for name, found in kept.items()
    }
    assert {name: len(found) for name, found in storages.items()} == {"latent": 1, "sdpa": 2}


def test_a_high_rank_layer_trains_with_less_memory_than_the_dense_one():
    spec, peaks = vt.HostSpec(64, 4, 16, 64), {}
    for name, config in (("dense", vt.MHAConfig()), ("tucker", vt.TuckerConfig(ranks=(4, 32, 32)))):
        layer, x = config.build(spec), torch.randn(32, 50, 64)
        with LiveBytes([x, *layer.parameters()]) as live:
            layer(x.requires_grad_()).sum().backward()
        peaks[name] = live.peak()
    assert peaks["tucker"] < peaks["dense"]


def test_what_dense_attention_keeps_by_hand():
    """D = 16, H = 2: 128 numbers per token; p, k, v of width r and 2 * 2 * r of the heads, padded to multiples of 4."""
    assert not keeps_more((16, 16, 16, 16), 2, 0.25)
    assert keeps_more((17, 17, 17, 17), 2, 0.25)  # 51 + 80
    assert keeps_more((1, 1, 1, 32), 2, 0.25)  # padded to the wider


def test_is_one_operation_to_the_compiler():
    torch._dynamo.reset()
    tensors = inputs()
    compiled = torch.compile(lambda *given: run(given, "latent"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), formula(*tensors))
    sin, cos = angles_of((9, 4))
    torch.library.opcheck(
        tucker_cpu.latent_attention, (*tensors[:2], tensors[1], *tensors[3:4], tensors[3], sin, cos, 0.4, True)
    )


@pytest.mark.parametrize("spec", ["timm", "rope", "rope mixed half"])
def test_layers_run_as_a_whole_and_by_heads_alike(spec):
    """Also under a rotation whose frequencies are trained, which the whole leaves to the others."""
    torch.manual_seed(0)
    layer = vt.TuckerConfig(ranks=(2, 8, 8)).build(SPECS[spec], dtype=torch.float64)
    given = rope_of(SPECS[spec])
    outputs = [layer.readout(layer.mix(X, **given))]
    for backend in ("auto", "latent", "sdpa", "blocked", "eager"):
        layer.backend = backend
        outputs.append(layer(X, **given))
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0])
    if given:
        layer.backend = "auto"
        table = given["rope"].clone().requires_grad_()
        layer(X, rope=table).square().sum().backward()
        assert table.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_torch_func_transforms_work():
    """Per-sample gradients: a backend of ours would have no rule for them."""
    layer = vt.TuckerConfig(ranks=(4, 32, 32)).build(vt.HostSpec(64, 4, 16, 64)).double()
    x = torch.randn(3, 5, 64, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(given, image):
        return torch.func.functional_call(layer, given, (image.unsqueeze(0),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(each[name].sum(0), p.grad)
