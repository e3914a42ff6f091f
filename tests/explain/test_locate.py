"""Places of tokens in whole models: timm's own blocks are run on a picture of coordinates, to see what they hand over."""

import pytest
import torch
from torch import nn

from tests.patching.test_families import FAMILIES, image, small_model
from vit_tucker.explain.capture import record_attention
from vit_tucker.explain.grid import PADDING, patch_numbers
from vit_tucker.explain.locate import proportional
from vit_tucker.hosts.find import find_attention

BLOCKS = {"swin_tiny_patch4_window7_224": "_attn", "maxvit_rmlp_pico_rw_256": "_partition_attn"}
"""Methods of timm's blocks that cut an image into sequences for the attention and put it together again."""


class Seen(nn.Module):
    """Stands in for an attention layer and keeps what it is given."""

    def forward(self, x, mask=None):
        self.x = x
        return x


@pytest.mark.parametrize("name", BLOCKS)
def test_places_are_those_that_timms_blocks_make(name):
    model = small_model(name)
    grids = record_attention(model, image(model, FAMILIES[name].get("img_size"))).grids
    assert list(grids) == list(find_attention(model))
    kinds = set()
    for layer, grid in grids.items():
        block = model.get_submodule(layer.rpartition(".")[0])
        block.attn = seen = Seen()
        coordinates = (patch_numbers(grid.height, grid.width) + 1).double()[None, ..., None]
        getattr(block, BLOCKS[name])(coordinates)
        assert torch.equal(seen.x.reshape(grid.index.shape).long() - 1, grid.index)
        kinds.add((grid.height, tuple(grid.index.flatten()[:3].tolist())))
    assert len(kinds) > 2  # shifted and unshifted windows, blocks and grids, of several stages


@pytest.mark.parametrize(
    ("name", "first", "padding"),
    [("davit_tiny", [0, 1, 2], False), ("nest.Nest", [0, 1, 2], False), ("mobilevit_xxs", [0, 2, 4], False)],
)
def test_places_by_hand(name, first, padding):
    model = small_model(name)
    grid = next(iter(record_attention(model, image(model, FAMILIES[name].get("img_size"))[:1]).grids.values()))
    assert grid.index[0, :3].tolist() == first
    assert (grid.index == PADDING).any() == padding
    assert sorted(grid.index.flatten().tolist()) == list(range(grid.num_tokens))


@pytest.mark.parametrize(
    ("name", "num_prefix", "size"),
    [
        ("deit_tiny_distilled_patch16_224", 2, (4, 4)),
        ("vit_small_patch16_dinov3", 5, (4, 4)),
        ("vit_relpos_small_patch16_224", 0, (4, 4)),
        ("visformer_tiny", 0, (4, 4)),
    ],
)
def test_prefix_tokens_and_patches(name, num_prefix, size):
    model = small_model(name)
    grid = next(iter(record_attention(model, image(model, FAMILIES[name].get("img_size"))[:1]).grids.values()))
    assert (grid.num_prefix, (grid.height, grid.width)) == (num_prefix, size)


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (12, (300, 400), (3, 4)),
        (196, (224, 224), (14, 14)),
        (197, (224, 224), None),
        (0, (8, 8), None),
        (15, (330, 560), (3, 5)),
        (700, (330, 560), (20, 35)),
        (195, (224, 224), None),
    ],
)
def test_rows_and_columns_in_the_proportions_of_the_image(count, size, expected):
    assert proportional(count, size) == expected
