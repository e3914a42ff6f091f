"""vit_tucker: swap the attention of any pretrained timm ViT, train it, compare it.

import timm, vit_tucker
model = timm.create_model("vit_base_patch16_224", pretrained=True)
print(vit_tucker.patch(model, vit_tucker.TuckerConfig(ranks=(8, 16, 16))))
"""

from vit_tucker import attention as attention
from vit_tucker import explain as explain
from vit_tucker.attention.base import AttentionConfig, HostSpec, MHAWeights, ParameterCount
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.options import Calibration, RankRule, Rule
from vit_tucker.attention.registry import get_method, list_methods, register_method
from vit_tucker.attention.special_cases import DenseTensors, to_dense, to_mha, to_tucker
from vit_tucker.attention.variants.gqa import GQAConfig
from vit_tucker.attention.variants.mha import MHAConfig
from vit_tucker.attention.variants.mla import MLAConfig
from vit_tucker.attention.variants.tucker import TuckerConfig
from vit_tucker.checkpoint.load import load, load_dense
from vit_tucker.checkpoint.save import push_to_hub, save
from vit_tucker.errors import CheckpointError, ConfigError, DataError, PatchError, VitTuckerError
from vit_tucker.export.dense import dense_model
from vit_tucker.patching.full_rank import full_rank_config
from vit_tucker.patching.patch import PatchRecord, patch, patch_record, plan, unpatch
from vit_tucker.patching.report import LayerReport, PatchReport
from vit_tucker.version import __version__

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
    "full_rank_config",
    "get_method",
    "list_methods",
    "load",
    "load_dense",
    "patch",
    "patch_record",
    "plan",
    "push_to_hub",
    "register_method",
    "save",
    "to_dense",
    "to_mha",
    "to_tucker",
    "unpatch",
]
