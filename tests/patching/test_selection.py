import pytest

from vit_tucker.errors import PatchError
from vit_tucker.patching.selection import select

NAMES = [f"blocks.{i}.attn" for i in range(12)]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, range(12)),
        (3, [3]),
        (-1, [11]),
        ("3", [3]),
        ("2-4", [2, 3, 4]),
        ("10-", [10, 11]),
        ("blocks.3.attn", [3]),
        ("blocks.1*.attn", [1, 10, 11]),
        ("blocks.[0-2].attn", [0, 1, 2]),
        (r"re:blocks\.(4|7)\.attn", [4, 7]),
        ([11, "0-1", "blocks.5.attn"], [0, 1, 5, 11]),
        (range(2), [0, 1]),
    ],
    ids=str,
)
def test_selects(selection, expected):
    assert select(selection, NAMES) == [NAMES[i] for i in expected]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("attn", "matches no attention module .*full names: blocks.0.attn"),  # a suffix is not a full name
        ("block.3.attn", "did you mean 'blocks.3.attn'"),
        ("re:blocks", "matches no attention module"),
        ("re:(", "no regular expression"),
        (12, r"index 12 is outside 0\.\.11"),
        ("5-3", r"range '5-3' is outside 0\.\.11"),
        ("4-12", r"outside 0\.\.11"),
        ([], "empty list"),
        (["0", "nothing"], "'nothing' matches no attention module"),
    ],
    ids=str,
)
def test_refuses_what_selects_nothing(selection, message):
    with pytest.raises(PatchError, match=message):
        select(selection, NAMES)
