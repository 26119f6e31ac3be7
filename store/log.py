"""The log of a run: the measurements of every step, its labels, the rollouts to one question, the warnings.

metrics.jsonl    an object a step                 labels.jsonl    one for each label of a step
rollouts.jsonl   a question a step, to read       warnings.txt    a line for each warning
"""

import math
import sys
from collections import ChainMap, Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from store.jsonl import Record, append_rows, read_rows, to_lines, write_atomic

Records = dict[str, list[Record]]  # rows for files of a run's folder: {"labels": of labels.jsonl, ...}
LOGS: dict[str, Callable[[Record], bool]] = {  # what else a row must be that has its step
    "metrics.jsonl": lambda row: all(isinstance(value, int | float) for value in row.values()),
    "labels.jsonl": lambda row: isinstance(row.get("id"), str) and isinstance(row.get("view"), str),
    "rollouts.jsonl": lambda row: True,
}


def read_log(file: Path) -> list[Record]:
    return read_rows(file, lambda row: isinstance(row.get("step"), int) and LOGS[file.name](row))


class RunLog:
    """What a run writes: three files of JSON lines, on request TensorBoard and Weights & Biases."""

    def __init__(self, folder: Path, config: dict[str, Any], first_step: int) -> None:
        self.folder = folder
        metrics, labels, rollouts = (keep_steps_before(folder / name, first_step) for name in LOGS)
        warn_of_gaps("metrics.jsonl", metrics, first_step)
        warn_of_gaps("labels.jsonl", labels, sum("label_agreement" in row for row in metrics))
        warn_of_gaps("rollouts.jsonl", rollouts, first_step)
        self.history = metrics
        self.label_of = {(row["id"], row["view"]): row.get("label") for row in labels}
        self.alarms: set[str] = set()
        self.board: Any = None
        self.wandb: Any = None
        if config["run"]["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        if config["run"]["wandb"]:
            import wandb

            self.wandb = wandb.init(
                project="co-rewarding", name=folder.name, dir=str(folder), config=config, resume="allow"
            )

    def headline(self) -> dict[str, str]:
        latest = ChainMap(*reversed(self.history))
        shown = {"reward": "reward", "label_accuracy": "label acc", "eval_accuracy": "held-out acc"}
        return {name: f"{latest[key]:.2f}" for key, name in shown.items() if key in latest}

    def warnings(self, signs: dict[str, str]) -> list[str]:
        """Return what was not said before of {sign: what was seen}, and keep it in warnings.txt."""
        new = [line for sign, line in signs.items() if sign not in self.alarms]
        self.alarms |= signs.keys()
        if new:
            file = self.folder / "warnings.txt"
            before = file.read_text(encoding="utf-8") if file.exists() else ""
            write_atomic(file, before + "".join(f"step {self.history[-1]['step']}: {line}\n" for line in new))
        return new

    def write(self, metrics: dict[str, float], records: Records) -> None:
        """Write one step; what it could not measure because it was skipped is left out: NaN is no JSON."""
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        metrics |= self.flipped(records.get("labels", []))
        self.history.append(metrics)
        append_rows(self.folder / "metrics.jsonl", [metrics])
        for name, rows in records.items():
            append_rows(self.folder / f"{name}.jsonl", rows)
        step = int(metrics["step"])
        measured = {key: value for key, value in metrics.items() if key != "step"}
        if self.board:
            for key, value in measured.items():
                self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(measured, step=step)

    def flipped(self, labels: list[Record]) -> dict[str, float]:
        now = {(row["id"], row["view"]): row["label"] for row in labels}
        flips = [self.label_of[key] != label for key, label in now.items() if key in self.label_of]
        self.label_of |= now
        return {"labels_flipped": fmean(flips)} if flips else {}

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def keep_steps_before(file: Path, step: int) -> list[Record]:
    """Drop what a killed run wrote after its last checkpoint: it is going to be written again."""
    rows = [row for row in read_log(file) if row["step"] < step] if file.exists() else []
    write_atomic(file, to_lines(rows))  # killed here, too, a run loses nothing
    return rows


def warn_of_gaps(name: str, rows: list[Record], steps: int) -> None:
    """Say so if a log lacks some of the steps before the first one, or metrics.jsonl holds one twice."""
    logged = len({row["step"] for row in rows})
    if logged < steps:
        print(f"warning: {name} lacks {steps - logged} of {steps} steps, and goes on without them", file=sys.stderr)
    if name == "metrics.jsonl" and logged < len(rows):
        print(f"warning: {name} holds {len(rows) - logged} of its steps twice", file=sys.stderr)


def closing_table(folder: Path) -> str:
    """Say what a run achieved, where the time went, and where its files are."""
    history = read_log(folder / "metrics.jsonl")
    seconds: Counter[str] = Counter()
    for metrics in history:
        seconds.update({k.removeprefix("seconds_"): v for k, v in metrics.items() if k.startswith("seconds_")})

    def change(key: str, window: int = 1, form: str = ".2f") -> str | None:
        values = [metrics[key] for metrics in history if key in metrics]
        return f"{fmean(values[:window]):{form}} -> {fmean(values[-window:]):{form}}" if values else None

    steps = [metrics for metrics in history if "reward" in metrics]
    taught_nothing = bool(steps) and all(metrics.get("zero_std_groups") == 1 for metrics in steps)
    warnings = folder / "warnings.txt"
    names = ("config.json", *LOGS, "curves.png")
    files = [name for name in names if (folder / name).exists() and (folder / name).stat().st_size]
    rows = {
        "nothing was learnt": "in no group of no step did two rewards differ" if taught_nothing else None,
        "held-out accuracy, sampled": change("eval_accuracy"),
        "held-out accuracy, greedy": change("eval_accuracy/greedy"),
        "label accuracy": change("label_accuracy", window=5),
        "reward": change("reward", window=5),
        "warned of": warnings.read_text().rstrip().replace("\n", "\n" + " " * 30) if warnings.exists() else None,
        "tokens sampled a second": change("tokens_per_second", window=5, form=",.0f"),
        "peak memory, GB": f"{max((metrics.get('peak_memory_gb', 0) for metrics in steps), default=0):.2f}",
        "seconds": f"{seconds.total():.0f} ({', '.join(f'{phase} {value:.0f}' for phase, value in seconds.items())})",
        "written to": f"{folder}/ ({', '.join(files)})",
        "policy": f"{folder}/checkpoints/latest/policy (AutoModelForCausalLM.from_pretrained loads it)",
        "compare": f"python -m tools.plot {folder} runs/ANOTHER --out comparison.png",
    }
    return "\n".join(f"  {name:<27} {value}" for name, value in rows.items() if value is not None)
