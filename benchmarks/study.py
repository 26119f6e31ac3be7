"""The miniature study: what every method does on the embedded task, and what it survives.

    python benchmarks/study.py                        # everything, under two hours on two idle cores
    python benchmarks/study.py --only misreading      # one section
    python benchmarks/study.py --seeds 0 --jobs 1     # a first look
    python benchmarks/study.py --jobs 0               # no new runs: the tables of those that are there

Writes every table as docs/results/study-NAME.csv, fills in those that docs/RESULTS.md shows, and draws the figures; the
text of the document stays. A run that is already there is not repeated; one that two sections need is made once.
"""

import csv
import json
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from start_models import MISREAD_WORDING

import train
from baselines import BASELINES, choose_variant
from config import parse
from embedded.word_problems import word_problems
from metrics import detect_collapse
from rewards import VARIANTS, Variant
from store import curves
from store.jsonl import read_rows

History = list[dict[str, Any]]
Table = list[list[str]]  # the header, then the rows

STEPS = 40
ALWAYS = f"--steps {STEPS} --eval-every 10 --eval-samples 2"
RATES = {"2.5e-4": "--lr 2.5e-4", "5e-4": "", "1e-3": "--lr 1e-3"}  # half, once and twice the default
NOISE = (0.25, 0.5)
METHODS = [*VARIANTS, *(name for name, row in BASELINES.items() if row not in VARIANTS.values())]
MISREADING = "--model embedded-misreading"
ON_MISREAD = f"eval_accuracy/greedy/wording {MISREAD_WORDING}"
ON_OTHERS = "eval_accuracy/greedy/other wordings"
REPHRASED = ("I", "III")  # what reads the rephrased questions
VOTING = ("majority", "I", "II")


TENTH = "{runs}/tenth.jsonl"  # the training questions, one in ten with its answer


def flags_of(method: str, model: str) -> str:
    """Of train.py. Semi-supervised learning sees a tenth of the answers."""
    data = f"--data {TENTH}" if method == "semi" else ""
    return f"--variant {method} {data} --model {model}" if data or model != "embedded" else f"--variant {method}"


def at_rates(model: str, all_methods_at: Sequence[str]) -> dict[str, str]:
    """The paper's methods at every rate, the others at some."""
    return {
        f"{name}, {rate}": f"{flags_of(name, model)} {lr}"
        for name in METHODS
        for rate, lr in RATES.items()
        if name in VARIANTS or rate in all_methods_at
    }


CROSSING = {
    "I: labels from the other wording": "--variant I",
    "majority on both, labels from the same": "--variant majority --views both",
}
STARTS = ("embedded", "embedded-misreading", "embedded-spellings")
MASKED = ("majority", "I", "II", "III", "soft-II")


def with_and_without_mask(rate: str) -> dict[str, str]:
    """Rows `method, start, rate`, each also with --mask-answer; and controls in which clipping acts."""
    rows = {}
    for start in STARTS:
        for name in MASKED:
            row = f"{name}, {start}, {rate}"
            rows[row] = f"{flags_of(name, start)} {RATES[rate]}"
            rows[f"{row}, masked"] = f"{rows[row]} --mask-answer"
    for name in ("random", "format"):
        rows[f"{name}, 4 mini-batches, {rate}"] = f"--variant {name} --mini-batches 4 {RATES[rate]}"
    return rows


# Section of the study -> row of its table -> flags of train.py. {runs} becomes the folder of the runs.
SECTIONS: dict[str, dict[str, str]] = {
    "usual": at_rates("embedded", ("5e-4", "1e-3")),
    "misreading": at_rates("embedded-misreading", ("5e-4",)),
    "spellings": {f"{name}, 5e-4": flags_of(name, "embedded-spellings") for name in METHODS},
    "kinder": {
        "majority": "--variant majority",
        "ttrl: 32 votes, 4 mini-batches, no KL": "--variant ttrl --votes 32 --mini-batches 4 --kl-coef 0",
        "scrl: 32 votes": "--variant scrl --votes 32",
        "self-harmony: 16 rollouts": "--variant self-harmony --rollouts 16",
        "empo: 16 rollouts": "--variant empo --rollouts 16",
        "intuitor: a fifth of the rate": "--variant intuitor --lr 1e-4",
        "rent: a fifth of the rate": "--variant rent --lr 1e-4",
        "rent: a fifth of the rate, 4 mini-batches, 5 rollouts": (
            "--variant rent --lr 1e-4 --mini-batches 4 --rollouts 5"
        ),
        "random: five times the KL": "--variant random --kl-coef 0.025",
    },
    "crossing": CROSSING,
    "crossing, misreading": {row: f"{flags} {MISREADING}" for row, flags in CROSSING.items()},
    "teacher": {
        "0.99 to 0.9999": "--variant II --lr 1e-3",
        "always 0.99": "--variant II --lr 1e-3 --ema-schedule constant",
        "always 0.9": "--variant II --lr 1e-3 --ema-schedule constant --ema-start 0.9",
        "frozen": "--variant II --lr 1e-3 --ema-start 1 --ema-end 1",
    },
    "group": {
        f"{name}, G = {size}": f"--variant {name}" + (f" --rollouts {size}" if size != 8 else "")
        for name in ("majority", "II")
        for size in (4, 8, 16)
    },
    "votes": {
        f"{name}, {match} votes": f"--variant {name} --model embedded-spellings{flag}"
        for name in VOTING
        for match, flag in {"exact": "", "math": " --answer-match math"}.items()
    },
    "mask": with_and_without_mask("1e-3"),
    "mask, usual rate": with_and_without_mask("5e-4"),
    "noise": {
        f"{name}, {share:.0%} of the pairs": f"--variant {name}"
        + (f" --model embedded --data {{runs}}/noise-{share}.jsonl --keep-bad-rewrites" if share else "")
        for name in REPHRASED
        for share in (0.0, *NOISE)
    },
}


# ---------------------------------------------------------------- runs


def write_noisy_pairs(file: Path, share: float) -> None:
    """The training questions, some of which have a rephrasing that asks for another problem's answer."""
    rows, rng = word_problems("train"), random.Random(f"noise {share}")
    for row in rows:
        if rng.random() < share:
            row["rephrased"] = rng.choice([other for other in rows if other["answer"] != row["answer"]])["question"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder_of(runs: Path, flags: str, seed: int) -> Path:
    return runs / ("-".join(re.findall(r"[\w.]+", flags)) + f"-seed{seed}")


def is_finished(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and read_rows(folder / "metrics.jsonl")[-1]["step"] == STEPS


def run(flags: str, seed: int, folder: Path) -> str:
    """One training run, in this process; what it prints goes to a file beside its metrics."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        train.train(parse(f"{flags.format(runs=folder.parent)} {ALWAYS} --seed {seed} --out {folder}".split()))
    shutil.rmtree(folder / "checkpoints")
    return folder.name


def run_all(runs: Path, wanted: dict[Path, tuple[str, int]], jobs: int) -> None:
    runs.mkdir(parents=True, exist_ok=True)
    for share in NOISE:
        write_noisy_pairs(runs / f"noise-{share}.jsonl", share)
    tenth = [row if i % 10 == 0 else row | {"answer": None} for i, row in enumerate(word_problems("train"))]
    (runs / "tenth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tenth))
    missing = {folder: what for folder, what in wanted.items() if not is_finished(folder)}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, flags, seed, folder) for folder, (flags, seed) in missing.items()]
        for i, future in enumerate(as_completed(futures), 1):
            print(f"{i} of {len(futures)}: {future.result()}", flush=True)


# ---------------------------------------------------------------- numbers


@cache
def read(folder: Path) -> History:
    """Metrics of a run, with one more: greedy accuracy on the wordings that no student misreads."""
    history = read_rows(folder / "metrics.jsonl")
    others = [f"eval_accuracy/greedy/wording {i}" for i in range(4) if i != MISREAD_WORDING]
    for record in history:
        if "eval_accuracy" in record:
            record[ON_OTHERS] = fmean(record[key] for key in others)
    return history


def first(key: str, history: History) -> float | None:
    return next((record[key] for record in history if key in record), None)


def last(key: str, history: History) -> float | None:
    """The last value of an evaluation; of a training step's numbers the mean of the last five."""
    values = [record[key] for record in history if key in record]
    return fmean(values[-5:] if not key.startswith("eval") else values[-1:]) if values else None


def spread(values: Sequence[float | None]) -> str:
    """Mean, and in brackets the lowest and the highest seed."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    lowest, highest = f"{min(known):.2f}", f"{max(known):.2f}"
    return f"{fmean(known):.2f}" + (f" ({lowest} to {highest})" if lowest != highest else "")


def survives(history: History) -> bool:
    """Better when sampled, and not more than five points worse when greedy, than before training."""
    return (
        last("eval_accuracy", history) > first("eval_accuracy", history)  # type: ignore[operator]
        and last("eval_accuracy/greedy", history) > first("eval_accuracy/greedy", history) - 0.05  # type: ignore[operator]
    )


def learns(history: History) -> bool:
    """Greedy decoding gets most of the misread wording right at the end, and has not lost the others for it."""
    return last(ON_MISREAD, history) > 0.5 and last(ON_OTHERS, history) > first(ON_OTHERS, history) - 0.05  # type: ignore[operator]


SAMPLED, GREEDY = "eval_accuracy", "eval_accuracy/greedy"
ENDS = [("usual", "5e-4", SAMPLED), ("usual", "1e-3", SAMPLED), ("misreading", "5e-4", ON_MISREAD)]
COLUMNS = {
    "sampled": SAMPLED,
    "greedy": GREEDY,
    "label accuracy": "label_accuracy",
    "reward accuracy": "reward_accuracy",
    "reward": "reward",
    "vote share": "vote_share",
    "entropy": "entropy",
    "tokens": "response_tokens",
    "commonest answer": "commonest_answer",
}
COLUMNS_OF = {
    "misreading": {
        "greedy, misread wording": ON_MISREAD,
        "greedy, other wordings": ON_OTHERS,
        "sampled, all": SAMPLED,
        "label accuracy": "label_accuracy",
        "reward": "reward",
    },
    "crossing, misreading": {
        "sampled, all": SAMPLED,
        "greedy, misread wording": ON_MISREAD,
        "greedy, other wordings": ON_OTHERS,
        "label accuracy": "label_accuracy",
    },
}
SHORT = {name: COLUMNS[name] for name in ("sampled", "greedy", "label accuracy", "reward", "vote share")}


def section_table(name: str, histories: dict[str, list[History]]) -> Table:
    """How many seeds survive, when others collapse, where they stand at equal numbers of answers; where they end."""
    columns = COLUMNS if name == "usual" else COLUMNS_OF.get(name, SHORT)
    rows = []
    for row, group in histories.items():
        steps = [step for history in group if (step := collapse_step(history)) is not None]
        when = ", ".join(map(str, sorted(steps))) or f"not within {STEPS}"
        equal = spread([at_equal_answers(SECTIONS[name][row], history) for history in group])
        ends = [spread([last(key, history) for history in group]) for key in columns.values()]
        rows.append([row, str(len(group)), str(sum(map(survives, group))), when, equal, *ends])
    start = next(iter(histories.values()))
    before = [spread([first(key, history) for history in start]) for key in columns.values()]
    header = ["", "seeds", "survive", "collapse at step", "sampled, at equal answers", *columns]
    return [header, ["before, or first step", *[""] * 4, *before], *rows]


def collapse_step(history: History) -> int | None:
    """The first evaluation from which on sampled accuracy stays more than five points under its start."""
    measured = [(int(record["step"]), record[SAMPLED]) for record in history if SAMPLED in record]
    low = [step for step, value in measured if value >= measured[0][1] - 0.05]
    return next((step for step, _ in measured if step > low[-1]), None)


@cache
def answers_a_question(flags: str) -> int:
    config = parse(flags.format(runs=".").split())
    return askings(choose_variant(config.method)) * config.votes


def askings(variant: Variant) -> int:
    """How often a step samples answers to a question: each voter in each of its wordings."""
    return len(variant.policy_views) + len(variant.teacher_views)


def at_equal_answers(flags: str, history: History) -> float | None:
    """Sampled accuracy when the run has asked for as many answers as plain majority voting has at its end.

    A step of majority asks each question in one wording, I in two; II also asks the teacher, and III both in two.
    """
    step = STEPS * answers_a_question("--variant majority") / answers_a_question(flags)
    return next((record[SAMPLED] for record in history if SAMPLED in record and record["step"] == step), None)


def summary_table(results: dict[str, dict[str, list[History]]]) -> Table:
    """Where each method ends, and when it collapses: the usual task at two rates, the wording misread at first."""
    rows = []
    for name in METHODS:
        usual, faster, misread = (results[section][f"{name}, {rate}"] for section, rate, _ in ENDS)
        steps = [step for run in faster if (step := collapse_step(run)) is not None]
        when = f"{len(steps)}, from {min(steps)}" if steps else "0"
        cells = [(usual, SAMPLED), (faster, SAMPLED), (misread, ON_MISREAD), (misread, ON_OTHERS)]
        once, twice, *greedy = (spread([last(key, run) for run in runs]) for runs, key in cells)
        rows.append([name, once, twice, when, *greedy])
    header = ["", "usual task", "twice the learning rate", "seeds that collapse there, from step"]
    return [[*header, "misread wording, greedy", "other wordings, greedy"], *rows]


def survival_table(results: dict[str, dict[str, list[History]]]) -> Table:
    """Of each method and learning rate, how many seeds survive, and how many learn."""
    columns = [("usual", "survives", rate) for rate in RATES] + [("spellings", "survives spellings", "5e-4")]
    columns += [("misreading", "learns", rate) for rate in RATES]
    rows = []
    for name in METHODS:
        cells = []
        for section, verb, rate in columns:
            held = [
                (learns if verb == "learns" else survives)(run) for run in results[section].get(f"{name}, {rate}", [])
            ]
            cells.append(f"{sum(held)} of {len(held)}" if held else "-")
        rows.append([name, *cells])
    return [["", *(f"{verb}, {rate}" for _, verb, rate in columns)], *rows]


def first_warning(history: History) -> int | None:
    """The step at which the alarm of metrics.py goes off."""
    return next((int(history[n - 1]["step"]) for n in range(1, len(history) + 1) if detect_collapse(history[:n])), None)


def alarm_table(results: dict[str, dict[str, list[History]]]) -> Table:
    """Of each method in all sections: how often the alarm goes off in runs that end better, and worse, than they began,
    and from what step on. LOST_AGREEMENT was chosen on every second method, and is judged by the others."""
    runs = {id(run): (flags.split()[1], run) for flags, run in each_run(results)}
    rows = []
    for method in dict.fromkeys(method for method, _ in runs.values()):
        of_method = [run for name, run in runs.values() if name == method]
        worse = [run for run in of_method if last(SAMPLED, run) < first(SAMPLED, run)]  # type: ignore[operator]
        steps = [step for run in worse if (step := first_warning(run)) is not None]
        better = [run for run in of_method if run not in worse]
        false = sum(first_warning(run) is not None for run in better)
        when = f"{min(steps)}, {median_low(steps)}, {max(steps)}" if steps else "-"
        chosen_on = "yes" if method in METHODS[::2] else "no"
        rows.append([method, chosen_on, f"{len(steps)} of {len(worse)}", when, f"{false} of {len(better)}"])
    header = ["", "threshold chosen on it", "warned, of those that end worse", "at step (first, median, last)"]
    return [[*header, "false alarms"], *rows]


def each_run(results: dict[str, dict[str, list[History]]]) -> Iterator[tuple[str, History]]:
    for section, rows in results.items():
        for row, group in rows.items():
            yield from ((SECTIONS[section][row], history) for history in group)


def draw_overview(histories: dict[str, list[History]], file: Path) -> None:
    """Draw README's figure: held-out accuracy beside reward, of the paper's methods on the usual task.

    The reward of self-certainty is over 10 where a vote pays at most 1, so that axis is logarithmic above 1.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key in zip(axes, (SAMPLED, "reward"), strict=True):
        for i, name in enumerate(VARIANTS):
            style = {"color": curves.COLOURS[i], "linestyle": curves.DASHES[i % len(curves.DASHES)], "label": name}
            curves.draw_metric(axis, key, histories[f"{name}, 5e-4"], **style)
        axis.set(title=curves.PANELS[key], xlabel="training step")
        axis.grid(alpha=0.25)
    axes[0].set_ylim(-0.02, 1.02)
    axes[1].set_yscale("symlog", linthresh=1)
    lines = axes[0].get_lines()
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(file, dpi=160)


def draw_misreading(histories: dict[str, list[History]], file: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, key, title in zip(axes, (ON_MISREAD, ON_OTHERS), ("the misread wording", "the other three"), strict=True):
        for i, name in enumerate(VARIANTS):  # the others are in draw_methods
            style = {"color": curves.COLOURS[i], "linestyle": curves.DASHES[i % len(curves.DASHES)], "label": name}
            curves.draw_metric(axis, key, histories[f"{name}, 5e-4"], **style)
        axis.set(title=title, xlabel="training step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("greedy accuracy, held-out")
    lines = axes[0].get_lines()
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(file, dpi=160)


def draw_methods(results: dict[str, dict[str, list[History]]], file: Path) -> None:
    """Draw where each method ends, one dot per seed: the usual task at two rates, and the wording misread at first."""
    titles = ["usual task, sampled", "twice the learning rate, sampled", "misread wording, greedy"]
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.6), layout="constrained", sharey=True)
    for axis, (section, rate, key), title in zip(axes, ENDS, titles, strict=True):
        groups = {name: results[section][f"{name}, {rate}"] for name in METHODS}
        start = fmean(value for run in groups["gt"] if (value := first(key, run)) is not None)
        axis.axvline(start, color="grey", linestyle=":", label="before")
        for y, (name, runs) in enumerate(groups.items()):
            ends = [value for run in runs if (value := last(key, run)) is not None]
            colour = curves.COLOURS[0] if name in ("I", "II", "III") else curves.COLOURS[1]
            axis.plot(ends, [y] * len(ends), "o", alpha=0.6, color="black" if name == "gt" else colour)
        axis.set(title=title, xlim=(-0.02, 1.02), xlabel="held-out accuracy")
        axis.grid(alpha=0.25)
    axes[0].set_yticks(range(len(METHODS)), METHODS)
    axes[0].invert_yaxis()
    figure.savefig(file, dpi=160)


def draw_masked(axis: Axes, histories: dict[str, list[History]], start: str, rate: str) -> None:
    before = first(SAMPLED, histories[f"majority, {start}, {rate}"][0])
    axis.axvline(before, color="grey", linestyle=":", label="before")
    for suffix, label, shift, fill in (("", "all tokens", -0.12, "full"), (", masked", "masked", 0.12, "none")):
        for y, name in enumerate(MASKED):
            ends = [last(SAMPLED, run) for run in histories[f"{name}, {start}, {rate}{suffix}"]]
            style = {"fillstyle": fill, "color": curves.COLOURS[y], "label": label if y == 0 else None}
            axis.plot(ends, [y + shift] * len(ends), "o", **style)
    axis.grid(alpha=0.25)


def draw_mask(results: dict[str, dict[str, list[History]]], file: Path) -> None:
    """Draw where each method ends with and without --mask-answer, one dot per seed: a row a rate, a column a start."""
    rates = {"mask, usual rate": "5e-4", "mask": "1e-3"}
    figure, axes = plt.subplots(2, len(STARTS), figsize=(10, 6), layout="constrained", sharex=True, sharey=True)
    for (section, rate), row in zip(rates.items(), axes, strict=True):
        for start, axis in zip(STARTS, row, strict=True):
            draw_masked(axis, results[section], start, rate)
            axis.set(title=f"{start}, {rate}", xlim=(-0.02, 1.02))
    axes[0, 0].set_yticks(range(len(MASKED)), MASKED)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(loc="lower left", fontsize=8)
    figure.supxlabel("held-out accuracy, sampled", fontsize=10)
    figure.savefig(file, dpi=160)


# ---------------------------------------------------------------- documents

# A cell of several numbers, and what its columns are called in a CSV file.
PARTS = {
    r"(\S+) \((\S+) to (\S+)\)": ("", " lowest", " highest"),
    r"(\S+) ± (\S+)(?: ± (\S+))?": ("", " error", " error over seeds"),
    r"(\S+) to (\S+)": (" first", " last"),
}


def alone(number: str, endings: Sequence[str]) -> list[str]:
    """Return the cells of a number that is alone: it is its own lowest and highest, and has no error."""
    return ["" if "error" in ending else number for ending in endings]


def split_cells(name: str, cells: Sequence[str]) -> Table:
    """Split a column of which a cell holds several numbers into one column a number; the name comes first in each."""
    for pattern, endings in PARTS.items():
        found = [re.fullmatch(pattern, cell) for cell in cells]
        if any(found):
            split = zip(found, cells, strict=True)
            numbers = zip(*(each.groups() if each else alone(cell, endings) for each, cell in split), strict=True)
            filled = [[number or "" for number in column] for column in numbers]
            columns = zip(endings, filled, strict=True)
            return [[name + ending, *column] for ending, column in columns if any(column) or "seeds" not in ending]
    return [[name, *cells]]


def write_csv(rows: Table, file: Path) -> None:
    """Write a table with one number a cell; what was not measured is empty."""
    names, *others = zip(*rows, strict=True)
    columns = [[names[0] or "name", *names[1:]]]
    for name, *cells in others:
        columns += split_cells(name, ["" if cell == "-" else cell for cell in cells])
    file.parent.mkdir(exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(zip(*columns, strict=True))


def publish(document: Path, name: str, rows: Table) -> None:
    """Write results/NAME.csv beside the document, and fill in the table after its line `<!-- NAME -->`, if any."""
    write_csv(rows, document.parent / "results" / f"{name}.csv")
    header, *others = rows
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *others)]
    fill_in(document, name, "\n".join(f"| {line} |" for line in lines))


def fill_in(document: Path, name: str, content: str) -> None:
    """Replace the table that follows the document's line `<!-- NAME -->`; without such a line, do nothing."""
    text = document.read_text()
    document.write_text(re.sub(rf"(<!-- {name} -->\n)(?:\|.*\n)*", lambda found: found[1] + content + "\n", text))


def table_name(section: str) -> str:
    """Return the name of a section's table and CSV file."""
    return "study-" + "-".join(re.findall(r"\w+", section))


def main(
    seeds: tuple[int, ...] = (0, 1, 2, 3),
    jobs: int = 2,
    only: tuple[str, ...] = tuple(SECTIONS),
    runs: Path = ROOT / "runs" / "study",
    document: Path = ROOT / "docs" / "RESULTS.md",
) -> None:
    sections = {name: SECTIONS[name] for name in only}
    each = [(flags, seed) for seed in seeds for rows in sections.values() for flags in rows.values()]
    if jobs:
        run_all(runs, {folder_of(runs, *what): what for what in each}, jobs)
    results = {
        name: {
            row: [read(folder) for seed in seeds if is_finished(folder := folder_of(runs, flags, seed))]
            for row, flags in rows.items()
        }
        for name, rows in sections.items()
    }
    for name, histories in results.items():
        publish(document, table_name(name), section_table(name, histories))
    if "usual" in results:
        named = [folder_of(runs, SECTIONS["usual"][f"{name}, 5e-4"], seed) for name in VARIANTS for seed in seeds]
        curves.draw([folder for folder in named if is_finished(folder)], document.with_name("study.png"))
        draw_overview(results["usual"], document.with_name("figure.png"))
    if {"mask", "mask, usual rate"} <= set(results):
        draw_mask(results, document.with_name("mask.png"))
    if "misreading" in results:
        draw_misreading(results["misreading"], document.with_name("misreading.png"))
    if {"usual", "misreading", "spellings"} <= set(results):
        publish(document, "study-summary", summary_table(results))
        publish(document, "study-survival", survival_table(results))
        draw_methods(results, document.with_name("methods.png"))
        publish(document, "study-alarm", alarm_table(results))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
