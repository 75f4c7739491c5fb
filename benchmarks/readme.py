"""Writes the README's table of figures, which the site's home page includes: the newest run in a benchmark CSV.

python benchmarks/readme.py --csv benchmarks/results/cpu.csv
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from cases import FLOORS
from plot import HERE, Row, newest_run, origin, short, time_text

README = HERE.parent / "README.md"
START, END = (f"<!-- --8<-- [{edge}:figures] -->\n" for edge in ("start", "end"))  # marks of pymdownx.snippets
CASES = (
    ("cross entropy", "large/CE/16384x1000/fp32"),
    ("label smoothing", "large/CE+LS/2048x32000/fp32"),
    ("focal, smoothed, weighted", "large/focal+LS+weights/512x128256/fp32"),
    ("label smoothing", "large/CE+LS/2048x32000/bf16"),
    ("label smoothing", "small classes/CE+LS/65536x10/fp32"),
    ("cross entropy, channels_last", "segmentation/CE channels_last/4x19x512x512/fp32"),
    ("cross entropy", "tiny/CE/128x10/fp32"),
    ("focal", "tiny/focal/128x10/fp32"),
    ("sigmoid focal", "sigmoid/focal/4096x4096/fp32"),
    ("sigmoid focal", "sigmoid/focal/100000x80/fp32"),
    ("linear layer + cross entropy", "linear/CE/2048x256x32000/fp32"),
    ("NDCG@10, MRR, MAP; 5 relevant", "ranking/5 relevant/10000x100/fp32"),
    ("the same, 10 relevant, graded", "ranking peers/10 relevant, graded/10000x100/fp32"),
    ("the same, 10 relevant", "ranking/10 relevant/10000x1000/fp32"),
    ("the same, 20 relevant", "ranking/20 relevant/500x50000/fp32"),
    ("ROC AUC, average precision", "classification/ROC AUC + average precision/1000000/fp32"),
    ("accuracy, macro F1, confusion matrix", "classification/accuracy + macro F1 + confusion matrix/65536x1000/fp32"),
    ("MAE, MSE, RMSE, R2", "regression/MAE + MSE + RMSE + R2/16000000/fp32"),
)


def label(row: Row) -> str:
    return "/".join(row[key] for key in ("family", "case", "shape", "dtype"))


def times(rows: list[Row], case: str) -> dict[str, float]:
    """Returns each contender's milliseconds for loss and gradient, or for the metrics, or for the floor."""
    found = {
        row["contender"]: float(row["p50_ms"])
        for row in rows
        if label(row) == case and row["p50_ms"] and (row["what"] == "fwd+bwd" or row["contender"] in FLOORS)
    }
    if "torchfast" not in found:
        raise SystemExit(f"the newest run has no figure of {case}: run benchmarks/run.py without --only")
    return found


def table(rows: list[Row]) -> Iterator[str]:
    yield "| loss with gradient, or metrics | input | torchfast | eager torch | torch.compile | fastest other | floor |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, case in CASES:
        found = times(rows, case)
        ours = found["torchfast"]

        def compared(who: str | None, name: str = "", found: dict[str, float] = found, ours: float = ours) -> str:
            if who not in found:
                return ""
            return f"{name}{time_text(found[who])} ({short(found[who] / ours)}x)"

        known = ("torchfast", "eager", "torch.compile", *FLOORS)
        others = {who: t for who, t in found.items() if who not in known and not who.startswith("torchfast")}
        other = min(others, key=lambda who: others[who], default=None)
        _, _, shape, dtype = case.split("/")
        floor = next(floor for floor in ("read", "mm", "sort", "copy_") if floor in found)
        cells = (
            name,
            f"{shape.replace('x', ' x ')} {dtype}",
            f"**{time_text(ours)}**",
            compared("eager"),
            compared("torch.compile"),
            compared(other, f"{other}: "),
            compared(floor, f"{floor.rstrip('_')}: "),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        "Medians with the system's allocator; (x): how many times longer than torchfast; the floor copies the logits "
        f"into memory that is there, or reads the inputs. {origin(rows[0])}. With memory that malloc keeps: "
        "`--kept-memory`."
    )


def written(readme: str, rows: list[Row]) -> str:
    """Returns the text with the table in its place."""
    block = "".join((START, *(f"{line}\n" for line in table(rows)), END))
    text, count = re.subn(f"{re.escape(START)}.*{re.escape(END)}", lambda _: block, readme, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md must have {START.strip()} and {END.strip()} once, in lines of their own")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "cpu.csv")
    args = parser.parse_args()
    README.write_text(written(README.read_text(), newest_run(args.csv)))


if __name__ == "__main__":
    main()
