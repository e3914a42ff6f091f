"""Rollout over a whole model: through windows, merged patches and layers side by side; refused where it is not defined."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.explain.capture import Recording
from vit_tucker.explain.readout import Queries, final_rows
from vit_tucker.explain.rollout import RolloutError, roll_back, spread_rows
from vit_tucker.explain.token_mixing import is_pool


class Flow(NamedTuple):
    """The share of each patch that reaches what the model reads its answer from.

    Attributes:
        picture: (height, width), relative to an even share: its mean is 1.
        prefix_share: share that ends in prefix tokens (or in a host's padding), not in patches.
        source: the tokens read out, in words.
    """

    picture: Tensor
    prefix_share: float
    source: str


def roll_out(
    model: nn.Module,
    recording: Recording,
    fused: Mapping[str, Tensor],
    queries: Queries = "auto",
    discard_ratio: float = 0.0,
    weighted: bool = False,
) -> Flow:
    """Computes the rollout of one recorded image, from the output back to the patches.

    Args:
        model: that was recorded.
        recording: of one image, of all attention layers.
        fused: by layer, (S, n, n): one map for all heads.
        queries: see ``explain_image``.
        discard_ratio: see ``attention_rollout``.
        weighted: maps are weighted by gradients: A + I in place of (A + I) / 2, and what is read out does not count itself.

    Raises:
        RolloutError: rollout is not defined, or nothing reaches the patches.
    """
    refuse_mixers(model, recording)
    layers = [(name, grid) for name, grid in recording.grids.items() if grid is not None and not grid.within_patch]
    grid = layers[-1][1]
    rows, source = final_rows(model, recording.pooled, grid, queries)
    own, start = rows, rows.sum()
    for names in reversed(parallel_groups(name for name, _ in layers)):
        below = recording.grids[names[0]]
        assert below is not None
        rows, own, grid = spread_rows(rows, grid, below), spread_rows(own, grid, below), below
        together = torch.stack([fused[name] for name in names]).mean(0)
        rows = roll_back(rows, together, grid, discard_ratio, normalised=not weighted)
    shares = (rows - own if weighted else rows)[0, 0]
    total = shares[grid.num_prefix :].sum()
    if not total > 0:
        raise RolloutError("nothing of the patches reaches what is read out")
    even = grid.height * grid.width
    whole = shares.sum() if weighted else start
    return Flow(grid.patches(shares) / total * even, 1 - (total / whole).item(), source)


def refuse_mixers(model: nn.Module, recording: Recording) -> None:
    """Raises RolloutError where rollout is not defined: tokens are mixed by something whose shares are not known."""
    for name, grid in recording.grids.items():
        if grid is None:
            raise RolloutError(f"where the tokens of {name} lie in the image can't be known")
    kinds = [kind for kind, _ in recording.events]
    first, last = kinds.index("attention"), len(kinds) - 1 - kinds[::-1].index("attention")
    for number, (kind, name) in enumerate(recording.events):
        module = model.get_submodule(name)
        if kind != "mixer" or number < first or is_pool(module):
            continue
        if number < last:
            raise RolloutError(f"{name} ({type(module).__name__}) mixes tokens between the attention layers")
        if hasattr(module, "num_heads"):
            raise RolloutError(f"{name} ({type(module).__name__}) reads the tokens out by attention of its own")


def parallel_groups(names: Iterable[str]) -> list[list[str]]:
    """Returns layers in order, those side by side in one block together: 'blocks.0.attns.0.attn', 'blocks.0.attns.1.attn'."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"(.*\battns)\.\d+\.", name)
        groups.setdefault(name if block is None else block[1], []).append(name)
    return list(groups.values())
