"""Spectra of the attention tensors of a model: what ranks its heads, queries, keys, outputs and values really have.

Two tensors per layer, three modes each: pre-softmax (head, query, key) and post-softmax (head, output, value). Plain: of the
weights. Whitened: in the metrics of the activation-aware conversion, where it counts what matters for the tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit_tucker.attention.effective import plain_layer
from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.linear import refuse_infinite
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.options import Calibration
from vit_tucker.attention.variants.tucker.ranks import whiten
from vit_tucker.conversion.calibrate import collect_moments
from vit_tucker.conversion.observe import WatchedLayer, located
from vit_tucker.errors import PatchError, WeightsError
from vit_tucker.hosts import find
from vit_tucker.hosts.families import read_host
from vit_tucker.patching.notes import token_notes
from vit_tucker.show.progress_bars import each
from vit_tucker.show.tables import csv_text
from vit_tucker.tensor.mode_ranks import effective_rank, energy_rank, mode_spectra, numerical_rank, stable_rank
from vit_tucker.tensor.rotary import RotaryPairs, lift, pair_energies
from vit_tucker.tensor.tucker import Pairs

MODES = {"pre": ("head", "query", "key"), "post": ("head", "output", "value")}
DAMPING = 1e-6
"""Of the metrics, relative to their mean eigenvalue: low, so that it does not show up in the spectra."""
NONE_DENSE = "no whitened spectra: these are of dense attention layers, and all of this model's are replaced"


@dataclass(frozen=True)
class ModeSpectrum:
    """One mode of one tensor of one layer.

    Attributes:
        layer: full module name.
        tensor: "pre" or "post".
        mode: "head", "query", "key", "output" or "value".
        whitened: in the tokens' metrics, or of the weights alone.
        size: full size of the mode.
        values: (n,) singular values of the mode's unfolding, the largest first, float64.
    """

    layer: str
    tensor: str
    mode: str
    whitened: bool
    size: int
    values: Tensor

    def summary(self) -> dict[str, Any]:
        """Returns the spectrum in numbers, a row of ranks.csv."""
        facts = {k: v for k, v in vars(self).items() if k != "values"}
        if not self.values[0] > 0:
            ranks: dict[str, float] = {"numerical_rank": 0, "effective_rank": 0.0, "stable_rank": 0.0}
            return {**facts, "largest": 0.0, **ranks, "rank_90": 0, "rank_95": 0, "rank_99": 0}
        energies = {f"rank_{percent}": energy_rank(self.values, percent / 100) for percent in (90, 95, 99)}
        ranks = {"numerical_rank": numerical_rank(self.values, self.size**2)}
        ranks |= {"effective_rank": effective_rank(self.values), "stable_rank": stable_rank(self.values)}
        return {**facts, "largest": self.values[0].item(), **ranks, **energies}


class Shape(NamedTuple):
    """The sizes of a layer that bound its ranks: for the marks of the figure.

    Attributes:
        layer: full module name.
        embed_dim, num_heads, head_dim: C, H and D.
    """

    layer: str
    embed_dim: int
    num_heads: int
    head_dim: int


def attention_tensors(module: nn.Module, model: nn.Module) -> tuple[HostSpec, Pairs | RotaryPairs, Pairs]:
    """Returns shape, pre- and post-softmax tensor (float64) of a host's attention, see ``read_host``, or of a layer of ours.

    Args:
        module: of the model.
        model: dense or patched.

    Raises:
        PatchError: an attention class that we can't read, or weights that are not what it computes with.
    """
    if isinstance(module, AttentionModule):
        module = plain_layer(module)
        refuse_infinite(module.named_parameters())
        return module.spec, module.pre_tensor(), module.post_pairs()
    host = read_host(module, model)
    host.refuse_not_finite()
    weights = host.weights.double()
    return host.spec, weights.pre_tensor(host.spec.rope), weights.post_pairs()


def spectra_of(name: str, pre: Pairs | RotaryPairs, post: Pairs, whitened: bool = False) -> list[ModeSpectrum]:
    """Returns the six spectra of a layer's tensors.

    A key mode with RoPE has the spectrum of its latent pairs, two equal values for each.

    Args:
        name: of the layer.
        pre, post: its tensors.
        whitened: they are in the norm of the tokens.
    """
    rows = []
    for tensor, given in (("pre", pre), ("post", post)):
        if isinstance(given, RotaryPairs):
            lifted = lift(given)
            pairs, spectra = lifted.pairs, mode_spectra(lifted.pairs)
            spectra = spectra._replace(right=(pair_energies(lifted) / 2).sqrt().repeat_interleave(2))
        else:
            pairs, spectra = given, mode_spectra(given)
        sizes = pairs.left.shape[0], pairs.left.shape[1], pairs.right.shape[1]
        for mode, size, values in zip(MODES[tensor], sizes, spectra, strict=True):
            rows.append(ModeSpectrum(name, tensor, mode, whitened, size, values))
    return rows


class Analysis(NamedTuple):
    """The spectra of a model's attention tensors, as ``analyse`` returns them.

    Attributes:
        rows: spectra, in the order of the layers.
        shapes: of the layers.
        notes: what else a reader should know.
    """

    rows: list[ModeSpectrum]
    shapes: list[Shape]
    notes: tuple[str, ...]


def analyse(model: nn.Module, batches: Iterable[Any] | None = None, options: Calibration | None = None) -> Analysis:
    """Returns spectra of all attention layers of a model, plain and, with images, whitened.

    Args:
        model: a timm model, dense or patched.
        batches: images as the model takes them, see ``patch``; only dense layers have whitened spectra.
        options: of the pass over the images.

    Returns:
        Spectra; layers that can't be read are left out.

    Raises:
        PatchError: no attention layer that we can read, or bad images.
        WeightsError: weights that are not what a layer computes with, or not finite; names the layer.
    """
    rows: list[ModeSpectrum] = []
    shapes: list[Shape] = []
    readable: list[WatchedLayer] = []
    model = find.inner(model)
    find.refuse_adapted(model)
    names: dict[nn.Module, str] = {}
    for name, module in find.find_attention(model).items():
        names.setdefault(module, name)
    for module, name in each(names.items(), "spectra of", "layers", itemgetter(1)):
        try:
            spec, pre, post = attention_tensors(module, model)
        except WeightsError as error:
            raise WeightsError(f"{name}: {error}") from None
        except PatchError:
            continue
        shapes.append(Shape(name, spec.embed_dim, spec.num_heads, spec.head_dim))
        rows += spectra_of(name, pre, post)
        if batches is not None and not isinstance(module, AttentionModule):
            readable.append(WatchedLayer(name, module, read_host(module, model)))
    if not shapes:
        raise PatchError(f"{type(model).__name__} has no attention module that vit_tucker can read")
    if batches is not None and not readable:
        return Analysis(rows, shapes, (NONE_DENSE,))
    if batches is not None:
        for layer, moments in collect_moments(model, readable, options or Calibration(), batches, "spectra of"):
            weights = layer.host.weights.double()
            spec = layer.host.spec
            with located(layer.name):
                pairs = whiten(weights.pre_tensor(spec.rope), weights.post_pairs(), moments, spec.scale, DAMPING)
            rows += spectra_of(layer.name, *pairs, whitened=True)
    return Analysis(rows, shapes, token_notes(model, readable))


@torch.no_grad()
def rank_scalars(model: nn.Module) -> dict[str, float]:
    """Returns the effective rank of each mode of each layer, by TensorBoard tag: ``ranks/pre_key/blocks.0.attn``.

    Args:
        model: patched or dense.
    """
    rows = (row for row in analyse(model).rows if row.values[0] > 0)
    return {f"ranks/{row.tensor}_{row.mode}/{row.layer}": effective_rank(row.values) for row in rows}


def save_spectra(folder: Path, rows: list[ModeSpectrum], shapes: list[Shape]) -> None:
    """Writes ranks.csv (a line per mode), singular_values.csv (a line per value) and layers.csv (what bounds the ranks).

    Args:
        folder: made if missing.
        rows: spectra of all modes; at least one.
        shapes: of the layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [row.summary() for row in rows]
    values = (
        (row.layer, row.tensor, row.mode, row.whitened, index, f"{value:.8g}")
        for row in rows
        for index, value in enumerate(row.values.tolist(), 1)
    )
    (folder / "layers.csv").write_text(csv_text(Shape._fields, shapes))
    (folder / "ranks.csv").write_text(csv_text(summaries[0], (summary.values() for summary in summaries)))
    header = ("layer", "tensor", "mode", "whitened", "index", "value")
    (folder / "singular_values.csv").write_text(csv_text(header, values))
