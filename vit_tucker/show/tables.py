"""Tables of text cells as Markdown, CSV and LaTeX, and how numbers are written in them."""

import csv
import io
from collections.abc import Sequence
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
        stem: of its files.
        header, rows, text_columns: what people read; see ``markdown``.
        raw_header, raw_rows: its numbers with all their digits.
        notes: what must be known to read it.
        not_in_latex: columns that a paper has no room for.
    """

    stem: str
    header: Sequence[str]
    rows: Rows
    text_columns: int
    raw_header: Sequence[str]
    raw_rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()
    not_in_latex: Sequence[str] = ()

    def markdown(self) -> str:
        """The table and its notes."""
        table = markdown(self.header, self.rows, self.text_columns)
        return "\n".join([table, "", *(f"- {note}" for note in self.notes)]).rstrip()

    def save(self, folder: Path) -> None:
        """Write it as CSV and LaTeX."""
        (folder / f"{self.stem}.csv").write_text(csv_text(self.raw_header, self.raw_rows))
        kept = [i for i, name in enumerate(self.header) if name not in self.not_in_latex]
        header, *rows = [[row[i] for i in kept] for row in (self.header, *self.rows)]
        text_columns = sum(i < self.text_columns for i in kept)
        note = "\n".join(note.replace("`", "") for note in self.notes)
        (folder / f"{self.stem}.tex").write_text(latex(header, rows, text_columns, note))


def markdown(header: Sequence[str], rows: Rows, text_columns: int = 1) -> str:
    """A Markdown table whose columns line up.

    Args:
        header: names of the columns.
        rows: cells, as many per row as there are columns.
        text_columns: how many of the first columns are text, aligned left; the others are numbers, aligned right.
    """
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [cell.ljust(width) if i < text_columns else cell.rjust(width)
         for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    ]  # fmt: skip
    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def latex(header: Sequence[str], rows: Rows, text_columns: int = 1, note: str = "") -> str:
    """A LaTeX tabular with the rules of booktabs; the caption is the paper's.

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
    """Text as LaTeX prints it literally.

    A cell may begin with a bracket: behind the end of a row it would be read as an option of the line break.
    """
    escaped = "".join(LATEX_ESCAPES.get(character, character) for character in text)
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A CSV table; None is an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def count(value: float | None) -> str:
    """'50,240', '-' for None."""
    return "-" if value is None else f"{round(value):,}"


def decimal(value: float | None, digits: int = 2) -> str:
    """'98.61', '-' for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def spread(mean: float | None, std: float | None, digits: int = 2) -> str:
    """'98.61 ± 0.20'; '98.61 ± -' where one run alone has no spread; '-' for None."""
    return "-" if mean is None else f"{mean:.{digits}f} ± {decimal(std, digits)}"


def short_count(value: float) -> str:
    """'264k' or '1.28M': three figures for axes and sentences; below 1,000 the number itself."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.9995:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"
