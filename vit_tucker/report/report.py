"""The report: what was run, what came out, and what holds of the paper's claim, from kept results alone."""

import os
from operator import itemgetter
from pathlib import Path

from vit_tucker.errors import ConfigError
from vit_tucker.report.ablations import ablation_table, name_of, option_lines, usual_options
from vit_tucker.report.collect import KEPT, SWEEP, collect
from vit_tucker.report.matched import compare_methods
from vit_tucker.report.sections import Section, sections
from vit_tucker.report.study import SweepNotes, facts, read_sweep, write_study
from vit_tucker.report.tables import BOOTSTRAP_NOTE, BOUNDS_NOTE, DENSE_NOTE, headline_table
from vit_tucker.report.verdicts import CLAIM, RULES, verdicts, word
from vit_tucker.show.tables import markdown

FIGURE = "accuracy_params.png"
SUMMARY = ("study", "host and data", "against", "median factor", "fewer at equal accuracy", "as good as dense",
           "fewer at dense accuracy")  # fmt: skip


def write_report(folder: Path) -> Path:
    """Writes README.md over the studies in a folder.

    Args:
        folder: each folder in it with a results.jsonl is a study, and gets tables if it has none; others with a README.md are
            named.

    Returns:
        The README.

    Raises:
        ConfigError: there is no study.
    """
    studies = sorted(file.parent for file in folder.glob(f"*/{KEPT}"))
    if not studies:
        make = f"make one by: vit-tucker tables RUNS... --out {folder / 'NAME'}"
        raise ConfigError(f"{folder}: no folder in it has a {KEPT}; {make}")
    others = sorted(readme.parent.name for readme in folder.glob("*/README.md") if readme.parent not in studies)
    rows: list[list[str]] = []
    chapters: list[tuple[bool, list[str]]] = []
    for study in studies:
        if not (study / "tables.md").is_file():
            write_study([study], study)
        before = len(rows)
        lines = chapter(study, rows)
        chapters.append((len(rows) == before, lines))
    lines = ["# Results", "", "## The claim", "", CLAIM, "", "## In short", ""]
    if rows:
        lines += [markdown(SUMMARY, rows, 3), ""]
    lines += [RULES, "", f"- {BOUNDS_NOTE}", f"- as good as dense: {DENSE_NOTE}", f"- {BOOTSTRAP_NOTE}", ""]
    for _, chapter_lines in sorted(chapters, key=itemgetter(0)):  # comparisons of methods first, then ablations
        lines += chapter_lines
    if others:
        lines += ["## Single runs", "", ", ".join(f"[{name}]({name})" for name in others), ""]
    lines += [
        "Written by `experiments/report.py` from the results.jsonl of each study; no number is typed by hand.",
        "",
    ]
    readme = folder / "README.md"
    readme.write_text("\n".join(lines))
    return readme


def chapter(study: Path, rows: list[list[str]]) -> list[str]:
    """Returns lines on one study; its lines of the summary are added to ``rows``."""
    found = collect([study])
    sweep = read_sweep([study])
    title = sweep.title or study.name
    lines = [f"## {title}", "", *([sweep.about, ""] if sweep.about else [])]
    parts = sections(found.results)
    for section in parts:
        lines += [f"### {section.title}", "", facts(section), ""]
        lines += section_lines(section, title, rows, study.parent, study / ("" if len(parts) == 1 else section.slug))
    lines += [f"All tables and figures: [{study.name}/tables.md]({study.name}/tables.md). To make them anew:", ""]
    return [*lines, "```bash", *commands(study, sweep), "```", ""]


def section_lines(section: Section, study: str, rows: list[list[str]], root: Path, folder: Path) -> list[str]:
    """Returns figure, numbers and verdicts of one host and data set with files in ``folder``; links are relative to ``root``."""
    comparison = compare_methods(section)
    if comparison is None:
        return ablation_lines(section, root, folder)
    for headline in comparison.headlines:
        dense = "-" if headline.at_dense is None else str(headline.at_dense)
        rows.append([study, section.title, headline.name, str(headline.median), word(headline.median), dense,
                     word(headline.at_dense)])  # fmt: skip
    table = headline_table(comparison)
    sentences = [f"- {sentence}" for sentence in verdicts(comparison)]
    numbers = [markdown(table.header, table.rows, table.text_columns), ""]
    return [*picture(section.title, root, folder / FIGURE), *numbers, *sentences, ""]


def picture(title: str, root: Path, file: Path) -> list[str]:
    """Returns a link to a figure, if it is there."""
    return [f"![{title}]({file.relative_to(root).as_posix()})", ""] if file.is_file() else []


def ablation_lines(section: Section, root: Path, folder: Path) -> list[str]:
    """Returns accuracy against each option that varies alone, of a study that compares Tucker with itself."""
    lines = []
    for option in usual_options(section):
        title = f"Accuracy by {name_of(option)}"
        table = ablation_table(option, option_lines(section, option))
        lines += [f"#### {title}", "", table.markdown(), "", *picture(title, root, folder / f"{table.stem}.png")]
    return lines or ["No settings that differ in one option alone.", ""]


def commands(study: Path, sweep: SweepNotes) -> list[str]:
    """Returns what reproduces a study, or its tables from its results where no sweep file is there."""
    place = Path(os.path.relpath(study)).as_posix()
    if sweep.file is None:
        return [f"./run.sh tables {place}"]
    return [f"./run.sh sweep --cfg {place}/{SWEEP} && ./run.sh tables {sweep.output_dir} --out {place}"]
