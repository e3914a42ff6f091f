"""The image size that a model was built for is found, whichever layer or record of timm has it."""

import pytest
import timm
import torch
from torch import nn

from vit_tucker.checkpoint.entry import create_structure
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import built_size, input_shape
from vit_tucker.hosts.structure import without_weights
from vit_tucker.hosts.tokens import count_tokens

SHALLOW = {"depths": (1, 1, 1, 1)}
BUILT: dict[str, dict] = {
    "vit_tiny_patch16_224": {"depth": 1, "img_size": (64, 96)},
    "vit_relpos_small_patch16_224": {"depth": 1, "img_size": 64},
    "eva02_tiny_patch14_224": {"depth": 1, "img_size": 56},
    "swin_tiny_patch4_window7_224": {**SHALLOW, "img_size": (64, 128), "window_size": 2},
    "nest_tiny": {"img_size": 64},
    "tnt_s_patch16_224": {"depth": 1, "img_size": 64},
    "visformer_tiny": {"img_size": (64, 96)},
    "coatnet_nano_rw_224": {**SHALLOW, "img_size": 64},
    "maxvit_rmlp_pico_rw_256": {**SHALLOW, "img_size": 192},
    "volo_d1_224": {"img_size": 64},
    "gcvit_xxtiny": {"img_size": 64},
    "hiera_tiny_224": {"img_size": 64},
    "levit_128s": {"img_size": 64},
}
"""Small models of families that are built for a size, at another one than timm's."""
FLEXIBLE = {"mvitv2_tiny": {}, "naflexvit_base_patch16_gap": {"depth": 1}}
"""Any size runs: timm's record is the only trace."""


def build(name: str, **options) -> nn.Module:
    """A model without weights, on the meta device where timm can."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    return without_weights(lambda: timm.create_model(name, **options)).eval()


def runs(model: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether it takes images of a size."""
    images = torch.empty(1, *size, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(images)
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def forget(model: nn.Module) -> nn.Module:
    """The model as an older timm makes it, which keeps neither arguments nor traits."""
    for name in ("_traits", "_model_args"):
        vars(model).pop(name, None)
    return model


@pytest.mark.parametrize("name", BUILT)
def test_models_built_at_another_size(name):
    model = build(name, **BUILT[name])
    size = BUILT[name]["img_size"]
    expected = (3, *size) if isinstance(size, tuple) else (3, size, size)
    for _ in range(2):
        assert input_shape(model) == expected
        assert input_shape(model, 480) == (3, 480, 480)
        model = forget(model)
    assert runs(model, expected)
    usual = model.pretrained_cfg["input_size"]
    assert usual != expected
    assert not runs(model, usual), "timm's own size would do as well"


@pytest.mark.skipif(not hasattr(timm.models, "get_model_args"), reason="timm keeps no arguments of what it builds")
@pytest.mark.parametrize("name", FLEXIBLE)
def test_flexible_models_have_the_size_that_timm_recorded(name):
    assert input_shape(build(name, img_size=192, **FLEXIBLE[name])) == (3, 192, 192)


def test_a_size_that_the_architecture_ignores_does_not_count():
    model = build("efficientformer_l1", img_size=192)
    assert input_shape(model) == (3, 224, 224)
    assert not runs(model, (3, 192, 192))


def test_what_is_no_size():
    """Convolutions have none of their own, and a model that does not run without values is not asked twice."""
    assert built_size(build("resnet18")) is None

    class Counting(nn.Module):
        def forward(self, images):
            return images.sum().item()

    assert built_size(Counting()) is None
    assert input_shape(Counting()) == (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, (64, (96, 32))),
        ("eva02_tiny_patch14_224", {"depth": 1}, (56, (84, 28))),
        ("swin_tiny_patch4_window7_224", SHALLOW, (448, (224, 448))),
        ("maxvit_rmlp_pico_rw_256", SHALLOW, (128, (128, 192))),
        ("efficientvit_m0", {}, (128, (128, 192))),
    ],
)
def test_sizes_that_are_set_after_the_build(name, options, sizes):
    model = timm.create_model(name, **options).eval()
    if not hasattr(model, "set_input_size"):
        pytest.skip("not in this timm")
    for size in sizes:
        model.set_input_size(img_size=size)
        assert input_shape(model) == ((3, *size) if isinstance(size, tuple) else (3, size, size))


@pytest.mark.parametrize("name", ["visformer_tiny", "volo_d1_224", "coatnet_nano_rw_224"])
def test_arguments_of_a_stored_model_count(name):
    """config.json of timm's own pushes: the size in model_args, pretrained_cfg as ever."""
    cfg = timm.get_pretrained_cfg(name).to_dict()
    config = {"architecture": name, "pretrained_cfg": cfg, "model_args": {"img_size": 192}}
    model = create_structure(config).eval()
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 224, 224)
    assert input_shape(model) == (3, 192, 192)
    layouts = {key: read_host(module).spec.layout for key, module in find_attention(model).items()}
    assert count_tokens(model, layouts).keys() == layouts.keys() != set()
    assert count_tokens(model, layouts, img_size=224) == {}
