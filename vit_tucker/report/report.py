"""The report: what was run, what came out, and what holds of the paper's claim, from kept results alone."""

import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from vit_tucker.errors import ConfigError
from vit_tucker.report.ablations import ablation_table, name_of, option_lines, usual_options
from vit_tucker.report.collect import KEPT, SWEEP, collect
from vit_tucker.report.matched import MethodComparison, compare_methods
from vit_tucker.report.overview import write_overview
from vit_tucker.report.sections import Section, sections
from vit_tucker.report.starts import (
    NOTES,
    StartComparison,
    compare_starts,
    start_sentences,
    starts_table,
    total_sentences,
)
from vit_tucker.report.study import SweepNotes, facts, read_sweep, write_study
from vit_tucker.report.tables import BOOTSTRAP_NOTE, BOUNDS_NOTE, DENSE_NOTE, headline_table, settings_table
from vit_tucker.report.verdicts import CLAIM, RULES, verdicts, word
from vit_tucker.show.tables import markdown

FIGURE = "accuracy_params.png"
SUMMARY = ("study", "host and data", "against", "median factor", "fewer at equal accuracy", "as good as dense",
           "fewer at dense accuracy")  # fmt: skip


class KeptSection(NamedTuple):
    """One host and data set of a study.

    Attributes:
        section: its settings.
        folder: of its figures.
        comparison: of Tucker with other methods; None where the study does not compare them.
        starts: how starts of one method compare.
    """

    section: Section
    folder: Path
    comparison: MethodComparison | None
    starts: list[StartComparison]


class KeptStudy(NamedTuple):
    """A study that ``tables --out`` kept.

    Attributes:
        folder: of its results.
        title: of its sweep, or the folder's name.
        sweep: what its sweep's file says.
        parts: its hosts and data sets.
    """

    folder: Path
    title: str
    sweep: SweepNotes
    parts: list[KeptSection]

    @property
    def order(self) -> int:
        """Returns 0 for studies that compare Tucker with other methods, 1 for others: the order of chapters."""
        return int(all(part.comparison is None for part in self.parts))


def write_report(folder: Path) -> Path:
    """Writes README.md over the studies in a folder, and the picture of those that compare methods.

    Args:
        folder: each folder in it with a results.jsonl is a study, and gets tables if it has none; others with a README.md are
            named.

    Returns:
        The README.

    Raises:
        ConfigError: there is no study.
    """
    places = sorted(file.parent for file in folder.glob(f"*/{KEPT}"))
    if not places:
        make = f"make one by: vit-tucker tables RUNS... --out {folder / 'NAME'}"
        raise ConfigError(f"{folder}: no folder in it has a {KEPT}; {make}")
    others = sorted(readme.parent.name for readme in folder.glob("*/README.md") if readme.parent not in places)
    studies = sorted((read_study(place) for place in places), key=attrgetter("order"))
    pictures = write_overview([part.section for study in studies for part in study.parts], folder)
    lines = ["# Results", "", *claim_lines(studies), *overview_lines(pictures), *summary_lines(studies)]
    lines += starts_lines(studies)
    for study in studies:
        lines += chapter(study)
    if others:
        lines += ["## Single runs", "", ", ".join(f"[{name}]({name})" for name in others), ""]
    lines += [
        "Written by `experiments/report.py` from the results.jsonl of each study; no number is typed by hand.",
        "",
    ]
    readme = folder / "README.md"
    readme.write_text("\n".join(lines))
    return readme


def read_study(folder: Path) -> KeptStudy:
    """Reads and compares a study's results; writes its tables if it has none."""
    if not (folder / "tables.md").is_file():
        write_study([folder], folder)
    sweep = read_sweep([folder])
    found = sections(collect([folder]).results)
    parts = [
        KeptSection(one, folder / ("" if len(found) == 1 else one.slug), compare_methods(one), compare_starts(one))
        for one in found
    ]
    return KeptStudy(folder, sweep.title or folder.name, sweep, parts)


def claim_lines(studies: Sequence[KeptStudy]) -> list[str]:
    """Returns the paper's claim, where some study compares Tucker with other methods."""
    judged = any(part.comparison is not None for study in studies for part in study.parts)
    return ["## The claim", "", CLAIM, ""] if judged else []


def overview_lines(pictures: Sequence[str]) -> list[str]:
    """Returns the picture over all studies, in the reader's theme; nothing if there is none."""
    if not pictures:
        return []
    light, dark = pictures
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">',
        f'  <img alt="Top-1 accuracy over attention parameters, a panel for each study" src="{light}" width="800">',
        "</picture>",
        "",
    ]


def summary_lines(studies: Sequence[KeptStudy]) -> list[str]:
    """Returns a table of verdicts and the rules behind them; nothing where no study compares Tucker with other methods."""
    rows = []
    for study in studies:
        for part in study.parts:
            for headline in [] if part.comparison is None else part.comparison.headlines:
                dense = "-" if headline.at_dense is None else str(headline.at_dense)
                rows.append([study.title, part.section.title, headline.name, str(headline.median), word(headline.median),
                             dense, word(headline.at_dense)])  # fmt: skip
    if not rows:
        return []
    rules = [RULES, "", f"- {BOUNDS_NOTE}", f"- as good as dense: {DENSE_NOTE}", f"- {BOOTSTRAP_NOTE}", ""]
    return ["## In short", "", markdown(SUMMARY, rows, 3), "", *rules]


def starts_lines(studies: Sequence[KeptStudy]) -> list[str]:
    """Returns a table of starts compared, over all studies; nothing where no study varies the start."""
    rows, header, compared, texts = [], [], [], 0
    for study in studies:
        for part in study.parts:
            if part.starts:
                table = starts_table(part.starts)
                header, texts = ["study", *table.header], table.text_columns + 1
                rows += [[study.title, *row] for row in table.rows]
                compared += part.starts
    if not rows:
        return []
    totals = [f"- {sentence}" for sentence in total_sentences(compared)]
    notes = [f"- {note}" for note in NOTES]
    return ["## How the attention starts", "", markdown(header, rows, texts), "", *totals, *notes, ""]


def chapter(study: KeptStudy) -> list[str]:
    """Returns lines on one study."""
    lines = [f"## {study.title}", "", *([study.sweep.about, ""] if study.sweep.about else [])]
    for part in study.parts:
        lines += [f"### {part.section.title}", "", facts(part.section), "", *section_lines(part, study.folder.parent)]
    tables = f"{study.folder.name}/tables.md"
    lines += [f"All tables and figures: [{tables}]({tables}). To make them anew:", ""]
    return [*lines, "```bash", *commands(study.folder, study.sweep), "```", ""]


def section_lines(part: KeptSection, root: Path) -> list[str]:
    """Returns figure, settings and what was found of one host and data set; links are relative to ``root``."""
    lines = picture(part.section.title, root, part.folder / FIGURE)
    if part.comparison is not None:
        table = headline_table(part.comparison)
        lines += [markdown(table.header, table.rows, table.text_columns), ""]
        lines += [*(f"- {sentence}" for sentence in verdicts(part.comparison)), ""]
    if part.starts:
        lines += [*(f"- {sentence}" for sentence in start_sentences(part.starts)), ""]
    lines += ["#### Settings", "", settings_table(part.section).markdown(), ""]
    return lines if part.comparison is not None else [*lines, *ablation_lines(part.section, root, part.folder)]


def picture(title: str, root: Path, file: Path) -> list[str]:
    """Returns a link to a figure, if it is there.

    Args:
        title: what stands in its place where pictures are not shown.
        root: folder of the page.
        file: the figure.
    """
    return [f"![{title}]({file.relative_to(root).as_posix()})", ""] if file.is_file() else []


def ablation_lines(section: Section, root: Path, folder: Path) -> list[str]:
    """Returns accuracy against each option that varies alone, of a study without verdicts.

    Args:
        section: of one host and data set.
        root: folder of the page.
        folder: of the figures.
    """
    lines = []
    for option in usual_options(section):
        title = f"Accuracy by {name_of(option)}"
        table = ablation_table(option, option_lines(section, option))
        lines += [f"#### {title}", "", table.markdown(), "", *picture(title, root, folder / f"{table.stem}.png")]
    return lines


def commands(study: Path, sweep: SweepNotes) -> list[str]:
    """Returns what reproduces a study, or its tables from its results where no sweep file is there."""
    place = Path(os.path.relpath(study)).as_posix()
    if sweep.file is None:
        return [f"./run.sh tables {place}"]
    return [f"./run.sh sweep --cfg {place}/{SWEEP} && ./run.sh tables {sweep.output_dir} --out {place}"]
