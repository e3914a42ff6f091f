"""A pytest plugin that runs timm's own tests of models on patched ones: `pytest -p timm_suite tests/test_models.py` in timm's sources.

Each selected test runs once for each method of ours, with models that timm makes and `vit_tucker.patch` changes: of the method's
example ranks, with random weights. What timm can't do with such a model unpatched is timm's matter: such tests are not selected.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vit_tucker
from vit_tucker.patching.find import find_attention
from vit_tucker.patching.hosts import has_mixed_rope, read_host

MODELS = (
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "test_mambaout",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_wee_patch16_reg1_gap_256",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
    "swin_tiny_patch4_window7_224",
    "coatnet_pico_rw_224",
    "maxvit_rmlp_pico_rw_256",
    "davit_tiny",
    "tnt_s_patch16_224",
    "visformer_tiny",
    "fastvit_sa12",
    "mobilevit_xxs",
    "convit_tiny",
    "volo_d1_224",
    "nest_tiny",
    "naflexvit_base_patch16_gap",
    "crossvit_tiny_240",
)
TESTS = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_default_cfgs_non_std",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
)
METHODS = vit_tucker.list_methods()
"""Not selected: the tests of TorchScript, which torch has given up; no layer of ours can be scripted."""


def only_ours(list_names: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """timm's list of models without what is not in ``MODELS``; of several pretrained weights of a model the first."""

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
    mixed, cls = has_mixed_rope(model), vit_tucker.get_method(method)
    fitting: dict[Any, list[str]] = {}
    refusal = vit_tucker.PatchError("no attention")
    for name, module in find_attention(model).items():
        try:
            spec = read_host(module, mixed).spec
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
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Has the tests' ``create_model`` make patched models."""
    make = request.module.create_model

    @functools.wraps(make)
    def create_patched(*args: Any, **options: Any) -> nn.Module:
        model: nn.Module = make(*args, **options)
        try:
            vit_tucker.patch(model, example(model, request.param))
        except vit_tucker.PatchError as error:
            pytest.skip(f"{request.param}: {error}")
        assert any(isinstance(module, vit_tucker.AttentionModule) for module in model.modules())
        return model

    monkeypatch.setattr(request.module, "create_model", create_patched)
    torch.manual_seed(0)
    yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the selected tests."""
    chosen = [item for item in items if getattr(item, "originalname", "") in TESTS]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
