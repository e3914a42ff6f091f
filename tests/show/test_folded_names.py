"""Names that differ in a number alone, as one."""

import pytest

from vit_tucker.show.folded_names import fold_names


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"blocks.{i}.attn" for i in range(12)], {"blocks.0-11.attn": 12}),
        (["blocks.0.attn", "blocks.1.attn", "blocks.2.attn", "blocks.5.attn"], {"blocks.0-2,5.attn": 4}),
        (["blocks.0.attn", "neck.attn", "blocks.1.attn"], {"blocks.0-1.attn": 2, "neck.attn": 1}),
        ([f"blocks.{i}.mlp.fc{k}" for i in (0, 1) for k in (1, 2)], {"blocks.0-1.mlp.fc1-2": 4}),
        (["layers.0.blocks.0.attn", "layers.0.blocks.1.attn", "layers.2.blocks.0.attn"],
         {"layers.0.blocks.0-1.attn": 2, "layers.2.blocks.0.attn": 1}),
        (["stages.0.blocks.1.attn", "stages.3.blocks.1.attn"], {"stages.0,3.blocks.1.attn": 2}),
        (["attn"], {"attn": 1}),
        ([], {}),
    ],
)  # fmt: skip
def test_groups_have_all_names_in_order(names, folded):
    found = fold_names(names)
    assert {label: len(members) for label, members in found.items()} == folded
    assert sorted(name for members in found.values() for name in members) == sorted(names)
    assert [members[0] for members in found.values()] == sorted(
        (members[0] for members in found.values()), key=names.index
    )
