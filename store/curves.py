"""Curves of one run or a comparison of several, from metrics.jsonl to a PNG.

Runs whose settings differ only in their seed are drawn as one line, their mean, inside a band from lowest to highest.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from config import UserError
from store.files import Row, read_rows

PANELS = {
    "eval_accuracy": "held-out accuracy, sampled",
    "label_accuracy": "label accuracy",
    "reward": "reward (intrinsic ones: from lowest to highest)",
    "commonest_answer": "share of the commonest answer",
    "answered": "share of responses with an answer",
    "truncated": "share of responses cut at the limit",
    "entropy": "token entropy (nats)",
    "response_tokens": "response length (tokens)",
}
SHARES = {"eval_accuracy", "label_accuracy", "reward", "commonest_answer", "answered", "truncated"}  # from 0 to 1
WINDOW = 5  # steps that a line is smoothed over; those of evaluations are not
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
DASHES = ["-", "--", "-.", ":"]  # so that a grey print stays legible too
WITHOUT_EFFECT = ("run", "memory")  # groups of settings that change no curve but by chance: the seed is in `run`
SHORT = {"source": "data", "name": "model"}  # of settings whose names in config.json say little

Curve = dict[int, float]  # step -> value


def folder_of_run(path: Path) -> Path:
    """The run that a path belongs to: its folder, a checkpoint, a policy, or a file of these."""
    for folder in (path.resolve(), *path.resolve().parents[:3]):
        if (folder / "metrics.jsonl").is_file():
            return folder
    raise UserError(f"{path} is not a run: it holds no metrics.jsonl; give a folder that train.py has written")


def settings_of_run(folder: Path) -> dict[str, str]:
    """What its curves depend on, the seed apart."""
    file = folder / "config.json"
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: str(value)
            for group, settings in groups.items()
            if group not in WITHOUT_EFFECT and isinstance(settings, dict)
            for name, value in settings.items()
        }
    except FileNotFoundError:
        return {"variant": folder.name}
    except (OSError, ValueError, AttributeError) as problem:
        raise UserError(f"{file} is damaged ({problem}): repair it, or leave the run out") from problem


def by_settings(folders: Sequence[Path]) -> dict[str, list[list[Row]]]:
    """Runs that have finished a step, by a label: their variant, and the settings that differ between these runs."""
    groups: dict[str, tuple[dict[str, str], list[list[Row]]]] = {}
    for folder in dict.fromkeys(map(folder_of_run, folders)):
        settings, history = settings_of_run(folder), read_rows(folder / "metrics.jsonl")
        if history:
            groups.setdefault(json.dumps(settings), (settings, []))[1].append(history)
        else:
            print(f"{folder}: left out, it has not finished a step")
    if not groups:
        raise UserError("nothing to draw: no run has finished a step")
    every = [settings for settings, _ in groups.values()]
    names = dict.fromkeys(name for settings in every for name in settings if name != "variant")
    differing = [name for name in names if len({settings.get(name) for settings in every}) > 1]

    def label(settings: dict[str, str]) -> str:
        others = (f"{SHORT.get(name, name).replace('_', ' ')} {settings.get(name)}" for name in differing)
        return ", ".join([settings.get("variant", "run"), *others])

    return {label(settings): histories for settings, histories in groups.values()}


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


def draw_metric(axis: Any, key: str, runs: Sequence[list[Row]], **style: Any) -> None:
    """The mean of the runs' curves (of a step over those that got there), and a band from lowest to highest."""
    raw = [{record["step"]: record[key] for record in history if key in record} for history in runs]
    curves = [smooth(curve, 1 if key.startswith("eval") else WINDOW) for curve in raw if curve]
    if key == "reward":
        curves = [to_unit(curve) for curve in curves]
    if not curves:
        return
    steps = sorted(set().union(*curves))
    values = [[curve[step] for curve in curves if step in curve] for step in steps]
    axis.plot(steps, [fmean(of_step) for of_step in values], **style)
    if len(curves) > 1:
        axis.fill_between(
            steps, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.15, linewidth=0
        )


def draw(folders: Sequence[Path], file: Path, title: str = "") -> Path:
    """One panel a metric, one line a method; returns the file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = by_settings(folders)
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14, 6.2), layout="constrained")
        axes = figure.subplots(2, 4, sharex=True)
        for axis, (key, heading) in zip(axes.flat, PANELS.items(), strict=True):
            for i, (label, runs) in enumerate(groups.items()):
                dash = DASHES[(i // len(COLOURS) + i) % len(DASHES)]
                draw_metric(axis, key, runs, color=COLOURS[i % len(COLOURS)], linestyle=dash, label=label)
            axis.set_title(heading, fontsize=10)
            axis.grid(alpha=0.25)
            if key in SHARES:
                axis.set_ylim(-0.02, 1.02)
            if not axis.lines:
                axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color="#777777")
        lines = {str(line.get_label()): line for axis in axes.flat for line in axis.lines}
        legend = figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
        legend.set_title(f"against training steps; means over the last {WINDOW}, held-out accuracy as measured")
        figure.suptitle(title)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160)
    return file
