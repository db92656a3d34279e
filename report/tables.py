"""What reports share: tables as Markdown and CSV, and the pictures where matplotlib is installed."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from data import text_cell
from machine import hardware


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads on a terminal too."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in lines)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping], errors: str = "strict") -> None:
    """Rows as CSV; a column that a row lacks stays empty, and no text is taken for a formula."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: text_cell(c) if isinstance(c, str) else c for key, c in row.items()} for row in rows)
    hardware.write_text(path, stream.getvalue(), errors)


def find_plots() -> ModuleType | None:
    """`report.plots`; None without matplotlib."""
    try:
        import report.plots as plots
    except ImportError:
        return None
    return plots
