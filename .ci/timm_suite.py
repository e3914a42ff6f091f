"""A pytest plugin that runs timm's own tests of models on patched ones: `pytest -p timm_suite tests/test_models.py` in timm.

Each selected test runs once for each method of ours, with models that timm makes and `vit_tucker.patch` changes: of the method's
example ranks, with random weights. What timm can't do with such a model unpatched is timm's matter: such tests are not selected.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vit_tucker
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention

PLAIN = {"embed_dim": 48, "depth": 3, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": PLAIN,
    "deit_tiny_distilled_patch16_224": PLAIN,
    "eva02_tiny_patch14_224": PLAIN,
    "beit_base_patch16_224": PLAIN,
    "vit_relpos_small_patch16_224": PLAIN,
    "vit_small_patch16_rope_mixed_224": PLAIN,
    "vit_small_patch16_dinov3": PLAIN,
    "naflexvit_base_patch16_gap": PLAIN,
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "davit_tiny": {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "tnt_s_patch16_224": {"embed_dim": 48, "inner_dim": 16, "depth": 3},
    "visformer_tiny": {"embed_dim": 48, "depth": (1, 1, 1)},
}
"""Architectures, with arguments that make them small; what a test asks for goes over them."""
TESTS = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_default_cfgs_non_std",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
)
FX = ("test_model_forward_fx", "test_model_backward_fx")
"""Symbolic traces."""
LEFT_OUT = {
    "test_model_forward_torchscript": "no layer of ours can be scripted, as torch.jit.script is no longer developed",
    "test_model_forward_fx_torchscript": "likewise",
}
"""What is not run of the tests over all architectures."""
METHODS = vit_tucker.list_methods()


def only_ours(list_names: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Returns timm's list of models without what is not in ``MODELS``; of several weights of a model the first."""

    @functools.wraps(list_names)
    def listed(*args: Any, **options: Any) -> list[str]:
        first: dict[str, str] = {}
        for name in list_names(*args, **options):
            first.setdefault(name.partition(".")[0], name)
        return [name for model, name in first.items() if model in MODELS]

    return listed


timm.list_models = only_ours(timm.list_models)
timm.list_pretrained = only_ours(timm.list_pretrained)


def example(model: nn.Module, method: str) -> vit_tucker.AttentionConfig:
    """A small config of a method, with random weights, for the first layer that any method takes; the others are left alone.

    Raises:
        PatchError: the method takes none of the model's layers.
    """
    cls = vit_tucker.get_method(method)
    fitting: dict[Any, list[str]] = {}
    refusal = vit_tucker.PatchError("no attention")
    for name, module in find_attention(model).items():
        try:
            spec = read_host(module, model).spec
            config = cls.example(spec)
            config.refuse_features(spec)
            config.check(spec)
            fitting.setdefault(config, []).append(name)
        except vit_tucker.PatchError as error:
            refusal = error
    if not fitting:
        raise refusal
    config, names = max(fitting.items(), key=lambda item: len(item[1]))
    return config.model_copy(update={"init": "random", "layers": tuple(names)})


@pytest.fixture(params=METHODS, autouse=True)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has the tests' ``create_model`` make patched models."""
    make = request.module.create_model

    @functools.wraps(make)
    def create_patched(*args: Any, **options: Any) -> nn.Module:
        small = MODELS[args[0].partition(".")[0]]
        model: nn.Module = make(*args, **{**small, **options})
        try:
            vit_tucker.patch(model, example(model, request.param))
        except vit_tucker.PatchError as error:
            pytest.skip(f"{request.param}: {error}")
        assert any(isinstance(module, vit_tucker.AttentionModule) for module in model.modules())
        return model

    monkeypatch.setattr(request.module, "create_model", create_patched)
    torch.manual_seed(0)
    return str(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the selected tests."""
    chosen = [item for item in items if getattr(item, "originalname", "") in (*TESTS, *FX)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
