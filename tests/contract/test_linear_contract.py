"""Every registered linear method x every property of a layer in the place of ``nn.Linear``; a new method needs no new test."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vit_tucker as vt
from tests.reference import randomise
from vit_tucker.linear.base import LINEAR_METHODS

SPECS = {
    "wide": vt.LinearSpec(12, 20, True),
    "narrow": vt.LinearSpec(20, 12, True),
    "square": vt.LinearSpec(16, 16, True),
    "no bias": vt.LinearSpec(12, 20, False),
    "one column": vt.LinearSpec(1, 6, True),
}
CASES = [(name, spec) for name in LINEAR_METHODS.names() for spec in SPECS]
X = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def host_of(spec, dtype=torch.float64):
    return randomise(nn.Linear(spec.in_features, spec.out_features, bias=spec.bias)).to(dtype)


def converted(config, spec, dtype=torch.float64):
    layer, host = config.build(spec, dtype=dtype), host_of(spec)
    with torch.no_grad():
        layer.convert_from(vt.LinearWeights(host.weight, host.bias).double())
    return layer


def configs(name):
    method = LINEAR_METHODS.get(name)
    return method.full_rank, method.example


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_full_rank_is_the_host(name, spec):
    spec = SPECS[spec]
    x, host = X[..., : spec.in_features], host_of(spec)
    layer = converted(LINEAR_METHODS.get(name).full_rank(spec), spec)
    torch.testing.assert_close(layer(x), host(x), rtol=1e-12, atol=1e-12)
    weights = layer.dense_weights()
    torch.testing.assert_close(weights.weight, host.weight.detach(), rtol=1e-12, atol=1e-12)
    assert (weights.bias is None) == (host.bias is None)


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_dense_weights_are_those_it_computes_with(name, spec):
    spec = SPECS[spec]
    layer = randomise(LINEAR_METHODS.get(name).example(spec).build(spec, dtype=torch.float64))
    x, weights = X[..., : spec.in_features], layer.dense_weights()
    expected = nn.functional.linear(x, weights.weight, weights.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert layer(x[0, 0]).shape == (spec.out_features,)
    assert layer(x[:0]).shape == (0, 5, spec.out_features)


@pytest.mark.parametrize("name", LINEAR_METHODS.names())
def test_convolutions_of_one_pixel_are_replaced_or_refused(name):
    spec, method = vt.LinearSpec(12, 20, True, channels_first=True), LINEAR_METHODS.get(name)
    config = method.full_rank(spec)
    if not method.convolutions:
        with pytest.raises(vt.PatchError, match="does not replace convolutions"):
            config.refuse_features(spec)
        return
    config.refuse_features(spec)
    x, host = torch.randn(2, 12, 3, 4, dtype=torch.float64), randomise(nn.Conv2d(12, 20, 1)).double()
    layer = config.build(spec, dtype=torch.float64)
    with torch.no_grad():
        layer.convert_from(vt.LinearWeights(host.weight.flatten(1), host.bias).double())
    torch.testing.assert_close(layer(x), host(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_counts_are_those_of_the_built_layer(name, spec):
    spec = SPECS[spec]
    for make in configs(name):
        config = make(spec)
        layer = config.build(spec)
        counted = config.count_parameters(spec)
        biases = layer.bias.numel() if getattr(layer, "bias", None) is not None else 0
        assert counted.total == sum(p.numel() for p in layer.parameters())
        assert counted.biases == biases == spec.bias * spec.out_features
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(7, spec.in_features))
        assert config.count_flops(spec, 7) == counter.get_total_flops()


@pytest.mark.parametrize("name", LINEAR_METHODS.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_err_as_the_host_does(name, dtype):
    """At most twice the error of an nn.Linear with the same dense weights, for which one more product rounds."""
    spec = vt.LinearSpec(96, 64, True)
    layer = converted(LINEAR_METHODS.get(name).example(spec), spec)
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact, plain = layer(x), nn.Linear(96, 64, dtype=torch.float64)
    weights = layer.dense_weights()
    plain.load_state_dict({"weight": weights.weight, "bias": weights.bias})
    errors = [
        (part.to(dtype)(x.to(dtype)).double() - exact).norm() / exact.norm() for part in (copy.deepcopy(layer), plain)
    ]
    assert 0 < errors[0] <= 2 * errors[1]
    assert LINEAR_METHODS.get(name).example(spec).build(spec, dtype=dtype)(x.to(dtype)).isfinite().all()


@pytest.mark.parametrize("name", LINEAR_METHODS.names())
def test_initial_weights_are_timms_and_biases_zero(name):
    spec = vt.LinearSpec(192, 256, True)
    torch.manual_seed(0)
    weights = LINEAR_METHODS.get(name).example(spec).build(spec).dense_weights()
    assert weights.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not weights.bias.any()


@pytest.mark.parametrize("name", LINEAR_METHODS.names())
def test_tools_take_it_as_any_module(name):
    """Copies, pickles, state dicts, the meta device, torch.fx, torch.compile, gradients of all parameters."""
    spec = SPECS["wide"]
    layer = converted(LINEAR_METHODS.get(name).example(spec), spec, torch.float32)
    x = X[..., :12].float().requires_grad_()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.fx.symbolic_trace(layer)):
        assert torch.equal(other(x), expected)
    fresh = LINEAR_METHODS.get(name).example(spec).build(spec, device="meta")
    fresh.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(fresh(x), expected)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    expected.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert x.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


RANKED = [name for name in LINEAR_METHODS.names() if LINEAR_METHODS.get(name).example(SPECS["wide"]).rank_options()]


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("spec", ["wide", "narrow", "no bias"])
def test_growth_is_exact_and_truncation_undoes_it(name, spec):
    spec, method = SPECS[spec], LINEAR_METHODS.get(name)
    layer = randomise(method.example(spec).build(spec, dtype=torch.float64))
    x = X[..., : spec.in_features]
    small, full, expected = layer.rank_options(), method.full_rank(spec).rank_options(), layer(x)
    before = dict(layer.named_parameters())
    assert layer.resize(**small) == {}
    replaced = layer.resize(**full)
    assert layer.rank_options() == full
    assert {id(old) for old in replaced} <= {id(p) for p in before.values()}
    assert all(any(new is p for p in layer.parameters()) for new in replaced.values())
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():  # new coordinates are used once the rest is not zero any more
        for parameter in replaced.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert (layer(x) - expected).norm() > 1e-3 * expected.norm()
    again = randomise(method.example(spec).build(spec, dtype=torch.float64))
    again.resize(**full)
    again.resize(**small)
    torch.testing.assert_close(again(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", RANKED)
def test_truncation_is_the_nearest_weight(name):
    """As far from the weight as the singular values that are left out say; a wrong one is further."""
    spec, method = SPECS["wide"], LINEAR_METHODS.get(name)
    layer = randomise(method.full_rank(spec).build(spec, dtype=torch.float64))
    weight = layer.dense_weights().weight
    layer.resize(**method.example(spec).rank_options())
    distance = (layer.dense_weights().weight - weight).norm()
    kept = next(iter(method.example(spec).rank_options().values()))
    values = torch.linalg.svdvals(weight)
    assert distance.item() == pytest.approx(values[kept:].norm().item(), rel=1e-10)
    assert distance < 0.99 * values[kept - 1 :].norm()


@pytest.mark.parametrize("name", RANKED)
def test_impossible_ranks_change_nothing(name):
    spec, method = SPECS["wide"], LINEAR_METHODS.get(name)
    layer = randomise(method.example(spec).build(spec))
    state = copy.deepcopy(layer.state_dict())
    (option,) = layer.rank_options()
    for wrong, message in (
        ({option: 13}, "is above the full rank 12"),
        ({option: 0}, "must be a whole number above 0"),
        ({option: 2.5}, "must be a whole number above 0"),
        ({f"{option}s": 2}, f"can't resize '{option}s'.*did you mean '{option}'"),
    ):
        with pytest.raises(vt.PatchError, match=message):
            layer.resize(**wrong)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
