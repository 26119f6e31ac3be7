"""Curves of one run or a comparison of several, from metrics.jsonl to a PNG.

Runs whose folders differ only in their seed are drawn as one line, their mean, inside a band from lowest to highest.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from config import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "eval_accuracy": "held-out accuracy, sampled",
    "reward": "reward (intrinsic ones: from lowest to highest)",
    "label_accuracy": "label accuracy",
    "response_tokens": "response length (tokens)",
    "entropy": "token entropy (nats)",
    "vote_share": "vote share of the majority answer",
}
SHARES = {"eval_accuracy", "reward", "label_accuracy", "vote_share"}  # drawn from 0 to 1
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
DASHES = ["-", "--", "-.", ":"]  # so that a grey print stays legible too

Curve = dict[int, float]  # step -> value


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Its metrics, a record a step."""
    file = folder / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in file.read_text().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run: it holds no metrics.jsonl") from None
    except ValueError as problem:
        raise UserError(f"{file} is damaged: {problem}") from None
    if not history:
        raise UserError(f"{file} is empty: the run has not finished a step")
    return history


def by_name(folders: Sequence[Path]) -> dict[str, list[list[dict[str, Any]]]]:
    """Runs under their folder's name without the seed."""
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for folder in folders:
        name = re.sub(r"[-_]seed\d+(-\d+)?$", "", folder.resolve().name)
        groups.setdefault(name, []).append(read_run(folder))
    return groups


def smooth(curve: Curve, window: int) -> Curve:
    """The mean of each value and those before it, `window` in all."""
    steps, values = list(curve), list(curve.values())
    return {step: fmean(values[max(0, i + 1 - window) : i + 1]) for i, step in enumerate(steps)}


def to_unit(curve: Curve) -> Curve:
    """An intrinsic reward has a scale of its own: stretched so that its lowest value is 0 and its highest 1."""
    lowest, highest = min(curve.values()), max(curve.values())
    if lowest >= 0 and highest <= 1:
        return curve
    return {step: (value - lowest) / ((highest - lowest) or 1) for step, value in curve.items()}


def draw_metric(axis: Any, key: str, runs: Sequence[list[dict[str, Any]]], **style: Any) -> None:
    """The mean of the runs' curves, and a band from their lowest to their highest."""
    window = 1 if key.startswith("eval") else 5
    raw = [{record["step"]: record[key] for record in history if key in record} for history in runs]
    curves = [smooth(curve, window) for curve in raw if curve]
    if key == "reward":
        curves = [to_unit(curve) for curve in curves]
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    axis.plot(steps, [fmean(curve[step] for curve in curves) for step in steps], **style)
    if len(curves) > 1:
        lowest, highest = ([f(curve[step] for curve in curves) for step in steps] for f in (min, max))
        axis.fill_between(steps, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def draw(folders: Sequence[Path], file: Path, title: str = "") -> Path:
    """One panel a metric, one line a method; returns the file."""
    groups = by_name(folders)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained", sharex=True)
        for axis, (key, label) in zip(axes.flat, PANELS.items(), strict=True):
            for i, (name, runs) in enumerate(groups.items()):
                dash = DASHES[(i // len(COLOURS) + i) % len(DASHES)]
                draw_metric(axis, key, runs, color=COLOURS[i % len(COLOURS)], linestyle=dash, label=name)
            axis.set_title(label, fontsize=10)
            axis.grid(alpha=0.25)
            if key in SHARES:
                axis.set_ylim(0, 1.02)
            if not axis.lines:
                axis.text(
                    0.5, 0.5, "not measured in these runs", ha="center", transform=axis.transAxes, color="#777777"
                )
        for axis in axes[-1]:
            axis.set_xlabel("training step")
        lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 4), frameon=False)
        figure.suptitle(title)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160)
        plt.close(figure)
    return file
