"""Finds the tokens that a model reads its answer from: the class token, all patches alike, or what its pooling weighs."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_tucker.errors import ExplainError, nearest
from vit_tucker.explain.grid import TokenGrid
from vit_tucker.explain.map_modules import unfused

Queries = Literal["auto", "class", "patches"]
QUERIES = get_args(Queries)


class ReadOut(NamedTuple):
    """The tokens whose attention is shown.

    Attributes:
        first, stop: tokens [first, stop) alike; stop None: to the last patch.
        label: in words, for a picture.
    """

    first: int
    stop: int | None
    label: str

    def rows(self, grid: TokenGrid) -> Tensor:
        """Returns their shares among an image's tokens, (T,), which sum to 1. A layer without prefix tokens: all patches."""
        first, stop = (self.first, self.stop) if grid.num_prefix else (0, None)
        stop = stop or grid.num_tokens
        rows = torch.zeros(grid.num_tokens)
        rows[first:stop] = 1 / (stop - first)
        return rows


def read_out(model: nn.Module, grid: TokenGrid, queries: Queries = "auto") -> ReadOut:
    """Returns the tokens that a model reads its answer from, by its own pooling, or the requested ones.

    Args:
        model: of timm.
        grid: of its last attention layer.
        queries: "auto" as the model does; "class" the class token; "patches" all patches alike.

    Raises:
        ExplainError: the model has no class token, or an unknown choice.
    """
    if queries not in QUERIES:
        raise ExplainError(f"queries '{queries}': one of {', '.join(QUERIES)}{nearest(queries, QUERIES)}")
    named = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
    has_class = grid.num_prefix > 0 and any(name.startswith("cls_token") for name in named)
    if queries == "class" and not has_class:
        raise ExplainError(f"queries 'class': {type(model).__name__} has no class token here; choose patches")
    pool = getattr(model, "global_pool", None) or "token"
    if queries == "class" or (queries == "auto" and has_class and pool == "token"):
        if getattr(model, "dist_token", None) is not None and queries == "auto":
            return ReadOut(0, 2, "class and distillation token")  # the mean of both heads is its answer
        return ReadOut(0, 1, "class token")
    if queries == "auto" and getattr(model, "pool_include_prefix", False):
        return ReadOut(0, None, "mean over all tokens")
    return ReadOut(grid.num_prefix, None, "mean over patches")


def final_rows(
    model: nn.Module, pooled: Mapping[str, Tensor], grid: TokenGrid, queries: Queries = "auto"
) -> tuple[Tensor, str]:
    """Returns the shares of the last layer's tokens in what is read out, (1, 1, T), and the tokens read out in words.

    Args:
        model, grid, queries: see ``read_out``.
        pooled: inputs (B, N, C) of its attention pooling, whose own weights count where there is one; see ``Recording``.
    """
    if queries == "auto" and len(pooled) == 1:
        name, x = next(iter(pooled.items()))
        weights = pool_weights(model.get_submodule(name), x)
        if weights is not None and weights.shape[-1] == grid.num_tokens:
            return weights.float().cpu(), "attention pooling"
    chosen = read_out(model, grid, queries)
    return chosen.rows(grid)[None, None], chosen.label


class SoftmaxRecorder(TorchFunctionMode):
    """Context that remembers the results of all softmaxes computed in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function, and remembers its result if it is a softmax."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("softmax", "_softmax"):
            self.seen.append(result)
        return result


def pool_weights(pool: nn.Module, x: Tensor) -> Tensor | None:
    """Returns the weights that attention pooling gives its tokens (B, N, C), mean over its heads and queries: (B, 1, N).

    None if the module, timm's AttentionPoolLatent or one like it, computes no softmax or several.
    """
    with torch.no_grad(), unfused([pool]), SoftmaxRecorder() as recorder:
        pool(x)
    maps = [w for w in recorder.seen if w.ndim == 4 and w.shape[0] == x.shape[0] and w.shape[-1] == x.shape[1]]
    return maps[0].mean((1, 2))[:, None] if len(maps) == 1 else None
