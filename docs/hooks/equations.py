"""Equations as MathML, made when the site is built: no script runs in the reader's browser, nothing is fetched.

pymdownx.arithmatex finds ``$...$``, ``$$...$$`` and math fences and marks them; GitHub shows the same source.
"""

import html
import re

MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]\s*</(?P=tag)>', re.DOTALL
)
VARIANT = re.compile(r'mathvariant="(?!normal")[^"]*"')
"""Browsers know no other variant (MathML Core); latex2mathml writes one for a letter without braces, as in \\mathbb R."""


class EquationError(ValueError):
    """LaTeX that can't be shown."""


def to_mathml(latex: str, display: bool) -> str:
    """One equation.

    Args:
        latex: as between the dollars.
        display: on a line of its own.

    Raises:
        EquationError: the converter doesn't know a command in it, or uses what browsers don't know.
    """
    from latex2mathml.converter import convert

    try:
        mathml = convert(latex.strip(), display="block" if display else "inline")
    except Exception as error:  # the converter's own kinds of errors, KeyErrors and IndexErrors among them
        raise EquationError(f"${latex.strip()}$: {type(error).__name__}: {error}") from None
    for sign, reason in (("\\", "an unknown command"), ("<mi>&</mi>", "an unknown environment")):
        if sign in mathml:
            raise EquationError(f"${latex.strip()}$: {reason}")
    if VARIANT.search(mathml):
        raise EquationError(f"${latex.strip()}$: write the letter in braces, as in \\mathbb{{R}}")
    return mathml


def render_equations(content: str) -> str:
    """The page's HTML with its equations as MathML; see ``to_mathml`` for errors."""

    def rendered(match: re.Match[str]) -> str:
        display = match["open"] == "["
        mathml = to_mathml(html.unescape(match["latex"]), display)
        return f'<div class="equation" tabindex="0">{mathml}</div>' if display else mathml

    return MARKED.sub(rendered, content)
