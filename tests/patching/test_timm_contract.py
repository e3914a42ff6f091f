"""timm's own methods of a model keep working on a patched one, and give what they give on the unpatched."""

import copy
import sys

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

import vit_tucker as vt
from tests.patching.trios import (
    HOSTS,
    ROPE_HOSTS,
    VIT_HOSTS,
    agree,
    make_dense,
    make_trio,
    over,
    over_hosts,
    skip_checkpointing,
)
from tests.reference import randomise
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_shape
from vit_tucker.hosts.tokens import count_tokens

INTERMEDIATES = (
    {},
    {"indices": 1},
    {"indices": [0], "stop_early": True},
    {"indices": [0, -1], "norm": True, "intermediates_only": True},
    {"indices": 2, "return_prefix_tokens": True},
    {"indices": (1,), "output_fmt": "NLC", "norm": True},
    {"indices": [0], "return_prefix_tokens": True, "norm": True, "stop_early": True, "output_fmt": "NLC"},
    {"return_prefix_tokens": True, "output_fmt": "NLC", "intermediates_only": True},
    {"output_dict": True, "return_prefix_tokens": True},
    {"is_causal": True},
)
SIZES = ({"img_size": 48}, {"patch_size": 4}, {"img_size": (48, 32)})


@over_hosts()
def test_features_and_head(host, method):
    def call(model, x):
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
        return features, model.forward_head(features), model.forward_head(features, pre_logits=True)

    agree(make_trio(host, method), call, pure=True)


@over_hosts()
def test_intermediates(host, method):
    trio = make_trio(host, method)
    tried = [options for options in INTERMEDIATES if timm_can(trio, options)]
    expected = {"indices", "norm", "intermediates_only"}
    if host != "swin":  # has one format, and older timm's stops early only with the last stage
        expected |= {"stop_early", "output_fmt"}
    if getattr(trio.dense, "num_prefix_tokens", 0):
        expected |= {"return_prefix_tokens"}
    assert {key for options in tried for key in options} >= expected
    agree(trio, lambda model, x: [model.forward_intermediates(x, **options) for options in tried], pure=True)


def timm_can(trio, options):
    """Whether the unpatched model has these options."""
    try:
        trio.dense.forward_intermediates(trio.x, **options)
    except (TypeError, AssertionError, UnboundLocalError, RuntimeError):
        return False
    return True


@over(*VIT_HOSTS)
def test_intermediate_layers_in_the_manner_of_dino(host, method):
    several = ({"n": 2}, {"n": [0], "reshape": True, "norm": True}, {"return_prefix_tokens": host != "vit_0"})
    agree(
        make_trio(host, method), lambda model, x: [model.get_intermediate_layers(x, **options) for options in several]
    )


@over_hosts()
def test_pruned_to_intermediate_layers_and_unpatched(host, method):
    trio = make_trio(host, method)

    def pruned(model, x):
        model.prune_intermediate_layers([0], prune_norm=True)
        return model.forward_intermediates(x, indices=[0])

    agree(trio, pruned)
    model, dense = copy.deepcopy(trio.exact), copy.deepcopy(trio.dense)
    for each in (model, dense):
        each.prune_intermediate_layers([0], prune_norm=True)
    vt.unpatch(model)
    assert torch.equal(model(trio.x), dense(trio.x))


@over()
def test_gradient_checkpointing(host, method):
    """The same gradients, by running each attention twice."""
    trio = make_trio(host, method)
    skip_checkpointing(host)
    grads, calls = [], []
    for enable in (False, True):
        model, seen = copy.deepcopy(trio.small), []
        model.set_grad_checkpointing(enable)
        for module in find_attention(model).values():
            module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(module))
        model(trio.x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        calls.append(len(seen))
    assert calls[1] == 2 * calls[0]
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@over_hosts()
def test_layer_decay_puts_each_core_and_factor_into_the_group_of_its_block(host, method):
    trio = make_trio(host, method)
    expected, coarse = lr_scales(trio.dense), groups(trio.dense, coarse=True)
    for model in (trio.exact, trio.small):
        assert lr_scales(model) == expected
        assert groups(model, coarse=True) == coarse
        assert groups(model) == groups(trio.dense)
    assert len(set(expected.values())) == len(expected), "each block has its own group"


def lr_scales(model):
    """Scale of the learning rate of each attention layer; one with several fails. Weights decay, vectors and tables don't."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    scales = {}
    for name, module in find_attention(model).items():
        (scales[name],) = {scale[id(p)] for p in module.parameters()}
        for key, p in module.named_parameters():
            assert decay[id(p)] == (0.0 if p.ndim == 1 or "relative_position_bias_table" in key else 0.1), key
    return scales


def groups(model, **options):
    """Group of each attention layer."""
    found = {name: set() for name in find_attention(model)}
    for number, names in group_parameters(model, model.group_matcher(**options)).items():
        for layer in found:
            if any(name.startswith(f"{layer}.") for name in names):
                found[layer].add(number)
    return found


@over_hosts()
def test_new_classifiers(host, method):
    trio = make_trio(host, method)

    def call(model, x):
        outputs = []
        for arguments in ((3,), (5, "avg"), (0,)):
            model.reset_classifier(*arguments)
            outputs.append(model.double()(x))  # older timm makes new parts in float32
        assert [y.shape[1] for y in outputs[:2]] == [3, 5]
        return outputs

    agree(trio, call)
    assert not any("original" in key for key in trio.exact.state_dict())


@over_hosts()
def test_another_input_size(host, method):
    """Position embeddings, rotations and position biases are resampled; unpatch gives the model that timm would have."""
    trio = resizable(host, method)
    for size in SIZES if host != "swin" else ({"img_size": 96}, {"img_size": (64, 128)}):
        x = images_of(size.get("img_size", 32))

        def resized(model, _, size=size, x=x):
            model.set_input_size(**size)
            return model.double().forward_features(x), model(x)

        agree(trio, resized)
    model, dense = copy.deepcopy(trio.exact), copy.deepcopy(trio.dense)
    for each in (model, dense):
        each.set_input_size(**size)
        each.double()
    assert all(p.requires_grad for p in model.parameters())
    vt.unpatch(model)
    assert torch.equal(model(x), dense(x))


def resizable(host, method):
    """Models, where timm can resize them."""
    if not hasattr(make_dense(host), "set_input_size"):
        pytest.skip(f"this timm's {type(make_dense(host)).__name__} has no set_input_size")
    return make_trio(host, method)


def images_of(size):
    """(2, 3, height, width)"""
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@over_hosts()
def test_weights_of_another_size_are_resampled_on_loading(host, method):
    """timm's filter of checkpoints on a patched model's weights: for position embeddings and tables of biases."""
    size = 96 if host == "swin" else 48
    x = images_of(size)

    def call(model, _):
        target = copy.deepcopy(model)
        target.set_input_size(img_size=size)
        randomise(target, seed=5)
        resample = sys.modules[type(model).__module__].checkpoint_filter_fn
        target.load_state_dict(resample(model.state_dict(), target))
        return target(x)

    agree(resizable(host, method), call)


@over_hosts(*VIT_HOSTS, *ROPE_HOSTS)
def test_images_of_many_sizes(host, method):
    def call(model, x):
        return [model(x), model(torch.cat([x, x], 2)), model(x[:, :, :16])]

    agree(make_trio(host, method, dynamic_img_size=True), call, pure=True)


@over_hosts()
def test_weights_are_initialised_anew_by_timm(host, method):
    """Every tensor of the layers starts again as the method has it, up to timm's own scale of output projections."""
    trio = make_trio(host, method)
    if not hasattr(trio.dense, "init_weights"):
        pytest.skip(f"this timm's {type(trio.dense).__name__} has no init_weights")
    model, expected = copy.deepcopy(trio.exact), copy.deepcopy(trio.exact)
    torch.manual_seed(0)
    model.init_weights()
    for name, module in find_attention(model).items():
        twin = expected.get_submodule(name)
        twin.init_weights()
        for (key, p), reference, before in zip(
            module.named_parameters(), twin.parameters(), trio.exact.get_submodule(name).parameters(), strict=True
        ):
            if key.startswith("position_bias"):
                continue
            assert not torch.equal(p, before), key
            if key != "proj.weight" and p.numel() >= 32:
                assert 0.5 * reference.std() <= p.std() <= 2 * reference.std(), f"{name}.{key}"
    assert torch.isfinite(model(trio.x)).all()


def test_token_counts_come_from_a_dry_run(make_vit):
    model = make_vit(reg_tokens=4)
    names = [f"blocks.{i}.attn" for i in range(3)]
    layouts = dict.fromkeys(names, "sequence")
    assert count_tokens(model, layouts) == dict.fromkeys(names, (1, 21))
    assert input_shape(model) == (3, 16, 16)
    dynamic = make_vit(dynamic_img_size=True)
    assert count_tokens(dynamic, layouts, img_size=24) == dict.fromkeys(names, (1, 37))
    assert count_tokens(torch.nn.Identity(), {"nothing": "sequence"}) == {}


@pytest.mark.parametrize(
    ("layout", "expected"), [("sequence", (12, 4)), ("grid", (2, 24)), ("channels_first", (2, 20))]
)
def test_tokens_are_counted_in_the_layout_of_the_host(layout, expected):
    """Tokens (2, 6, 4, 5): windows of sequences, a grid, or six channels first."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.Identity()

        def forward(self, images):
            return self.attn(images.new_empty(2, 6, 4, 5))

    assert count_tokens(Model(), {"attn": layout}) == {"attn": expected}


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("vit_tiny_patch16_224", {"in_chans": 1}, (1, 224, 224)),
        ("vit_small_r26_s32_224", {"in_chans": 5}, (5, 224, 224)),  # a network before the patches
        ("mobilevit_s", {"in_chans": 1}, (1, 256, 256)),  # no patch_embed at all
        ("csatv2", {}, (3, 512, 512)),  # a cosine transform comes first, its first convolution takes 64 channels
    ],
)
def test_input_shapes_know_the_channels_of_the_images(name, options, shape):
    if not timm.is_model(name):
        pytest.skip("not in this timm")
    model = timm.create_model(name, **options)
    assert input_shape(model) == shape


def test_hosts_have_the_prefix_tokens_that_their_names_say():
    numbers = {host: getattr(make_dense(host), "num_prefix_tokens", None) for host in HOSTS}
    assert all(numbers[host] == int(host[-1]) for host in (*VIT_HOSTS, *ROPE_HOSTS))
    assert set(numbers.values()) >= {0, 1, 5}
