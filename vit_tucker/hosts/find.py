"""Finds the self-attention modules of a model, and refuses models that can't be patched at all."""

from torch import nn

from vit_tucker.attention.effective import full_name, imported_class, is_tuner
from vit_tucker.attention.module import AttentionModule
from vit_tucker.errors import PatchError, WeightsError
from vit_tucker.hosts.families import family_of


def looks_like_attention(module: nn.Module) -> bool:
    """Returns whether a user may take a module for attention, by its class's name and a number of heads, known to us or not."""
    name = type(module).__name__.lower()
    return ("attention" in name or name.endswith("attn")) and hasattr(module, "num_heads")


def is_self_attention(module: nn.Module) -> bool:
    """Returns whether tokens attend to each other in it: a known class, or a name like one.

    Attention pooling (timm's AttentionPool...) reads tokens out with a learned query, cross-attention takes its queries from
    elsewhere, other modules of that name let channels or one token attend: no weights of ours fit them.
    """
    family = family_of(module)
    if isinstance(module, AttentionModule) or (family is not None and family.is_self_attention(module)):
        return True
    if not looks_like_attention(module) or is_left_alone(module):
        return False
    name = type(module).__name__
    return not name.startswith("AttentionPool") and "Cross" not in name


def is_left_alone(module: nn.Module) -> bool:
    """Returns whether a module stands beside self-attention and stays as it is."""
    family = family_of(module)
    return family is not None and family.is_left_alone(module)


def own_parts(model: nn.Module) -> set[int]:
    """Returns modules inside layers of ours: copies of a host's position bias may be of a class that looks like attention."""
    layers = [module for module in model.modules() if isinstance(module, AttentionModule)]
    return {id(part) for layer in layers for part in layer.modules() if part is not layer}


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Finds all self-attention modules of a model by full name, in its order; a shared module under each of its names."""
    inside = own_parts(model)
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if is_self_attention(module) and id(module) not in inside}


def find_other_attention(model: nn.Module) -> list[str]:
    """Finds attention that no method replaces, by full name: pooling, cross-attention, attention of channels or of one token."""
    inside = own_parts(model)
    return [
        name
        for name, module in model.named_modules()
        if (looks_like_attention(module) or is_left_alone(module))
        and not is_self_attention(module)
        and id(module) not in inside
    ]


WRAPPERS = {
    "DistributedDataParallel": "patch the model before it is wrapped (before accelerator.prepare)",
    "DataParallel": "patch the model before it is wrapped",
    "FullyShardedDataParallel": "patch the model before it is wrapped (before accelerator.prepare)",
    "OptimizedModule": "patch the model before torch.compile",
}


PEFT_MODELS = {
    ("peft.peft_model", "PeftModel"): "base_model",
    ("peft.mixed_model", "PeftMixedModel"): "base_model",
    ("peft.tuners.tuners_utils", "BaseTuner"): "model",
}
"""What PEFT puts around a model whose own modules hold the adapters, and where the model stands in it."""


def inner(model: nn.Module) -> nn.Module:
    """Returns the model inside PEFT's ``get_peft_model``, which has its adapters in its own modules; any other as it is."""
    for place, attribute in PEFT_MODELS.items():
        if isinstance(model, imported_class(*place)):
            return inner(getattr(model, attribute))
    return model


def refuse_wrapped(model: nn.Module) -> None:
    """Raises PatchError for a model inside DDP, FSDP or torch.compile: their state would still refer to the old modules."""
    for name, module in model.named_modules():
        advice = WRAPPERS.get(type(module).__name__)
        if advice is not None:
            where = f"module '{name}'" if name else "the model"
            raise PatchError(f"{where} is a {type(module).__name__}: {advice}")
    refuse_adapted(model)


def refuse_adapted(model: nn.Module) -> None:
    """Raises WeightsError for a model of PEFT's with adapters on the own parameters of an attention module."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None) if is_tuner(module) else None
        if base is not None and is_self_attention(base):
            raise WeightsError(
                f"{name} is a {full_name(module)} around attention as a whole: merge_and_unload() it first"
            )
