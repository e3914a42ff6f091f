"""Names of tensors: from the layouts in which weights are published to timm's."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from vit_tucker.storage.weights import without_wrappers

PREFIXES = {
    *("module", "model", "net", "network", "backbone", "encoder", "teacher", "student"),
    *("ema", "ema_model", "model_ema"),
    *("base_model", "base_encoder", "momentum_encoder", "target_encoder", "trunk", "visual", "vit", "image_encoder"),
    *("vision_encoder", "vision_model", "vision_tower", "feature_extractor", "learner"),
}
"""Names of the attribute in which a training script holds the model."""
PREFERRED = ("ema", "teacher", "base_encoder", "target_encoder")
"""Of two copies of a model in one file, the one whose prefix has such a part."""
PRETRAINING = re.compile(
    r"^(decoder_|decoder\.|lm_head\.|dino_head\.|ibot_head\.|head\.(mlp|last_layer|\d+)\b|last_layer\.|projector|predictor|"
    r"text_model\.|text_projection|logit_scale|logit_bias)"
)
"""Tensors that only the pretraining of a backbone needs: decoders, projection heads, text towers."""
BUFFERS = re.compile(r"(^|\.)(relative_position_index|attn_mask|relative_coords_table|position_ids)$")
"""Tensors that a model computes from its sizes."""


@dataclass
class Renamed:
    """A state dict in timm's names.

    Attributes:
        state: tensors by timm's names, some of which may still be in a form that timm's own filters read.
        layout: what the names were, '' for timm's own.
        prefix: what was taken off all names, with its dot.
        left_out: names of tensors that are not in ``state``, as they are in the file.
    """

    state: dict[str, Tensor]
    layout: str = ""
    prefix: str = ""
    left_out: list[str] = field(default_factory=list)


def to_timm_names(state: Mapping[str, Tensor], known: Collection[str]) -> Renamed:
    """Renames the tensors of a state dict as timm names them.

    Args:
        state: tensors by the names in the file.
        known: names of the model's tensors; its number of blocks and classes may be another one.

    Returns:
        All tensors that are the model's, in the layout of timm or one that timm's own filters convert (OpenCLIP, DINOv2, ...).
    """
    clean = {without_wrappers(key): value for key, value in state.items()}
    for anchor, layout, rename in LAYOUTS:
        found = next((key for key in clean if key == anchor or key.endswith(f".{anchor}")), None)
        if found is not None and anchor not in known:
            renamed = rename(clean, found.removesuffix(anchor))
            renamed.layout = layout
            return without_pretraining(renamed, known)
    return without_pretraining(below(clean, best_prefix(clean, known)), known)


def below(state: Mapping[str, Tensor], prefix: str) -> Renamed:
    """Returns the tensors whose names have a prefix, without it; the others are left out."""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return Renamed(inside, prefix=prefix, left_out=[key for key in state if not key.startswith(prefix)])


def best_prefix(state: Mapping[str, Tensor], known: Collection[str]) -> str:
    """Returns the prefix, made of ``PREFIXES``, under which most tensors have names of the model; '' where none has."""
    prefixes = {""}
    for key in state:
        parts = key.split(".")
        for count in range(1, 5):
            if not set(parts[:count]) <= PREFIXES or len(parts) <= count:
                break
            prefixes.add(".".join(parts[:count]) + ".")

    def order(prefix: str) -> tuple[int, bool, int]:
        matches = sum(key.startswith(prefix) and key[len(prefix) :] in known for key in state)
        return matches, any(part in PREFERRED for part in prefix.split(".")), -len(prefix)

    best = max(prefixes, key=order)
    return best if order(best)[0] else ""


def without_pretraining(renamed: Renamed, known: Collection[str]) -> Renamed:
    """Removes what only pretraining needs, and copies position biases that BEiT's pretraining shares between its blocks."""
    state = renamed.state
    for key in [key for key in state if key not in known and (PRETRAINING.search(key) or BUFFERS.search(key))]:
        del state[key]
        renamed.left_out.append(renamed.prefix + key)
    shared = "rel_pos_bias.relative_position_bias_table"
    if shared in state and shared not in known and "blocks.0.attn.relative_position_bias_table" in known:
        table = state.pop(shared)
        for number in block_numbers(state):
            state[f"blocks.{number}.attn.relative_position_bias_table"] = table
        renamed.layout = renamed.layout or "BEiT pretraining, its shared position bias copied to each block"
        if state.pop("mask_token", None) is not None:
            renamed.left_out.append(f"{renamed.prefix}mask_token")
    return renamed


def block_numbers(state: Mapping[str, Tensor]) -> list[int]:
    """Returns the numbers of the blocks that a state dict in timm's layout has."""
    return sorted({int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})


Rules = tuple[tuple[str, str], ...]

HUGGING_FACE: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
)
HUGGING_FACE_CLIP: Rules = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
)
TORCHVISION: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
OPEN_CLIP: Rules = ((r"^", "visual."),)
"""The image tower of OpenAI's CLIP or OpenCLIP, to where timm's own filter renames it from."""
QKV = {"query": 0, "q": 0, "key": 1, "k": 1, "value": 2, "v": 2}


def renamed_by(rules: Rules, key: str) -> str:
    """Returns a name after all rules in their order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def joined_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins queries, keys and values, ``attn.query.weight`` and so on, to ``attn.qkv.weight``.

    Where keys have no bias (BEiT), those of queries and values become ``attn.q_bias`` and ``attn.v_bias``.
    """
    result: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for key, value in state.items():
        match = re.match(r"(.*\.attn)\.(\w+)\.(weight|bias)$", key)
        if match and match[2] in QKV:
            parts.setdefault((match[1], match[3]), {})[QKV[match[2]]] = value
        else:
            result[key] = value
    for (attention, kind), found in parts.items():
        if sorted(found) == [0, 1, 2]:
            result[f"{attention}.qkv.{kind}"] = torch.cat([found[0], found[1], found[2]])
        else:
            result |= {f"{attention}.{'qkv'[number]}_{kind}": value for number, value in found.items()}
    return result


def from_hugging_face(state: Mapping[str, Tensor], prefix: str) -> Renamed:
    """Renames ViT, DeiT, DINOv2, BEiT and MAE of Hugging Face's transformers, with the classifier beside the model."""
    inside = below(state, prefix).state
    left_out = [f"{prefix}{key}" for key in inside if key.startswith("pooler.dense.")]
    result = joined_projections(
        {renamed_by(HUGGING_FACE, k): v for k, v in inside.items() if not k.startswith("pooler.dense.")}
    )
    width = result["patch_embed.proj.weight"].shape[0]
    heads = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
    for key, value in state.items():
        if key.startswith(prefix) and (prefix or key.partition(".")[0] not in heads):
            continue
        result.pop(key, None)
        head, _, kind = key.removeprefix(prefix).rpartition(".")
        beside = heads.get(head)
        if beside and state.get(f"{head}.weight", value).shape[-1] == width:
            result[f"{beside}.{kind}"] = value
        else:
            left_out.append(key)
    return Renamed(result, prefix=prefix, left_out=left_out)


def from_hugging_face_clip(state: Mapping[str, Tensor], prefix: str) -> Renamed:
    """Renames the vision tower of Hugging Face's CLIP; its projection becomes the classifier, as in timm's own CLIP weights."""
    tower = below(state, prefix)
    result = joined_projections({renamed_by(HUGGING_FACE_CLIP, key): value for key, value in tower.state.items()})
    result["cls_token"] = result["cls_token"].reshape(1, 1, -1)
    result["pos_embed"] = result["pos_embed"].unsqueeze(0)
    projection = state.get("visual_projection.weight")
    if projection is not None:
        result |= {"head.weight": projection, "head.bias": torch.zeros(len(projection))}
    left_out = [key for key in tower.left_out if key != "visual_projection.weight"]
    return Renamed(result, prefix=prefix, left_out=left_out)


def from_rules(rules: Rules, state: Mapping[str, Tensor], prefix: str) -> Renamed:
    """Renames the tensors of a layout that has those of timm, one for one.

    Args:
        rules: patterns of names and the names in timm.
        state: stored tensors by name.
        prefix: of the names that belong to the model.
    """
    found = below(state, prefix)
    return replace(found, state={renamed_by(rules, key): value for key, value in found.state.items()})


LAYOUTS: tuple[tuple[str, str, Callable[[Mapping[str, Tensor], str], Renamed]], ...] = (
    ("embeddings.patch_embeddings.projection.weight", "Hugging Face transformers", from_hugging_face),
    ("embeddings.patch_embedding.weight", "Hugging Face CLIP", from_hugging_face_clip),
    ("conv_proj.weight", "torchvision", partial(from_rules, TORCHVISION)),
    ("class_embedding", "OpenCLIP", partial(from_rules, OPEN_CLIP)),
    ("trunk.patch_embed.proj.weight", "OpenCLIP with a tower of timm", partial(from_rules, OPEN_CLIP)),
)
"""A tensor by which a layout is recognised, the layout's name, and the function that renames it."""
