"""Curves of one run or a comparison of several, from metrics.jsonl to a PNG."""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from config import UserError, by_flag
from store.jsonl import Record
from store.log import read_log

PANELS = {
    "eval_accuracy": "held-out accuracy, sampled",
    "label_accuracy": "label accuracy",
    "reward": "reward, in each variant's own unit",
    "commonest_answer": "share of the commonest answer",
    "answered": "share of responses with an answer",
    "truncated": "share of responses cut at the limit",
    "entropy": "token entropy (nats)",
    "response_tokens": "response length (tokens)",
}
SHARES = {"eval_accuracy", "label_accuracy", "commonest_answer", "answered", "truncated"}  # from 0 to 1
WINDOW = 5  # steps that a line is smoothed over; those of evaluations are not
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
DASHES = ["-", "--", "-.", ":"]  # so that a grey print stays legible too
# Groups of settings and flags that change no curve but by chance: the seed is in `run`.
WITHOUT_EFFECT = ("run", "memory", "--eval-every", "--data-dir", "--sampler")


def settings_of_run(folder: Path) -> dict[str, str]:
    """Return the settings that a run's curves depend on, but for the seed."""
    file = folder / "config.json"
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
        flags = by_flag({name: group for name, group in groups.items() if name not in WITHOUT_EFFECT})
        return {flag: str(value) for flag, value in flags.items() if flag not in WITHOUT_EFFECT}
    except (OSError, ValueError, AttributeError) as problem:
        raise UserError(f"{file} is missing or damaged ({problem}): repair it, or leave the run out") from problem


def by_settings(runs: Sequence[Path]) -> dict[str, list[int]]:
    """Group the places of runs that differ by the seed alone, under a label: the variant, and what differs."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i, folder in enumerate(runs):
        groups.setdefault(tuple(settings_of_run(folder).items()), []).append(i)
    every = [dict(settings) for settings in groups]
    names = dict.fromkeys(chain.from_iterable(every))
    differing = [name for name in names if len({settings.get(name) for settings in every}) > 1]

    def label(settings: dict[str, str]) -> str:
        others = (f"{name} {settings.get(name)}" for name in differing if name != "--variant")
        return " ".join([settings.get("--variant", "run"), *others])

    return {label(dict(settings)): places for settings, places in groups.items()}


def histories_by_settings(folders: Sequence[Path]) -> dict[str, list[list[Record]]]:
    histories: dict[Path, list[Record]] = {}
    for folder in dict.fromkeys(folders):
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} is not a run: give a folder that train.py has written, with a metrics.jsonl")
        if history := read_log(folder / "metrics.jsonl"):
            histories[folder] = history
        else:
            print(f"{folder}: left out, it has not finished a step")
    if not histories:
        raise UserError("nothing to draw: no run has finished a step")
    each = list(histories.values())
    return {label: [each[i] for i in places] for label, places in by_settings(list(histories)).items()}


def draw_metric(axis: Any, key: str, runs: Sequence[list[Record]], **style: Any) -> None:
    """Draw the mean of the runs' curves, of a step over those that got there, and a band from lowest to highest."""
    window = 1 if key.startswith("eval") else WINDOW
    of_step: dict[int, list[float]] = defaultdict(list)
    for history in runs:
        measured = [record for record in history if key in record]
        for i, record in enumerate(measured):
            of_step[record["step"]].append(fmean(each[key] for each in measured[max(0, i + 1 - window) : i + 1]))
    if not of_step:
        return
    steps = sorted(of_step)
    marker = "o" if len(steps) == 1 else None  # a line of one point is not seen
    axis.plot(steps, [fmean(of_step[step]) for step in steps], marker=marker, **style)
    if len(runs) > 1:
        lowest = [min(of_step[step]) for step in steps]
        highest = [max(of_step[step]) for step in steps]
        axis.fill_between(steps, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def draw(folders: Sequence[Path], file: Path, title: str = "") -> Path:
    """Draw a panel for each metric, with a line for each setting; return the file."""
    from matplotlib.figure import Figure

    groups = histories_by_settings(folders)
    figure = Figure(figsize=(14, 6.2), layout="constrained")
    axes = list(figure.subplots(2, 4, sharex=True).flat)
    for axis, (key, heading) in zip(axes, PANELS.items(), strict=True):
        for i, (label, runs) in enumerate(groups.items()):
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
            draw_metric(axis, key, runs, label=label, **style)
        axis.set_title(heading, fontsize=10)
        axis.grid(alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if key in SHARES:
            axis.set_ylim(-0.02, 1.02)
        if key == "reward" and axis.dataLim.ymax > 1:  # self-certainty is over 10, where votes pay 1
            axis.set_yscale("symlog", linthresh=1)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    lines = {str(line.get_label()): line for line in chain.from_iterable(axis.lines for axis in axes)}
    legend = figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    legend.set_title(f"means over the last {WINDOW} steps, held-out accuracy as measured")
    for axis in axes[4:]:
        axis.set_xlabel("training step", fontsize=9)
    figure.suptitle(title or (folders[0].resolve().name if len(folders) == 1 else ""))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160)
    except (OSError, ValueError) as problem:  # a place that cannot be written, a format that nobody knows
        raise UserError(f"{file} was not written ({problem}): choose another --out") from problem
    return file
