"""Training the attention alone, or what patterns name."""

import pytest
import timm
import torch

import vit_tucker as vt
from vit_tucker.hosts.find import find_attention
from vit_tucker.patching.freeze import freeze_except

TUCKER = vt.TuckerConfig(ranks=(3, 6, 6), exclude=0)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("patched", [True, False])
def test_attention_alone_is_trained(make_vit, images, patched):
    """Attention trains, replaced or not; nothing else gets gradients or steps, with checkpointing too."""
    model = make_vit().train()
    if patched:
        vt.patch(model, TUCKER)
    names = vt.freeze_except_attention(model)
    assert set(names) == trained(model) == {name for name, _ in model.named_parameters() if ".attn." in name}
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(images).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in names if ".k_proj.bias" not in name}
    assert vt.freeze_except_attention(model, keep="head") == (*names, "head.weight", "head.bias")
    model.requires_grad_(True)
    assert trained(model) > set(names)


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("attention", [r"blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]),
        ("blocks.*.attn", ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]),
        (["blocks.[12].attn", "head"], ["blocks.1.attn", "blocks.2.attn", "head"]),
        ("re:blocks\\.(0|2)\\.(attn|norm1)", ["blocks.0.attn", "blocks.0.norm1", "blocks.2.attn", "blocks.2.norm1"]),
        (("pos_embed", "head.bias"), ["pos_embed", "head.bias"]),
        ("blocks.0.*.proj", ["blocks.0.attn.proj"]),
        ("blocks", ["blocks"]),
    ],
)
def test_patterns(make_vit, only, expected):
    model = make_vit()
    vt.patch(model, TUCKER)
    freeze_except(model, only, "train.only")
    assert trained(model) == {
        name for name, _ in model.named_parameters() if any(name == e or name.startswith(f"{e}.") for e in expected)
    }


def test_shared_layers_are_trained(make_vit):
    model = make_vit()
    model.blocks[2].attn = model.blocks[0].attn
    freeze_except(model, "blocks.2.attn", "train.only")
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith("blocks.0.attn.")}


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (
            "atention",
            "train.only: 'atention' matches no module or parameter of VisionTransformer; did you mean 'attention'?",
        ),
        (
            ["attention", "haed"],
            "train.only: 'haed' matches no module or parameter of VisionTransformer; did you mean 'head'?",
        ),
        ("re:(", r"train.only: 're:\(' is no regular expression: "),
        ("head_drop", "train.only: head_drop: no parameter matches"),
        ([], "train.only: an empty list would train nothing"),
    ],
)
def test_what_names_nothing_is_refused(make_vit, only, message):
    model = make_vit()
    model.head.requires_grad_(False)
    before = trained(model)
    with pytest.raises(vt.ConfigError, match=message) as caught:
        freeze_except(model, only, "train.only")
    assert "\n" not in str(caught.value)
    assert trained(model) == before


def test_models_without_attention_are_refused():
    model = timm.create_model("resnet18")
    with pytest.raises(vt.ConfigError, match="keep: ResNet has no self-attention layer"):
        vt.freeze_except_attention(model)
    assert not find_attention(model)
