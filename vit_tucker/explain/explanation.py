"""Explains what a model's attention does with one image: maps of each head and rollout, as pictures over the image."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.checkpoint.save import unwrapped
from vit_tucker.conversion.observe import evaluating
from vit_tucker.errors import ExplainError
from vit_tucker.explain.capture import record_attention
from vit_tucker.explain.flow import Flow, roll_out
from vit_tucker.explain.gradient import class_relevance
from vit_tucker.explain.grid import TokenGrid
from vit_tucker.explain.readout import Queries, ReadOut, read_out
from vit_tucker.explain.rollout import Fusion, RolloutError, fuse_heads
from vit_tucker.hosts.find import find_attention
from vit_tucker.patching.selection import Selection, select


class Explanation(NamedTuple):
    """Pictures of one image's attention. Values are relative to uniform attention: 1 is a token's even share.

    Attributes:
        output: of the model, (classes,).
        heads: by layer, (H, height, width): how much the tokens read out attend to each patch. Layers whose tokens can't be
            placed in the image are left out.
        unplaced: names of the latter.
        flow: rollout, or relevance for a class, over all layers; None where it is not defined.
        obstacle: why it is not defined; '' where it is.
        queries: the tokens whose attention ``heads`` shows, in words.
        map_bytes: memory of each layer's full map.
    """

    output: Tensor
    heads: dict[str, Tensor]
    unplaced: tuple[str, ...]
    flow: Flow | None
    obstacle: str
    queries: str
    map_bytes: dict[str, int]

    @property
    def rollout(self) -> Tensor | None:
        """Returns the picture of ``flow``, (height, width)."""
        return None if self.flow is None else self.flow.picture


def explain_image(
    model: nn.Module,
    image: Tensor,
    layers: Selection | None = None,
    *,
    head_fusion: Fusion = "mean",
    discard_ratio: float = 0.0,
    queries: Queries = "auto",
    weighted: bool = False,
    target: int | None = None,
) -> Explanation:
    """Explains one image by the attention of all heads and by rollout. Maps are reduced layer by layer, none is kept.

    Rollout goes through windows and through merged patches (Swin) exactly: a window's map is a block of the map of the whole
    image. It is not defined where something else mixes tokens between the attention layers, such as MaxViT's convolutions.

    Args:
        model: of timm, patched or not.
        image: (channels, height, width), as the model takes it.
        layers: whose heads are shown; rollout needs all layers and takes them.
        head_fusion, discard_ratio: of rollout, see ``attention_rollout``.
        queries: whose attention is shown: "auto" the tokens that the model reads out, "class", "patches" (mean over all).
        weighted: in place of rollout, relevance for one class, see ``class_relevance``; all maps are in memory then.
        target: number of that class; the predicted one if None.

    Raises:
        ExplainError: see ``record_attention`` and ``class_relevance``; bad options; or the model's output differs while maps are
            captured.
    """
    model = unwrapped(model)
    batch = image[None]
    fuse_heads(torch.ones(1, 1, 1, 1), head_fusion)  # refused before anything is computed
    if weighted and (discard_ratio or head_fusion != "mean"):
        raise ExplainError(
            "relevance for a class weighs heads by gradients: it takes no head fusion and discards nothing"
        )
    names = select(layers, list(find_attention(model)))
    kept_bytes: dict[str, int] = {}

    def keep(name: str, attn: Tensor, grid: TokenGrid | None) -> tuple[Tensor | None, Tensor]:
        kept_bytes[name] = attn.numel() * attn.element_size()
        attn = attn.float()
        shown = None
        if grid is not None and name in names:
            shown = head_pictures(attn, grid, read_out(model, grid, queries if grid.num_prefix else "auto"))
        return None if shown is None else shown.cpu(), fuse_heads(attn, head_fusion).cpu()

    recording = record_attention(model, batch, reduce=keep)
    check_output(model, batch, recording.output)
    heads = {name: kept[0] for name, kept in recording.maps.items() if name in names}
    last = next((grid for grid in reversed(recording.grids.values()) if grid is not None), None)
    flow, obstacle = None, ""
    try:
        fused = class_relevance(model, batch, target) if weighted else {k: v[1] for k, v in recording.maps.items()}
        flow = roll_out(model, recording, fused, queries, discard_ratio, weighted)
    except RolloutError as error:
        obstacle = str(error)
    shown = {name: picture for name, picture in heads.items() if picture is not None}
    unplaced = tuple(name for name, picture in heads.items() if picture is None)
    label = "" if last is None else read_out(model, last, queries).label
    return Explanation(recording.output[0].cpu(), shown, unplaced, flow, obstacle, label, kept_bytes)


def head_pictures(attn: Tensor, grid: TokenGrid, chosen: ReadOut) -> Tensor:
    """Returns what chosen tokens attend to, (H, height, width), head by head, relative to uniform attention.

    Args:
        attn: maps of one image, (S, H, n, n).
        grid: where its tokens lie.
        chosen: the tokens.
    """
    rows = grid.gather(chosen.rows(grid).to(attn))  # (S, n)
    received = torch.einsum("si,shij->hsj", rows, attn)
    return grid.patches(grid.scatter(received)) * grid.num_tokens


def check_output(model: nn.Module, images: Tensor, output: Any) -> None:
    """Raises ExplainError unless the output equals that of the uninstrumented model.

    Fused kernels sum the same products in another order: rounding, which a trained network may amplify a thousandfold. A map that
    lacks a mask, a bias or the scale shows in the first digits. Hence ten thousand units of rounding of the largest output, but
    no more than a tenth of it (in half precision).

    Args:
        model: the uninstrumented model.
        images: (B, channels, height, width).
        output: of the instrumented model, (B, classes).
    """
    if not isinstance(output, Tensor):
        what = f"{type(model).__name__} gives a {type(output).__name__}"
        raise ExplainError(f"{what}; explain needs a model with one output tensor")
    with torch.no_grad(), evaluating(model):
        plain = model(images)
    tolerance = min(1e4 * torch.finfo(plain.dtype).eps, 0.1) * plain.abs().max().item()
    error = (plain - output).abs().max().item()
    if not error <= tolerance:
        raise ExplainError(
            f"the model's output changes by {error:.2g} while its maps are captured (allowed: {tolerance:.2g})"
        )
