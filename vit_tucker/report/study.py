"""Everything that is written of some runs: tables, figures, and the one file that holds their results."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from vit_tucker.errors import ConfigError, one_line
from vit_tucker.report import ablation_figures, ablations
from vit_tucker.report.collect import KEPT, SWEEP, collect, write_results
from vit_tucker.report.curves import check_patterns, draw_curves, has_course, recovery_table
from vit_tucker.report.figures import COSTS, draw_accuracy
from vit_tucker.report.matched import compare_methods
from vit_tucker.report.sections import Section, sections
from vit_tucker.report.starts import compare_starts, starts_table
from vit_tucker.report.tables import headline_table, matched_table, seed_list, settings_table
from vit_tucker.show.tables import Table

RECIPE_SHOWN = ("epochs", "opt", "lr", "global_batch_size", "sched", "warmup_epochs", "weight_decay", "smoothing")


class Part(NamedTuple):
    """A table, a figure, or both; the figure by the name of its PNG file."""

    table: Table | None
    figure: str | None


class SectionOutput(NamedTuple):
    """The tables and figures of a section.

    Attributes:
        section: the settings.
        folder: where its files are, relative to the study's.
        parts: by title, in order.
        notes: what is missing.
    """

    section: Section
    folder: str
    parts: dict[str, Part]
    notes: list[str]


class Study(NamedTuple):
    """A set of runs, and the tables and figures of them.

    Attributes:
        title, about: of the sweep's file, or the folder's name and ''.
        outputs: one per host and data set.
        notes: runs that were left out.
    """

    title: str
    about: str
    outputs: list[SectionOutput]
    notes: tuple[str, ...]


def write_study(
    paths: Sequence[Path], out: Path, options: Sequence[str] = (), curves: Sequence[str] = (), quiet: bool = False
) -> Study:
    """Reads runs and writes results.jsonl, tables.md and, for each table and figure, its own files.

    Args:
        paths: see ``collect``.
        out: folder for the files; several hosts or data sets get a folder each inside it.
        options: keys of the config against which accuracy is tabulated and drawn, beside the usual ones; see ``option_lines``.
        curves: names of configs whose training curves are drawn, with wildcards; all if empty.
        quiet: no progress on a terminal.

    Raises:
        ConfigError: no finished runs, or no such options or configs; nothing has been written.
    """
    found = collect(paths)
    sweep = read_sweep([*paths, out])
    parts = sections(found.results)
    ablations.check_options(options, parts)
    check_patterns(curves, parts)
    out.mkdir(parents=True, exist_ok=True)
    write_results(out / KEPT, found.results)
    if sweep.file is not None and sweep.file.resolve() != (out / SWEEP).resolve():
        shutil.copyfile(sweep.file, out / SWEEP)
    names = [section.slug if len(parts) > 1 else "" for section in parts]
    figures = sum(len(COSTS) + 1 + len(drawn_options(section, options)) for section in parts)
    with tqdm(total=figures, unit="figures", disable=True if quiet else None, leave=False) as bar:
        outputs = [write_section(section, out, name, options, curves, bar.update)
                   for section, name in zip(parts, names, strict=True)]  # fmt: skip
    study = Study(sweep.title or out.resolve().name, sweep.about, outputs, found.notes)
    (out / "tables.md").write_text(study_page(study))
    return study


class SweepNotes(NamedTuple):
    """The title, text and folder that a sweep's file states.

    Attributes:
        title, about: '' where it says nothing.
        output_dir: of its runs, as sweep.py has it for this file.
        file: where it is; None if there is none.
    """

    title: str = ""
    about: str = ""
    output_dir: str = ""
    file: Path | None = None


def read_sweep(paths: Sequence[Path]) -> SweepNotes:
    """Reads the first sweep.yaml in some folders.

    Raises:
        ConfigError: the file is no YAML mapping.
    """
    file = next((path / SWEEP for path in paths if (path / SWEEP).is_file()), None)
    if file is None:
        return SweepNotes()
    try:
        content: Any = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a mapping of keys")
    title, about = (" ".join(str(content.get(key) or "").split()) for key in ("title", "about"))
    return SweepNotes(title, about, str(content.get("output_dir") or f"runs/{file.stem}"), file)


def drawn_options(section: Section, options: Sequence[str]) -> list[str]:
    """Returns the usual options that vary in a section, and those that are asked for, each once."""
    return list(dict.fromkeys((*ablations.usual_options(section), *options)))


def write_section(
    section: Section, out: Path, name: str, options: Sequence[str], curves: Sequence[str], drawn: Callable[[], object]
) -> SectionOutput:
    """Writes tables and figures of one host and data set; calls ``drawn`` after each figure.

    Args:
        section: of one host and data set.
        out: the study's folder.
        name: of the section's folder in it; '' for the study's own.
        options, curves: see ``write_study``.
        drawn: is called after each figure.
    """
    folder = out / name
    folder.mkdir(exist_ok=True)
    comparison, title = compare_methods(section), section.measures[0].stem.capitalize()
    parts = {"Settings": Part(settings_table(section), None)}
    notes: list[str] = []
    for cost, (label, _) in COSTS.items():
        figure, missing = draw_accuracy(section, cost, folder)
        parts[f"{title} over {label}"] = Part(None, figure)
        notes += missing
        drawn()
    if comparison is not None:
        parts["Attention parameters at equal accuracy"] = Part(matched_table(comparison), None)
        parts["In short"] = Part(headline_table(comparison), None)
    if section.measures[0].lowest:
        notes.append("Tables of parameters at equal accuracy, of starts and of epochs to recover are for images alone.")
    elif starts := compare_starts(section):
        parts["Starts compared"] = Part(starts_table(starts), None)
    parts["Training"] = Part(recovery_table(section), draw_curves(section, folder, curves))
    drawn()
    if not has_course(section.comparable):
        notes.append("No training curves, nor epochs to recover: no setting was evaluated after more than one epoch.")
    for option in drawn_options(section, options):
        if lines := ablations.option_lines(section, option):
            figure = ablation_figures.draw_ablation(option, lines, folder)
            parts[f"{title} by {ablations.name_of(option)}"] = Part(ablations.ablation_table(option, lines), figure)
        else:
            notes.append(f"No two settings differ in {option} alone.")
        drawn()
    for part in parts.values():
        if part.table is not None:
            part.table.save(folder)
    return SectionOutput(section, name, {title: part for title, part in parts.items() if any(part)}, notes)


def study_page(study: Study) -> str:
    """Returns the text of tables.md."""
    lines = [f"# {study.title}", "", *([study.about, ""] if study.about else [])]
    for output in study.outputs:
        lines += [f"## {output.section.title}", "", facts(output.section), ""]
        for title, (table, figure) in output.parts.items():
            lines += [f"### {title}", ""]
            lines += [table.markdown(), ""] if table is not None else []
            lines += [f"![{title}]({Path(output.folder, figure).as_posix()})", ""] if figure is not None else []
        lines += [f"- {note}" for note in output.notes]
        lines += [""] * bool(output.notes)
    lines += [f"- {note}" for note in study.notes]
    return "\n".join(lines).rstrip() + "\n\nWritten by `experiments/tables.py` from results.jsonl alone.\n"


def facts(section: Section) -> str:
    """Returns what was run, in one paragraph: data, recipe, seeds, machine, versions, commits, dates."""
    runs = section.runs
    first = runs[0]
    seeds = sorted({seed for setting in section.settings for seed in setting.seeds})
    recipe = {key.removeprefix("train."): value for key, value in section.recipe.items() if key.startswith("train.")}
    shown = [f"{key} {recipe[key]}" for key in RECIPE_SHOWN if key in recipe]
    versions = distinct(f"Python {e['python']}, torch {e['torch']}, timm {e['timm']}, accelerate {e['accelerate']}"
                        for e in (run["environment"] for run in runs))  # fmt: skip
    machine = distinct(
        f"{run['processes']} process(es) on {run['environment']['device']}, precision {run['precision']}"
        for run in runs
    )
    dense = section.dense
    reference = "no dense run" if dense is None else (
        f"dense reference {dense.name} ({section.describe_recipe(dense) or 'the same recipe'})")  # fmt: skip
    commits = distinct(commit for setting in section.settings for commit in setting.commits.split(", "))
    dates = sorted({run["finished"] for run in runs})
    unit = "tokens" if section.measures[0].lowest else "images"
    number = mode(run["num_train"] for run in runs)  # those of the recipe: a start may have seen more
    return (
        f"{number} training and {first['data']['num_eval'] or 'streamed'} evaluation {unit}; {', '.join(shown)}; "
        f"{len(runs)} runs, seeds {seed_list(seeds)}; {reference}. {machine}; {versions}; commit {commits}; finished "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def distinct(texts: Any) -> str:
    """Returns each text once, joined."""
    return "; or ".join(dict.fromkeys(texts))
