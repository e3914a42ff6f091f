"""What a model's attention does with one image: maps of each head and rollout, as pictures over the image."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.errors import ExplainError
from vit_tucker.explain.capture import Recording, is_pool, record_attention, unwrapped
from vit_tucker.explain.grid import TokenGrid
from vit_tucker.explain.readout import Queries, ReadOut, final_rows, read_out
from vit_tucker.explain.rollout import Fusion, fuse_heads, refine, roll_back
from vit_tucker.patching.find import find_attention
from vit_tucker.patching.selection import Selection, select
from vit_tucker.patching.watch import evaluating


@dataclass(frozen=True)
class Explanation:
    """Pictures of one image's attention. Values are relative to uniform attention: 1 is a token's even share.

    Attributes:
        output: of the model, (classes,).
        heads: by layer, (H, height, width): how much the tokens read out attend to each patch. Layers whose tokens can't be
            placed in the image are left out.
        unplaced: names of the latter.
        rollout: (height, width), over all layers; None where it is not defined.
        obstacle: why rollout is not defined; '' where it is.
        prefix_share: share of rollout that ends in prefix tokens, not in patches.
        rollout_from: the tokens whose rollout it is, in words.
        queries: the tokens whose attention ``heads`` shows, in words.
        map_bytes: memory of each layer's full map.
    """

    output: Tensor
    heads: dict[str, Tensor]
    unplaced: tuple[str, ...]
    rollout: Tensor | None
    obstacle: str
    prefix_share: float
    rollout_from: str
    queries: str
    map_bytes: dict[str, int]


def explain_image(
    model: nn.Module,
    image: Tensor,
    layers: Selection | None = None,
    *,
    head_fusion: Fusion = "mean",
    discard_ratio: float = 0.0,
    queries: Queries = "auto",
) -> Explanation:
    """Attention of all heads and rollout for one image. Maps are reduced layer by layer, none is kept.

    Rollout goes through windows and through merged patches (Swin) exactly: a window's map is a block of the map of the whole
    image. It is not defined where something else mixes tokens between the attention layers, such as MaxViT's convolutions.

    Args:
        model: of timm, patched or not.
        image: (channels, height, width), as the model takes it.
        layers: whose heads are shown; rollout needs all layers and takes them.
        head_fusion, discard_ratio: of rollout, see ``attention_rollout``.
        queries: whose attention is shown: "auto" the tokens that the model reads out, "class", "patches" (mean over all).

    Raises:
        ExplainError: see ``record_attention``; bad options; or the model's output differs while maps are captured.
    """
    model = unwrapped(model)
    batch = image[None]
    fuse_heads(torch.ones(1, 1, 1, 1), head_fusion)  # refused before anything is computed
    names = select(layers, list(find_attention(model)))
    kept_bytes: dict[str, int] = {}

    def keep(name: str, attn: Tensor, grid: TokenGrid | None) -> tuple[Tensor | None, Tensor]:
        kept_bytes[name] = attn.numel() * attn.element_size()
        attn = attn.float()
        shown = None
        if grid is not None and name in names:
            shown = head_pictures(attn, grid, read_out(model, grid, queries if grid.num_prefix else "auto"))
        return shown, fuse_heads(attn, head_fusion)

    recording = record_attention(model, batch, reduce=keep)
    check_output(model, batch, recording.output)
    heads = {name: kept[0] for name, kept in recording.maps.items() if name in names}
    rollout, obstacle, prefix_share, source = None, "", 0.0, ""
    last = next((grid for grid in reversed(recording.grids.values()) if grid is not None), None)
    label = "" if last is None else read_out(model, last, queries).label
    try:
        rollout, prefix_share, source = roll_out(model, recording, discard_ratio, queries)
    except ExplainError as error:
        if not str(error).startswith("rollout: "):
            raise
        obstacle = str(error).removeprefix("rollout: ")
    return Explanation(
        output=recording.output[0],
        heads={name: picture for name, picture in heads.items() if picture is not None},
        unplaced=tuple(name for name, picture in heads.items() if picture is None),
        rollout=rollout,
        obstacle=obstacle,
        prefix_share=prefix_share,
        rollout_from=source,
        queries=label,
        map_bytes=kept_bytes,
    )


def head_pictures(attn: Tensor, grid: TokenGrid, chosen: ReadOut) -> Tensor:
    """What the tokens read out attend to, head by head, relative to uniform attention.

    Args:
        attn: (S, H, n, n), of one image.
        grid: of the layer.
        chosen: the tokens read out.

    Returns:
        (H, height, width)
    """
    rows = grid.gather(chosen.rows(grid).to(attn))  # (S, n)
    received = torch.einsum("si,shij->hsj", rows, attn)
    return grid.patches(grid.scatter(received)) * grid.num_tokens


def roll_out(
    model: nn.Module, recording: Recording, discard_ratio: float, queries: Queries
) -> tuple[Tensor, float, str]:
    """Rollout of one recorded image as a picture, the share of it that ends in prefix tokens, and whose it is.

    Args:
        model: that was recorded.
        recording: of one image; fused maps are the second of each pair in ``maps``.
        discard_ratio: see ``attention_rollout``.
        queries: see ``explain_image``.

    Raises:
        ExplainError: "rollout: ..." where it is not defined.
    """
    refuse_mixers(model, recording)
    layers = [(name, grid) for name, grid in recording.grids.items() if grid is not None and not grid.within_patch]
    grid = layers[-1][1]
    rows, source = final_rows(model, recording.pooled, grid, queries)
    for names in reversed(parallel_groups(name for name, _ in layers)):
        below = recording.grids[names[0]]
        assert below is not None
        rows, grid = refine(rows, grid, below), below
        fused = torch.stack([recording.maps[name][1] for name in names]).mean(0)
        rows = roll_back(rows, fused, grid, discard_ratio)
    patches = rows[0, 0, grid.num_prefix :]
    share = (patches.sum() / rows.sum()).item()
    return grid.patches(rows[0, 0] / patches.sum()) * len(patches), 1 - share, source


def refuse_mixers(model: nn.Module, recording: Recording) -> None:
    """Raise ExplainError where rollout is not defined: tokens are mixed by something whose shares are not known."""
    for name, grid in recording.grids.items():
        if grid is None:
            raise ExplainError(f"rollout: where the tokens of {name} lie in the image can't be known")
    kinds = [kind for kind, _ in recording.events]
    first, last = kinds.index("attention"), len(kinds) - 1 - kinds[::-1].index("attention")
    for number, (kind, name) in enumerate(recording.events):
        module = model.get_submodule(name)
        if kind != "mixer" or number < first or is_pool(module):
            continue
        if number < last:
            raise ExplainError(f"rollout: {name} ({type(module).__name__}) mixes tokens between the attention layers")
        if hasattr(module, "num_heads"):
            raise ExplainError(
                f"rollout: {name} ({type(module).__name__}) reads the tokens out by attention of its own"
            )


def parallel_groups(names: Iterable[str]) -> list[list[str]]:
    """Layers in order, those that stand side by side in one block together: 'blocks.0.attns.0.attn', 'blocks.0.attns.1.attn'."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"(.*\battns)\.\d+\.", name)
        groups.setdefault(name if block is None else block[1], []).append(name)
    return list(groups.values())


def check_output(model: nn.Module, images: Tensor, output: Any) -> None:
    """Raise ExplainError unless the model gives the same output while nobody looks.

    Fused kernels sum the same products in another order: rounding, which a trained network may amplify a thousandfold. A map that
    lacks a mask, a bias or the scale shows in the first digits. Hence ten thousand units of rounding of the largest output.
    """
    with torch.no_grad(), evaluating(model):
        plain = model(images)
    tolerance = 1e4 * torch.finfo(plain.dtype).eps * plain.abs().max().item()
    error = (plain - output).abs().max().item()
    if not error <= tolerance:
        raise ExplainError(
            f"the model's output changes by {error:.2g} while its maps are captured (allowed: {tolerance:.2g})"
        )
