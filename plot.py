"""Curves of one run or a comparison of several, from metrics.jsonl to a PNG.

python plot.py runs/a runs/b --out comparison.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "eval_accuracy": "held-out accuracy",
    "reward": "reward",
    "label_accuracy": "label accuracy",
    "response_tokens": "response length (tokens)",
    "entropy": "token entropy (nats)",
    "vote_share": "vote share of the majority answer",
}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]  # Okabe and Ito
LINES = ["-", "--", "-.", ":"]  # so that neither a grey print nor a ninth run is ambiguous


class PlotError(ValueError):
    """A run that cannot be drawn, in one sentence."""


def read_run(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Its label and its metrics, one record a step."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise PlotError(f"{folder} is not a run: it has no metrics.jsonl")
    history = [json.loads(line) for line in file.read_text().splitlines()]
    return folder.name, history


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Mean of each value and the ones before it, `window` in all."""
    starts = (max(0, i + 1 - window) for i in range(len(values)))
    return [sum(values[start : i + 1]) / (i + 1 - start) for i, start in enumerate(starts)]


def draw(folders: Sequence[Path], file: Path, title: str = "") -> Path:
    """One panel a metric, one line a run; returns the file."""
    runs = [read_run(folder) for folder in folders]
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex=True)
        for axis, (key, label) in zip(axes.flat, PANELS.items(), strict=True):
            for i, (name, history) in enumerate(runs):
                points = [(record["step"], record[key]) for record in history if key in record]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}
                if key == "eval_accuracy":
                    axis.plot(steps, values, label=name, marker="o", markersize=3, **style)
                else:
                    axis.plot(steps, values, alpha=0.2, linewidth=0.8, **style)
                    axis.plot(steps, smooth(values), label=name, **style)
            axis.set_title(label)
            axis.grid(alpha=0.25)
            axis.set_ylim(bottom=0, top=1.02 if key in UNIT else None)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        handles, labels = axes.flat[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 4), frameon=False)
        if title:
            figure.suptitle(title)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160)
        plt.close(figure)
    return file


UNIT = {"eval_accuracy", "reward", "label_accuracy", "vote_share"}  # shares, drawn from 0 to 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw runs from their metrics.jsonl.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG to write (default: %(default)s)")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    try:
        print(f"written: {draw(arguments.folders, arguments.out, arguments.title)}")
    except PlotError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
