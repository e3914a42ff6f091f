"""The report: what was run, what came out, and what holds of the paper's claim, from kept results alone."""

import os
from pathlib import Path

from vit_tucker.errors import ConfigError
from vit_tucker.report.collect import KEPT, collect
from vit_tucker.report.formats import markdown
from vit_tucker.report.matched import compare_methods
from vit_tucker.report.sections import Section, sections
from vit_tucker.report.settings import method_name
from vit_tucker.report.study import SWEEP, Sweep, facts, read_sweep, write_study
from vit_tucker.report.tables import BOOTSTRAP_NOTE, BOUNDS_NOTE, DENSE_NOTE, headline_table
from vit_tucker.report.verdicts import CLAIM, RULES, verdicts, word

FIGURE = "accuracy_params.png"
SUMMARY = (
    *("study", "host and data", "against", "median factor", "fewer at equal accuracy"),
    *("as good as dense", "fewer at dense accuracy"),
)


def write_report(folder: Path) -> Path:
    """Write README.md over the studies in a folder.

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
        make = f"make one by experiments/tables.py RUNS... --out {folder / 'NAME'}"
        raise ConfigError(f"{folder}: no folder in it has a {KEPT}; {make}")
    others = sorted(readme.parent.name for readme in folder.glob("*/README.md") if readme.parent not in studies)
    rows: list[list[str]] = []
    chapters: list[str] = []
    for study in studies:
        if not (study / "tables.md").is_file():
            write_study([study], study)
        chapters += chapter(study, rows)
    lines = ["# Results", "", "## The claim", "", CLAIM, "", "## In short", ""]
    if rows:
        lines += [markdown(SUMMARY, rows, 3), ""]
    lines += [RULES, "", f"- {BOUNDS_NOTE}", f"- as good as dense: {DENSE_NOTE}", f"- {BOOTSTRAP_NOTE}", "", *chapters]
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
    """Lines on one study; its lines of the summary are added to ``rows``."""
    found = collect([study])
    sweep = read_sweep([study])
    title = (sweep.title if sweep is not None else "") or study.name
    lines = [f"## {title}", "", *([sweep.about, ""] if sweep is not None and sweep.about else [])]
    parts = sections(found.results)
    for section in parts:
        lines += [f"### {section.title}", "", facts(section), ""]
        figure = study / ("" if len(parts) == 1 else section.slug) / FIGURE
        if figure.is_file():
            lines += [f"![{section.title}]({figure.relative_to(study.parent).as_posix()})", ""]
        lines += section_lines(section, title, rows)
    lines += [f"All tables and figures: [{study.name}/tables.md]({study.name}/tables.md). To make them anew:", ""]
    return [*lines, "```bash", *commands(study, sweep), "```", ""]


def section_lines(section: Section, study: str, rows: list[list[str]]) -> list[str]:
    """Numbers and verdicts of one host and data set."""
    comparison = compare_methods(section)
    if comparison is None:
        return ["No runs of Tucker and another method to compare.", ""]
    for headline in comparison.headlines:
        dense = "-" if headline.at_dense is None else str(headline.at_dense)
        rows.append([study, section.title, method_name(headline.method), str(headline.median), word(headline.median), dense,
                     word(headline.at_dense)])  # fmt: skip
    table = headline_table(comparison)
    sentences = [f"- {sentence}" for sentence in verdicts(comparison)]
    return [markdown(table.header, table.rows, table.text_columns), "", *sentences, ""]


def commands(study: Path, sweep: Sweep | None) -> list[str]:
    """What reproduces a study from nothing, or its tables from its results where no sweep file is there."""
    place = Path(os.path.relpath(study)).as_posix()
    if sweep is None:
        return [f"./run.sh tables {place}"]
    return [f"./run.sh sweep --cfg {place}/{SWEEP} && ./run.sh tables {sweep.output_dir} --out {place}"]
