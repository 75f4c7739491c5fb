"""Draws the newest run in a benchmark CSV: one picture per family, and the scaling curve.

    python benchmarks/plot.py --csv benchmarks/results/cpu.csv --out docs/img

Lengths are times relative to copying the logits into memory that is there, of metrics to reading their inputs, in the
same run; the small print says where it ran.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
COLORS = {
    "torchfast": "#d1495b",
    "torchfast one-hot": "#e8a0a8",
    "torch.compile": "#66a182",
    "liger": "#edae49",
    "torch chunked": "#d9b26f",
    "eager": "#8d96a3",
    "copy_": "#2e4057",
}
BARS = ("torchfast", "torchfast one-hot", "torch.compile", "liger", "torch chunked", "eager")
FLOORS = {"read": "reading the inputs", "mm": "the product of matrices alone", "copy_": "copying the logits"}

Row = dict[str, str]


def newest_run(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{path} has no rows; run benchmarks/run.py first")
    newest = max(row["date"] for row in rows if row["memory"] == "system")
    return [row for row in rows if row["date"] == newest]


def time_text(ms: float) -> str:
    return f"{short(ms)} ms" if ms >= 1 else f"{short(1e3 * ms)} µs"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def origin(row: Row) -> str:
    """Puts what the figures depend on in small print below the picture."""
    kernels = "native kernels" if row["native"] == "True" else "the slow reference, no native kernels"
    where = row["cpu"]
    if row["device"] != "cpu":
        kernels, where = "Triton kernels", row["device"]
    commit = row["commit"] + "+" * (row["dirty"] == "True")
    return (
        f"torchfast {row['torchfast']} ({commit}, {kernels}), torch {row['torch']}, "
        f"{where}, {row['threads']} threads, {row['date'][:10]}"
    )


def bars(axes: Axes, cases: dict[tuple[str, str], dict[str, Row]], dtype: str, floors: dict[str, str]) -> None:
    """Draws a group of bars per case: time / the floor's time, logarithmic, with the time itself at the end."""
    ticks, limit, low = [], 1.0, 1.0
    found = dict.fromkeys(name for rows in cases.values() for name in rows)
    floor = next(name for name in FLOORS if all(name in rows for rows in cases.values()))
    drawn = [*(name for name in BARS if name in found), *(name for name in found if name not in COLORS | FLOORS)]
    drawn = [name for name in drawn if name not in ("clone", floor)]
    height = 0.8 / len(drawn)
    for group, rows in enumerate(cases.values()):
        ticks.append(group + height * (len(drawn) - 1) / 2)
        for i, name in enumerate(drawn):
            row, y = rows.get(name), group + i * height
            if row is None:
                continue
            if not row["p50_ms"]:  # what failed or is wrong is said here too, not left out
                axes.text(1.0, y, f" {name}: {row['note'].split(':')[0]}", va="center", fontsize=7, color="red")
                continue
            p50 = float(row["p50_ms"])
            ratio = p50 / float(rows[floor]["p50_ms"])
            spread = [[ratio * (1 - float(row["p20_ms"]) / p50)], [ratio * (float(row["p80_ms"]) / p50 - 1)]]
            error = {"xerr": spread, "error_kw": {"lw": 0.8, "ecolor": "#00000066"}}
            axes.barh(
                y,
                ratio,
                height,
                color=COLORS.get(name, "#b9c0c9"),
                label=name if name in COLORS and group == 0 else None,
                **error,
            )
            end = max(ratio + spread[1][0], 1.0)
            who = "" if name in COLORS else f"  {name}:"
            axes.text(end, y, f"{who}  {short(ratio)}x, {time_text(p50)}", va="center", fontsize=7)
            limit, low = max(limit, end), min(low, ratio)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, low / 1.5), limit * (limit / low) ** 0.35 * 2)
    axes.axvline(1, color=COLORS["copy_"], lw=1.2, ls="--", label=floors[floor])
    axes.set_yticks(ticks, [f"{case}\n{shape}" for case, shape in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(dtype, loc="left", fontsize=10)
    axes.set_xlabel(f"time / {floors[floor]}: median, 20-80%; log scale, left is faster")
    axes.spines[["top", "right"]].set_visible(False)


def family_picture(rows: list[Row], family: str) -> Figure:
    by_dtype: dict[str, dict[tuple[str, str], dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["what"] == "fwd+bwd" or row["contender"] in FLOORS:
            by_dtype[row["dtype"]][row["case"], row["shape"]][row["contender"]] = row
    most = max(map(len, by_dtype.values()))
    size = (max(8.5, 7.5 * len(by_dtype)), 1.8 + 0.62 * most)
    figure, panels = plt.subplots(1, len(by_dtype), figsize=size, squeeze=False, layout="constrained")
    for axes, (dtype, cases) in zip(panels[0], by_dtype.items(), strict=True):
        bars(axes, cases, dtype, FLOORS | {"copy_": "copying the classifier"} if family == "linear" else FLOORS)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8)
    metrics = {
        "ranking": "NDCG@10, MRR, MAP",
        "classification": "metrics",
        "regression": "metrics",
        "retrieval": "metrics",
    }
    what = metrics.get(family.partition(" ")[0], "loss + gradient")
    figure.suptitle(f"{family}: {what}", x=0.01, ha="left", fontsize=11)
    return figure


def scaling_picture(rows: list[Row]) -> Figure:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 4), squeeze=False, layout="constrained")
    for axes, case in zip(panels[0], cases, strict=True):
        curve(axes, [row for row in rows if row["case"] == case])
    panels[0][0].set_ylabel("median time")
    return figure


def curve(axes: Axes, rows: list[Row]) -> None:
    """Draws time against size: a straight line where a doubling doubles."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row["what"] in ("fwd+bwd", "floor") and row["contender"] in COLORS and row["p50_ms"]:
            elements = math.prod(map(int, row["shape"].split("x")))
            curves[row["contender"]].append((elements, float(row["p50_ms"])))
    for name, color in COLORS.items():
        if points := sorted(curves[name]):
            elements, ms = zip(*points, strict=True)
            style, label = ("o--", "copying the logits") if name == "copy_" else ("o-", name)
            axes.plot(elements, ms, style, color=color, ms=4, label=label)
            if name == "torchfast":  # linear through the largest: a doubling that doubles
                linear = [ms[-1] * n / elements[-1] for n in elements]
                axes.plot(elements, linear, ":", color=color, lw=1, label="linear")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: time_text(value))
    axes.set_xlabel("logits or scores")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    axes.set_title(f"{rows[0]['case']}, {rows[0]['dtype']}", loc="left", fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "cpu.csv")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "img")
    args = parser.parse_args()
    rows = newest_run(args.csv)
    args.out.mkdir(parents=True, exist_ok=True)
    for family in dict.fromkeys(row["family"] for row in rows):
        chosen = [row for row in rows if row["family"] == family]
        figure = scaling_picture(chosen) if family == "scaling" else family_picture(chosen, family)
        figure.supxlabel(origin(rows[0]), fontsize=6.5, color="#555555", x=0.01, ha="left")
        path = args.out / f"{args.csv.stem}-{family.replace(' ', '-')}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
