"""Tables of text cells as plain text, Markdown, CSV, LaTeX and JSON, and how numbers are written in them."""

import csv
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Rows = Sequence[Sequence[str]]

LATEX_ESCAPES = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
}


@dataclass(frozen=True)
class Table:
    """A table as people read it, and as machines do.

    Attributes:
        header, rows, text_columns: what people read; see ``markdown``.
        raw_header, raw_rows: its values with all their digits.
        notes: what must be known to read it.
        title: a line above; '' for none.
        stem: of its files.
        not_in_latex: columns that a paper has no room for.
    """

    header: Sequence[str]
    rows: Rows
    text_columns: int
    raw_header: Sequence[str]
    raw_rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()
    title: str = ""
    stem: str = ""
    not_in_latex: Sequence[str] = ()

    def markdown(self) -> str:
        """Returns the table with its title and notes."""
        title, notes = [self.title, ""] if self.title else [], [f"- {note}" for note in self.notes]
        return "\n".join(
            [*title, markdown(self.header, self.rows, self.text_columns), *([""] if notes else []), *notes]
        )

    def latex(self) -> str:
        """Returns the columns for a paper; title and notes are comments."""
        kept = [i for i, name in enumerate(self.header) if name not in self.not_in_latex]
        header, *rows = [[row[i] for i in kept] for row in (self.header, *self.rows)]
        comments = "\n".join([self.title, *self.notes]).strip("\n").replace("`", "")
        return latex(header, rows, sum(i < self.text_columns for i in kept), comments)

    def render(self, style: str) -> str:
        """Returns the table as "markdown", "csv", "latex" or "json"."""
        if style == "json":
            rows = [dict(zip(self.raw_header, row, strict=True)) for row in self.raw_rows]
            return json.dumps({"title": self.title, "rows": rows, "notes": list(self.notes)}, indent=2)
        if style == "csv":
            return csv_text(self.raw_header, self.raw_rows)
        return self.latex() if style == "latex" else self.markdown()

    def save(self, folder: Path) -> None:
        """Writes it as CSV and LaTeX."""
        for style, ending in (("csv", "csv"), ("latex", "tex")):
            (folder / f"{self.stem}.{ending}").write_text(self.render(style))


def align(rows: Rows, left: Collection[int], least: int = 0) -> list[list[str]]:
    """Returns cells padded to the width of their column.

    Args:
        rows: cells, as many per row as there are columns.
        left: columns of text, aligned left; the others are numbers, aligned right.
        least: the smallest width.
    """
    widths = [max(least, *map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [cell.ljust(width) if i in left else cell.rjust(width)
         for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]  # fmt: skip


def plain(rows: Rows, left: Collection[int], rule_after: Collection[int] = ()) -> str:
    """Returns a table of plain text for a terminal or a log.

    Args:
        rows, left: see ``align``.
        rule_after: rows that have a line of dashes below them.
    """
    lines = []
    for number, cells in enumerate(align(rows, left)):
        line = "  ".join(cells)
        lines += [line.rstrip(), *(["-" * len(line)] if number in rule_after else [])]
    return "\n".join(lines)


def markdown(
    header: Sequence[str], rows: Rows, text_columns: int = 1, *, aligned: bool = True, colons: bool = True
) -> str:
    """Returns a table in Markdown, with its header.

    Args:
        header: names of the columns.
        rows: cells, as many per row as there are columns.
        text_columns: how many of the first columns are text, aligned left; the others are numbers, aligned right.
        aligned: the columns line up; files of many long rows are several times smaller if they don't.
        colons: the rule marks columns of numbers, for viewers that align them too.
    """
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    cells = align(cells, range(text_columns), 3 if colons else 1) if aligned else cells
    widths = [len(cell) if aligned else 1 for cell in cells[0]]
    if colons:
        rule = [f" {'-' * width} " if i < text_columns else f" {'-' * (width - 1)}: " for i, width in enumerate(widths)]
    else:
        rule = ["-" * (width + 2) for width in widths]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def latex(header: Sequence[str], rows: Rows, text_columns: int = 1, note: str = "") -> str:
    """Returns a LaTeX tabular with the rules of booktabs; the caption is the paper's.

    Args:
        header, rows, text_columns: as for ``markdown``.
        note: a comment above it; several lines are allowed.
    """
    comments = [f"% {line}" for line in (*note.splitlines(), r"needs \usepackage{booktabs}")]
    columns = "l" * text_columns + "r" * (len(header) - text_columns)
    lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in (header, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*comments, rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", ""])


def escape_latex(text: str) -> str:
    """Returns text that LaTeX prints literally.

    A cell may begin with a bracket: behind the end of a row it would be read as an option of the line break.
    """
    escaped = "".join(LATEX_ESCAPES.get(character, character) for character in text)
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def csv_text(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a CSV table; None is an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def count(value: float | None) -> str:
    """Returns '50,240'; '-' for None."""
    return "-" if value is None else f"{round(value):,}"


def decimal(value: float | None, digits: int = 2) -> str:
    """Returns '98.61'; '-' for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """Returns '2.3%'; '-' for None."""
    return "-" if value is None else f"{value:.1%}"


def spread(mean: float | None, std: float | None, digits: int = 2) -> str:
    """Returns '98.61 ± 0.20'; '98.61 ± -' where one run alone has no spread; '-' for None.

    Args:
        mean: None for no value.
        std: standard deviation, None with one run alone.
        digits: behind the point.
    """
    return "-" if mean is None else f"{mean:.{digits}f} ± {decimal(std, digits)}"


def short_count(value: float) -> str:
    """Returns '264k' or '1.28M', three figures for axes and sentences; below 1,000 the number itself."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.9995:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"
