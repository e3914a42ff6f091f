"""A method's own name, place and colour: said by a plug-in's class, kept by its run, shown in tables and figures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from matplotlib.colors import to_hex

import vit_tucker as vt
from tests.report.synthetic import run_results, study
from vit_tucker.attention.registry import METHODS
from vit_tucker.attention.variants.gqa import GQAConfig
from vit_tucker.config.load import load_config
from vit_tucker.report import figures
from vit_tucker.report.collect import checked_results
from vit_tucker.report.sections import sections
from vit_tucker.report.tables import settings_table
from vit_tucker.run.describe import stored_display
from vit_tucker.run.run import run
from vit_tucker.show.methods import FREE_COLOURS, SHIPPED, MethodDisplay, fill_in

TINY = ("model.depth=1", "model.embed_dim=16", "model.num_heads=2", "train.epochs=1", "train.warmup_epochs=0")
OWN = {"name": "Halved heads", "order": 2.5, "colour": FREE_COLOURS[0], "marker": "X"}


class HalvedConfig(GQAConfig):
    """A plug-in's method that says how it is shown."""

    display: ClassVar[MethodDisplay] = vt.MethodDisplay(**OWN, starts={"mean": "halved"})

    method: Literal["halved"] = "halved"
    num_kv_heads: int = 1


class PlainConfig(GQAConfig):
    """A plug-in's method that does not."""

    method: Literal["plain"] = "plain"
    num_kv_heads: int = 1


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    vt.register_method("halved")(HalvedConfig)
    vt.register_method("plain")(PlainConfig)
    yield
    for name in ("halved", "plain"):
        METHODS.entries.pop(name)


def results_of(method: str, folder: Path) -> dict:
    overrides = [*TINY, "train.latency_batch_size=null", f"output_dir={folder / method}"]
    attention = ["attention.num_kv_heads=1", f"attention.method={method}"]
    run(load_config("digits/gqa2", [*overrides, *attention]))
    return json.loads((folder / method / "results.json").read_text())


def test_every_method_of_the_package_brings_what_tables_know_of_it():
    own = {name: vt.get_method(name).display for name in vt.list_methods() if name not in ("halved", "plain")}
    assert own == {name: display for name, display in SHIPPED.items() if name != "dense"}


def test_a_plug_in_is_shown_as_it_says_from_its_results_alone(tmp_path, monkeypatch):
    stored = {
        method: stored_display(vt.get_method(method)(num_kv_heads=1)).get("display") for method in ("plain", "gqa")
    }
    stored["halved"] = results_of("halved", tmp_path)["display"]
    assert stored == {
        "halved": {**OWN, "starts": {"mean": "halved"}},
        "plain": {"starts": SHIPPED["gqa"].starts},
        "gqa": None,
    }
    monkeypatch.setattr(METHODS, "entries", {})  # tables are made where the plug-in is not
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, *_: drawn.append(figure) or "x.png")
    runs = study(seeds=2)
    for method, params in (("halved", 30_000), ("plain", 60_000)):
        section = {"method": method, "num_kv_heads": 1, "conversion": "mean"}
        for seed in range(2):
            runs.append(run_results(method, section, params, 93.0, seed, display=stored[method]))
    (section,) = sections([checked_results(json.loads(json.dumps(entry)), "r") for entry in runs])
    assert section.methods == ["tucker", "halved", "gqa", "mla", "plain"]
    table = settings_table(section)
    rows = {row[0]: row[1:4] for row in table.rows}
    assert rows["halved"] == ["Halved heads", "num_kv_heads=1", "halved"]
    assert rows["plain"] == ["plain", "num_kv_heads=1", "mean-pool"]
    figures.draw_accuracy(section, "params", tmp_path)
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    looks = {
        name: (to_hex(lines[name].get_color()).upper(), lines[name].get_marker()) for name in lines if ", " in name
    }
    assert looks["Halved heads, halved"] == (OWN["colour"], "X")
    assert looks["plain, mean-pool"] == (FREE_COLOURS[1], "v")  # the first free one
    assert looks["GQA, mean-pool"] == (SHIPPED["gqa"].colour, "s")


def test_more_methods_than_colours_are_all_drawn():
    filled = fill_in({f"m{i}": MethodDisplay() for i in range(6)})
    assert [display.colour for display in filled.values()] == [*FREE_COLOURS, *FREE_COLOURS[:2]]
    assert filled["m5"].name == "m5"


@pytest.mark.parametrize(
    ("key", "value"), [("colour", "blau"), ("marker", "oo"), ("name", "a\nb"), ("colr", "#000000")]
)
def test_wrong_displays_are_one_line_in_python_and_in_results(key, value):
    entry = run_results("a", {"method": "halved"}, 9, 90.0, display={key: value})
    for read in (lambda: MethodDisplay(**{key: value}), lambda: checked_results(entry, "results.json")):
        with pytest.raises(vt.ConfigError, match=key) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_display_of_another_kind_is_refused():
    class WrongConfig(GQAConfig):
        display: ClassVar = "GQA"
        method: Literal["wrong"] = "wrong"

    with pytest.raises(vt.ConfigError, match="WrongConfig.display must be a vit_tucker.MethodDisplay"):
        vt.register_method("wrong")(WrongConfig)
