"""The table that a run prints at its end, in 80 columns: a row has several lines, as the headings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cases import Case

try:
    from rich.table import Table
except ImportError:
    from plain import Table


def overview(headings: Sequence[str], rows: list[tuple[Case, list[str]]]) -> Table:
    """Lists the cases under the names of their families; the last cell of each is its verdict."""
    table = Table(box=None, padding=(0, 1, 1, 0))  # a blank between columns, a line between rows
    table.add_column("case", overflow="fold", min_width=len("focal+LS+weights"))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", min_width=len("missed: eager,"))
    for family, of_family in itertools.groupby(rows, key=lambda row: row[0].family):
        table.add_row(f"[bold]{family}")
        for case, cells in of_family:
            table.add_row(case.label.removeprefix(f"{family}/").replace("/", " "), *cells)
    return table
