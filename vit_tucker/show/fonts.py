"""Fonts for characters that the figures' own font lacks, such as Chinese or Japanese names of classes."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, findSystemFonts, fontManager, get_font
from matplotlib.text import Text

LOGGER = logging.getLogger("vit_tucker")
PREFERRED = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans CJK TC", "Noto Sans SC", "Noto Sans JP"),
    *(
        "Source Han Sans SC",
        "Source Han Sans",
        "PingFang SC",
        "Hiragino Sans",
        "Apple SD Gothic Neo",
        "Microsoft YaHei",
    ),
    *("Yu Gothic", "MS Gothic", "Malgun Gothic", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "IPAexGothic"),
    *("NanumGothic", "Droid Sans Fallback", "Noto Sans", "Arial Unicode MS"),
)
"""Families that are tried first; any other one that is installed comes after them."""
UNUSABLE = ("Last Resort", "LastResort", "Emoji")
"""Parts of the names of fonts that draw boxes for all characters, or pictures that matplotlib can't draw."""
SHOWN = 12
"""Missing characters that the log names."""


@contextmanager
def installed_fonts(figure: Figure) -> Iterator[None]:
    """Gives texts with characters that their font lacks other fonts of this machine that have them, to draw within the context.

    Characters that no installed font has are drawn as boxes, and one line of the log names them.
    """
    own = covered(findfont("DejaVu Sans"))
    texts = {text: without(text.get_text(), own) for text in figure.findobj(Text) if isinstance(text, Text)}
    lacking = set().union(*texts.values())
    families, missing = families_for(lacking)
    if missing and add_new_fonts():
        families, missing = families_for(lacking)
    for text, characters in texts.items():
        if characters:
            text.set_fontfamily(list(dict.fromkeys((*text.get_fontfamily(), *families))))
    with warnings.catch_warnings():
        if missing:
            warn_of(" ".join(sorted(missing)[:SHOWN]) + " ..." * (len(missing) > SHOWN))
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from", category=UserWarning)
        yield


@cache
def warn_of(characters: str) -> None:
    """Names characters in the log, once, that no installed font has."""
    LOGGER.warning(
        "figures: no installed font has %s: boxes stand in their place; a font such as Noto Sans CJK has them",
        characters,
    )


def without(text: str, covered_characters: frozenset[int]) -> set[str]:
    """Returns the visible characters of a text that are none of these code points."""
    return {character for character in text if ord(character) not in covered_characters and not character.isspace()}


@cache
def add_new_fonts() -> int:
    """Adds fonts that were installed after matplotlib made its list of them; returns how many, once in a process."""
    known = {font.fname for font in fontManager.ttflist}
    added = 0
    for file in findSystemFonts():
        if file not in known:
            try:
                fontManager.addfont(file)
            except (OSError, RuntimeError):  # not a font that matplotlib can read
                continue
            added += 1
    return added


@cache
def covered(file: str) -> frozenset[int]:
    """Returns the code points that a font file has glyphs for; none if the file can't be read."""
    try:
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def families_for(characters: Iterable[str]) -> tuple[list[str], set[str]]:
    """Returns installed families that together have some characters, and the characters that none has."""
    missing, families = set(characters), []
    for font in candidates():
        found = {character for character in missing if ord(character) in covered(font.fname)} if missing else set()
        if found:
            families.append(font.name)
            missing -= found
    return families, missing


def candidates() -> list[FontEntry]:
    """Returns the upright fonts of this machine, one file of each family, preferred families first."""
    place = {family: number for number, family in enumerate(PREFERRED)}
    usable = [f for f in fontManager.ttflist if f.style == "normal" and not any(part in f.name for part in UNUSABLE)]
    regular = {
        font.name: font
        for font in sorted(usable, key=lambda f: (f.weight not in (400, "normal"), f.fname), reverse=True)
    }
    return sorted(regular.values(), key=lambda font: (place.get(font.name, len(place)), font.name))
