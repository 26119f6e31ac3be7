"""How the result of an evaluation is kept, shown and compared with another one.

A result.json holds {"settings": ..., "versions": ..., "benchmarks": {name: what evaluate.result_of says}}.
"""

import json
import math
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from config import UserError
from store.curves import by_settings
from store.jsonl import changes

Estimate = dict[str, Any]  # value, its standard error (None for a single question), number of questions


def versions() -> dict[str, str]:
    """Return what numbers depend on besides settings: packages, the device, and the commit if there is one."""
    import torch

    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    for name in ("torch", "transformers", "vllm", "math-verify"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    root = Path(__file__).resolve().parents[1]
    describe = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git on this machine, or no repository
        commit = subprocess.run([*describe, "--abbrev=40", "--exclude=*"], check=True, capture_output=True, text=True)
        found["commit"] = commit.stdout.strip()
    return found


def estimate(values: Sequence[float], of_mean: bool = True) -> Estimate:
    """Compute the mean of values with its standard error, or with their standard deviation."""
    error = stdev(values) / (math.sqrt(len(values)) if of_mean else 1) if len(values) > 1 else None
    return {"value": fmean(values), "error": error, "questions": len(values)}


def read_result(path: str) -> dict[str, Any]:
    file = Path(path, "result.json") if Path(path).is_dir() else Path(path)
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        return {name: dict(result[name]) for name in ("settings", "versions", "benchmarks")}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file} is no result.json of an evaluation: {problem!r}") from problem


def written(number: Estimate, name: str, sign: str = "") -> str:
    """Write an estimate in percent, or in tokens: `43.2 ± 1.8`."""
    scale = 1 if name.startswith("tokens") else 100
    error = "" if number["error"] is None else f" ± {scale * number['error']:.1f}"
    return f"{scale * number['value']:{sign},.1f}{error}"


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Lay out a row for each number and a column for each benchmark; then its main number by level and the like."""
    rows = [["", *results], ["questions", *(f"{result['questions']:,}" for result in results.values())]]
    for name in next(iter(results.values()))["numbers"]:  # all have the same
        rows.append([name, *(written(result["numbers"][name], name) for result in results.values())])
    lines = [in_columns(rows), "in percent, ± the standard error over questions; tokens a response"]
    for benchmark, result in results.items():
        groups = [f"  {group} {written(each, '')} ({each['questions']:,})" for group, each in result["groups"].items()]
        lines += [f"\n{benchmark}, {result['groups of']} by group:", *groups] if groups else []
    return "\n".join(lines)


def compare(before_path: str, after_path: str) -> str:
    """Compare every number that both results have: before, after, and their mean difference question by question.

    Its standard error is smaller than that of two separate means, since both were asked the same questions.
    """
    before = read_result(before_path)
    after = read_result(after_path)
    shared = [name for name in before["benchmarks"] if name in after["benchmarks"]]
    if not shared:
        raise UserError(f"{before_path} and {after_path} have no benchmark in common")
    rows = [["", "", "before", "after", "difference"]]
    notes = []
    for benchmark in shared:
        a = before["benchmarks"][benchmark]
        b = after["benchmarks"][benchmark]
        if a["fingerprint"] != b["fingerprint"]:
            raise UserError(
                f"{benchmark} has other questions in {before_path} than in {after_path}: evaluate one again"
            )
        for name in [name for name in a["numbers"] if name in b["numbers"]]:
            difference = estimate([y - x for x, y in zip(a["values"][name], b["values"][name], strict=True)])
            both = [written(result["numbers"][name], name) for result in (a, b)]
            rows.append([benchmark, name, *both, written(difference, name, sign="+")])
        if (main := a["groups of"]) in b["values"]:
            notes.append(f"{benchmark}, by {main}: {moved(a['values'][main], b['values'][main])}")
    for kind in ("settings", "versions"):
        if changed := changes(before[kind], after[kind]):
            notes.append(f"other {kind}: {changed}")
    return "\n".join([f"before: {before_path}", f"after:  {after_path}", in_columns(rows), *notes])


def moved(before: Sequence[float], after: Sequence[float]) -> str:
    """Count the questions that moved, by the share of their samples that is right: what was acquired, what was lost."""
    pairs = list(zip(before, after, strict=True))
    solvable = [after for before, after in pairs if before > 0]
    acquired = sum(before == 0 and after > 0.5 for before, after in pairs)
    degraded = sum(before > 0.5 and after == 0 for before, after in pairs)
    kept = sum(after > 0.5 for after in solvable)
    return (
        f"{acquired:,} questions acquired (never right before, mostly after), {degraded:,} lost (mostly, then never); "
        f"of {len(solvable):,} solvable before (once or more) {kept:,} are mostly right"
    )


def seeds(paths: Sequence[str]) -> str:
    """Lay out a line for each setting of the runs that were measured: the mean over its seeds ± standard deviation."""
    results = [read_result(path) for path in paths]
    groups = by_settings([run_of(result, path) for result, path in zip(results, paths, strict=True)])
    lines = []
    for benchmark in dict.fromkeys(chain.from_iterable(result["benchmarks"] for result in results)):
        measured = [result["benchmarks"].get(benchmark, {}).get("numbers", {}) for result in results]
        names = dict.fromkeys(chain.from_iterable(measured))
        rows = [[benchmark, "seeds", *names]]
        for label, places in groups.items():
            of_seeds = [measured[i] for i in places if measured[i]]
            spread = {name: [numbers[name]["value"] for numbers in of_seeds if name in numbers] for name in names}
            cells = [
                written(estimate(values, of_mean=False), name) if values else "-" for name, values in spread.items()
            ]
            rows.append([label, str(len(of_seeds)), *cells])
        lines.append(in_columns(rows))
    return "\n\n".join([*lines, "in percent, ± the standard deviation over seeds; tokens a response"])


def run_of(result: dict[str, Any], path: str) -> Path:
    model = Path(str(result["settings"].get("model")))
    for folder in model.parents:
        if (folder / "metrics.jsonl").is_file():
            return folder
    raise UserError(f"{path} measures {model}, which is in no run's folder: leave it out")
