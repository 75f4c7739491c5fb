"""What the benchmarks use of rich, in plain text, for machines that do not have it: no colours, and columns all the
same."""

from __future__ import annotations

import re
from typing import Any


class Table:
    def __init__(self, title: str = "", **_: Any) -> None:
        self.title = title
        self.right: list[bool] = []
        self.rows: list[tuple[str, ...]] = [()]

    def add_column(self, heading: str, *, justify: str = "left", **_: Any) -> None:
        self.right.append(justify == "right")
        self.rows[0] += (heading,)

    def add_row(self, *cells: str) -> None:
        self.rows.append(tuple(without_markup(cell) for cell in cells))

    def add_section(self) -> None:
        self.rows.append(())

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*filter(None, self.rows), strict=True)]
        shapes = [f"{{:{'>' if right else '<'}{width}}}" for right, width in zip(self.right, widths, strict=True)]
        return "\n".join([self.title, *("  ".join(shapes).format(*row).rstrip() if row else "" for row in self.rows)])


class Console:
    def __init__(self, **_: Any) -> None:
        pass

    def print(self, what: Any, *, markup: bool = True, **_: Any) -> None:
        print(without_markup(what) if markup and isinstance(what, str) else what, flush=True)


def without_markup(text: str) -> str:
    return re.sub(r"\[/?(red|yellow|green|bold|dim)\]", "", text)
