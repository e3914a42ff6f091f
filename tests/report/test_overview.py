"""The picture over all studies: its points are the settings' numbers, and the kept one is that of the kept results."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.report.synthetic import DENSE_PARAMS, study
from vit_tucker.report.collect import collect
from vit_tucker.report.overview import FILES, write_overview
from vit_tucker.report.sections import sections
from vit_tucker.report.stats import pareto_front
from vit_tucker.show.figures import DARK, LIGHT, contrast, themed

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def parts(file):
    """Groups of an SVG file that have a path, by id."""
    found = {}
    for group in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}g"):
        path = group.find("{http://www.w3.org/2000/svg}path")
        if path is not None and not re.fullmatch(r"[a-z_]+\d+", group.get("id", "")):
            found[group.get("id")] = path
    return found


def points(path):
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d")), dtype=float)


def curves(file):
    """By id, where the points of each curve lie in its panel: (0, 0) is the lower left corner, (1, 1) the upper right one."""
    found = parts(file)
    placed = {}
    for area in (name for name in found if name.endswith("-area")):
        corners = points(found[area])
        low, high = corners.min(0), corners.max(0)
        for name, path in found.items():
            if name.startswith(area.removesuffix("area")) and name != area and path.get("d"):
                x, y = ((points(path) - low) / (high - low)).T
                placed[name] = np.stack([x, 1 - y], 1)
    return placed


def test_points_are_the_fronts_of_the_methods(tmp_path):
    (section,) = sections(study(seeds=3))
    assert write_overview([section], tmp_path) == list(FILES)
    placed = curves(tmp_path / "accuracy_params_light.svg")
    assert set(placed) == {f"{section.slug}-{method}" for method in ("tucker", "gqa", "mla")}
    truth, seen = [], []
    for method in section.methods:
        settings = [s for s in section.comparable if s.method == method]
        front = [settings[i] for i in pareto_front([s.params for s in settings], [s.score for s in settings])]
        truth += [(np.log(s.params), s.score) for s in front]
        seen += [*placed[f"{section.slug}-{method}"]]
    truth, seen = np.array(truth), np.array(seen)
    assert np.log(DENSE_PARAMS) > truth[:, 0].max()
    for axis in (0, 1):  # log parameters and accuracy: straight lines through all points of all methods
        fit = np.polynomial.Polynomial.fit(truth[:, axis], seen[:, axis], 1)
        assert fit(truth[:, axis]) == pytest.approx(seen[:, axis], abs=1e-4)
    changed = study(seeds=3)
    for run in changed:
        run["last"]["eval_top1"] += 0.3 * (run["name"] == "tucker-8-16-16")
    write_overview(sections(changed), tmp_path / "..")
    other = curves(tmp_path / ".." / "accuracy_params_light.svg")
    assert not np.allclose(other[f"{section.slug}-tucker"], placed[f"{section.slug}-tucker"], atol=1e-3)


def test_one_method_makes_no_picture(tmp_path):
    assert write_overview(sections(study(seeds=1, methods=("tucker",))), tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_the_kept_picture_is_that_of_the_kept_results(kept_picture, name):
    made, kept = curves(kept_picture / name), curves(RESULTS / name)
    assert set(made) == set(kept)
    assert len(made) >= 6
    for curve, placed in made.items():
        assert placed == pytest.approx(kept[curve], abs=2e-3)


@pytest.fixture(scope="module")
def kept_picture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picture")
    found = [sections(collect([file]).results) for file in sorted(RESULTS.glob("*/results.jsonl"))]
    write_overview([section for study_sections in found for section in study_sections], folder)
    return folder


def test_the_same_bytes_for_the_same_data(tmp_path):
    (section,) = sections(study(seeds=1))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_overview([section], tmp_path / folder)
    for name in FILES:
        text = (tmp_path / "a" / name).read_bytes()
        assert text == (tmp_path / "b" / name).read_bytes()
        assert b"<dc:date>" not in text
    dark = (tmp_path / "a" / "accuracy_params_dark.svg").read_text()
    assert DARK.background in dark
    assert LIGHT.ink not in dark


@pytest.mark.parametrize("colour", ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#F0E442"])
def test_colours_have_the_contrast_on_dark_pages_that_they_have_on_white(colour):
    assert themed(colour, LIGHT) == colour.lower()
    wanted = min(contrast(colour, LIGHT.background), contrast(DARK.ink, DARK.background))
    assert contrast(themed(colour, DARK), DARK.background) >= wanted - 1e-9
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
