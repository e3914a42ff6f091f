"""Rotary position embeddings (RoPE): of each head's queries and keys, as hosts have them, and in a latent key space.

Blocks hand their attention a table of sines and cosines, one column pair for each pair of a head's D coordinates:

    (N', 2 D) one table for all heads           (B, 1, N', 2 D) one per image (patch dropout, images of many sizes)
    (H, N', 2 D) a table per head (mixed RoPE)  (B, H, N', 2 D) the same per image

N' = N without the prefix tokens, which are not rotated. Older timm hands (B, N', 2 D) over for one table per image. As complex
numbers, z = x_0 + i x_1 becomes z exp(i angle).

Latent RoPE (Tucker Attention, arXiv 2603.30033, Def 3.1 and Eq 12) rotates the one key that all heads share, and the heads'
queries in that space: score_i(m, n) = Q_im R(m) R(n)^T K_n^T. Scores depend on relative positions only (Lemma B.5), and what
forms a query from a token stays one matrix per head (Cor 3.2.1). Each latent pair is rotated by one column pair of the host's
table, so whatever makes the table (axial, mixed or DINOv3 embeddings, another image size, augmentation) works unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_tucker.attention.tracing import is_traced


@dataclass(frozen=True)
class RopeSpec:
    """The way in which a host rotates its queries and keys.

    Attributes:
        num_prefix_tokens: class and register tokens at the start, which are not rotated.
        half: pairs are (p, p + D/2) instead of (2 p, 2 p + 1).
        per_head: each head has angles of its own (mixed RoPE).
    """

    num_prefix_tokens: int = 0
    half: bool = False
    per_head: bool = False


def head_rotations(rope: RopeSpec, num_heads: int, head_dim: int) -> Tensor:
    """Returns the numbers (H, D/2), int64, of the rotations of each head's D/2 pairs: equal numbers have equal angles.

    The rotation of pair p of head i has the number i * D/2 + p, with one table for all heads p.

    Args:
        rope: of the host.
        num_heads, head_dim: H and D.
    """
    numbers = torch.arange(num_heads * (head_dim // 2)).unflatten(0, (num_heads, -1))
    return numbers if rope.per_head else numbers[:1].expand(num_heads, -1)


def spread_rotations(width: int, num_heads: int, head_dim: int) -> Tensor:
    """Spreads rotations (width/2,), int64, for latent pairs evenly over a table's columns, then over the heads.

    Args:
        width: of the latent, even.
        num_heads, head_dim: H and D; one head where all have the same table.
    """
    columns = head_dim // 2
    rounds, rest = divmod(width // 2, columns)
    whole = torch.arange(rounds * columns)
    spread = (2 * torch.arange(rest) + 1) * columns // (2 * max(rest, 1)) + rounds * columns
    return torch.cat([whole, spread]) % (num_heads * columns)


def adjacent_pairs(x: Tensor, half: bool) -> Tensor:
    """Returns coordinates (..., D) in the order in which pairs are neighbours."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if half else x


def separate_pairs(x: Tensor, half: bool) -> Tensor:
    """Moves the partners of each rotated pair back from adjacent columns to where the host has them, see ``adjacent_pairs``.

    Args:
        x: (..., D).
        half: see ``RopeSpec``.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if half else x


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotates each pair of neighbours by its angle; the result has x's dtype.

    As complex numbers: one product that reads x once, where their parts take six operations and a copy. What is recorded gets the
    parts: neither compilers nor ONNX know complex numbers well.

    Args:
        x: (..., N, R).
        sin, cos: (..., N, R/2).
    """
    if is_traced() or not (x.is_cpu or x.is_cuda):
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2).to(x.dtype)
    wide = torch.promote_types(torch.promote_types(x.dtype, sin.dtype), torch.float32)
    turned = complex_pairs(x.to(wide)) * torch.complex(cos.to(wide), sin.to(wide))
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def complex_pairs(x: Tensor) -> Tensor:
    """Reads neighbours as complex numbers, (..., R) -> (..., R/2): a view where pairs lie so in memory, else of a copy."""
    if x.stride(-1) != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def head_angles(rope: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
    """Returns sines and cosines of a table, one per pair: each (N', D/2), (H, N', D/2), (B, 1, N', D/2) or (B, H, N', D/2)."""
    if rope.ndim == 3 and not spec.per_head:
        rope = rope.unsqueeze(1)
    return tuple(part.chunk(2, -1)[0] if spec.half else part[..., ::2] for part in rope.chunk(2, -1))  # type: ignore[return-value]


def latent_angles(rope: Tensor, rotations: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
    """Returns sines and cosines of latent pairs, each (N', R/2), or (B, 1, N', R/2) for tables per image.

    Args:
        rope: (N', 2 D) or (B, N', 2 D) table, see above.
        rotations: number of each latent pair's rotation, (R/2,), see ``head_rotations``.
        spec: of the host.
    """
    if spec.per_head:
        sin, cos = (part.movedim(-3, -2).flatten(-2).index_select(-1, rotations) for part in head_angles(rope, spec))
        return (sin.unsqueeze(-3), cos.unsqueeze(-3)) if rope.ndim > 3 else (sin, cos)  # of (..., N', H*D/2)
    columns = rotations % (rope.shape[-1] // 4)
    chosen = rope.unflatten(-1, (2, -1)).index_select(-1, columns if spec.half else 2 * columns)  # (..., N', 2, R/2)
    sin, cos = (chosen if rope.ndim != 3 else chosen.unsqueeze(1)).unbind(-2)
    return sin, cos


def with_prefix(sin: Tensor, cos: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Returns angles (..., N, R/2) with those of the prefix tokens, which are 0.

    Args:
        sin, cos: (..., N', R/2).
        prefix: number of prefix tokens, N - N'.
    """
    if prefix == 0:
        return sin, cos
    return F.pad(sin, (0, 0, prefix, 0)), F.pad(cos, (0, 0, prefix, 0), value=1.0)


@torch.fx.wrap
def rotate_heads(x: Tensor, rope: Tensor | None, spec: RopeSpec, inverse: bool = False) -> Tensor:
    """Rotates each head's coordinates as the host does.

    Args:
        x: queries or keys, (B, H, N, D), or (B, 1, N, D) for a table that all heads share.
        rope: (N', 2 D) or (B, N', 2 D) table, or None to rotate nothing.
        spec: of the host.
        inverse: rotate back.
    """
    if rope is None:
        return x
    sin, cos = with_prefix(*head_angles(rope, spec), spec.num_prefix_tokens)
    return separate_pairs(rotate(adjacent_pairs(x, spec.half), -sin if inverse else sin, cos), spec.half)


@torch.fx.wrap
def rotate_latent(
    q: Tensor, k: Tensor, rope: Tensor | None, rotations: Tensor, spec: RopeSpec
) -> tuple[Tensor, Tensor]:
    """Rotates the heads' queries and the one key that they share in the key's space: latent RoPE.

    Computed token by token, as queries lie in memory, so that heads can be packed without a copy.

    Args:
        q, k: (B, H, N, R) and (B, 1, N, R).
        rope: (N', 2 D) or (B, N', 2 D) table, or None to rotate nothing.
        rotations: number of each pair's rotation, (R/2,).
        spec: of the host.
    """
    if rope is None:
        return q, k
    sin, cos = (
        part.unsqueeze(1) if part.ndim == 2 else part.transpose(1, 2)  # (N, 1, R/2) or (B, N, 1, R/2)
        for part in with_prefix(*latent_angles(rope, rotations, spec), spec.num_prefix_tokens)
    )
    q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, N, H, R) and (B, N, 1, R)
    if q.shape[1] == 1 and not is_traced():  # a step of decoding: as one tensor, half the operations
        both = rotate(torch.cat([q, k], 2), sin, cos).transpose(1, 2)
        return both[:, :-1], both[:, -1:]
    return rotate(q, sin, cos).transpose(1, 2), rotate(k, sin, cos).transpose(1, 2)


@torch.fx.wrap
def rotate_key(k: Tensor, rope: Tensor, rotations: Tensor, spec: RopeSpec) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rotates the key for kernels that form the queries themselves; other arguments as of ``rotate_latent``.

    Args:
        k: (B, N, R).

    Returns:
        The key, and sines and cosines for the queries, each (N, R/2) or (B, N, R/2): prefix tokens have the angle 0.
    """
    sin, cos = with_prefix(*latent_angles(rope, rotations, spec), spec.num_prefix_tokens)
    if sin.ndim == 4:
        sin, cos = sin.squeeze(1), cos.squeeze(1)
    return rotate(k, sin, cos), (sin, cos)


def angle_kernel(rope: Tensor, spec: RopeSpec, weights: Tensor, num_tokens: int) -> Tensor:
    """Returns weighted means of cos(angle(l) - angle(m)) over a head's rotations, (H, N, N), with a table per image (B, H, N, N).

    Prefix tokens have the angle 0.

    Args:
        rope: (N', 2 D) or (B, N', 2 D) table.
        spec: of the host.
        weights: (H, D/2) weights of the rotations.
        num_tokens: N, prefix tokens included.
    """
    sin, cos = (part.to(weights.dtype) for part in head_angles(rope, spec))
    if sin.ndim == 2:
        sin, cos = sin.unsqueeze(0), cos.unsqueeze(0)
    sin, cos = with_prefix(sin, cos, num_tokens - sin.shape[-2])
    share = weights.unsqueeze(1)  # (H, 1, D/2)
    return (cos * share) @ cos.mT + (sin * share) @ sin.mT
