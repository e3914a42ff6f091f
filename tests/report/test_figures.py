"""Figures: what is drawn, read from the figure itself; files are rendered once, in test_study.py."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tests.report.synthetic import DENSE_PARAMS, TUCKER, run_results, study
from vit_tucker.errors import ConfigError
from vit_tucker.report import ablation_figures, curves, figures
from vit_tucker.report.ablation_figures import draw_ablation
from vit_tucker.report.ablations import ablation_table, check_options, natural, option_lines, usual_options
from vit_tucker.report.curves import check_patterns, draw_curves, epochs_to_reach, recovery_table
from vit_tucker.report.figures import draw_accuracy
from vit_tucker.report.sections import sections
from vit_tucker.show.figures import accuracy_axis, log_axis
from vit_tucker.show.methods import GQA

HOSVD = {"method": "tucker", "conversion": "hosvd", "init": "pretrained"}


@pytest.fixture
def drawn(monkeypatch):
    """Figures in place of files."""
    kept = []

    def keep(figure, folder, stem):
        kept.append(figure)
        return f"{stem}.png"

    for module in (figures, curves, ablation_figures):
        monkeypatch.setattr(module, "save", keep)
    return kept


def labelled(axis):
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def test_accuracy_over_parameters(drawn, tmp_path):
    runs = study(seeds=3)
    worse = {**HOSVD, "ranks": [1, 64, 64]}
    runs += [run_results("worse", worse, 60_000, 93.0, seed) for seed in range(3)]
    (section,) = sections(runs)
    assert draw_accuracy(section, "params", tmp_path) == ("accuracy_params.png", [])
    (axis,) = drawn[0].axes
    lines = labelled(axis)
    faded = "faded: not on its curve's front"
    assert set(lines) == {"Tucker, HOSVD", "GQA, mean-pool", "MLA, joint SVD", "dense (band: ± std)", faded}
    assert list(lines["Tucker, HOSVD"].get_xdata()) == [
        params for _, params in TUCKER
    ]  # the front only, without "worse"
    means = [s.score for s in section.comparable if s.method == "tucker" and s.name != "worse"]
    assert list(lines["Tucker, HOSVD"].get_ydata()) == means
    assert list(lines["dense (band: ± std)"].get_xdata()) == [DENSE_PARAMS]
    assert axis.get_xscale() == "log"
    assert to_hex(lines["GQA, mean-pool"].get_color()).upper() == GQA.colour
    assert len({line.get_marker() for name, line in lines.items() if name != faded}) == 4
    (worse,) = (line for line in axis.lines if line.get_alpha() is not None and list(line.get_xdata()) == [60_000])
    assert list(worse.get_ydata()) == [93.0]  # drawn too, off the line
    bars = [container for container in axis.containers if container.has_yerr]
    segments = [segment for bar in bars for collection in bar[2] for segment in collection.get_segments()]
    halves = sorted(np.ptp(segment[:, 1]) / 2 for segment in segments)
    assert halves == pytest.approx(sorted(s.score_std for s in section.comparable if s.name != "worse"))


def test_a_dense_host_far_away_stands_at_the_end_of_the_axis(drawn, tmp_path):
    """Settings of nearly equal size are not one strip: the axis is theirs, and the legend has the host's cost."""
    runs = [run_results("mha", None, DENSE_PARAMS, 95.0, seed) for seed in (0, 1)]
    for ranks, params in (((8, 4, 12), 20_500), ((8, 8, 8), 21_500), ((1, 8, 8), 17_400)):
        attention = {**HOSVD, "ranks": list(ranks)}
        runs += [run_results(f"t{ranks}", attention, params, 90.0 + params / 1e4, seed) for seed in (0, 1)]
    draw_accuracy(*sections(runs), "params", tmp_path)
    (axis,) = drawn[0].axes
    assert axis.get_xlim()[1] < 25_000
    star = labelled(axis)["dense (at 264k; band: ± std)"]
    place = star.get_transform().transform([(star.get_xdata()[0], star.get_ydata()[0])])
    assert axis.transAxes.inverted().transform(place)[0, 0] == pytest.approx(1.0)
    near = runs + [run_results("large", {**HOSVD, "ranks": [8, 64, 64]}, 200_000, 94.0, seed) for seed in (0, 1)]
    draw_accuracy(*sections(near), "params", tmp_path)
    assert list(labelled(drawn[1].axes[0])["dense (band: ± std)"].get_xdata()) == [DENSE_PARAMS]


def test_quartiles_of_latency_are_bars_of_the_methods_below(drawn, tmp_path):
    (section,) = sections(study(seeds=2, methods=("tucker", "gqa")))
    draw_accuracy(section, "latency", tmp_path)
    main, strip = drawn[0].axes
    assert not [
        line
        for line in main.lines
        if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2 and line.get_linestyle() == "-"
    ]  # no bars among the settings
    assert [label.get_text() for label in strip.get_yticklabels()] == ["Tucker", "GQA"]
    for line, method in zip(strip.lines, ("tucker", "gqa"), strict=False):
        ranges = np.array([s.latency_range for s in section.comparable if s.method == method])
        assert list(line.get_xdata()) == pytest.approx(list(np.median(ranges, axis=0)))


@pytest.mark.parametrize(("low", "high"), [(78.9e6, 104e6), (8.67e6, 17.4e6), (1e5, 2.4e5), (2.6e4, 9e4), (1e3, 1e6)])
def test_a_log_axis_has_ticks_to_read_its_values_by(low, high):
    axis = Figure().subplots()
    axis.plot([low, high], [1, 2])
    log_axis(axis, low, high)
    inside = [tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
    assert 3 <= len(inside) <= 8
    labels = [axis.xaxis.get_major_formatter()(tick) for tick in inside]
    assert len(set(labels)) == len(labels)


def test_missing_costs_are_left_out_and_said(drawn, tmp_path):
    runs = study(seeds=1)
    for run in runs:
        run["cost"]["latency"] = None
        if run["name"] == "gqa2":
            del run["cost"]
    (section,) = sections(runs)
    file, notes = draw_accuracy(section, "flops", tmp_path)
    assert file == "accuracy_flops.png"
    assert notes == ["Not in the figure over FLOPs per image, which their results lack: gqa2."]
    assert len(labelled(drawn[0].axes[0])["GQA, mean-pool"].get_xdata()) == 2
    assert draw_accuracy(section, "latency", tmp_path)[0] is None


@pytest.mark.parametrize(("low", "high", "scale"), [(92.0, 95.0, "linear"), (40.0, 99.0, "function")])
def test_errors_that_differ_much_are_on_a_log_scale(low, high, scale):
    axis = Figure().subplots()
    axis.plot([1, 2], [low, high])
    accuracy_axis(axis, low, high)
    assert axis.get_yscale() == scale
    if scale == "function":
        bottom, top = axis.get_ylim()
        assert bottom < low < high < top < 100
        assert all(low - 20 < tick < 100 for tick in axis.get_yticks())
        points = axis.transData.transform([(1, 90.0), (1, 99.0)])[:, 1]
        middle = axis.transData.transform((1, 100 - np.sqrt(10.0)))[1]
        assert middle == pytest.approx(points.mean())  # the error's geometric mean


def test_curves_have_a_panel_per_method_and_start(drawn, tmp_path):
    (section,) = sections(study(seeds=3))
    assert draw_curves(section, tmp_path) == "curves.png"
    panels = [axis for axis in drawn[0].axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["Tucker, HOSVD", "GQA, mean-pool", "MLA, joint SVD"]
    assert [len(axis.lines) for axis in panels] == [5, 4, 5]  # with dense
    setting = next(s for s in section.comparable if s.method == "tucker")
    means = np.mean([[row["eval_top1"] for row in run["curve"]] for run in setting.runs], axis=0)
    assert panels[0].lines[0].get_ydata() == pytest.approx(means)
    short = study(seeds=1)
    for run in short:
        run["curve"] = run["curve"][-1:]
    assert draw_curves(*sections(short), tmp_path) is None
    draw_curves(section, tmp_path, ["gqa*"])
    assert [axis.get_title() for axis in drawn[1].axes if axis.get_title()] == ["GQA, mean-pool"]
    with pytest.raises(ConfigError, match="--curves gqa9: no such config; did you mean 'gqa"):
        check_patterns(["gqa9"], [section])


def test_many_groups_are_rows_with_their_labels_beside_them(drawn, tmp_path):
    """And so are values that have no order: no legend of groups, one entry for each value."""
    runs, tops = [], {}
    for rank in range(2, 10):
        for init in ("pretrained", "random"):
            top1 = 90.0 + rank / 10 - 5 * (init == "random")
            tops[rank, init] = top1
            attention = {**HOSVD, "ranks": [rank, 8, 8], "init": init}
            runs += [run_results(f"t{rank}{init}", attention, 1000 * rank, top1 + seed, seed) for seed in (0, 1)]
    (section,) = sections(runs)
    lines = option_lines(section, "init")
    assert draw_ablation("init", lines, tmp_path) == "by_init.png"
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [line.label for line in lines]
    found = labelled(axis)
    assert set(found) == {"HOSVD", "random"}
    for name, init in (("HOSVD", "pretrained"), ("random", "random")):
        assert sorted(found[name].get_xdata()) == pytest.approx(
            sorted(t + 0.5 for (_, i), t in tops.items() if i == init)
        )
        rows = np.round(found[name].get_ydata() - axis.get_yticks(), 6)
        assert len(set(rows)) == 1  # each in its group's row, above or below the middle
    assert found["HOSVD"].get_ydata()[0] < found["random"].get_ydata()[0]
    legend = drawn[0].legends[0].get_window_extent()
    assert legend.height < axis.get_window_extent().height / 3
    widest = max(label.get_window_extent().width for label in axis.get_yticklabels())
    assert axis.get_position().width > 0.3
    assert widest < drawn[0].get_size_inches()[0] * drawn[0].dpi / 2


def test_panels_of_curves_fill_their_rows(drawn, tmp_path):
    """Five of them: three and two, not four and one."""
    starts = [{"init": "random"}, {}, {"conversion": "hooi"}, {"calibration": {"images": 8}},
              {"calibration": {"images": 8, "refine_steps": 5}}]  # fmt: skip
    runs = [run_results(f"t{i}", {**HOSVD, "ranks": [2, 4, 4], **start}, 1000, 90.0) for i, start in enumerate(starts)]
    draw_curves(*sections(runs), tmp_path)
    panels = [axis for axis in drawn[0].axes if axis.get_title()]
    assert len(panels) == 5
    assert panels[0].get_gridspec().ncols == 3


def test_epochs_to_recover():
    (section,) = sections(study(seeds=2, noise=0.0))
    setting = next(s for s in section.settings if s.name == "tucker-8-16-16")
    # its curve is 94.56 - 30 / 2^(epoch - 1), and 94.56 after the last of 8 epochs
    assert epochs_to_reach(setting, 90.0) == 4
    assert epochs_to_reach(setting, 94.5) == 8
    assert epochs_to_reach(setting, 94.6) is None
    table = recovery_table(section)
    row = next(row for row in table.rows if row[0] == "tucker-2-4-4")
    assert row[-3:] == ["5", ">8", ">8"]  # within 5, 2 and 1 of 95
    without = study(seeds=2)
    for run in without:
        del run["curve"]
    assert recovery_table(*sections(without)) is None


def test_ablations_take_settings_that_agree_in_all_else(drawn, tmp_path):
    runs = []
    for ranks, top1 in (((2, 8, 8), 90.0), ((4, 8, 8), 92.0), ((16, 8, 8), 93.0), ((4, 16, 16), 94.0)):
        runs += [
            run_results(f"t{ranks}", {**HOSVD, "ranks": list(ranks)}, 1000 * sum(ranks), top1, seed) for seed in (0, 1)
        ]
    random = {**HOSVD, "ranks": [4, 8, 8], "init": "random"}
    runs += [run_results("random", random, 20_000, 80.0, seed) for seed in (0, 1)]
    (section,) = sections(runs)
    (line,) = option_lines(section, "attention.ranks.0")
    assert line.values == ["2", "4", "16"]
    assert [s.score for s in line.settings] == [90, 92, 93]
    assert line.label == "Tucker ranks=_,8,8, HOSVD"
    (start,) = option_lines(section, "init")
    assert dict(zip(start.values, (s.score for s in start.settings), strict=True)) == {"HOSVD": 92, "random": 80}
    assert option_lines(section, "attention.ranks.1") == []
    (both,) = option_lines(section, "attention.ranks.1,attention.ranks.2")
    assert both.values == ["8, 8", "16, 16"]
    assert usual_options(section) == ["init", "attention.ranks.0", "attention.ranks.1,attention.ranks.2"]
    table = ablation_table("attention.ranks.0", [line])
    assert list(table.header) == ["head rank", "2", "4", "16"]
    assert sorted(("epochs=16", "epochs=4", "epochs=1"), key=natural) == ["epochs=1", "epochs=4", "epochs=16"]
    assert table.rows == [["Tucker ranks=_,8,8, HOSVD", "90.00 ± 0.00", "92.00 ± 0.00", "93.00 ± 0.00"]]
    assert draw_ablation("attention.ranks.0", [line], tmp_path) == "by_ranks_0.png"
    (axis,) = drawn[0].axes
    assert list(labelled(axis)[line.label].get_xdata()) == [2, 4, 16]
    with pytest.raises(ConfigError, match="no run's config has 'attention.rank.0'; did you mean 'attention.ranks.0'"):
        check_options(["attention.rank.0"], [section])
