"""Maps the tokens of an attention layer to places in the image: whole images, windows (shifted, padded), strided grids."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = -1
"""Number of a token that a host adds to fill its last windows."""


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of an image as one attention layer sees them.

    Attributes:
        height, width: of the grid of patches.
        num_prefix: tokens before the patches (class, distillation, registers).
        index: (S, n) int64, for each of the S sequences that an image is cut into, the numbers of its n tokens: prefix tokens
            come first, then the patches row by row; ``PADDING`` for tokens that are no part of the image. Each token is in
            exactly one sequence.
        within_patch: the tokens are pixels of one patch, whose own token attends elsewhere (TNT): nothing moves between patches.
    """

    height: int
    width: int
    num_prefix: int
    index: Tensor
    within_patch: bool = False

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens of an image, prefix tokens included, padding left out."""
        return self.num_prefix + self.height * self.width

    @property
    def is_whole(self) -> bool:
        """Returns whether all tokens of the image attend to each other, in their own order."""
        return self.index.shape[0] == 1 and self.index.shape[1] == self.num_tokens

    def gather(self, values: Tensor) -> Tensor:
        """Gathers values of an image's tokens, sequence by sequence, (..., S, n); 0 for padding.

        Args:
            values: (..., T).
        """
        return F.pad(values, (0, 1))[..., self.index]  # PADDING, -1, reads the last entry: the added zero

    def scatter(self, values: Tensor) -> Tensor:
        """Undoes ``gather``, (..., T): values of padding are dropped.

        Args:
            values: (..., S, n).
        """
        flat = self.index.flatten()
        order = flat.new_zeros(self.num_tokens)
        real = flat != PADDING
        order[flat[real]] = torch.arange(len(flat))[real]
        return values.flatten(-2)[..., order]

    def patches(self, values: Tensor) -> Tensor:
        """Returns the patches' values as pictures, (..., height, width), without prefix tokens.

        Args:
            values: (..., T).
        """
        return values[..., self.num_prefix :].unflatten(-1, (self.height, self.width))


def patch_numbers(height: int, width: int) -> Tensor:
    """Returns the numbers of patches counted row by row, (height, width)."""
    return torch.arange(height * width).view(height, width)


def whole_grid(height: int, width: int, num_prefix: int = 0) -> TokenGrid:
    """Returns a grid of all tokens in one sequence.

    Args:
        height, width: in patches.
        num_prefix: class and register tokens at the start.
    """
    return TokenGrid(height, width, num_prefix, torch.arange(num_prefix + height * width)[None])


def window_grid(height: int, width: int, window: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> TokenGrid:
    """Returns windows side by side, row by row, after a cyclic shift to the upper left; filled up on the right and below.

    Args:
        height, width: of the grid of patches.
        window: height and width of a window.
        shift: rows and columns of the cyclic shift (Swin's shifted windows).
    """
    shifted = torch.roll(patch_numbers(height, width), (-shift[0], -shift[1]), (0, 1))
    filled = F.pad(shifted, (0, -width % window[1], 0, -height % window[0]), value=PADDING)
    cut = filled.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))  # (rows, wh, columns, ww)
    return TokenGrid(height, width, 0, cut.transpose(1, 2).flatten(2).flatten(0, 1))


def strided_grid(height: int, width: int, size: tuple[int, int]) -> TokenGrid:
    """Returns sequences of ``size`` tokens, ``height / size[0]`` rows and ``width / size[1]`` columns apart (MaxViT's grids).

    Args:
        height, width: of the grid of patches, multiples of ``size``.
        size: rows and columns of the tokens of one sequence.
    """
    cut = (
        patch_numbers(height, width).unflatten(1, (size[1], -1)).unflatten(0, (size[0], -1))
    )  # (gh, rows, gw, columns)
    return TokenGrid(height, width, 0, cut.permute(1, 3, 0, 2).flatten(2).flatten(0, 1))
