"""Parameter groups of patched models, layer-wise decay, the weight-decay rule."""

import fnmatch
import math

import pytest
import timm
import torch

import vit_tucker as vt
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.registry import list_methods
from vit_tucker.config.schema import TrainConfig
from vit_tucker.errors import ConfigError
from vit_tucker.patching.full_rank import full_rank_config
from vit_tucker.training.optim import (
    create_optimizer,
    create_scheduler,
    describe_groups,
    group_table,
    undecayed_names,
)

RECIPE = TrainConfig(epochs=10, warmup_epochs=2, lr=1.0, warmup_lr=1e-3, min_lr=1e-2, layer_decay=0.5)

HOSTS = {
    "vit_tiny_patch16_224": {"depth": 3, "embed_dim": 48, "init_values": 0.1},
    "deit_tiny_distilled_patch16_224": {"depth": 3, "embed_dim": 48},
    "eva02_tiny_patch14_224": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    "beit_base_patch16_224": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    "maxvit_rmlp_pico_rw_256": {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 2, 1)},
    "vit_relpos_small_patch16_224": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_siglip_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
}
"""Plain, two tokens, RoPE, no key biases, two hierarchical ones, position biases made by a network, map pooling."""


def make_host(name):
    """A small host."""
    return timm.create_model(name, num_classes=10, **HOSTS[name])


def make_patched(name, method):
    model = make_host(name)
    config = full_rank_config(model, method).model_copy(update={"init": "random"})
    vt.patch(model, config, keep_originals=False)
    return model


def by_parameter(model, optimizer, key):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: group.get(key) for group in optimizer.param_groups for p in group["params"]}


def outside_their_block(model, scales):
    """Patched parameters whose lr_scale is not that of the rest of their block."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, AttentionModule):
            block = name.rpartition(".")[0] + "."
            rest = {s for n, s in scales.items() if n.startswith(block) and not n.startswith(name + ".")}
            assert len(rest) == 1, f"{block} is no block with one lr_scale"
            found += [n for n, s in scales.items() if n.startswith(name + ".") and s not in rest]
    return found


@pytest.mark.parametrize("host", HOSTS)
def test_patched_attention_is_in_its_blocks_group(host):
    for method in list_methods():
        model = make_patched(host, method)
        optimizer = create_optimizer(model, RECIPE)
        grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)  # each exactly once
        scales = by_parameter(model, optimizer, "lr_scale")
        assert not outside_their_block(model, scales)
        assert len(set(scales.values())) >= 4  # stem, blocks, head: the decay acts
    wrong = {n: (1.0 if n.endswith("_core") or ".attn.proj" in n else s) for n, s in scales.items()}
    assert outside_their_block(model, wrong)  # the check sees a core that left its block


def test_frozen_parameters_are_in_no_group(make_vit):
    model = make_vit()
    model.patch_embed.requires_grad_(False)
    for layer_decay in (None, 0.5):
        optimizer = create_optimizer(model, RECIPE.model_copy(update={"layer_decay": layer_decay}))
        assert set(by_parameter(model, optimizer, "lr")) == {
            n for n, p in model.named_parameters() if not n.startswith("patch_embed")
        }


def test_a_host_without_layers_is_refused():
    model = timm.create_model("pit_ti_224")
    with pytest.raises(ConfigError, match="train.layer_decay=0.5: timm's PoolingVisionTransformer does not tell"):
        create_optimizer(model, RECIPE)
    assert create_optimizer(model, RECIPE.model_copy(update={"layer_decay": None})).param_groups


@pytest.mark.parametrize("sched", ["cosine", "linear", "step", "constant"])
def test_each_group_has_its_share_of_the_schedule(make_vit, sched):
    """lr of a group = lr_scale * schedule(global step), in warm-up and after it; the largest scale is 1."""
    model = make_vit()
    vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6)))
    config = RECIPE.model_copy(update={"sched": sched, "decay_epochs": 4.0})
    optimizer = create_optimizer(model, config)
    scheduler = create_scheduler(optimizer, config, steps_per_epoch=10)
    curve = {
        "cosine": lambda t: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * t / 100)),
        "linear": lambda t: 0.01 + 0.99 * (1 - t / 100),
        "step": lambda t: 0.1 ** (t // 40),
        "constant": lambda t: 1.0,
    }[sched]
    assert sorted({g["lr_scale"] for g in optimizer.param_groups}) == [0.5**k for k in (4, 3, 2, 1, 0)]
    for step in range(0, 100, 3):
        scheduler.step_update(step)
        base = 1e-3 + (1 - 1e-3) * step / 20 if step < 20 else curve(step)
        for group in optimizer.param_groups:  # float64 arithmetic in another order: some ulps
            assert group["lr"] == pytest.approx(base * group["lr_scale"], rel=1e-12), step
    for group in optimizer.param_groups:
        group.pop("lr_scale")
    scheduler.step_update(50)
    assert len({group["lr"] for group in optimizer.param_groups}) == 1  # twin: without lr_scale the layers are alike


def test_the_optimizer_uses_the_groups_rate(make_vit):
    """A step of plain SGD moves a core of block i by lr * schedule * lr_scale * gradient."""
    model = make_vit()
    vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6)))
    config = RECIPE.model_copy(update={"opt": "momentum", "momentum": 0.0, "weight_decay": 0.0, "sched": "linear"})
    optimizer = create_optimizer(model, config)
    create_scheduler(optimizer, config, 10).step_update(60)
    before = [b.attn.pre_core.detach().clone() for b in model.blocks]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i, block in enumerate(model.blocks):
        moved = before[i] - block.attn.pre_core.detach()
        wanted = (0.01 + 0.99 * 0.4) * 0.5 ** (3 - i)
        torch.testing.assert_close(moved, torch.full_like(moved, wanted), rtol=0, atol=1e-14)  # float64 of order 1


UNDECAYED_SUFFIXES = ("bias", "norm.weight", "norm1.weight", "norm2.weight")
DECAYED = {
    "tucker": ["pre_core", "post_core", "pre_head", "post_head", "q_proj.weight", "k_proj.weight", "v_proj.weight"],
    "gqa": ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
    "mla": ["q_down.weight", "q_up.weight", "kv_down.weight", "k_up.weight", "v_up.weight"],
    "mha": ["qkv.weight"],
}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("method", sorted(DECAYED))
def test_weight_decay_rule_by_name(method, layer_decay):
    """All factors of a layer, none of its biases and norms; by the names that the layer really has."""
    assert set(DECAYED) == set(list_methods())
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3, "qk_norm": method != "tucker", "reg_tokens": 2}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    vt.patch(model, full_rank_config(model, method).model_copy(update={"init": "random"}), keep_originals=False)
    optimizer = create_optimizer(model, RECIPE.model_copy(update={"layer_decay": layer_decay}))
    decay = by_parameter(model, optimizer, "weight_decay")
    attention = {n.removeprefix("blocks.1.attn."): d for n, d in decay.items() if n.startswith("blocks.1.attn.")}
    decayed = sorted(n for n, d in attention.items() if d > 0)
    optional = set() if "v_proj.weight" in attention else {"v_proj.weight"}  # latents may be shared
    assert decayed == sorted({*DECAYED[method], "proj.weight"} - optional)
    kept = [n for n, d in attention.items() if d == 0]
    assert kept
    assert all(n.endswith(UNDECAYED_SUFFIXES) for n in kept)
    assert ("q_norm.weight" in kept) == (method != "tucker")
    if method == "tucker":
        assert "q_proj.bias" in kept  # p0, the constant coordinate of the query mode
    assert {n for n, d in decay.items() if d == 0} == undecayed_names(model)
    assert {"pos_embed", "cls_token"} <= undecayed_names(model)


@pytest.mark.parametrize("host", HOSTS)
def test_patching_changes_no_other_parameters_decay(host):
    """Outside attention as in the dense host; a position bias that moved into the new layer stays undecayed."""
    dense_host = make_host(host)
    dense = undecayed_names(dense_host)
    for method in ("tucker", "mla"):
        model = make_patched(host, method)
        names = dict(model.named_parameters())
        shared = names.keys() & dict(dense_host.named_parameters())
        assert undecayed_names(model) & shared == dense & shared
        moved = {n for n in names if ".position_bias." in n}
        assert moved <= undecayed_names(model)
        if host.startswith(("maxvit", "swin", "beit", "vit_relpos")):
            assert any(names[n].ndim > 1 for n in moved)


def test_timms_names_alone_would_decay_a_moved_position_bias():
    """Twin: why POSITION_BIASES is there."""
    dense, model = make_host("maxvit_rmlp_pico_rw_256"), make_patched("maxvit_rmlp_pico_rw_256", "tucker")

    def missed(model, kind):
        return [
            n
            for n, p in model.named_parameters()
            if p.ndim > 1 and kind in n and not any(fnmatch.fnmatch(n, e) for e in model.no_weight_decay())
        ]

    assert not missed(dense, "rel_pos.mlp")
    assert missed(model, "position_bias.source.mlp")


@pytest.mark.parametrize(("method", "factors"), [("tucker", (4, 4)), ("mla", (4, 3)), ("gqa", (2, 2)), ("mha", (2, 2))])
def test_a_layers_tensor_shrinks_once_for_each_factor(make_vit, method, factors):
    """AdamW on zero gradients multiplies the tensor by (1 - lr * weight_decay)^factors, as docs/recipes.md says."""
    model = make_vit(qkv_bias=False)
    vt.patch(model, full_rank_config(model, method))
    optimizer = create_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.5))
    attention = model.blocks[1].attn

    def tensors():
        return [p.left @ p.right.mT for p in (attention.pre_pairs(), attention.post_pairs())]

    before = tensors()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for old, new, count in zip(before, tensors(), factors, strict=True):
        # float64, sums of at most 24 * 24 terms of order 1
        torch.testing.assert_close(new, old * 0.95**count, rtol=0, atol=1e-12)
        assert not torch.allclose(new, old * 0.95 ** (count + 1), rtol=0, atol=1e-3)


def test_the_table_shows_blocks_and_scales(make_vit):
    model = make_vit()
    vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6)))
    optimizer = create_optimizer(model, RECIPE)
    create_scheduler(optimizer, RECIPE, 10).step_update(20)
    groups = describe_groups(model, optimizer)
    assert sum(g.parameters for g in groups) == sum(p.numel() for p in model.parameters())
    assert sum(g.tensors for g in groups) == len(list(model.parameters()))
    block = [g for g in groups if g.layer == "blocks.1"]
    assert {g.lr_scale for g in block} == {0.25}
    assert {g.weight_decay for g in block} == {0.0, RECIPE.weight_decay}
    decayed = next(g for g in block if g.weight_decay)
    assert decayed.tensors == 10  # two cores, two head factors, four mode factors, two MLP matrices
    assert any("core" in name or "head" in name for name in decayed.examples)
    for other in (RECIPE.model_copy(update={"sched": "constant"}), RECIPE):  # the peak, wherever the schedule stands
        optimizer = create_optimizer(model, other)
        assert [g.peak_lr for g in describe_groups(model, optimizer)] == [g.lr_scale * RECIPE.lr for g in groups]
        create_scheduler(optimizer, other, 10)  # at the first step of the warm-up
        assert all(g["lr"] < 0.01 * RECIPE.lr for g in optimizer.param_groups)
        assert describe_groups(model, optimizer) == groups
    assert {g.peak_lr for g in block} == {0.25 * RECIPE.lr}
    lines = group_table(groups).splitlines()
    assert "  peak lr  " in lines[0]
    assert len(lines) == 1 + len(groups)
    assert len({line.rindex("  " + g.examples[0]) for line, g in zip(lines[1:], groups, strict=True)}) == 1  # aligned
    assert [g.layer for g in groups if "norm" in g.layer] == [
        "blocks.2, norm"
    ]  # timm: the last block and the norm after it
    with pytest.raises(KeyError):
        describe_groups(make_vit(), optimizer)
