"""Hosts with something around their weights: adapters merge, hooks are reported or refused by name, NaN is refused."""

import copy
import functools
import warnings

import peft
import pytest
import timm
import torch
from torch import nn

import vit_tucker as vt
from tests.reference import randomise
from vit_tucker.errors import WeightsError
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.tokens import count_tokens

SMALL = {"embed_dim": 24, "num_heads": 2, "depth": 2, "patch_size": 4}
HOSTS = {
    "one qkv": ("vit_tiny_patch16_224", {**SMALL, "img_size": 16}),
    "queries, keys and values apart": ("eva02_base_patch14_224", {**SMALL, "img_size": 16, "depth": 1}),
    "RoPE": ("vit_small_patch16_dinov3", {**SMALL, "img_size": 16, "depth": 1}),
    "windows": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
    ),
    "convolutions": ("visformer_tiny", {"img_size": 32, "embed_dim": 48, "depth": (0, 1, 1), "num_heads": 2}),
}
HOSTS = {kind: host for kind, host in HOSTS.items() if timm.is_model(host[0])}  # old timm has fewer
ON_ATTENTION = r".*attn\.(qkv|q_proj|k_proj|v_proj|proj)"
SMALL_TUCKER = vt.TuckerConfig(ranks=(2, 4, 4))


def host(kind="one qkv"):
    name, options = HOSTS[kind]
    return randomise(timm.create_model(name, num_classes=5, **options)).double().eval()


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def adapted(kind="one qkv", **options):
    """A host with random LoRA on all projections, and what ``get_peft_model`` puts around it."""
    model = host(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=ON_ATTENTION, r=2, **options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, wrapped.eval()


@pytest.mark.parametrize("kind", HOSTS)
def test_adapters_are_merged_exactly(kind):
    model, _ = adapted(kind)
    size = HOSTS[kind][1]["img_size"]
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    assert not torch.allclose(plain(x), expected, rtol=1e-2)  # the twin: what the raw weights give
    planned = vt.plan(model, vt.MHAConfig(), img_size=size)
    assert planned.layers[0].flops_before is not None
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for method in vt.list_methods() if kind == "one qkv" else ["gqa", "tucker"]:  # all get the same merged weights
        config = vt.full_rank_config(model, method)
        report = vt.patch(model, config, img_size=size)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        assert not any("lora" in name for name, _ in model.named_parameters())
        vt.unpatch(model)
        assert torch.equal(model(x), expected)
    note = report.notes[-1]
    assert planned.notes == (note,)
    assert note.startswith(
        "merged into the new layers, which train as a whole where these did: peft.tuners.lora.layer."
    )
    assert next(iter(find_attention(model))) + ".proj" in note


def test_a_peft_model_is_patched_inside():
    model, wrapped = adapted(modules_to_save=["head"])
    x = images()
    expected = wrapped(x)
    report = vt.patch(wrapped, vt.full_rank_config(wrapped, "gqa"))
    assert [layer.name for layer in report.layers] == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-9, atol=1e-9)
    assert vt.patch_record(wrapped) is vt.patch_record(model) is not None
    assert all(parameter.requires_grad for parameter in model.blocks[0].attn.parameters())  # its adapters trained
    assert not model.blocks[0].mlp.fc1.weight.requires_grad
    assert type(vt.dense_model(wrapped).head) is nn.Linear
    vt.unpatch(wrapped)
    assert torch.equal(wrapped(x), expected)


def test_every_model_of_pefts_is_entered():
    model = host()
    config = peft.LoraConfig(target_modules=["fc1"], r=2)
    mixed = peft.get_peft_model(model, config, mixed=True)
    for outer in (mixed, mixed.base_model):
        assert [layer.name for layer in vt.patch(outer, SMALL_TUCKER).layers] == ["blocks.0.attn", "blocks.1.attn"]
        assert vt.patch_record(model) is not None
        vt.unpatch(outer)
        assert vt.patch_record(model) is None


def test_adapters_that_are_off_count_for_nothing():
    model, wrapped = adapted()
    x = images()
    on = model(x)
    wrapped.base_model.disable_adapter_layers()
    expected = model(x)
    vt.patch(model, vt.full_rank_config(model, "tucker"))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, on, rtol=1e-2)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_an_adapter_that_the_host_passes_by_is_refused(name):
    """Both multiply by the weight inside of qkv: an adapter there has no effect, merged it would have one."""
    model = randomise(timm.create_model(name, num_classes=5, **SMALL, img_size=16)).double().eval()
    x = images()
    plain = model(x)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], r=2), model)
    vt.plan(model, vt.MHAConfig())  # new adapters add nothing
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.fill_(1.0)
    torch.testing.assert_close(model(x), plain)
    with pytest.raises(WeightsError, match=r"^blocks\.0\.attn: its qkv is a peft.*the adapter has no effect"):
        vt.plan(model, vt.MHAConfig())


def of_class(module):
    """The forward of the class replaced, as token merging and others do."""
    original = type(module).forward

    @functools.wraps(original)
    def forward(self, x, **options):
        return original(self, x, **options)

    type(module).forward = forward
    return lambda: setattr(type(module), "forward", original)


def set_(module, name, value):
    setattr(module, name, value)


class Other(timm.models.vision_transformer.Attention):
    """Another forward in a class of its own."""

    def forward(self, x, **options):
        return x


class Doubled(nn.Dropout):
    """A dropout in name only."""

    def forward(self, x):
        return 2 * x


ALTERED = {
    "its qkv has a forward hook": lambda m: m.qkv.register_forward_hook(lambda module, args, y: 2 * y),
    "its proj has a forward pre-hook": lambda m: m.proj.register_forward_pre_hook(lambda module, args: None),
    "its q_norm has a forward hook": lambda m: m.q_norm.register_forward_hook(lambda module, args, y: 2 * y),
    "its qkv has a forward of its own": lambda m: set_(m.qkv, "forward", lambda x: x),
    "its forward is not that of timm": lambda m: set_(m, "forward", lambda x, **options: x),
    "another has been put in its place": of_class,
    "unknown attention class": lambda m: set_(m, "__class__", Other),
    "its qkv is a torch.ao.nn.quantized": lambda m: set_(m, "qkv", torch.ao.nn.quantized.dynamic.Linear(24, 72)),
    "its proj_drop is a torch.nn.modules.container.Sequential": lambda m: set_(m, "proj_drop", nn.Sequential()),
    "its attn_drop is a tests.patching.test_adapted_hosts.Doubled": lambda m: set_(m, "attn_drop", Doubled()),
    "parameters of its own are pruned": lambda m: prune_own(m),
    "its weights contain NaN or infinite values (query)": lambda m: m.qkv.weight.data[0].fill_(float("nan")),
    "its weights contain NaN or infinite values (out bias)": lambda m: m.proj.bias.data[0].fill_(float("inf")),
    "its weights contain NaN or infinite values (q_norm.weight)": lambda m: m.q_norm.weight.data[0].fill_(
        float("-inf")
    ),
}


def prune_own(module):
    module.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    nn.utils.prune.random_unstructured(module, "bias", 0.5)


@pytest.mark.parametrize("reason", ALTERED)
def test_what_can_not_be_read_is_refused_by_name(reason):
    name, options = HOSTS["one qkv"]
    norms = "norm" in reason
    model = timm.create_model(name, num_classes=5, qk_norm=norms, **options)
    vt.plan(model, vt.MHAConfig())
    undo = ALTERED[reason](model.blocks[1].attn)
    before = dict(model.named_modules())
    try:
        for run in (vt.plan, vt.patch):
            for config in (vt.MHAConfig(), vt.GQAConfig(num_kv_heads=1)):
                with pytest.raises(vt.PatchError) as caught:
                    run(model, config)
                assert str(caught.value).startswith(
                    ("blocks.1.attn: ", "blocks.0.attn: ") if reason[0] == "a" else "blocks.1"
                )
                assert reason in str(caught.value)
                assert "\n" not in str(caught.value)
    finally:
        if callable(undo):
            undo()
    assert dict(model.named_modules()) == before
    vt.plan(model, vt.MHAConfig(layers=0))  # the other layer is what it was


@pytest.mark.parametrize(
    "config", [SMALL_TUCKER, vt.TuckerConfig(ranks={"budget": 0.5}), vt.MLAConfig(q_lora_rank=4, kv_lora_rank=4)]
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_weights_that_are_not_finite_are_refused_by_all_methods(config, calibrated):
    model = host()
    vt.plan(model, config)
    model.blocks[1].attn.proj.weight.data[3, 2] = float("nan")
    with pytest.raises(WeightsError, match=r"^blocks\.1\.attn: its weights contain NaN or infinite values \(out\)$"):
        vt.patch(model, config, calibration=images() if calibrated else None)
    with pytest.raises(WeightsError, match=r"^blocks\.1\.attn: "):
        vt.plan(model, config)
    vt.patch(model, config.model_copy(update={"layers": 0}))


def test_random_starts_read_no_weights():
    model = host()
    model.blocks[1].attn.proj.weight.data[3, 2] = float("nan")
    vt.patch(model, SMALL_TUCKER.model_copy(update={"init": "random"}))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_hooks_are_reported_and_never_called():
    model = host()
    calls = []

    class Recorder:
        """Can't be copied, as hooks with open files can't."""

        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

        def see(self, *args):
            calls.append(args)

    plain = vt.plan(model, SMALL_TUCKER)
    see, attn = Recorder().see, model.blocks[0].attn
    attn.register_forward_hook(see)
    attn.attn_drop.register_forward_pre_hook(see)
    attn.qkv.register_full_backward_hook(see)
    attn.proj.weight.register_hook(see)
    model.blocks[1].register_forward_hook(see)  # of a module that stays
    everywhere = nn.modules.module.register_module_forward_hook(see)
    try:
        report = vt.plan(model, SMALL_TUCKER)
        assert vt.patch(model, SMALL_TUCKER).notes == report.notes
    finally:
        everywhere.remove()
    assert not calls
    assert report.notes == (
        "not carried over: forward hook of blocks.0.attn, backward hook of blocks.0.attn.qkv, "
        "forward pre-hook of blocks.0.attn.attn_drop, gradient hook of blocks.0.attn.proj.weight",
    )
    assert report.layers == plain.layers  # the tokens were counted
    model(images())
    assert len(calls) == 1
    assert not any(part._forward_hooks or part._backward_hooks for part in model.blocks[0].attn.modules())
    vt.unpatch(model)
    assert len(model.blocks[0].attn._forward_hooks) == 1


def test_copies_of_a_host_do_not_take_its_hooks_along():
    """Norms and tables of position biases are copied into the new layers: hooks on them or around them are not."""
    model = host("windows")
    name, attn = next(iter(find_attention(model).items()))
    attn.register_forward_hook(lambda module, args, y: y)
    vt.patch(model, vt.MHAConfig())
    assert not any(part._forward_hooks for part in model.get_submodule(name).modules())


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_normalised_weights_count_by_their_value(wrap):
    model = host()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in model.blocks:
            wrap(block.attn.qkv)
            wrap(block.attn.proj)
    randomise(model).eval()
    x = images()
    expected = model(x)
    assert count_tokens(model, {"blocks.0.attn": "sequence"}) == {"blocks.0.attn": (1, 17)}
    report = vt.patch(model, vt.full_rank_config(model, "tucker"))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert "merged into the new layers" in report.notes[0]


def test_adapters_around_attention_as_a_whole_are_refused():
    model = host()
    vt.patch(model, SMALL_TUCKER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(
            peft.LoraConfig(target_modules=[], target_parameters=["attn.pre_head"], r=2), model
        )
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn is a peft.*ParamWrapper around attention as a whole"):
        vt.dense_model(model)
