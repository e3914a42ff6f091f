"""Equations become MathML, and what browsers would not show is refused."""

import re

import pytest

from docs.hooks import ROOT
from docs.hooks.equations import EquationError, render_equations, to_mathml

pytest.importorskip("latex2mathml")
DOLLARS = re.compile(r"(?<!\$)\$(?!\$)([^$\n]+)\$")
FENCES = re.compile(r"```math\n(.*?)```", re.DOTALL)


def test_marked_equations_are_replaced_and_nothing_else():
    page = '<p>a <span class="arithmatex">\\(x &lt; y_1\\)</span> b</p><div class="arithmatex">\\[\nz\n\\]</div>'
    html = render_equations(page)
    assert html.count("<math") == 2
    assert "<mo>&#x0003C;</mo>" in html
    assert 'display="inline"' in html.partition("</p>")[0]
    assert 'display="block"' in html.partition('class="equation"')[2]
    assert html.startswith("<p>a ")
    assert render_equations("<p>$5</p>") == "<p>$5</p>"


@pytest.mark.parametrize("latex", [r"\unknown x", r"\mathbb R", r"\left( x", r"\begin{aligned}a &= b\end{aligned}"])
def test_what_cannot_be_shown_is_refused(latex):
    with pytest.raises(EquationError, match=re.escape(latex[:8])):
        to_mathml(latex, display=True)


def test_equations_of_the_pages_can_be_shown():
    text = (ROOT / "docs" / "mathematics.md").read_text()
    displays = FENCES.findall(text)
    inline = DOLLARS.findall(FENCES.sub("", text))
    assert len(displays) > 10
    assert len(inline) > 50
    for latex, display in [(x, True) for x in displays] + [(x, False) for x in inline]:
        assert to_mathml(latex, display).startswith("<math")


def test_inline_equations_survive_github():
    """GitHub reads a backslash before punctuation as Markdown's, so that \\, and \\{ lose it between single dollars."""
    for page in (ROOT / "docs").glob("*.md"):
        for latex in DOLLARS.findall(FENCES.sub("", page.read_text())):
            assert not re.search(r"\\[,;{}!]", latex), (page.name, latex)
