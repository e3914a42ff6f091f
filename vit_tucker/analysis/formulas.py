"""Table 1 of the paper: attention parameters per layer and KV cache of each method, as formulas.

Source: Klein et al., Tucker Attention, arXiv 2603.30033, Table 1. Biases do not count.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.variants.gqa import GQAConfig
from vit_tucker.attention.variants.mha import MHAConfig
from vit_tucker.attention.variants.mla.config import MLAConfig
from vit_tucker.attention.variants.tucker.config import TuckerConfig
from vit_tucker.errors import ConfigError, PatchError, nearest


@dataclass(frozen=True)
class Sizes:
    """The letters of the formulas; by default those of a ViT-B/16 at 224 pixels.

    Attributes:
        d: embed_dim.
        H: heads, of width D = d / H.
        N: tokens.
        G: key/value heads of GQA.
        c: latent width of MLA, of queries as of keys and values.
        r: ranks [head, query/output, key/value] of both Tucker tensors.
    """

    d: int = 768
    H: int = 12
    N: int = 197
    G: int = 4
    c: int = 16
    r: tuple[int, int, int] = (8, 16, 16)

    @property
    def D(self) -> int:
        """Returns the width of a head, d / H."""
        return self.d // self.H

    @property
    def spec(self) -> HostSpec:
        """Returns the host that these sizes describe."""
        return HostSpec(embed_dim=self.d, num_heads=self.H, head_dim=self.D, out_dim=self.d)


@dataclass(frozen=True)
class Formula:
    """One row of Table 1.

    Attributes:
        method: as the table calls it.
        options: letters that it needs beyond d, H and N.
        weights: formula of the attention parameters per layer, without biases.
        entries: formula of the KV cache entries per layer.
        count_weights, count_entries: the same, computed.
        config: the method of ours that it describes.
    """

    method: str
    options: tuple[str, ...]
    weights: str
    entries: str
    count_weights: Callable[[Sizes], int]
    count_entries: Callable[[Sizes], int]
    config: Callable[[Sizes], AttentionConfig]


def tucker_weights(s: Sizes) -> int:
    """Returns the weights of both tensors' factors and cores.

    Args:
        s: sizes of the layer.
    """
    r1, r2, r3 = s.r
    return 2 * (s.H * r1 + r1 * r2 * r3 + s.d * r2 + s.d * r3)


TABLE_1 = (
    Formula(*("MHA", (), "4 d^2", "2 N d"), lambda s: 4 * s.d**2, lambda s: 2 * s.N * s.d, lambda s: MHAConfig()),
    Formula(
        *("MQA", (), "2 d^2 + 2 D d", "2 N D"),
        lambda s: 2 * s.d**2 + 2 * s.D * s.d,
        lambda s: 2 * s.N * s.D,
        lambda s: GQAConfig(num_kv_heads=1),
    ),
    Formula(
        *("GQA", ("G",), "2 d^2 + 2 G D d", "2 N G D"),
        lambda s: 2 * s.d**2 + 2 * s.G * s.D * s.d,
        lambda s: 2 * s.N * s.G * s.D,
        lambda s: GQAConfig(num_kv_heads=s.G),
    ),
    Formula(
        *("MLA, shared latent", ("c",), "d^2 + 5 d c", "N c"),
        lambda s: s.d**2 + 5 * s.d * s.c,
        lambda s: s.N * s.c,
        lambda s: MLAConfig(q_lora_rank=s.c, kv_lora_rank=s.c),
    ),
    Formula(
        *("MLA, separate latents", ("c",), "d^2 + 6 d c", "2 N c"),
        lambda s: s.d**2 + 6 * s.d * s.c,
        lambda s: 2 * s.N * s.c,
        lambda s: MLAConfig(q_lora_rank=s.c, kv_lora_rank=s.c, shared_kv=False),
    ),
    Formula(
        *("Tucker", ("r",), "2 (H r1 + r1 r2 r3 + d r2 + d r3)", "2 N r3"),
        tucker_weights,
        lambda s: 2 * s.N * s.r[2],
        lambda s: TuckerConfig(ranks=s.r),
    ),
    Formula(
        *("Tucker, shared KV", ("r",), "2 (H r1 + r1 r2 r3 + d r2 + d r3) - d r3", "N r3"),
        lambda s: tucker_weights(s) - s.d * s.r[2],
        lambda s: s.N * s.r[2],
        lambda s: TuckerConfig(ranks=s.r, shared_kv=True),
    ),
)
FORMULAS: Mapping[str, Formula] = {formula.method: formula for formula in TABLE_1}


def read_sizes(given: Mapping[str, Any]) -> Sizes:
    """Returns the default sizes with some replaced.

    Args:
        given: by letter, positive integers; r a list of three.

    Raises:
        ConfigError: unknown letter, or a value that can't be one.
    """
    letters = [field.name for field in fields(Sizes)]
    for letter, value in given.items():
        if letter not in letters:
            raise ConfigError(f"{letter}: unknown size{nearest(letter, letters)}; Table 1 has {', '.join(letters)}")
        numbers = value if letter == "r" else [value]
        wanted = "three positive integers, [8, 16, 16]" if letter == "r" else "a positive integer"
        counts = isinstance(numbers, list) and all(type(number) is int and number > 0 for number in numbers)
        if not counts or (letter == "r" and len(numbers) != 3):
            raise ConfigError(f"{letter}={value}: must be {wanted}")
    values: dict[str, Any] = {**given, "r": tuple(given.get("r", Sizes.r))}
    sizes = replace(Sizes(), **values)
    if sizes.d % sizes.H:
        raise ConfigError(f"H={sizes.H}: heads must divide d={sizes.d}")
    return sizes


def measure_layer(formula: Formula, sizes: Sizes) -> tuple[int, int | None]:
    """Counts weights and KV cache entries of a layer that is built, without values.

    Args:
        formula: row of Table 1.
        sizes: of the layer.

    Raises:
        ConfigError: the method can't have these sizes.
    """
    config = formula.config(sizes)
    try:
        config.check(sizes.spec)
    except PatchError as error:
        raise ConfigError(f"{formula.method}: {error}") from None
    layer = config.build(sizes.spec, device="meta")
    weights = sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
    return weights, None if layer.kv_width is None else layer.kv_width * sizes.N


def formula_rows(sizes: Sizes) -> list[tuple[Any, ...]]:
    """Returns the rows of Table 1 for some sizes: method, its sizes, both formulas, and what they give beside built layers.

    Args:
        sizes: of the layer.
    """
    rows: list[tuple[Any, ...]] = []
    for row in TABLE_1:
        own = " ".join(f"{letter}={shown(getattr(sizes, letter))}" for letter in row.options)
        weights, entries = measure_layer(row, sizes)
        values = row.count_weights(sizes), weights, row.count_entries(sizes), entries
        rows.append((row.method, own, row.weights, row.entries, *values))
    return rows


def shown(value: Any) -> str:
    """Returns a value as it is printed: 4 as '4', (8, 16, 16) as '[8,16,16]'.

    Args:
        value: a number or a tuple.
    """
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
