"""vit_tucker: swap the attention of any pretrained timm ViT, train it, compare it.

import timm, vit_tucker
model = timm.create_model("vit_base_patch16_224", pretrained=True)
print(vit_tucker.patch(model, vit_tucker.TuckerConfig(ranks=(8, 16, 16))))

Names are imported when they are first used: torch and timm take seconds, which --help and shell completion need not wait for.
"""

import lazy_loader

from vit_tucker.checkpoint.registration import register_with_timm

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi

register_with_timm()
