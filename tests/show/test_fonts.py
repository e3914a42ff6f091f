"""Names in scripts that the figures' own font lacks: other installed fonts are taken, and boxes are never drawn silently."""

import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from vit_tucker.show import fonts
from vit_tucker.show.figures import save

PRIVATE = "\U000f1234\U000f1235"
"""Characters that no real font has."""


def font_file(file, family, characters):
    """Writes a font whose glyphs are squares."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, names = pen.glyph(), [f"g{ord(character):x}" for character in characters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, characters), names, strict=True)))
    builder.setupGlyf(dict.fromkeys([".notdef", *names], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(file)


@pytest.fixture
def installed(tmp_path):
    """A font for the first of the private characters, on this machine for one test."""
    before = list(fontManager.ttflist)
    font_file(tmp_path / "own.ttf", "Own Sans", PRIVATE[:1])
    fontManager.addfont(tmp_path / "own.ttf")
    yield "Own Sans"
    fontManager.ttflist[:] = before


def figure_with(text):
    figure = Figure(figsize=(2, 1))
    axis = figure.subplots()
    axis.set_title(text)
    axis.set_yticks([0.5], [text])
    axis.plot([0, 1], [0, 1], label="plain")
    axis.legend()
    return figure, axis


def test_an_installed_font_that_has_the_characters_is_used(installed, tmp_path, caplog):
    figure, axis = figure_with(f"cat {PRIVATE[0]}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")
        save(figure, tmp_path, "figure")
    assert axis.title.get_fontfamily()[-1] == installed
    assert axis.get_yticklabels()[0].get_fontfamily()[-1] == installed
    assert installed not in axis.get_legend().get_texts()[0].get_fontfamily()
    assert not caplog.records


def test_characters_without_a_font_are_named_in_one_line(installed, tmp_path, caplog):
    figure, axis = figure_with(PRIVATE)
    fonts.warn_of.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        save(figure, tmp_path, "figure")
        save(figure, tmp_path, "figure")
    assert not [warning for warning in warned if "Glyph" in str(warning.message)]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"figures: no installed font has {PRIVATE[1]}: boxes stand in their place")
    assert axis.title.get_fontfamily()[-1] == installed  # for the other one


def test_fonts_are_found_that_were_installed_after_matplotlib_s_list(tmp_path, caplog, monkeypatch):
    before = list(fontManager.ttflist)
    font_file(tmp_path / "new.ttf", "New Sans", PRIVATE)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    files = [str(tmp_path / name) for name in ("broken.ttf", "new.ttf")]
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: files)
    fonts.add_new_fonts.cache_clear()
    figure, axis = figure_with(PRIVATE)
    with fonts.installed_fonts(figure):
        assert axis.title.get_fontfamily()[-1] == "New Sans"
    assert not caplog.records
    fontManager.ttflist[:] = before
    fonts.add_new_fonts.cache_clear()


def test_names_in_the_own_font_change_nothing(caplog, tmp_path):
    figure, axis = figure_with("Größe ± Δ, 12%\n→ Ελληνικά, кошка")
    before = axis.title.get_fontfamily()
    with fonts.installed_fonts(figure):
        pass
    assert axis.title.get_fontfamily() == before
    assert not caplog.records


def test_preferred_families_come_first():
    names = [font.name for font in fonts.candidates()]
    assert len(set(names)) == len(names)
    places = [fonts.PREFERRED.index(name) for name in names if name in fonts.PREFERRED]
    assert places == sorted(places)
    assert not any("Last" in name for name in names)
