"""The map of what can be patched, as Markdown: a summary, a table by kind of attention, a table by model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vit_tucker.show.tables import markdown

Entry = dict[str, Any]


HEAD = """# What can be patched

Every model of timm {version} {which}that has attention, read from its structure; made by
`python -m vit_tucker hosts {arguments}`.

**{summary}.**

- **exact**: the method carries all that the model's attention does; at full rank the patched model gives the model's own
  outputs (`benchmarks/hosts.py` patches and runs each of them). Smaller ranks, fewer key/value heads and narrower latents
  approximate.
- **exact (latent RoPE)**: the same, from a key rank of `H * D` on. All heads share one latent key, whose pairs keep rotations of
  the heads' pairs; below that rank some of them are missing, and the patch report says so.
- **n of m layers**: `layers=` or `exclude=` can choose those that can be replaced.
- **refused**: `patch` raises one error with the reason and changes nothing.
- **stays as it is**: pooling, cross-attention, attention of channels or of a class token alone; no method replaces them.

## By kind of attention
"""
LEGEND = """
Beyond plain attention: `qk_norm` norms of queries and keys, `scale_norm` a norm and `gate` a gate of the output, `rope` rotary
embeddings, `position_bias` relative position bias, `layout` tokens as a grid or with channels first.

## Reasons
"""


class Notes(dict[str, int]):
    """Numbers of reasons, in the order in which they come up."""

    def cell(self, status: str) -> str:
        """Returns 'exact', 'refused [3]' or '2 of 12 layers [4]'."""
        verdict, colon, reasons = status.partition(": ")
        if not colon:
            return status
        marks = [str(self.setdefault(reason, len(self) + 1)) for reason in reasons.split("; ")]
        return f"{verdict} [{', '.join(marks)}]"

    def lines(self) -> list[str]:
        """Returns the notes, '[3] ...'."""
        return [f"- [{number}] {reason}" for reason, number in self.items()]


def counts(values: dict[str, int]) -> str:
    """Returns '24 eva.EvaAttention, 1 attention_pool.AttentionPoolLatent'."""
    return ", ".join(f"{count} {name}" for name, count in values.items())


def hosts_table(entries: Sequence[Entry], notes: Notes, aligned: bool = True) -> str:
    """Returns a table with a row for each model.

    Args:
        entries: one for each model; at least one.
        notes: numbered footnotes.
        aligned: pad the cells.
    """
    methods = list(entries[0]["methods"])
    header = ("model", "self-attention", "heads", *methods, "stays as it is")
    rows = [
        (entry["name"], counts(entry["layers"]), ", ".join(map(str, entry["heads"])),
         *(notes.cell(entry["methods"][method]) for method in methods), counts(entry["left_alone"]))
        for entry in entries
    ]  # fmt: skip
    return markdown(header, rows, len(header), aligned=aligned, colons=False)


def kind_table(entries: Sequence[Entry], notes: Notes) -> str:
    """Returns a table with a row for each kind of attention: its classes, its features, and the status of each method."""
    methods = list(entries[0]["methods"])
    kinds: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        verdicts = (notes.cell(entry["methods"][method]) for method in methods)
        kind = (", ".join(entry["layers"]), ", ".join(entry["features"]), *verdicts)
        kinds.setdefault(kind, []).append(entry["name"])
    rows = [(cells[0] or "none", cells[1], str(len(names)), names[0], *cells[2:]) for cells, names in kinds.items()]
    rows.sort(key=lambda row: -int(row[2]))
    header = ("self-attention", "beyond plain attention", "models", "for example", *methods)
    return markdown(header, rows, len(header), colons=False)


def summary(entries: Sequence[Entry]) -> str:
    """Returns a line with the number of models whose every attention layer each method can replace."""
    exact = Counter(
        method for entry in entries for method in entry["methods"] if entry["methods"][method].startswith("exact")
    )
    models = "1 model" if len(entries) == 1 else f"{len(entries)} models"
    taken = ", ".join(f"{method} {exact[method]}" for method in entries[0]["methods"])
    return f"{models} with attention; patched as a whole by: {taken}"


def terminal_map(entries: Sequence[Entry]) -> str:
    """Returns the table by model with its notes, for people at a terminal."""
    notes = Notes()
    table = hosts_table(entries, notes)
    return "\n".join([table, "", *notes.lines(), summary(entries)])


def document(entries: Sequence[Entry], timm_version: str, file: str, pattern: str | None = None) -> str:
    """Returns the whole map as a Markdown file.

    Args:
        entries: of the models.
        timm_version: by which they were read.
        file: where it goes, for the command in its head.
        pattern: of the models' names, None for all.
    """
    notes = Notes()
    kinds, models = kind_table(entries, notes), hosts_table(entries, notes, aligned=False)
    which, option = ("", "") if pattern is None else (f"named `{pattern}` ", f"--filter '{pattern}' ")
    head = HEAD.format(version=timm_version, which=which, arguments=f"{option}--out {file}", summary=summary(entries))
    return "\n".join([head, kinds, LEGEND, *notes.lines(), "", "## By model", "", models, ""])
