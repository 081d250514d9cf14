"""The report as a table on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.report.rows import findings, main_rows, title_of
from sparsekit.report.schema import RunReport

if TYPE_CHECKING:
    from rich.console import RenderableType


def terminal_table(report: RunReport, directory: Path | None = None) -> RenderableType:
    """Return the report for a terminal of 80 columns or more. It ends with the files, below `directory` if given."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    trustworthy = report.benchmark.trustworthy
    figures = Table()
    figures.add_column("")
    for name in ("dense", "pruned", "change"):
        figures.add_column(name, justify="right")
    for row in main_rows(report):
        # Text, not str: rich reads square brackets in a name as markup.
        figures.add_row(*(Text(cell) for cell in (row.label, row.dense, row.pruned, row.change)))

    notes = Table.grid(padding=(0, 2))
    notes.add_column(no_wrap=True, style="bold")
    notes.add_column(overflow="fold")
    for label, text in findings(report):
        doubtful = label == "speed-up" and not trustworthy
        notes.add_row(label, Text(text, style="bold yellow" if doubtful else ""))
    for warning in report.warnings:
        notes.add_row(Text("warning", style="yellow"), Text(warning, style="yellow"))
    names = "report.html  report.json  pruned.onnx  dense.onnx  pruned/"
    notes.add_row("files", Text(f"{directory}/\n{names}" if directory else f"{names}"))
    return Group(Text(title_of(report), style="bold"), figures, Padding(notes, (0, 1)))
