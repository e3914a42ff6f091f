"""Tools around a model keep working on a patched one: timm's, torch.compile and export, copies, other precisions, meta device."""

import copy
import os
import pickle
import shutil

import pytest
import timm
import torch
from timm.models import _features_fx, _manipulate
from timm.utils import AttentionExtract, ModelEmaV2, ModelEmaV3
from torchvision.models import feature_extraction

import vit_tucker as vt
from tests.patching.test_families import FAMILIES
from tests.patching.trios import (
    HOSTS,
    ROPE_HOSTS,
    VIT_HOSTS,
    agree,
    assert_equal,
    distance,
    make_patchwork,
    make_trio,
    over,
    over_hosts,
    run_copy,
    skip_checkpointing,
)
from vit_tucker.hosts.find import find_attention

pytestmark = pytest.mark.slow

TRACED = ("vit_1", "eva02_1", "mixed_1", "swin")
"""One host of each kind of call, and windows. Rotated halves and BEiT's biases take the same way through a graph."""
COMPILED = ("eva02_1", "mixed_1", "swin")
"""What vit_1 has is compiled with its gradients."""


def maps(model, x, method):
    """Attention maps by name, as timm extracts them."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return dict(AttentionExtract(model, method=method)(x))


@over()
def test_attention_maps_by_hooks(host, method):
    trio = make_trio(host, method)

    def call(model, x):
        extracted = maps(model, x, "hook")
        assert list(extracted) == [f"{name}.attn_drop" for name in find_attention(trio.dense)]
        for attention in extracted.values():
            assert attention.shape[-1] == attention.shape[-2]
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
        return extracted

    agree(trio, call)


@pytest.mark.parametrize("host", TRACED[:-1])
def test_attention_maps_by_fx(host):
    """The graph's maps are those of the hooks, on the unpatched model as well."""
    trio = make_patchwork(host)
    agree(trio, lambda model, x: maps(model, x, "hook"))
    traced = maps(copy.deepcopy(trio.exact), trio.x, "fx")
    hooked = maps(copy.deepcopy(trio.dense), trio.x, "hook")
    assert list(traced) == [name.replace("attn_drop", "softmax") for name in hooked]
    assert_equal(list(traced.values()), list(hooked.values()))


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing the model in eval mode")
@pytest.mark.parametrize("host", TRACED)
def test_traced_by_fx(host):
    """Graphs of torch, torchvision and timm give the model's outputs, fused attention included, for any number of images."""
    trio = make_patchwork(host)
    more = torch.cat([trio.x, -trio.x, trio.x])
    with torch.no_grad():
        expected, other = trio.dense(more), trio.small(more)
    assert distance(other, expected) > 1e-3
    model = copy.deepcopy(trio.exact)
    node = feature_extraction.get_graph_node_names(model)[1][-1]
    assert_equal([torch.fx.symbolic_trace(model)(more)], [expected])
    assert_equal([feature_extraction.create_feature_extractor(model, [node])(more)[node]], [expected])
    if model.feature_info:
        dense = _features_fx.FeatureGraphNet(copy.deepcopy(trio.dense), (0, 1)).eval()(more)
        assert_equal(_features_fx.FeatureGraphNet(model, (0, 1)).eval()(more), dense)


@pytest.mark.parametrize("host", COMPILED)
def test_compiled_in_one_graph(host):
    torch._dynamo.reset()
    trio = make_patchwork(host)
    agree(trio, lambda model, x: model(x), pure=True)
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(trio.exact), backend="aot_eager", fullgraph=True)(trio.x)
        assert_equal([compiled], [trio.dense(trio.x)])


def test_gradients_of_a_compiled_model():
    torch._dynamo.reset()
    trio = make_patchwork("vit_1")

    def gradients(model, x):
        return torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)

    agree(trio, gradients)
    compiled = torch.compile(copy.deepcopy(trio.exact), backend="aot_eager", fullgraph=True)
    assert_equal(gradients(compiled, trio.x.clone()), gradients(trio.dense, trio.x.clone()))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor():
    torch._dynamo.reset()
    trio = make_trio("vit_1", "tucker", depth=1)
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(trio.exact), fullgraph=True)(trio.x)
        assert_equal([compiled], [trio.dense(trio.x)])
        assert distance(trio.small(trio.x), trio.dense(trio.x)) > 1e-3


@pytest.mark.parametrize("host", TRACED)
def test_exported_with_any_number_of_images(host):
    trio = make_patchwork(host)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(copy.deepcopy(trio.exact), (trio.x,), dynamic_shapes=({0: batch},))
    for x in (trio.x, torch.cat([trio.x, -trio.x, trio.x])):
        expected = trio.dense(x)
        assert_equal([program.module()(x)], [expected])
    assert distance(trio.small(x), expected) > 1e-3


@over_hosts()
def test_copies_are_equal_and_independent(host, method):
    trio = make_trio(host, method)
    for duplicate in (copy.deepcopy(trio.small), pickle.loads(pickle.dumps(trio.small))):
        expected = trio.small(trio.x)
        assert torch.equal(duplicate(trio.x), expected)
        assert vt.patch_record(duplicate).config == vt.patch_record(trio.small).config
        with torch.no_grad():
            for module in find_attention(duplicate).values():
                for p in module.parameters():
                    p.zero_()
        assert torch.equal(trio.small(trio.x), expected)
        assert not torch.equal(duplicate(trio.x), expected)
        vt.unpatch(duplicate)
        assert torch.equal(duplicate(trio.x), trio.dense(trio.x))


@over_hosts()
def test_moving_averages(host, method):
    """The moving average of weights that do not change is the model itself."""
    trio = make_trio(host, method)
    for average in (ModelEmaV2, ModelEmaV3):
        ema = average(trio.small, decay=0.9)
        for _ in range(3):
            ema.update(trio.small)
        torch.testing.assert_close(ema.module(trio.x), trio.small(trio.x), rtol=1e-9, atol=1e-9)


@over()
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_half_precision_is_as_good_as_the_dense_one(host, method, autocast):
    """The error against float64 is at most twice the dense model's."""
    trio = make_trio(host, method)
    x = torch.cat([trio.x, trio.x.flip(0).roll(3, -1), -trio.x, trio.x.roll(5, -2)])
    expected = trio.dense(x)

    def error(model):
        dtype = torch.float32 if autocast else torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert autocast or y.dtype == torch.bfloat16
        return distance(y, expected)

    dense = error(trio.dense)
    assert error(trio.exact) <= 2 * dense
    assert error(trio.small) > 2 * dense


@over_hosts()
def test_built_on_the_meta_device(host, method):
    """A model that gets its weights after the patch loses nothing but timm's own buffers, which timm makes anew."""
    if not hasattr(_manipulate, "reinit_non_persistent_buffers"):
        pytest.skip("this timm has no reinit_non_persistent_buffers")
    trio = make_trio(host, method)
    name, own = HOSTS[host]
    with torch.device("meta"):
        model = timm.create_model(name, **{**FAMILIES[name], **own}).double().eval()
    vt.patch(model, vt.full_rank_config(trio.dense, method))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    model.load_state_dict(trio.exact.state_dict(), assign=True)

    def renewed(model, x):
        _manipulate.reinit_non_persistent_buffers(model)
        return model(x)

    agree(trio._replace(exact=model), renewed)


@over()
def test_training_with_drop_path_and_dropout(host, method):
    """The same random numbers in the same order, with gradient checkpointing as well: outputs and gradients elsewhere agree."""
    trio = make_trio(host, method)

    def call(model, x, checkpointing=False):
        model.train().set_grad_checkpointing(checkpointing)
        y = model(x)
        y.square().sum().backward()
        return y, [p.grad for name, p in model.named_parameters() if ".attn." not in name and p.grad is not None]

    tolerance = 1e-8 if host != "mixed_1" else 1e-5  # timm makes tables of learned frequencies in float32
    agree(trio, call, tolerance)
    plain, _ = run_copy(call, trio.exact, trio.x)
    assert distance(trio.exact(trio.x), plain[0]) > 1e-2, "nothing was dropped"
    skip_checkpointing(host)
    checkpointed, _ = run_copy(lambda model, x: call(model, x, checkpointing=True), trio.exact, trio.x)
    assert_equal(checkpointed, plain)


@over(*VIT_HOSTS, *ROPE_HOSTS)
def test_patch_dropout(host, method):
    """Each image keeps patches of its own, and with RoPE has its own table; as many images as heads are no tables per head."""
    trio = make_trio(host, method, patch_drop_rate=0.5)
    tables, tokens = [], []

    def call(model, x):
        return model.train()(torch.cat([x, x.flip(0)]))

    def watched(model, x):
        for module in find_attention(model).values():
            module.register_forward_pre_hook(watch, with_kwargs=True)
        return call(model, x)

    def watch(module, args, kwargs):
        assert len(args[0]) == module.num_heads
        tokens.append(args[0].shape[1])
        tables.append(kwargs.get("rope"))

    agree(trio, call)
    run_copy(watched, trio.exact, trio.x)
    assert set(tokens) == {trio.dense.num_prefix_tokens + 8}
    if host in ROPE_HOSTS:
        assert all(len(table) == 4 and table.ndim > 2 and not torch.equal(table[0], table[1]) for table in tables)
