"""Everything that is written of some runs: tables, figures, and the one file that holds their results."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vit_tucker.errors import ConfigError
from vit_tucker.report.collect import KEPT, collect, write_results
from vit_tucker.report.curves import draw_curves, recovery_table
from vit_tucker.report.figures import COSTS, draw_accuracy
from vit_tucker.report.formats import Table
from vit_tucker.report.matched import Comparison, compare_methods
from vit_tucker.report.sections import Section, sections
from vit_tucker.report.tables import headline_table, matched_table, seed_list, settings_table

SWEEP = "sweep.yaml"
RECIPE_SHOWN = ("epochs", "opt", "lr", "global_batch_size", "sched", "warmup_epochs", "weight_decay", "smoothing")


@dataclass(frozen=True)
class SectionOutput:
    """What was made of a section.

    Attributes:
        section: the settings.
        folder: where its files are, relative to the study's.
        comparison: of Tucker with the other methods, where there are such.
        tables, figures: by title; figures are names of PNG files.
        notes: what is missing.
    """

    section: Section
    folder: str
    comparison: Comparison | None
    tables: dict[str, Table]
    figures: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """Some runs and what was made of them.

    Attributes:
        title, about: of the sweep's file, or the folder's name and ''.
        outputs: one per host and data set.
        notes: runs that were left out.
    """

    title: str
    about: str
    outputs: list[SectionOutput]
    notes: tuple[str, ...]


def write_study(paths: Sequence[Path], out: Path, curves: Sequence[str] = ()) -> Study:
    """Read runs and write results.jsonl, tables.md and, for each table and figure, its own files.

    Args:
        paths: see ``collect``.
        out: folder for the files; several hosts or data sets get a folder each inside it.
        curves: names of configs whose training curves are drawn, with wildcards; all if empty.

    Raises:
        ConfigError: no finished runs, or not such ones.
    """
    found = collect(paths)
    title, about, sweep = read_sweep([*paths, out])
    parts = sections(found.results)
    out.mkdir(parents=True, exist_ok=True)
    write_results(out / KEPT, found.results)
    if sweep is not None and sweep.resolve() != (out / SWEEP).resolve():
        shutil.copyfile(sweep, out / SWEEP)
    outputs = [write_section(section, out, section.slug if len(parts) > 1 else "", curves) for section in parts]
    study = Study(title or out.resolve().name, about, outputs, found.notes)
    (out / "tables.md").write_text(document(study))
    return study


def read_sweep(paths: Sequence[Path]) -> tuple[str, str, Path | None]:
    """Title and text of the first sweep.yaml in some folders, and the file.

    Raises:
        ConfigError: the file is no YAML mapping.
    """
    file = next((path / SWEEP for path in paths if (path / SWEEP).is_file()), None)
    if file is None:
        return "", "", None
    try:
        content: Any = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a mapping of keys")
    return str(content.get("title") or ""), " ".join(str(content.get("about") or "").split()), file


def write_section(section: Section, out: Path, name: str, curves: Sequence[str]) -> SectionOutput:
    """Tables and figures of one host and data set."""
    folder = out / name
    folder.mkdir(exist_ok=True)
    comparison = compare_methods(section)
    tables: dict[str, Table | None] = {"Settings": settings_table(section)}
    if comparison is not None:
        tables["Attention parameters at equal accuracy"] = matched_table(comparison)
        tables["In short"] = headline_table(comparison)
    tables["Epochs to recover"] = recovery_table(section)
    figures, notes = {}, []
    for cost, (label, _) in COSTS.items():
        figures[f"Accuracy over {label}"], missing = draw_accuracy(section, cost, folder)
        notes += missing
    figures["Training"] = draw_curves(section, folder, curves)
    made = {title: table for title, table in tables.items() if table is not None}
    for table in made.values():
        table.save(folder)
    drawn = {title: file for title, file in figures.items() if file is not None}
    return SectionOutput(section, name, comparison, made, drawn, notes)


def document(study: Study) -> str:
    """tables.md."""
    lines = [f"# {study.title}", "", *([study.about, ""] if study.about else [])]
    for output in study.outputs:
        lines += [f"## {output.section.title}", "", facts(output.section), ""]
        for title, table in output.tables.items():
            lines += [f"### {title}", "", table.markdown(), ""]
        for title, file in output.figures.items():
            lines += [f"![{title}]({Path(output.folder, file).as_posix()})", ""]
        lines += [f"- {note}" for note in output.notes]
        lines += [""] * bool(output.notes)
    lines += [f"- {note}" for note in study.notes]
    return "\n".join(lines).rstrip() + "\n\nWritten by `experiments/tables.py` from results.jsonl alone.\n"


def facts(section: Section) -> str:
    """What was run, in one paragraph: data, recipe, seeds, machine, versions, commits, dates."""
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
    return (
        f"{first['num_train']} training and {first['data']['num_eval']} evaluation images; {', '.join(shown)}; {len(runs)} runs, "
        f"seeds {seed_list(seeds)}; {reference}. {machine}; {versions}; commit {commits}; finished "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def distinct(texts: Any) -> str:
    """Each text once."""
    return "; or ".join(dict.fromkeys(texts))
