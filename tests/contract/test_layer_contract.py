"""Every registered method x every property of an attention layer. A new method is tested here without a change.

A method is held to what it says that it ``carries``; test_features.py holds it to refusing the rest.
"""

import copy
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vit_tucker
from tests.reference import all_configs, carries, dense_attention, make_spec, make_weights, randomise, rope_of
from vit_tucker.attention.decoding import attend_past
from vit_tucker.attention.host import DENSE_INIT_STD
from vit_tucker.attention.moment_sums import MomentSums
from vit_tucker.attention.moments import LayerCall
from vit_tucker.attention.rope import RopeSpec
from vit_tucker.tensor.metric import metric_root
from vit_tucker.tensor.regression import LinearMoments
from vit_tucker.tensor.rotary import tensor_distance
from vit_tucker.tensor.tucker import Pairs, relative_distance

SPECS = {
    "timm": make_spec(),
    "no biases": make_spec(qkv_bias=False, proj_bias=False),
    "qkv bias only": make_spec(proj_bias=False),
    "narrow heads": make_spec(head_dim=4),
    "wide heads": make_spec(head_dim=10),
    "other output width": make_spec(out_dim=20),
    "one head": make_spec(num_heads=1, head_dim=24),
    "no key bias": make_spec(key_bias=False),
    "rope": make_spec(rope=RopeSpec(1)),
    "rope half": make_spec(key_bias=False, rope=RopeSpec(3, half=True)),
    "rope mixed": make_spec(qkv_bias=False, rope=RopeSpec(0, per_head=True)),
    "rope mixed half": make_spec(rope=RopeSpec(1, half=True, per_head=True)),
    "rope narrow heads": make_spec(head_dim=4, rope=RopeSpec(1)),
    "rope wide heads": make_spec(head_dim=10, proj_bias=False, rope=RopeSpec(1)),
    "decoder": make_spec(causal=True, softmax_scale=0.3),
    "decoder, rope half": make_spec(causal=True, rope=RopeSpec(half=True)),
}
METHODS = [(name, spec) for name in vit_tucker.list_methods() for spec in SPECS if carries(name, SPECS[spec])]
CONFIGS = [(config, spec) for spec in SPECS for config in all_configs(SPECS[spec])]
GENERATOR = torch.Generator().manual_seed(7)
TOKENS = (
    torch.randn(20, 9, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    @ torch.randn(8, 24, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    / 8**0.5
    + torch.randn(20, 9, 24, generator=torch.Generator().manual_seed(10), dtype=torch.float64) * 0.1
)
X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def built(config, spec, dtype=torch.float64):
    return randomise(config.build(spec, dtype=torch.float64)).to(dtype).eval()


def converted(config, spec, weights):
    module = config.build(spec, dtype=weights.query.dtype).eval()
    with torch.no_grad():
        module.convert_from(weights.double())
    return module


@pytest.mark.parametrize(("name", "spec"), METHODS)
def test_full_rank_conversion_is_exact(name, spec):
    spec = SPECS[spec]
    config, weights = vit_tucker.get_method(name).full_rank(spec), make_weights(spec)
    config.check(spec)
    module = converted(config, spec, weights)
    expected, given = dense_attention(weights, X, spec), rope_of(spec)
    torch.testing.assert_close(module(X, **given), expected, rtol=1e-9, atol=1e-9)
    assert tensor_distance(weights.pre_tensor(spec.rope), module.pre_tensor()) < 1e-12
    assert relative_distance(weights.post_pairs(), module.post_pairs()) < 1e-12
    changed = dense_attention(weights, X, spec, spec.scale * 1.001)  # the tolerance sees a change of 0.1% in the scores
    assert not torch.allclose(module(X, **given), changed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_a_token_with_the_keys_and_values_of_its_past_is_as_in_the_sequence(config, spec):
    spec = SPECS[spec]
    if spec.rope is not None and spec.rope.num_prefix_tokens:
        pytest.skip("its table starts after the prefix tokens: the layer is called with the whole sequence only")
    layer, given = built(config, spec), rope_of(spec)
    last = {name: table[..., -1:, :] for name, table in given.items()}
    _, k, v = layer.project(X[:, :-1], **{name: table[..., :-1, :] for name, table in given.items()})
    q, key, value = layer.project(X[:, -1:], **last)
    pasts = torch.cat([k, key], 2), torch.cat([v, value], 2)
    y = layer.readout(
        layer.combine(X[:, -1:], attend_past(q, *pasts, attn_mask=None, is_causal=True, scale=layer.scale))
    )
    whole = layer(X, is_causal=True, **given)[:, -1:]
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
    if layer.kv_width is not None and spec.causal:
        kept = k.shape[1] * (k.shape[3] + (0 if v is k else v.shape[3]))
        assert kept == layer.kv_width
    short = layer.combine(X[:, -1:], attend_past(q, key, value, attn_mask=None, is_causal=True, scale=layer.scale))
    assert not torch.allclose(layer.readout(short), whole, rtol=1e-3, atol=1e-3)  # the past counts


def calibrated(config, spec, weights, x):
    """A module converted for the tokens x, as the calibration does it for one layer; float64 throughout."""
    module, y = config.build(spec, dtype=torch.float64).eval(), dense_attention(weights, x, spec)
    given = rope_of(spec)
    sums, probe = MomentSums(spec, weights), torch.randn(y.shape, generator=GENERATOR, dtype=torch.float64)
    sums.add(LayerCall(x, y, probe, **given))
    moments = sums.moments()
    with torch.no_grad():
        module.convert_calibrated(weights, moments, 1e-6)
        f = module.mix(x, **given).flatten(0, 1)
        readout = LinearMoments.like(f, y.flatten(0, 1), centre=module.has_out_bias)
        readout.add(f, y.flatten(0, 1), probe.norm(dim=-1).flatten())
        module.fit_readout(readout, metric_root(moments.output, 1e-6), 1e-6)
    return module, y


@pytest.mark.parametrize(("name", "spec"), METHODS)
def test_full_rank_calibrated_conversion_is_exact(name, spec):
    spec = SPECS[spec]
    module, y = calibrated(vit_tucker.get_method(name).full_rank(spec), spec, make_weights(spec), TOKENS)
    torch.testing.assert_close(
        module(TOKENS, **rope_of(spec)), y, rtol=1e-7, atol=1e-7
    )  # roots of metrics of condition 1e6


@pytest.mark.parametrize(("name", "spec"), METHODS)
def test_calibrated_conversion_beats_the_weights_alone(name, spec):
    spec, weights = SPECS[spec], make_weights(SPECS[spec])
    config = vit_tucker.get_method(name).example(spec)
    module, y = calibrated(config, spec, weights, TOKENS)
    given = rope_of(spec)
    plain = (converted(config, spec, weights)(TOKENS, **given) - y).norm()
    assert (module(TOKENS, **given) - y).norm() <= plain * (1 + 1e-6) + 1e-8 * y.norm()  # exact ones differ by rounding


@pytest.mark.parametrize(("name", "spec"), METHODS)
def test_readout_of_mix_is_the_layer(name, spec):
    module = built(vit_tucker.get_method(name).example(SPECS[spec]), SPECS[spec])
    given = rope_of(SPECS[spec])
    torch.testing.assert_close(module.readout(module.mix(X, **given)), module(X, **given))
    f = module.mix(X, **given)
    torch.testing.assert_close(  # linear: what the regression relies on
        module.readout(2 * f) - module.readout(f), module.readout(f) - module.readout(torch.zeros_like(f))
    )


def compresses(name, spec):
    example = vit_tucker.get_method(name).example(spec)
    return example.count_parameters(spec).weights < vit_tucker.MHAConfig().count_parameters(spec).weights


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, spec in METHODS if compresses(name, SPECS[spec])])
def test_compressing_conversion_is_not_exact(name, spec):
    spec = SPECS[spec]
    config = vit_tucker.get_method(name).example(spec)
    weights = make_weights(spec)
    module = converted(config, spec, weights)
    assert not torch.allclose(module(X, **rope_of(spec)), dense_attention(weights, X, spec), rtol=1e-3)
    pre = tensor_distance(weights.pre_tensor(spec.rope), module.pre_tensor())
    post = tensor_distance(weights.post_pairs(), module.post_pairs())
    assert max(pre, post) > 1e-3  # a method may compress one of them


@pytest.mark.parametrize(("name", "spec"), [case for case in METHODS if case[1] in ("timm", "rope", "rope mixed half")])
def test_low_precision_error_is_at_most_twice_the_references(name, spec):
    """bf16 layer against the float64 truth; the reference is the dense formula computed in bf16 (flash-attention's rule)."""
    spec = SPECS[spec]
    weights, given = make_weights(spec), rope_of(spec)
    truth = dense_attention(weights, X, spec)
    low = type(weights)(**{k: None if v is None else v.bfloat16() for k, v in vars(weights).items()})
    reference_error = (dense_attention(low, X.bfloat16(), spec).double() - truth).abs().max()
    module = converted(vit_tucker.get_method(name).full_rank(spec), spec, weights).bfloat16()
    ours = module(X.bfloat16(), **{key: table.float() for key, table in given.items()})
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - truth).abs().max() <= 2 * reference_error


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_parameters_are_counted_from_the_formula(config, spec):
    spec = SPECS[spec]
    module = config.build(spec)
    count = config.count_parameters(spec)
    biases = sum(p.numel() for p in module.parameters() if p.ndim == 1)
    assert count.biases == biases
    assert count.total == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_flops_are_those_that_torch_counts(config, spec):
    spec = SPECS[spec]
    module = built(config, spec)
    module.fused_attn = False  # torch counts the same products under other names in its fused kernels
    with FlopCounterMode(display=False) as counter:  # with gradients: without, few tokens are computed in another order
        module(X[:1], **rope_of(spec))
    assert counter.get_total_flops() == config.count_flops(spec, X.shape[1])


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_paths_and_masks_agree(config, spec):
    module = built(config, SPECS[spec])
    n, given = X.shape[1], rope_of(SPECS[spec])

    def run(**options):
        return module(X, **given, **options)

    boolean = torch.rand(2, 1, n, n, generator=torch.Generator().manual_seed(0)) > 0.4
    boolean |= torch.eye(n, dtype=torch.bool)
    additive = torch.zeros(2, 1, n, n, dtype=torch.float64).masked_fill(~boolean, float("-inf"))
    triangle = torch.ones(n, n, dtype=torch.bool).tril()
    outputs = {}
    for fused in (True, False):
        module.fused_attn = fused
        outputs[fused] = [run(), run(attn_mask=boolean), run(attn_mask=additive), run(is_causal=True)]
        torch.testing.assert_close(outputs[fused][1], outputs[fused][2])
        torch.testing.assert_close(outputs[fused][3], run(attn_mask=triangle))
        assert not torch.allclose(outputs[fused][0], outputs[fused][1])
        per_head = torch.randn(
            2, module.num_heads, n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        outputs[fused].append(run(attn_mask=per_head))
    for a, b in zip(outputs[True], outputs[False], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_masked_tokens_do_not_matter(config, spec):
    module = built(config, SPECS[spec])
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    mask[..., -2:] = False
    changed = X.clone()
    changed[:, -2:] += 1
    given = rope_of(SPECS[spec])
    torch.testing.assert_close(module(X, mask, **given)[:, :-2], module(changed, mask, **given)[:, :-2])
    assert not torch.allclose(module(X, **given)[:, :-2], module(changed, **given)[:, :-2])


def without_keys(spec):
    """Masks under which some queries may attend to nothing: padding, a row, and causal order with padding on the left."""
    n, heads = X.shape[1], SPECS[spec].num_heads
    padding = torch.ones(2, 1, 1, n, dtype=torch.bool)
    padding[0] = False
    row = torch.ones(1, heads, n, n, dtype=torch.bool)
    row[:, :, 4] = False
    return padding, row, torch.ones(n, n, dtype=torch.bool).tril() & (torch.arange(n) > 2)


MASKED = ("timm", "other output width", "rope", "rope mixed half")


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, spec in METHODS if spec in MASKED])
def test_queries_that_may_attend_to_nothing_get_the_output_bias_alone(name, spec):
    module = built(vit_tucker.get_method(name).example(SPECS[spec]), SPECS[spec])
    bias = module.readout(torch.zeros_like(module.mix(X, **rope_of(SPECS[spec]))))[0, 0]
    for allowed in without_keys(spec):
        blind = ~allowed.expand(2, module.num_heads, 9, 9).any(-1).any(1)
        additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
        outputs = []
        for mask in (allowed, additive, additive.bfloat16()):
            for module.fused_attn in (True, False):
                x = X.clone().requires_grad_()
                y = module(x, attn_mask=mask, **rope_of(SPECS[spec]))
                torch.testing.assert_close(y[blind], bias.expand_as(y[blind]))
                assert (y[~blind] - bias).abs().amax(-1).min() > 1e-6
                module.zero_grad()
                y.square().sum().backward()
                assert all(t.grad.isfinite().all() for t in (x, *module.parameters()))
                outputs.append((y, x.grad))
        for y, grad in outputs[1:]:
            torch.testing.assert_close(y, outputs[0][0])
            torch.testing.assert_close(grad, outputs[0][1])


@pytest.mark.parametrize("name", vit_tucker.list_methods())
@pytest.mark.parametrize("fused", [True, False])
def test_additive_masks_of_another_dtype(name, fused):
    module = built(vit_tucker.get_method(name).example(SPECS["timm"]), SPECS["timm"])
    module.fused_attn = fused
    mask = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    for given, layer in (
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
    ):
        module, x = module.to(layer), X.to(layer)
        y = module(x, mask.to(given))
        assert torch.equal(y, module(x, mask.to(given).to(layer)))
        assert not torch.allclose(y, module(x))
    with pytest.raises(vit_tucker.PatchError, match="attn_mask is int64; it must be bool"):
        module(x, mask.long())


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_every_parameter_gets_a_gradient(config, spec):
    module = built(config, SPECS[spec]).train()
    module(X, **rope_of(SPECS[spec])).square().sum().backward()
    dead = [name for name, p in module.named_parameters() if p.grad is None]
    assert dead == []
    zero = [name for name, p in module.named_parameters() if p.ndim > 1 and not p.grad.any()]
    assert zero == []


@pytest.mark.parametrize("name", vit_tucker.list_methods())
@pytest.mark.parametrize("rate", ["attn_drop", "proj_drop"])
def test_dropout_rates_of_the_host_are_kept(name, rate):
    spec = make_spec(**{rate: 0.5})
    module = built(vit_tucker.get_method(name).example(spec), spec)
    torch.testing.assert_close(module(X), module(X))
    module.train()
    torch.manual_seed(0)
    assert not torch.allclose(module(X), module(X))


@pytest.mark.parametrize("name", vit_tucker.list_methods())
def test_own_initialisation_has_the_dense_spread(name):
    """Entries of the reconstructed W_i and Wt_i have the standard deviation of a dense init, sqrt(D) * 0.02^2."""
    spec = make_spec(embed_dim=96, num_heads=8, head_dim=12, out_dim=96)
    config = vit_tucker.get_method(name).example(spec)
    target = spec.head_dim**0.5 * DENSE_INIT_STD**2
    torch.manual_seed(0)
    pairs = [(m.pre_pairs(), m.post_pairs()) for m in (config.build(spec) for _ in range(8))]
    for side in (0, 1):
        stds = [Pairs(p[side].left[:, :96], p[side].right).dense().std() for p in pairs]
        mean = torch.stack(stds).square().mean().sqrt()
        assert mean / target == pytest.approx(1, abs=0.1)  # products of few random cores: about 5% over 8 draws


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_copies_and_pickles(config, spec):
    module = built(config, SPECS[spec])
    given = rope_of(SPECS[spec])
    expected = module(X, **given)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(X, **given), expected)
    fresh = config.build(SPECS[spec], dtype=torch.float64).eval()
    assert not torch.allclose(fresh(X, **given), expected)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(X, **given), expected)


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_builds_where_and_how_asked(config, spec):
    module = config.build(SPECS[spec], device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module.fused_attn
    assert isinstance(module.attn_drop, torch.nn.Dropout)


@pytest.mark.parametrize("name", vit_tucker.list_methods())
def test_config_is_frozen_and_survives_json(name):
    config = vit_tucker.get_method(name).example(make_spec())
    assert config.method == name
    assert type(config).model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.init = "random"
    with pytest.raises(ValueError, match="colour: unknown key"):
        type(config)(**{**config.model_dump(), "colour": "red"})
