"""Weights as they act: adapters and parametrizations merge exactly in a copy, what alters a module otherwise is refused."""

import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

from tests.reference import randomise
from vit_tucker.attention.effective import plain_part, readable, with_plain_parts
from vit_tucker.attention.linear import called_weight
from vit_tucker.errors import WeightsError

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PEFT = {
    "LoRA": peft.LoraConfig(target_modules=["qkv"], r=3, lora_alpha=7, lora_dropout=0.5),
    "rank-stabilised LoRA with bias": peft.LoraConfig(target_modules=["qkv"], r=3, lora_bias=True, use_rslora=True),
    "DoRA": peft.LoraConfig(target_modules=["qkv"], r=3, use_dora=True),
    "LoHa": peft.LoHaConfig(target_modules=["qkv"], r=3),
    "LoKr": peft.LoKrConfig(target_modules=["qkv"], r=3),
    "IA3 of outputs": peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]),
    "IA3 of inputs": peft.IA3Config(target_modules=["qkv"], feedforward_modules=["qkv"]),
    "OFT": peft.OFTConfig(target_modules=["qkv"], oft_block_size=4, r=0),
    "VeRA": peft.VeraConfig(target_modules=["qkv"], r=3),
    "a norm": peft.LNTuningConfig(target_modules=["norm"]),
    "a trained copy": peft.LoraConfig(target_modules=["other"], modules_to_save=["qkv"]),
}


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.other = nn.LayerNorm(24), nn.Linear(24, 72), nn.Linear(2, 2)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.qkv(self.norm(x))


def adapted(config, *others, dtype=torch.float64):
    """Parts with random adapters, in eval mode."""
    model = Parts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        for number, other in enumerate(others):
            wrapped.add_adapter(f"other{number}", other)
    return randomise(model).to(dtype).eval(), wrapped


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", PEFT)
def test_adapters_merge_exactly(kind):
    model, wrapped = adapted(PEFT[kind])
    expected, state = model(X), state_of(model)
    plain = with_plain_parts(model, ["qkv"])
    assert (type(plain.norm), type(plain.qkv)) == (nn.LayerNorm, nn.Linear)
    torch.testing.assert_close(plain(X), expected, rtol=1e-12, atol=1e-12)
    assert model(X).equal(expected)  # the model itself keeps its adapters
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with wrapped.disable_adapter():  # the twin: the base's weights alone are others
        assert not torch.allclose(model(X), expected, rtol=1e-2)
        torch.testing.assert_close(with_plain_parts(model, ["qkv"])(X), model(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("state", ["both", "the second", "merged", "merged, then off"])
def test_adapters_count_as_they_are_set(state):
    config = PEFT["LoRA"]
    model, wrapped = adapted(config, peft.LoraConfig(target_modules=["qkv"], r=2))
    first = model(X)
    wrapped.base_model.set_adapter({"both": ["default", "other0"], "the second": "other0"}.get(state, "default"))
    if state.startswith("merged"):
        wrapped.merge_adapter()
    if state == "merged, then off":
        wrapped.base_model.disable_adapter_layers()
    plain = with_plain_parts(model, ["qkv"])(X)
    torch.testing.assert_close(plain, model(X), rtol=1e-11, atol=1e-11)
    assert torch.allclose(plain, first) == (state == "merged")


def test_a_merged_weight_is_rounded_once():
    model, _ = adapted(PEFT["LoRA"], dtype=torch.float32)
    exact, _ = adapted(PEFT["LoRA"])
    weight = readable(model.qkv).weight
    assert weight.dtype == torch.float32
    assert weight.equal(readable(exact.qkv.float().double()).weight.float())
    assert not weight.equal(model.qkv.weight)


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda linear: prune.random_unstructured(linear, "weight", 0.5),
        lambda linear: prune.l1_unstructured(prune.random_unstructured(linear, "weight", 0.3), "weight", 0.3),
        lambda linear: prune.random_unstructured(linear, "bias", 0.5),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_parametrizations_have_a_value(wrap, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = randomise(wrap(nn.Linear(24, 24).double())).train(training)
    state = state_of(linear)
    plain = plain_part(linear)
    assert type(plain) is nn.Linear
    assert not plain._forward_pre_hooks
    assert all(torch.equal(state[name], tensor) for name, tensor in linear.state_dict().items())
    torch.testing.assert_close(plain(X), linear.eval()(X), rtol=1e-12, atol=1e-12)
    original = next(tensor for name, tensor in state.items() if "orig" in name or name == "weight_v")
    assert not any(original.equal(parameter) for parameter in plain.parameters())


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """Computes what a Linear does."""


def with_forward(linear):
    linear.forward = lambda x: x
    return linear


def with_hook(linear, register):
    getattr(linear, register)(lambda *args: None)
    return linear


def of_two_tensors(linear):
    linear.weight = nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach()))
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_hook(nn.Linear(24, 72), "register_forward_hook"), "its qkv has a forward hook"),
        (lambda: with_hook(nn.Linear(24, 72), "register_forward_pre_hook"), "its qkv has a forward pre-hook"),
        (lambda: with_forward(nn.Linear(24, 72)), "its qkv has a forward of its own"),
        (lambda: Scaled(24, 72), r"its qkv is a .*Scaled, not a Linear or"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(24, 72), r"its qkv is a torch\.ao\.nn\.quantized.*Linear"),
        (lambda: of_two_tensors(nn.Linear(24, 72)), "its qkv has weights that are a TwoTensor"),
    ],
)
def test_what_alters_a_projection_is_refused(make, reason):
    model = Parts()
    model.qkv = make()
    with pytest.raises(WeightsError, match=reason):
        with_plain_parts(model, ["qkv"])


def test_a_part_inside_a_part_is_named_in_full():
    model = Parts()
    model.other = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(2, 2)))
    with_plain_parts(model)
    model.other[1][0].register_forward_hook(lambda module, args, y: y)
    with pytest.raises(WeightsError, match=r"^its other\.1\.0 has a forward hook"):
        with_plain_parts(model)


def test_a_plain_module_is_given_back_as_it_is():
    model = Parts()
    model.qkv = Named(24, 72)
    assert with_plain_parts(model, ["qkv"]) is model


def test_an_adapter_that_is_altered_or_has_no_merge_is_refused():
    model, _ = adapted(PEFT["LoRA"])
    handle = model.qkv.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(WeightsError, match="its qkv has a forward hook"):
        with_plain_parts(model, ["qkv"])
    handle.remove()
    with_plain_parts(model, ["qkv"])
    parametrizations.orthogonal(model.qkv.base_layer)  # PEFT adds to a weight that this computes anew
    with pytest.raises(WeightsError, match="its qkv is a peft.*whose merged weights don't compute what it computes"):
        with_plain_parts(model, ["qkv"])


def test_the_weight_of_a_linear_that_is_called_is_without_its_bias():
    linear = randomise(nn.Linear(24, 7)).double()
    assert linear.bias.abs().min() > 1e-3
    torch.testing.assert_close(
        called_weight(linear, X), linear.weight, rtol=1e-12, atol=1e-12
    )  # rounding of one subtraction
