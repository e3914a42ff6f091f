"""vit_tucker: swap the attention of any pretrained timm ViT, train it, compare it.

import timm, vit_tucker
model = timm.create_model("vit_base_patch16_224", pretrained=True)
print(vit_tucker.patch(model, vit_tucker.TuckerConfig(ranks=(8, 16, 16))))

Names are imported when they are first used: torch and timm take seconds, which --help and shell completion need not wait for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vit_tucker.checkpoint.registration import register_with_timm
from vit_tucker.version import __version__

if TYPE_CHECKING:  # for type checkers and editors; _WHERE below says the same to Python
    from vit_tucker import attention as attention
    from vit_tucker import explain as explain
    from vit_tucker.attention.base import AttentionConfig, ParameterCount
    from vit_tucker.attention.host import HostSpec, MHAWeights
    from vit_tucker.attention.module import AttentionModule
    from vit_tucker.attention.options import Calibration, RankRule, Rule
    from vit_tucker.attention.registry import get_method, list_methods, register_method
    from vit_tucker.attention.special_cases import DenseTensors, to_dense, to_mha, to_tucker
    from vit_tucker.attention.variants.gqa import GQAConfig
    from vit_tucker.attention.variants.mha import MHAConfig
    from vit_tucker.attention.variants.mla.config import MLAConfig
    from vit_tucker.attention.variants.tucker.config import TuckerConfig
    from vit_tucker.checkpoint.load import load, load_dense
    from vit_tucker.checkpoint.save import push_to_hub, save
    from vit_tucker.errors import CheckpointError, ConfigError, DataError, PatchError, VitTuckerError
    from vit_tucker.export.dense import dense_model
    from vit_tucker.linear.base import LinearConfig, LinearModule, LinearSpec, LinearWeights, register_linear_method
    from vit_tucker.patching.freeze import freeze_except_attention
    from vit_tucker.patching.full_rank import full_rank_config
    from vit_tucker.patching.patch import patch, plan, unpatch
    from vit_tucker.patching.record import PatchRecord, patch_record
    from vit_tucker.patching.report import LayerReport, PatchReport

_WHERE = {
    "attention.base": (
        "AttentionConfig",
        "ParameterCount",
    ),
    "attention.host": (
        "HostSpec",
        "MHAWeights",
    ),
    "attention.module": ("AttentionModule",),
    "attention.options": (
        "Calibration",
        "RankRule",
        "Rule",
    ),
    "attention.registry": (
        "get_method",
        "list_methods",
        "register_method",
    ),
    "attention.special_cases": (
        "DenseTensors",
        "to_dense",
        "to_mha",
        "to_tucker",
    ),
    "attention.variants.gqa": ("GQAConfig",),
    "attention.variants.mha": ("MHAConfig",),
    "attention.variants.mla.config": ("MLAConfig",),
    "attention.variants.tucker.config": ("TuckerConfig",),
    "checkpoint.load": (
        "load",
        "load_dense",
    ),
    "checkpoint.save": (
        "push_to_hub",
        "save",
    ),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "PatchError",
        "VitTuckerError",
    ),
    "export.dense": ("dense_model",),
    "linear.base": (
        "LinearConfig",
        "LinearModule",
        "LinearSpec",
        "LinearWeights",
        "register_linear_method",
    ),
    "patching.freeze": ("freeze_except_attention",),
    "patching.full_rank": ("full_rank_config",),
    "patching.patch": (
        "patch",
        "plan",
        "unpatch",
    ),
    "patching.record": (
        "PatchRecord",
        "patch_record",
    ),
    "patching.report": (
        "LayerReport",
        "PatchReport",
    ),
}
"""The module of each public name, below vit_tucker."""
_MODULE_OF = {name: f"vit_tucker.{module}" for module, names in _WHERE.items() for name in names}
_PARTS = ("attention", "explain", "export")
"""Parts that are reached as attributes without having been imported."""

__all__ = [
    "AttentionConfig",
    "AttentionModule",
    "Calibration",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DenseTensors",
    "GQAConfig",
    "HostSpec",
    "LayerReport",
    "LinearConfig",
    "LinearModule",
    "LinearSpec",
    "LinearWeights",
    "MHAConfig",
    "MHAWeights",
    "MLAConfig",
    "ParameterCount",
    "PatchError",
    "PatchRecord",
    "PatchReport",
    "RankRule",
    "Rule",
    "TuckerConfig",
    "VitTuckerError",
    "__version__",
    "dense_model",
    "freeze_except_attention",
    "full_rank_config",
    "get_method",
    "list_methods",
    "load",
    "load_dense",
    "patch",
    "patch_record",
    "plan",
    "push_to_hub",
    "register_linear_method",
    "register_method",
    "save",
    "to_dense",
    "to_mha",
    "to_tucker",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    if name in _PARTS:
        return importlib.import_module(f"vit_tucker.{name}")
    raise AttributeError(f"module 'vit_tucker' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})


register_with_timm()
