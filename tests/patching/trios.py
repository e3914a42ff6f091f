"""Small models of timm's families, unpatched, patched exactly and patched with a compressing config: what timm does with the
first it must do with the second, and the third must show that the comparison can fail."""

import copy
import gc
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils.checkpoint
from timm.models import _manipulate
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, image, small_model
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention

METHODS = vt.list_methods()
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {  # with the number of prefix tokens
    "vit_1": ("vit_tiny_patch16_224", {}),
    "vit_0": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "vit_5": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "eva02_1": ("eva02_tiny_patch14_224", {}),
    "axial_0": ("vit_small_patch16_rope_224", {"class_token": False, "global_pool": "avg"}),
    "mixed_1": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3_5": ("vit_small_patch16_dinov3", {"num_classes": 7}),
    "beit": ("beit_base_patch16_224", {}),
    "relpos": ("vit_relpos_small_patch16_224", {}),
    "srelpos": ("vit_srelpos_small_patch16_224", {}),
    "swin": ("swin_tiny_patch4_window7_224", {}),
}
ROPE_HOSTS = ("eva02_1", "axial_0", "mixed_1", "dinov3_5")
VIT_HOSTS = ("vit_1", "vit_0", "vit_5")
KINDS = (VIT_HOSTS, ("axial_0", "eva02_1"), ("mixed_1",), ("dinov3_5",), ("beit", "swin"), ("srelpos", "relpos"))
"""Hosts by what their attention is called with: tokens alone; a table of rotations, one for each head, one of halves; a position
bias of its own, or of a module."""
TRAINING = {"drop_path_rate": 0.5, "proj_drop_rate": 0.2}


def over(*hosts: str) -> pytest.MarkDecorator:
    """Runs a test over pairs of a host and a method: every method with every kind of host, and every host at least once.

    The other pairs are redundant: what a layer of ours computes depends on the kind of its call, see ``KINDS``, and what timm
    does with a host depends on the host alone.

    Args:
        hosts: names; all if none are given.
    """
    kinds = [[host for host in kind if host in (hosts or HOSTS)] for kind in KINDS]
    return _parametrize([(kind[i % len(kind)], method) for kind in kinds if kind for i, method in enumerate(METHODS)])


def over_hosts(*hosts: str) -> pytest.MarkDecorator:
    """Runs a test of what timm does with a model over every host once, with the methods in turns, see ``over``."""
    return _parametrize([(host, METHODS[i % len(METHODS)]) for i, host in enumerate(hosts or HOSTS)])


def _parametrize(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("host", "method"), pairs, ids=["-".join(pair) for pair in pairs])


class Trio(NamedTuple):
    """A model as timm made it, patched at full rank and patched with a small config; and images for it."""

    dense: nn.Module
    exact: nn.Module
    small: nn.Module
    x: Tensor


@cache
def make_dense(host: str, **options: Any) -> nn.Module:
    """A host as timm makes it, with random weights; in training it drops paths and outputs."""
    name, own = HOSTS[host]
    return small_model(name, **own, **TRAINING, **options)


def refusal(method: str, model: nn.Module) -> str | None:
    """Returns why a method refuses a model's attention; None if it does not."""
    for module in find_attention(model).values():
        spec = read_host(module, model).spec
        try:
            config = vt.get_method(method).example(spec)
            config.refuse_features(spec)
            config.check(spec)
        except vt.PatchError as error:
            return str(error)
    return None


def small_config(model: nn.Module, method: str) -> vt.AttentionConfig:
    """A config that fits the first layer and changes the output: random weights where there is nothing to compress."""
    spec = read_host(next(iter(find_attention(model).values())), model).spec
    cls = vt.get_method(method)
    config = cls.example(spec)
    return config.model_copy(update={"init": "random"}) if config == cls.full_rank(spec) else config


@cache
def make_trio(host: str, method: str, **options: Any) -> Trio:
    """Models that tests share: ``agree`` works on copies. Skips what the method refuses."""
    dense = make_dense(host, **options)
    reason = refusal(method, dense)
    if reason is not None:
        pytest.skip(f"{method} refuses {host}: {reason}")
    exact, small = copy.deepcopy(dense), copy.deepcopy(dense)
    torch.manual_seed(0)
    vt.patch(exact, vt.full_rank_config(dense, method))
    vt.patch(small, small_config(dense, method))
    gc.freeze()  # hundreds of modules that stay need not be looked through again and again
    return Trio(dense, exact, small, image(dense, FAMILIES[HOSTS[host][0]]["img_size"]))


@cache
def make_patchwork(host: str) -> Trio:
    """All methods in one model, each in a block of its own: one compilation sees them all."""
    count = len(METHODS)
    options = {"depths": (2, count - 2)} if host == "swin" else {"depth": count}
    dense = make_dense(host, **options)
    exact, small = copy.deepcopy(dense), copy.deepcopy(dense)
    for name, method in zip(find_attention(dense), METHODS, strict=True):
        if refusal(method, dense) is None:
            trio = make_trio(host, method, **options)
            for patchwork, patched in ((exact, trio.exact), (small, trio.small)):
                parent, _, child = name.rpartition(".")
                setattr(patchwork.get_submodule(parent), child, copy.deepcopy(patched.get_submodule(name)))
    return Trio(dense, exact, small, image(dense, FAMILIES[HOSTS[host][0]]["img_size"]))


def run(call: Callable[[nn.Module, Tensor], Any], model: nn.Module, x: Tensor) -> tuple[list[Tensor], Any]:
    """Returns the tensors that a call gives, and their arrangement."""
    torch.manual_seed(0)
    leaves, arrangement = tree_flatten(call(model, x.clone()))
    return leaves, arrangement


def run_copy(call: Callable[[nn.Module, Tensor], Any], model: nn.Module, x: Tensor) -> tuple[list[Tensor], Any]:
    """Runs a call on a copy of the model, see ``run``."""
    return run(call, copy.deepcopy(model), x)


def agree(trio: Trio, call: Callable[[nn.Module, Tensor], Any], tolerance: float = 1e-8, pure: bool = False) -> None:
    """``call(model, images)`` gives the same tensors, in the same arrangement, on the exactly patched model as on the unpatched
    one, in float64; on the compressed model it gives others. Models are copied, unless the call is pure."""
    act = run if pure else run_copy
    (expected, arrangement), (got, same), (other, _) = (act(call, model, trio.x) for model in trio[:3])
    assert arrangement == same
    assert_equal(got, expected, tolerance)
    assert max(map(distance, other, expected)) > 1e-3, "this comparison can't fail"


def assert_equal(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-8) -> None:
    """Lists of tensors agree, up to a share of their largest entry."""
    assert expected
    largest = max(e.abs().max().item() for e in expected)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance * largest)


def distance(x: Tensor, reference: Tensor) -> float:
    """Returns the relative distance in the Frobenius norm."""
    return ((x.double() - reference).norm() / reference.norm().clamp_min(1e-9)).item()


def skip_checkpointing(host: str) -> None:
    """Skips what timm before 1.0.15 can't do: its blocks take keyword arguments, which torch's old checkpointing refuses."""
    if _manipulate.checkpoint is torch.utils.checkpoint.checkpoint and host not in (*VIT_HOSTS, "swin"):
        pytest.skip("this timm can't checkpoint blocks that take keyword arguments")
