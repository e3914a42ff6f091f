"""Operations of whole models: by hand, and patched minus dense against the methods' formulas."""

import copy

import pytest
import torch
from torch import nn

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, small_model
from vit_tucker.analysis.flops import count_model_flops, known_flops
from vit_tucker.analysis.host_map import build_structure
from vit_tucker.attention.cores import FEW_TOKENS, order_macs
from vit_tucker.attention.module import AttentionModule
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_shape

HOSTS = {
    "vit_tiny_patch16_224": ("gqa", "mha", "mla", "tucker"),
    "beit_base_patch16_224": ("gqa", "tucker"),  # a mask on all scores
    "vit_small_patch16_rope_mixed_224": ("gqa", "mla", "tucker"),
    "vit_small_patch16_dinov3": ("gqa", "mla", "tucker"),
    "swin_tiny_patch4_window7_224": ("mha", "mla", "tucker"),  # 16 and 4 windows of 16 tokens
    "volo.VOLO": ("gqa", "tucker"),  # tokens as a grid
    "visformer_tiny": ("gqa", "mla"),  # channels first
}
"""Methods by host: all on a plain one, those whose keys rotate otherwise where there is RoPE, those that fold factors once per
batch, and one that does not, in windows. Masks and layouts touch the call alone, which is the same code for all methods."""


def test_a_vit_by_hand():
    """Patches, 12 blocks of width 192 with 3 heads on 197 tokens, classifier: 2 operations per multiply-add."""
    width, tokens = 192, 197
    patches = 196 * (3 * 16 * 16) * width
    projections, attention, mlp = 4 * tokens * width**2, 2 * tokens**2 * width, 2 * tokens * width * 4 * width
    macs = patches + 12 * (projections + attention + mlp) + width * 1000
    found = count_model_flops(build_structure("vit_tiny_patch16_224"), (3, 224, 224))
    assert found == 2 * macs
    assert found != 2 * (macs - 12 * attention)  # twin: torch's counter does not see the CPU's fused kernel


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, methods in HOSTS.items() for method in methods])
def test_the_difference_is_that_of_the_formulas(name, method):
    """Exact; only what a batch does once, folding head factors into cores and up projections into each other, is counted in
    each window by the formula."""
    model, size = small_model(name), FAMILIES[name].get("img_size")
    shape = (3, size, size) if size else input_shape(model)
    dense = count_model_flops(model, shape)
    spec = read_host(next(iter(find_attention(model).values()))).spec
    config = vt.get_method(method).example(spec).model_copy(update={"init": "random"})
    report = vt.patch(model, config, img_size=size)
    difference = count_model_flops(model, shape) - dense
    folds = 0
    if method in ("tucker", "mla") and name.startswith("swin"):
        for layer, windows in zip(attention_layers(model), (16, 16, 4, 4), strict=True):
            folds += (windows - 1) * 2 * once_per_batch(layer) + 2 * saved_by_order(layer, windows * 16)
    assert difference == report.flops_after - report.flops_before - folds
    assert (difference == 0) == (method == "mha")  # twin: the others cost something else


def saved_by_order(layer: AttentionModule, tokens: int) -> int:
    """Multiply-adds that an order for few tokens saves, which the formula does not count."""
    if not hasattr(layer, "pre_core") or tokens > FEW_TOKENS:
        return 0
    saved = 0
    for core, width in ((layer.pre_core, layer.q_proj.in_features), (layer.post_core, layer.proj.out_features)):
        macs = order_macs(tokens, width, layer.num_heads, core.shape)
        saved += min(macs["formed"], macs["folded"]) - min(macs.values())
    return saved


def once_per_batch(layer: AttentionModule) -> int:
    """Multiply-adds that don't depend on the number of tokens."""
    if hasattr(layer, "pre_core"):
        return layer.num_heads * (layer.pre_core.numel() + layer.post_core.numel())
    queries, latent = layer.q_up.in_features + 1, layer.k_up.in_features  # the biases are one more column
    return layer.attn_dim * (queries * latent + layer.proj.out_features * (latent + 1))


def attention_layers(model: nn.Module) -> list[AttentionModule]:
    return [module for module in model.modules() if isinstance(module, AttentionModule)]


def test_the_model_is_not_touched(make_vit):
    """Neither its modes, nor its gradients, nor the random numbers; nor are the dense layers that it keeps copied."""
    model = make_vit(drop_rate=0.5, proj_drop_rate=0.2, dtype=torch.float32)
    vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6), exclude=[0]))
    model.train()
    model.blocks[1].eval()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    original = vt.patch_record(model).originals["blocks.1.attn"].qkv.weight
    original.register_hook(lambda g: g)  # a tensor with a hook can't be deep-copied
    assert count_model_flops(model, (3, 16, 16)) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(p.requires_grad for p in model.parameters())


class DependsOnValues(nn.Module):
    """Works on real tensors only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 8)

    def forward(self, images):
        x = self.linear(images.flatten(1))
        return x if x.sum().item() < 1e9 else -x


def test_models_that_need_values_are_run_on_the_cpu():
    model = DependsOnValues()
    assert count_model_flops(model, (3, 4, 4)) == 2 * 48 * 8
    with pytest.raises(RuntimeError, match=r"(?i)meta"):
        count_model_flops(model.to("meta"), (3, 4, 4))
    assert known_flops(model, (3, 4, 4)) is None
