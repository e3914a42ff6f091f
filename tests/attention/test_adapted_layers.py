"""Every layer of ours with something around its Linears: it is called, so that adapters act and learn and hooks fire."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import vit_tucker
from tests.reference import all_configs, make_spec, randomise, rope_of
from vit_tucker.attention.effective import plain_layer
from vit_tucker.attention.rope import RopeSpec
from vit_tucker.attention.special_cases import to_dense, to_mha, to_tucker
from vit_tucker.attention.variants.mha import MHA
from vit_tucker.errors import WeightsError

SPECS = {
    "timm": make_spec(),
    "wide heads": make_spec(head_dim=10),
    "rope": make_spec(rope=RopeSpec(1)),
    "rope mixed half": make_spec(key_bias=False, rope=RopeSpec(1, half=True, per_head=True)),
}
X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def backends_of(config):
    return ("auto", "eager", "sdpa", "blocked", *(("latent",) if type(config).whole_kernels else ()))


CASES = [
    (spec, number, backend)
    for spec in SPECS
    for number, config in enumerate(all_configs(SPECS[spec]))
    for backend in backends_of(config)
]


def built(spec, number, backend="auto", dtype=torch.float64):
    """A random layer and the names of its Linears."""
    config = all_configs(SPECS[spec])[number].model_copy(update={"backend": backend})
    layer = config.build(SPECS[spec], dtype=torch.float64)
    config.set_options(layer)
    layer = randomise(layer).to(dtype).eval()
    return layer, [name for name, part in layer.named_modules() if isinstance(part, nn.Linear)]


def adapted(layer, linears):
    """The layer with random adapters on its Linears."""
    holder = nn.ModuleDict({"attn": layer})
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[f"attn.{name}" for name in linears], r=2), holder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


@pytest.mark.parametrize(("spec", "number", "backend"), CASES)
def test_adapters_act_and_learn(spec, number, backend):
    layer, linears = built(spec, number, backend)
    given, plain = rope_of(SPECS[spec]), layer(X, **rope_of(SPECS[spec]))
    layer = adapted(layer, linears)
    y = layer(X, **given)
    torch.testing.assert_close(plain_layer(layer)(X, **given), y, rtol=1e-9, atol=1e-9)  # what the merged weights give
    assert not torch.allclose(y, plain, rtol=1e-3)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    for name, parameter in layer.named_parameters():
        if "lora" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 1e-12, name
    for name in linears:  # each has an effect of its own
        layer.get_submodule(name).enable_adapters(False)
        assert not torch.allclose(layer(X, **given), y, rtol=1e-6), name
        layer.get_submodule(name).enable_adapters(True)


@pytest.mark.parametrize(("spec", "number"), [(spec, number) for spec, number, backend in CASES if backend == "auto"])
def test_hooks_fire_and_count(spec, number):
    layer, linears = built(spec, number)
    given = rope_of(SPECS[spec])
    expected = layer(X, **given)
    for name in linears:
        seen = []
        handle = layer.get_submodule(name).register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        torch.testing.assert_close(layer(X, **given), expected, rtol=1e-9, atol=1e-9)  # one that only looks
        handle.remove()
        assert len(seen) == 1, name
        handle = layer.get_submodule(name).register_forward_hook(lambda module, args, y: 1.5 * y)
        altered = copy.deepcopy(layer)
        handle.remove()
        scaled = copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in scaled.get_submodule(name).parameters():
                parameter.mul_(1.5)
        torch.testing.assert_close(altered(X, **given), scaled(X, **given), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(altered(X, **given), expected, rtol=1e-6), name


@pytest.mark.parametrize(("spec", "number"), [(spec, number) for spec, number, backend in CASES if backend == "auto"])
def test_quantised_layers_run(spec, number):
    layer, _ = built(spec, number, dtype=torch.float32)
    x = X.float()
    given = {name: table.float() for name, table in rope_of(SPECS[spec]).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    expected, y = layer(x, **given), small(x, **given)
    assert not torch.equal(y, expected)
    assert (y - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(WeightsError, match=r"its \w+ is a torch\.ao\.nn\.quantized"):
        plain_layer(small)


@pytest.mark.parametrize("number", range(len(all_configs(SPECS["timm"]))))
def test_other_forms_merge_adapters(number):
    layer, linears = built("timm", number)
    plain = layer(X)
    y = adapted(layer, linears)(X)
    tucker, dense = to_tucker(layer), to_dense(layer)
    torch.testing.assert_close(tucker(X), y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(to_dense(tucker).post, dense.post, rtol=1e-8, atol=1e-8)
    if isinstance(layer, MHA):  # others may have larger ranks than heads hold
        torch.testing.assert_close(to_mha(layer)(X), y, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(plain, y, rtol=1e-2)
    assert all(parameter.requires_grad for parameter in tucker.parameters())  # the adapters did


@pytest.mark.parametrize("method", vit_tucker.list_methods())
def test_other_forms_refuse_what_can_not_be_merged(method):
    layer = vit_tucker.get_method(method).full_rank(SPECS["timm"]).build(SPECS["timm"])
    to_tucker(layer)
    layer.proj.register_forward_hook(lambda module, args, y: 2 * y)
    for form in (to_tucker, to_mha, to_dense):
        with pytest.raises(WeightsError, match="its proj has a forward hook"):
            form(layer)


@pytest.mark.parametrize("method", vit_tucker.list_methods())
def test_weights_of_tensor_subclasses_are_multiplied_by_their_linears(method):
    """As torchao's: tensors that need not know more than the product of a Linear."""
    layer = vit_tucker.get_method(method).example(SPECS["timm"]).build(SPECS["timm"]).eval()
    expected = layer(X.float())
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(OnlyLinear(part.weight.detach()))
    torch.testing.assert_close(layer(X.float()), expected)


class OnlyLinear(torch.Tensor):
    """A weight that computes nothing but ``F.linear``."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.inner, *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inner)
        raise NotImplementedError(f"{func} of a weight that is for Linears only")
