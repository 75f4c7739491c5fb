"""What the benchmarks use of rich, in plain text, for machines that do not have it: no colours, and columns all the
same."""

from __future__ import annotations

import itertools
import re
from typing import Any


class Table:
    def __init__(self, **_: Any) -> None:
        self.right: list[bool] = []
        self.rows: list[tuple[str, ...]] = [()]  # the headings first

    def add_column(self, heading: str, *, justify: str = "left", **_: Any) -> None:
        self.right.append(justify == "right")
        self.rows[0] += (heading,)

    def add_row(self, *cells: str) -> None:
        """A row may have fewer cells than there are columns."""
        self.rows.append((*map(without_markup, cells), *[""] * (len(self.right) - len(cells))))

    def __str__(self) -> str:
        split = [[cell.split("\n") for cell in row] for row in self.rows]  # a cell may have several lines
        widths = [max(len(line) for cell in column for line in cell) for column in zip(*split, strict=True)]
        shapes = [f"{{:{'>' if right else '<'}{width}}}" for right, width in zip(self.right, widths, strict=True)]
        lines = (itertools.zip_longest(*cells, fillvalue="") for cells in split)
        return "\n\n".join("\n".join("  ".join(shapes).format(*line).rstrip() for line in of) for of in lines)


class Console:
    def __init__(self, **_: Any) -> None:
        pass

    def print(self, what: Any, *, markup: bool = True, **_: Any) -> None:
        print(without_markup(what) if markup and isinstance(what, str) else what, flush=True)


def without_markup(text: str) -> str:
    return re.sub(r"\[/?(red|yellow|green|bold|dim)\]", "", text)
