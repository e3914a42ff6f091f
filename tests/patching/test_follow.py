"""unpatch gives what the model would be had it never been patched: dtype, device, mode and requires_grad follow."""

import copy

import pytest
import torch
from torch import nn

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, image, small_model

HOSTS = (
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
    "vit_relpos_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "nest.Nest",
    "tnt_s_patch16_224",
    "volo.VOLO",
    "visformer_tiny",
)
CASTS = (nn.Module.half, nn.Module.bfloat16, nn.Module.double)
TUCKER = vt.TuckerConfig(ranks=(3, 6, 6), init="random")


def restored(model, change, config=TUCKER):
    """A copy of the model after a patch, a change, and ``unpatch``."""
    model = copy.deepcopy(model)
    vt.patch(model, config)
    change(model)
    vt.unpatch(model)
    return model


def changed(model, change):
    """A copy of the model after the change alone."""
    model = copy.deepcopy(model)
    change(model)
    return model


def same_state(model, other):
    """Dtypes and values of parameters and buffers."""
    tensors, others = ([*m.named_parameters(), *m.named_buffers()] for m in (model, other))
    return all(
        name == key and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for (name, a), (key, b) in zip(tensors, others, strict=True)
    )


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", HOSTS)
def test_casts_are_followed(name):
    """The state of a model that was cast and never patched, and its outputs: with all casts, and with all methods."""
    dense = small_model(name).float()
    images = image(dense, FAMILIES[name].get("img_size"))[:1].bfloat16()
    plain = {cast: cast(copy.deepcopy(dense)) for cast in CASTS}
    with torch.no_grad():
        expected = plain[nn.Module.bfloat16](images)
    methods = 0
    for method in vt.list_methods():
        try:
            config = vt.full_rank_config(dense, method).unconverted()
        except vt.PatchError:
            continue
        methods += 1
        for cast in CASTS if methods == 1 else [nn.Module.bfloat16]:
            model = restored(dense, cast, config)
            assert same_state(model, plain[cast])
            assert not same_state(model, dense)
            if cast is nn.Module.bfloat16:
                with torch.no_grad():
                    assert torch.equal(model(images), expected)
    assert methods >= 3


def test_norms_of_another_dtype(make_vit):
    """A host of two dtypes comes back as it was; norms and the rest follow their own counterparts."""
    dense = make_vit(qk_norm=True).bfloat16()
    for block in dense.blocks:
        block.attn.q_norm.float()
        block.attn.k_norm.float()
    config = vt.GQAConfig(num_kv_heads=2, init="random")

    def norms(model):
        model.blocks[0].attn.q_norm.double()

    def projections(model):
        for module in model.blocks[0].attn.modules():
            if isinstance(module, nn.Linear):
                module.double()

    for change in (lambda model: None, nn.Module.half, norms, projections):
        assert same_state(restored(dense, change, config), changed(dense, change))
    assert not same_state(restored(dense, norms, config), dense)


def test_gradients_have_the_dtype_of_their_parameters(make_vit, images):
    model = make_vit()
    model(images).sum().backward()
    vt.patch(model, TUCKER)
    model.float()
    vt.unpatch(model)
    weight = model.blocks[0].attn.qkv.weight
    assert weight.grad.dtype == weight.dtype == torch.float32
    assert weight.grad.abs().max() > 0


FREEZING = {
    "nothing": lambda model: None,
    "the model": lambda model: model.requires_grad_(False),
    "a block": lambda model: model.blocks[1].requires_grad_(False),
    "output projections": lambda model: [block.attn.proj.requires_grad_(False) for block in model.blocks],
    "output biases": lambda model: [block.attn.proj.bias.requires_grad_(False) for block in model.blocks],
    "all but biases": lambda model: [p.requires_grad_(name.endswith("bias")) for name, p in model.named_parameters()],
}


@pytest.mark.parametrize("freeze", FREEZING)
@pytest.mark.parametrize("config", [TUCKER, vt.GQAConfig(num_kv_heads=2, init="random"), vt.MHAConfig(init="random")])
def test_freezing_is_followed(make_vit, freeze, config):
    dense = make_vit()
    assert flags(restored(dense, FREEZING[freeze], config)) == flags(changed(dense, FREEZING[freeze]))


def test_partly_frozen_hosts_come_back_as_they_were(make_vit):
    """Unless all of the replacement is frozen, or what was frozen trains."""
    dense = changed(make_vit(), FREEZING["all but biases"])
    assert flags(restored(dense, lambda model: None)) == flags(dense)
    frozen = restored(dense, lambda model: model.requires_grad_(False))
    assert not any(flags(frozen).values())
    assert all(flags(restored(frozen, lambda model: model.requires_grad_(True))).values())


def test_modes_are_followed_by_each_layer(make_vit):
    dense = make_vit(attn_drop_rate=0.1).train()
    dense.blocks[2].attn.attn_drop.eval()

    def modes(model):
        return {name: module.training for name, module in model.named_modules()}

    def some(model):
        model.blocks[0].eval()
        model.blocks[1].attn.attn_drop.eval()

    for change in (lambda model: None, nn.Module.eval, some):
        assert modes(restored(dense, change)) == modes(changed(dense, change))


def test_originals_follow_to_the_meta_device_and_are_refused_where_their_values_are_lost(make_vit):
    dense = make_vit()
    assert all(p.is_meta for p in restored(dense, lambda model: model.to("meta")).parameters())
    model = copy.deepcopy(dense).to("meta")
    vt.patch(model, TUCKER)
    model.to_empty(device="cpu")
    modules = dict(model.named_modules())
    with pytest.raises(
        vt.PatchError, match=r"blocks.0.attn: the original module is on the meta device and has no values"
    ):
        vt.unpatch(model)
    assert dict(model.named_modules()) == modules
    assert vt.patch_record(model) is not None


@pytest.mark.parametrize("shared", ["module", "tensor"])
def test_what_is_shared_stays_shared(make_vit, shared):
    model = make_vit()
    first, last = model.blocks[0].attn, model.blocks[2].attn
    if shared == "module":
        model.blocks[2].attn = first
    else:
        last.qkv.weight = first.qkv.weight
    model = restored(model, nn.Module.half)
    assert model.blocks[2].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    assert {p.dtype for p in model.parameters()} == {torch.float16}
