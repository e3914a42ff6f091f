"""Relevance for a class: by hand, by the steps of the paper on whole maps, and what is refused."""

import pytest
import torch

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, image, small_model
from vit_tucker.errors import ExplainError
from vit_tucker.explain.explanation import explain_image
from vit_tucker.explain.gradient import class_relevance, weigh

CLASSES = {"num_classes": 5}


def model_and_image(name, **options):
    model = small_model(name, **options)
    return model, image(model, FAMILIES[name].get("img_size"))[:1]


def test_only_what_speaks_for_the_class_counts():
    attn = torch.tensor([[[[0.5, 0.5]], [[0.2, 0.8]]]])
    gradient = torch.tensor([[[[2.0, -1.0]], [[-5.0, 1.0]]]])
    torch.testing.assert_close(weigh(attn, gradient), torch.tensor([[[0.5, 0.4]]]))


@pytest.mark.parametrize("patched", [False, True], ids=["dense", "tucker"])
def test_weighted_by_the_change_of_the_logit(patched):
    model, x = model_and_image("vit_tiny_patch16_224", **CLASSES)
    if patched:
        vt.patch(model, vt.TuckerConfig(ranks=(3, 16, 16)))
    model.requires_grad_(False)
    maps = class_relevance(model, x, 2)
    step = 1e-6
    layer, entry = "blocks.1.attn", (0, slice(None), 0, 3)
    kept, changes = {}, []
    attn_drop = model.get_submodule(f"{layer}.attn_drop")
    model.get_submodule(layer).fused_attn = False
    for head in range(4):

        def nudge(module, args, output, head=head):
            kept["map"] = output.clone()
            moved = output.clone()
            moved[0, head, 0, 3] += step
            return moved

        handle = attn_drop.register_forward_hook(nudge)
        moved = model(x)[0, 2]
        handle.remove()
        changes.append((moved - model(x)[0, 2]).item() / step)
    expected = (kept["map"][entry] * torch.tensor(changes).double()).clamp_min(0).mean()
    assert expected > 1e-6
    assert maps[layer][0, 0, 3].item() == pytest.approx(expected.item(), rel=1e-3)  # a difference quotient of one side


def test_the_picture_follows_the_papers_updates():
    model, x = model_and_image("vit_tiny_patch16_224", **CLASSES)
    found = explain_image(model, x[0], weighted=True, target=2)
    relevance = torch.eye(17)
    for fused in class_relevance(model, x, 2).values():
        relevance = relevance + fused[0] @ relevance
    expected = relevance[0, 1:] / relevance[0, 1:].mean()
    torch.testing.assert_close(found.rollout.flatten(), expected, rtol=1e-4, atol=1e-4)  # float32
    other = explain_image(model, x[0], weighted=True, target=1)
    assert (other.rollout - found.rollout).abs().max() > 1e-2
    best = int(model(x).argmax())
    default = explain_image(model, x[0], weighted=True)
    assert torch.equal(default.rollout, explain_image(model, x[0], weighted=True, target=best).rollout)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "tnt_s_patch16_224"])
def test_other_hosts(name):
    model, x = model_and_image(name, **CLASSES)
    vt.patch(model, vt.full_rank_config(model, "gqa"))
    found = explain_image(model, x[0], weighted=True)
    assert not found.obstacle
    assert found.rollout.mean().item() == pytest.approx(1, abs=1e-5)
    assert found.rollout.min() >= 0


def test_refused():
    model, x = model_and_image("vit_tiny_patch16_224", **CLASSES)
    with pytest.raises(ExplainError, match="relevance for class 5: the model has the classes 0 to 4"):
        explain_image(model, x[0], weighted=True, target=5)
    with pytest.raises(ExplainError, match="takes no head fusion and discards nothing"):
        explain_image(model, x[0], weighted=True, head_fusion="max")
    with pytest.raises(ExplainError, match="has no classifier here"):
        class_relevance(*model_and_image("vit_tiny_patch16_224", num_classes=0))
