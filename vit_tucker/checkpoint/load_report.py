"""Reports in one line what was loaded into a model, and refuses a load after which the model can't be used."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vit_tucker.checkpoint.loading import ObservedLoad, describe_misfit, module_names, name_list
from vit_tucker.checkpoint.tensor_names import BUFFERS, block_numbers
from vit_tucker.errors import CheckpointError

PRE_LOGITS = (
    "its classifier needs the layer {}, which timm's model no longer has; another number of classes (model.num_classes) makes "
    "a new classifier"
)

LOOKS: tuple[tuple[str, str], ...] = (
    (r"(^|\.)lora_[AB]\.", "a LoRA adapter (PEFT), which contains no weights of the model itself"),
    (r"^visual\.(conv1|class_embedding)", "the image tower of a CLIP, which timm's models named *_clip_* have"),
    (r"(^|\.)layer1\.0\.conv1\.weight$", "a ResNet"),
    (r"(^|\.)features\.\d+\.0\.block\.", "a ConvNeXt or EfficientNet of torchvision"),
    (r"(^|\.)features\.1\.0\.attn\.", "a Swin transformer of torchvision"),
    (r"(^|\.)layers\.\d+\.blocks\.\d+\.attn\.", "a Swin transformer"),
    (r"(^|\.)stages\.\d+\.blocks\.\d+\.", "a hierarchical model of timm (ConvNeXt, MaxViT, ...)"),
    (r"(^|\.)layers\.\d+\.self_attn\.[qk]_proj\.", "a language model of Hugging Face"),
    (r"(^|\.)h\.\d+\.attn\.c_attn\.", "a GPT-2"),
    (r"(^|\.)bert\.", "a BERT"),
    (r"(^|\.)(down|up)_blocks\.\d+\.", "a UNet of diffusers"),
    (r"(^|\.)layer\.\d+\.attention\.q_proj\.", "a DINOv3 of Hugging Face transformers"),
    (r"(^|\.)encoder\.layers\.\d+\.self_attn\.", "a vision tower of Hugging Face transformers"),
    (r"^(exp_avg|state\.\d+)", "the state of an optimizer"),
)
"""Patterns of names by which messages describe the model that weights are of."""


@dataclass(frozen=True)
class LoadReport:
    """The tensors that were loaded into a model, and those that were new or left out.

    Attributes:
        origin: file, or timm's name of the weights.
        total: tensors of the model.
        new: names of those that the weights don't have, which are as timm initialises them.
        resampled: phrases such as 'pos_embed 37x37 -> 16x16', of tensors that timm adapted to other sizes.
        left_out: names of tensors of the file that the model has no use for.
        source: the layout, and where in the file the weights lie; '' for timm's own layout.
        classifier: names of the model's classifier tensors.
        normalisation: whose mean and standard deviation the model's pretrained_cfg has.
    """

    origin: str
    total: int
    new: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    source: str = ""
    classifier: tuple[str, ...] = ()
    normalisation: str = ""

    @property
    def has_classifier(self) -> bool:
        """Returns whether the model's classifier comes from the weights."""
        return bool(self.classifier) and not set(self.new) & set(self.classifier)

    def __str__(self) -> str:
        """Returns one line: '150 of 152 tensors; new: head.weight, head.bias; resampled: pos_embed 37x37 -> 16x16'."""
        parts = [f"{self.total - len(self.new)} of {self.total} tensors"]
        if self.source:
            parts[0] += f" ({self.source})"
        for what, names in (("new", self.new), ("resampled", self.resampled), ("left out", self.left_out)):
            if names:
                parts.append(f"{what}: {name_list(names)}")
        return f"weights: {self.origin}: {'; '.join(parts)}"


def check_load(
    load: ObservedLoad,
    origin: str,
    added: Callable[[], Collection[str]],
    source: str = "",
    left_out: Collection[str] = (),
) -> LoadReport:
    """Decides whether a model may be used with what was loaded into it.

    New may be a classifier that the weights don't have for these classes, a norm after the pooling where the weights have one
    before it and no classifier (so MAE and BEiT are fine-tuned), and what the config itself adds to the architecture.

    Args:
        load: what timm did.
        origin: names the weights.
        added: names of the model's tensors that are there by arguments of the config alone; asked for only where some are new.
        source, left_out: see ``LoadReport``.

    Raises:
        CheckpointError: other tensors would stay as they were initialised, or tensors of the weights would not be used.
    """
    model = load.model
    own, cfg = set(model.state_dict()), vars(model).get("pretrained_cfg") or {}
    classifier = [f"{name}.{kind}" for name in module_names(cfg.get("classifier")) for kind in ("weight", "bias")]
    may_be_new = names_that_may_be_new(load, own, classifier)
    if set(load.missing) - may_be_new:
        may_be_new |= set(added())
    unused = [key for key in load.unexpected if not BUFFERS.search(key)]
    may_be_unused = names_that_may_be_unused(load, unused, classifier)
    wrong = [key for key in load.missing if key not in may_be_new]
    strange = [key for key in unused if key not in may_be_unused]
    if wrong or (strange and load.strict):
        raise CheckpointError(describe_misfit(wrong, strange) + pooling_hint(load, wrong, strange))
    refuse_pre_logits(load, classifier)
    classes = [key for key in load.filtered if key not in load.loaded and key in classifier]
    return LoadReport(
        origin,
        len(own),
        tuple(load.missing),
        tuple(resampled(load, model)),
        tuple(dict.fromkeys([*unused, *classes, *load.dropped, *left_out])),
        source,
        tuple(key for key in classifier if key in own),
        origin,
    )


def names_that_may_be_new(load: ObservedLoad, own: set[str], classifier: Collection[str]) -> set[str]:
    """Returns the names of a model's tensors that may be new: a classifier that the weights lack, and a norm right before it.

    Args:
        load: what timm did.
        own: names of the model's tensors.
        classifier: names of those of its classifiers.
    """
    cfg = vars(load.model).get("pretrained_cfg") or {}
    has_classifier = any(key in load.filtered for key in classifier)
    if has_classifier and cfg.get("num_classes") == getattr(load.model, "num_classes", None):
        return set()
    pooled = "norm.weight" in load.filtered and "fc_norm.weight" not in load.filtered
    return {*classifier, *(key for key in own if pooled and not has_classifier and key.startswith("fc_norm."))}


def names_that_may_be_unused(load: ObservedLoad, unused: Collection[str], classifier: Collection[str]) -> set[str]:
    """Returns the names of tensors of the weights that the model does without: a classifier, the norm that another replaces.

    Args:
        load: what timm did.
        unused: names of tensors of the weights that the model has not.
        classifier: names of the tensors of the model's classifiers.
    """
    names = {*classifier, *(["norm.weight", "norm.bias"] if "fc_norm.weight" in load.missing else [])}
    if not getattr(load.model, "num_classes", 0):  # LeViT's classifiers have norms of their own
        heads = {key.partition(".")[0] for key in classifier}
        names |= {key for key in unused if key.partition(".")[0] in heads}
    return names


def refuse_pre_logits(load: ObservedLoad, classifier: Collection[str]) -> None:
    """Raises CheckpointError for a classifier behind a layer that timm no longer has, and drops: its logits would be wrong."""
    behind = [key for key in load.given if "pre_logits" in key]
    if behind and any(key in load.loaded for key in classifier):
        raise CheckpointError(PRE_LOGITS.format(behind[0]))


def pooling_hint(load: ObservedLoad, missing: list[str], strange: list[str]) -> str:
    """Returns which global_pool the weights were trained with, where their last norm shows that it is another one.

    Args:
        load: what timm did.
        missing: names of the model's tensors that the weights lack.
        strange: names of tensors of the weights that the model has not.
    """
    if "norm.weight" in missing and any(key.startswith("fc_norm.") for key in strange):
        return "; the weights were fine-tuned with pooled tokens: set model.global_pool=avg"
    if "fc_norm.weight" in missing and "norm.weight" in load.filtered:
        return "; the weights were trained with a class token: set model.global_pool=token"
    return ""


def resampled(load: ObservedLoad, model: nn.Module) -> Iterator[str]:
    """Yields 'pos_embed 37x37 -> 16x16' for each tensor that timm adapted to the model's sizes; a kind of tensors once."""
    seen = set()
    for name, shape in load.loaded.items():
        before = load.given.get(name)
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        if before is None or before == shape or len(before) != len(shape) or kind in seen:
            continue
        seen.add(kind)
        if name == "pos_embed" and grid_text(before) == grid_text(shape):
            continue  # only the class token's position went elsewhere
        if name == "pos_embed":
            yield f"{name} {grid_text(before)} -> {grid_text(shape)}"
        elif len(shape) == 4 and before[1] != shape[1]:
            yield f"{name} {before[1]} -> {shape[1]} channels"
        elif len(shape) == 4:
            yield f"{name} {before[2]}x{before[3]} -> {shape[2]}x{shape[3]}"
        else:
            yield f"{kind} {tuple(before)} -> {tuple(shape)}"


def grid_text(shape: tuple[int, ...]) -> str:
    """Returns '16x16' for position embeddings (1, 257, C) or (1, 256, C); the number of tokens where they are no square."""
    if len(shape) == 4:
        return f"{shape[1]}x{shape[2]}"
    tokens = shape[1]
    side = math.isqrt(tokens)
    prefix = tokens - side * side
    return f"{side}x{side}" if prefix <= 5 else f"{tokens} tokens"


def looks_like(state: Mapping[str, Tensor]) -> str:
    """Describes the model that a state dict is of, for messages: its kind, and the sizes of a ViT."""
    numbers, embed = block_numbers(state), state.get("patch_embed.proj.weight")
    if numbers and embed is not None and embed.ndim == 4:
        width, channels, _, patch = embed.shape
        head = state.get("head.weight")
        classes = "no classifier" if head is None else f"{len(head)} classes"
        return f"a ViT of {len(numbers)} blocks, width {width}, patches of {patch} pixels, {channels} channels and {classes}"
    for pattern, name in LOOKS:
        if any(re.search(pattern, key) for key in state):
            return name
    return f"tensors named {', '.join(list(state)[:3])}"
