"""Every registered method: live factors by role, and other ranks in place where the method has ranks."""

import pytest
import torch

import vit_tucker
from tests.contract.test_layer_contract import METHODS, SPECS, X, built, converted, make_weights, rope_of
from vit_tucker.errors import PatchError
from vit_tucker.tensor.rotary import tensor_distance
from vit_tucker.tensor.tucker import relative_distance

RANKED = [(name, spec) for name, spec in METHODS if vit_tucker.get_method(name).example(SPECS[spec]).rank_options()]


def example(name, spec):
    return built(vit_tucker.get_method(name).example(SPECS[spec]), SPECS[spec])


@pytest.mark.parametrize("name", vit_tucker.list_methods())
def test_factors_are_the_layers_own_parameters(name):
    layer = example(name, "timm")
    own, expected = list(layer.parameters()), layer(X)
    assert layer.factors()
    for role, factor in layer.factors().items():
        assert any(factor is parameter for parameter in own), role
        with torch.no_grad():
            kept = factor.clone()
            factor.add_(torch.randn_like(factor))
            assert (layer(X) - expected).norm() > 1e-3 * expected.norm(), role
            factor.copy_(kept)
    assert torch.equal(layer(X), expected)


@pytest.mark.parametrize(("name", "spec"), RANKED)
def test_same_ranks_change_nothing(name, spec):
    layer = example(name, spec)
    before, expected = dict(layer.named_parameters()), layer(X, **rope_of(SPECS[spec]))
    assert layer.resize(**layer.rank_options()) == {}
    assert all(parameter is before[key] for key, parameter in layer.named_parameters())
    assert torch.equal(layer(X, **rope_of(SPECS[spec])), expected)


@pytest.mark.parametrize(("name", "spec"), RANKED)
def test_growth_is_exact_and_undone_exactly(name, spec):
    spec, cls = SPECS[spec], vit_tucker.get_method(name)
    layer = built(cls.example(spec), spec)
    small, full, given = layer.rank_options(), cls.full_rank(spec).rank_options(), rope_of(spec)
    expected, before = layer(X, **given), {id(p) for p in layer.parameters()}
    replaced = layer.resize(**full)
    assert layer.rank_options() == full
    assert {id(old) for old in replaced} <= before
    assert all(any(new is p for p in layer.parameters()) for new in replaced.values())
    torch.testing.assert_close(layer(X, **given), expected, rtol=1e-10, atol=1e-10)  # float64; 1e-14 seen
    with torch.no_grad():  # the new coordinates are used once what follows them is not zero any more
        for parameter in replaced.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert (layer(X, **given) - expected).norm() > 1e-3 * expected.norm()
    layer = built(cls.example(spec), spec)
    expected = layer(X, **given)
    layer.resize(**full)
    layer.resize(**small)
    torch.testing.assert_close(layer(X, **given), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "spec"), RANKED)
def test_truncation_keeps_what_a_conversion_keeps(name, spec):
    """The error is that of a HOSVD or SVD at the same ranks; with RoPE whole pairs are chosen, which keeps less."""
    spec, cls = SPECS[spec], vit_tucker.get_method(name)
    weights, given = make_weights(spec), rope_of(spec)
    layer, direct = converted(cls.full_rank(spec), spec, weights), converted(cls.example(spec), spec, weights)
    options = cls.example(spec).rank_options()
    replaced = layer.resize(**options)
    assert layer.rank_options() == options
    assert (len(replaced) > 0) == (cls.full_rank(spec).rank_options() != options)
    pre, post = weights.pre_tensor(spec.rope), weights.post_pairs()
    errors = tensor_distance(pre, layer.pre_tensor()), relative_distance(post, layer.post_pairs())
    bounds = tensor_distance(pre, direct.pre_tensor()), relative_distance(post, direct.post_pairs())
    if spec.rope is None:
        torch.testing.assert_close(torch.stack(errors), torch.stack(bounds), rtol=1e-8, atol=1e-10)
    assert all(error < 1 for error in errors)
    assert torch.isfinite(layer(X, **given)).all()


def test_dtype_mode_and_gradients_follow():
    spec = SPECS["timm"]
    layer = vit_tucker.get_method("tucker").example(spec).build(spec, dtype=torch.bfloat16).train()
    layer.q_proj.requires_grad_(False)
    replaced = layer.resize(ranks=(2, 4, 4), post_ranks=(1, 4, 4))
    assert {new.dtype for new in replaced.values()} == {torch.bfloat16}
    assert not layer.q_proj.weight.requires_grad
    assert layer.pre_core.requires_grad
    assert layer.training
    layer(X.to(torch.bfloat16)).sum().backward()
    assert layer.pre_core.grad.shape == (2, 4, 4)
    assert layer.q_proj.weight.grad is None


@pytest.mark.parametrize(
    ("name", "spec", "options", "message"),
    [
        (
            "tucker",
            "timm",
            {"rank": 3},
            "can't resize 'rank', what can be resized: ranks, post_ranks; did you mean 'ranks'",
        ),
        ("tucker", "timm", {"ranks": (9, 8, 8)}, "head rank 9 is above its full rank"),
        ("tucker", "timm", {"post_ranks": (1, 99, 8)}, "query/output rank 99 is above its full rank 24"),
        ("tucker", "rope", {"ranks": (2, 8, 7)}, "key rank 7 is odd"),
        ("mla", "timm", {"q_lora_rank": 99}, "q_lora_rank=99 is above its full rank 24"),
        ("tucker", "timm", {"ranks": (2, 4)}, r"ranks=\(2, 4\): must be 3 whole numbers above 0"),
        ("tucker", "timm", {"ranks": (True, 4, 4)}, "must be 3 whole numbers above 0"),
        ("tucker", "timm", {"post_ranks": (0, 4, 4)}, "must be 3 whole numbers above 0"),
        ("tucker", "timm", {"ranks": None}, "ranks=None: must be 3 whole numbers above 0"),
        ("mla", "timm", {"kv_lora_rank": 2.5}, "kv_lora_rank=2.5: must be a whole number above 0"),
        ("gqa", "timm", {"num_kv_heads": 1}, "can't resize 'num_kv_heads', it has no ranks"),
        ("mha", "timm", {"ranks": (1, 1, 1)}, "can't resize 'ranks', it has no ranks"),
    ],
)
def test_impossible_ranks_change_nothing(name, spec, options, message):
    layer = example(name, spec)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(PatchError, match=message):
        layer.resize(**options)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("spec", ["timm", "rope"])
def test_shared_keys_and_values_are_cut_by_what_they_are_to_both(spec):
    """Each tensor counts by its share: a hundredfold longer output core changes nothing, as it would in a sum of the two."""
    config, given = vit_tucker.TuckerConfig(ranks=(2, 8, 8), shared_kv=True), rope_of(SPECS[spec])
    layer, scaled = (built(config, SPECS[spec]) for _ in range(2))
    expected = layer(X, **given)
    layer.resize(ranks=(2, 8, 12), post_ranks=(2, 8, 12))
    torch.testing.assert_close(layer(X, **given), expected, rtol=1e-10, atol=1e-10)  # float64
    layer.resize(ranks=(2, 8, 8), post_ranks=(2, 8, 8))
    torch.testing.assert_close(layer(X, **given), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        scaled.post_core.mul_(100)
    for each in (layer, scaled):
        each.resize(ranks=(2, 8, 4), post_ranks=(2, 8, 4))
    planes = [torch.linalg.qr(each.k_proj.weight.mT).Q for each in (layer, scaled)]
    torch.testing.assert_close(*(plane @ plane.mT for plane in planes), rtol=1e-7, atol=1e-7)
    assert (layer(X, **given) - expected).norm() > 1e-3 * expected.norm()
    assert layer.rank_options() == {"ranks": (2, 8, 4), "post_ranks": (2, 8, 4)}
    assert layer.v_proj is None


def test_equal_bases_that_are_not_shared_stay_apart():
    layer = example("tucker", "timm")
    with torch.no_grad():
        layer.v_proj.weight.copy_(layer.k_proj.weight)
    key = layer.k_proj.weight
    layer.resize(post_ranks=(1, 3, 2))
    assert layer.k_proj.weight is key
    assert layer.v_proj.weight.shape == (2, 24)
    assert torch.isfinite(layer(X)).all()


def test_adapters_are_to_be_merged_first():
    layer = example("tucker", "timm")
    layer.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(PatchError, match="merge them"):
        layer.resize(ranks=(2, 4, 4))


@pytest.mark.parametrize(("name", "spec"), METHODS)
def test_orthonormal_factors_leave_the_function(name, spec):
    """Of badly scaled factors too; bases have orthonormal columns then, pairs that rotate columns of unit length in the mean."""
    spec, cls = SPECS[spec], vit_tucker.get_method(name)
    for config in (cls.example(spec), cls.full_rank(spec)):
        layer = built(config, spec)
        with torch.no_grad():
            for number, linear in enumerate(layer.input_projections()):
                linear.weight.mul_(10.0 ** (number - 1))
        expected = layer(X, **rope_of(spec))
        with torch.no_grad():
            layer.orthonormalise()
        torch.testing.assert_close(layer(X, **rope_of(spec)), expected, rtol=1e-9, atol=1e-9)
        for linear in layer.latent_projections if hasattr(layer, "latent_projections") else ():
            if linear is None or linear.out_features > linear.in_features:
                continue
            rows = torch.cat([linear.weight.mT, linear.bias[None]]) if linear.bias is not None else linear.weight.mT
            gram = rows.mT @ rows
            if linear is layer.latent_projections[1] and layer.latent_width is not None:
                lengths = gram.diagonal().unflatten(0, (-1, 2)).mean(1)
                torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-10, atol=1e-10)
            else:
                torch.testing.assert_close(gram, torch.eye(len(gram)).to(gram), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "bases"),
    [
        (vit_tucker.TuckerConfig(ranks=(2, 8, 8)), ("q_proj", "k_proj", "v_proj")),
        (vit_tucker.TuckerConfig(ranks=(2, 8, 8), shared_kv=True), ("q_proj", "k_proj")),
        (vit_tucker.MLAConfig(q_lora_rank=6, kv_lora_rank=6), ("q_down", "kv_down")),
        (vit_tucker.GQAConfig(num_kv_heads=1, conversion="svd"), ("k_proj", "v_proj")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"refine_steps": 5}, {"sequential": True}], ids=str)
def test_calibrated_layers_have_orthonormal_bases(make_vit, config, bases, options):
    """Conversions find them in coordinates of unit variance, where equal steps are far too large in some directions."""
    if config.method == "gqa" and options.get("refine_steps"):
        pytest.skip("queries, keys and values of GQA are refined as the weights that they are")
    model = make_vit()
    config = config.model_copy(update={"calibration": vit_tucker.Calibration(**options)})
    vit_tucker.patch(model, config, calibration=[torch.randn(12, 3, 16, 16, dtype=torch.float64)])
    for block in model.blocks:
        for name in bases:
            linear = getattr(block.attn, name)
            rows = (
                linear.weight.mT
                if linear.bias is None or name != "q_proj"
                else torch.cat([linear.weight.mT, linear.bias[None]])
            )
            torch.testing.assert_close(rows.mT @ rows, torch.eye(rows.shape[1]).double(), rtol=1e-9, atol=1e-9)
