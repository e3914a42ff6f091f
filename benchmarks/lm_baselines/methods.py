"""All methods of the comparison, each with the variants of it that have a given number of cache entries."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vit_tucker as vt
from lm_baselines.care import care
from lm_baselines.mha2mla import mha2mla
from lm_baselines.moments import LayerMoments, attention_layers, layer_moments, shape_of
from lm_baselines.rorope import rorope
from lm_baselines.shrink import cacheshrink
from lm_baselines.text import scored

Convert = Callable[[], nn.Module]
CALIBRATION = vt.Calibration(objective="likelihood", sequential=True, refine_steps=40, refine_lr=1e-2)
"""Of our methods."""


@dataclass
class Source:
    """What conversions start from.

    Attributes:
        model: dense; never changed.
        tokenizer: of the model.
        blocks: calibration tokens, (blocks, N).
        moments: of the model on these, computed when first asked for.
    """

    model: nn.Module
    tokenizer: Any
    blocks: Tensor
    moments: list[LayerMoments] | None = None

    def copy(self) -> nn.Module:
        """Returns a copy of the dense model."""
        return copy.deepcopy(self.model)

    def batches(self) -> list[Tensor]:
        """Returns the calibration tokens as batches of eight blocks."""
        return list(self.blocks.split(8))

    def known(self) -> list[LayerMoments]:
        """Returns the moments."""
        if self.moments is None:
            self.moments = layer_moments(self.model, self.batches())
        return self.moments


Variants = Iterator[tuple[dict[str, Any], Convert]]
"""Options of each variant, and what makes the converted model."""


def converted(baseline: Callable[..., nn.Module], source: Source, entries: int, options: dict[str, Any]) -> nn.Module:
    """Returns a copy of the model that a baseline has converted.

    Args:
        baseline: converts a model in place, by its moments.
        source: model and tokens.
        entries: cached per token and layer.
        options: of the baseline.
    """
    return baseline(source.copy(), source.known(), entries, **options)


def rorope_variants(source: Source, entries: int) -> Variants:
    """Yields RoRoPE with a rotated head of D, D/2 and D/4 columns, or with two heads, each with three folds of frequencies."""
    _, groups, width = shape_of(attention_layers(source.model)[0])
    for heads, collapse in ((1, 1), (1, 2), (1, 4), (2, 1)):
        rotated = heads * width // collapse
        if heads > groups or width // 2 % collapse or rotated > 0.7 * entries:
            continue
        for fold in (collapse, 2 * collapse, 4 * collapse):
            if width // 2 % fold == 0:
                options = {"rope_heads": heads, "collapse": collapse, "fold": fold}
                yield options, partial(converted, rorope, source, entries, options)


def mha2mla_variants(source: Source, entries: int) -> Variants:
    """Yields MHA2MLA with several numbers of rotated pairs, by the weights alone and whitened."""
    _, groups, width = shape_of(attention_layers(source.model)[0])
    most = min(width // 2, 3 * entries // (8 * groups))
    for pairs in (count for count in (1, 2, 4, 8, 12, 16, 24) if count <= most):
        for whiten in (False, True):
            options = {"pairs": pairs, "whiten": whiten}
            yield options, partial(converted, mha2mla, source, entries, options)


def care_variants(source: Source, entries: int) -> Variants:
    """Yields CARE with equal ranks and with ranks by layer, at the damping of the authors' code and at a tenth of it."""
    for damping in (0.1, 0.01):
        for adjusted in (True, False):
            options = {"damping": damping, "adjusted": adjusted}
            yield options, partial(converted, care, source, entries, options)


def cacheshrink_variants(source: Source, entries: int) -> Variants:
    """Yields cacheshrink's default, and what its "auto" picks for grouped heads."""
    for method in ("separate", "xkv"):
        options = {"method": method}
        yield options, partial(cacheshrink, source.model, source.tokenizer, source.blocks, entries, method)


def patched(source: Source, config: vt.AttentionConfig) -> nn.Module:
    """Returns a copy of the model with one of our methods, calibrated.

    Args:
        source: model and tokens.
        config: method and ranks.
    """
    model = source.copy()
    vt.patch(model, config, calibration=source.batches(), keep_originals=False)
    return model


def tucker_variants(source: Source, entries: int) -> Variants:
    """Yields Tucker with ranks chosen by layer, no more parameters than the host's."""
    _, groups, width = shape_of(attention_layers(source.model)[0])
    rule = vt.RankRule(cache=entries / (2 * groups * width), budget=1.0)
    yield {"ranks": rule.model_dump()}, partial(patched, source, vt.TuckerConfig(ranks=rule, calibration=CALIBRATION))


def mla_variants(source: Source, entries: int) -> Variants:
    """Yields MLA of ours with a latent of half the entries for keys and one for values, at two widths of the query latent."""
    size, latent = attention_layers(source.model)[0].q_proj.in_features, entries // 2
    for query in (size // 2, size):
        options: dict[str, Any] = {"q_lora_rank": query, "kv_lora_rank": latent, "shared_kv": False}
        yield options, partial(patched, source, vt.MLAConfig(**options, calibration=CALIBRATION))


def gqa_variants(source: Source, entries: int) -> Variants:
    """Yields GQA of ours with as many key heads as the entries allow, if that is a whole number that divides the heads."""
    heads, _, width = shape_of(attention_layers(source.model)[0])
    groups = entries // (2 * width)
    if groups and entries == groups * 2 * width and heads % groups == 0:
        for conversion in ("mean", "svd"):
            options: dict[str, Any] = {"num_kv_heads": groups, "conversion": conversion}
            config = vt.GQAConfig(**options, calibration=CALIBRATION)
            yield options, partial(patched, source, config)


METHODS: dict[str, Callable[[Source, int], Variants]] = {
    "Tucker": tucker_variants,
    "MLA": mla_variants,
    "GQA": gqa_variants,
    "RoRoPE": rorope_variants,
    "CARE": care_variants,
    "MHA2MLA": mha2mla_variants,
    "cacheshrink": cacheshrink_variants,
}


def rebuild(source: Source, method: str, entries: int, variant: dict[str, Any]) -> nn.Module:
    """Returns the model of one variant.

    Args:
        source: model and tokens.
        method: of ``METHODS``.
        entries: cached per token and layer.
        variant: its options, and perhaps its loss.
    """
    wanted = {key: value for key, value in variant.items() if key != "calibration_loss"}
    torch.manual_seed(0)
    return next(convert for options, convert in METHODS[method](source, entries) if options == wanted)()


def best_variant(
    source: Source, method: str, entries: int, blocks: int
) -> tuple[nn.Module | None, list[dict[str, Any]]]:
    """Returns the variant with the lowest loss on the last calibration blocks, and all variants' options and losses.

    Args:
        source: model and tokens.
        method: of ``METHODS``.
        entries: cached per token and layer.
        blocks: of the calibration tokens that decide.

    Returns:
        None where the method has no form with so many entries.
    """
    tried: list[dict[str, Any]] = []
    best: nn.Module | None = None
    for options, convert in METHODS[method](source, entries):
        torch.manual_seed(0)
        model = convert()
        loss = scored(model, source.blocks[-blocks:]).loss
        if best is None or loss < min(row["calibration_loss"] for row in tried):
            best = model
        tried.append({**options, "calibration_loss": loss})
    return best, tried
