"""Other ranks for both tensors of a Tucker layer."""

from torch import Tensor

from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.latent_rope import resize_keys
from vit_tucker.tensor.allocation import Ranks
from vit_tucker.tensor.resize import Resized, apply_map, mode_gram, resize_factor
from vit_tucker.tensor.tucker import Tucker

HEAD, LEFT, RIGHT = range(3)


def resize_tensors(
    tensors: tuple[Tucker, Tucker],
    ranks: tuple[Ranks, Ranks],
    rotations: Tensor | None,
    spec: HostSpec,
    shared_kv: bool,
) -> tuple[tuple[Tucker, Tucker], Tensor | None]:
    """Truncates each mode as the HOSVD of its tensor does, or adds columns to its factor that the core does not use yet.

    Args:
        tensors: the pre- and the post-softmax tensor, float64, with biases as last rows of factors.
        ranks: new ones of both, possible for the layer.
        rotations: numbers of the rotations of the latent key's pairs, (r3/2,), with RoPE.
        spec: of the layer.
        shared_kv: both have the same right factor, apart from a bias.

    Returns:
        The new tensors; a shared right factor is truncated by the sum of what it is to both, each relative to its norm. The new
        rotations: of pairs that stay, then of new pairs.
    """
    pre, post = tensors
    grams = [mode_gram(pre, RIGHT), mode_gram(post, RIGHT)]
    if shared_kv:
        shares = [
            gram / (factor.mT @ factor * gram).sum()
            for gram, factor in zip(grams, (pre.right, post.right), strict=True)
        ]
        grams[0] = shares[0] + shares[1]
    right, rotations = resize_keys(pre.right, grams[0], ranks[0][2], rotations, spec)
    values = right._replace(factor=right.factor[: spec.embed_dim])
    if not shared_kv:
        values = resize_factor(post.right, grams[1], ranks[1][2], spec.embed_dim)
    return (resize_tucker(pre, ranks[0], right, spec), resize_tucker(post, ranks[1], values, spec)), rotations


def resize_tucker(tucker: Tucker, ranks: Ranks, right: Resized, spec: HostSpec) -> Tucker:
    """Returns the tensor with other ranks, its right factor given.

    Args:
        tucker: the tensor, float64.
        ranks: the new ones.
        right: the new right factor.
        spec: of the layer.
    """
    head = resize_factor(tucker.head, mode_gram(tucker, HEAD), ranks[0], len(tucker.head))
    left = resize_factor(tucker.left, mode_gram(tucker, LEFT), ranks[1], min(len(tucker.left), spec.embed_dim))
    core = tucker.core
    for mode, new in ((HEAD, head), (LEFT, left), (RIGHT, right)):
        core = core if new.map is None else apply_map(core, new.map, mode)
    return Tucker(core, head.factor, left.factor, right.factor)
