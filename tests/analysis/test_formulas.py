"""Table 1: what the formulas' text says, what their functions compute, and what layers have."""

import re
from dataclasses import replace

import pytest

from vit_tucker.analysis.formulas import FORMULAS, TABLE_1, Sizes, measure_layer, read_sizes
from vit_tucker.errors import ConfigError

SIZES = (Sizes(), Sizes(d=1024, H=16, N=50, G=2, c=32, r=(8, 32, 24)), Sizes(d=24, H=4, N=9, G=1, c=3, r=(4, 5, 6)))


def value_of(text: str, sizes: Sizes) -> int:
    """A formula's text as Python: '2 d^2 + 2 G D d' -> 2*d**2+2*G*D*d."""
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", text.replace("^", "**"))
    r1, r2, r3 = sizes.r
    letters = {name: getattr(sizes, name) for name in "dHDNGc"} | {"r1": r1, "r2": r2, "r3": r3}
    return eval(product, {"__builtins__": {}}, letters)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("formula", TABLE_1, ids=lambda f: f.method)
def test_text_function_and_layer_agree(formula, sizes):
    weights, entries = value_of(formula.weights, sizes), value_of(formula.entries, sizes)
    assert (formula.count_weights(sizes), formula.count_entries(sizes)) == (weights, entries)
    assert measure_layer(formula, sizes) == (weights, entries)
    assert formula.config(sizes).count_parameters(sizes.spec).weights == weights
    other = replace(sizes, d=2 * sizes.d)  # twin
    assert formula.count_weights(other) != weights


@pytest.mark.parametrize(
    ("method", "letters", "expected"),
    [
        ("MHA", {}, 2_359_296),
        ("GQA", {"G": 1}, 1_277_952),
        ("MQA", {}, 1_277_952),
        ("MLA, shared latent", {"c": 16}, 651_264),
        ("Tucker", {"r": [8, 16, 16]}, 53_440),
        ("Tucker", {"r": [8, 32, 32]}, 114_880),
    ],
)
def test_layers_of_a_vit_b16(method, letters, expected):
    """As in the paper's notes on ViT-B/16."""
    assert FORMULAS[method].count_weights(read_sizes(letters)) == expected
    assert FORMULAS[method].count_weights(read_sizes({**letters, "d": 384})) != expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"e": 1}, "e: unknown size; Table 1 has d, H, N, G, c, r"),
        ({"d": 0}, "d=0: must be a positive integer"),
        ({"d": True}, "positive integer"),
        ({"r": [8, 16]}, "three positive integers"),
        ({"r": 8}, "three positive integers"),
        ({"N": "x"}, "positive integer"),
        ({"d": 770}, "H=12: heads must divide d=770"),
    ],
    ids=str,
)
def test_wrong_sizes_are_one_line(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_sizes(given)


def test_sizes_that_a_method_can_not_have():
    with pytest.raises(ConfigError, match="GQA: num_kv_heads=5 must divide num_heads=12"):
        measure_layer(FORMULAS["GQA"], read_sizes({"G": 5}))
