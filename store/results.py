"""How the result of an evaluation is kept, shown and compared with another one.

A result.json holds {"settings": ..., "benchmarks": {name: what evaluate.result_of says}}.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from config import UserError

Estimate = dict[str, Any]  # value, its standard error (None for a single question), number of questions


def estimate(values: Sequence[float]) -> Estimate:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": fmean(values), "error": error, "questions": len(values)}


def read_result(path: str) -> dict[str, Any]:
    try:
        result = json.loads(Path(path).read_text())
        return {"settings": dict(result["settings"]), "benchmarks": dict(result["benchmarks"])}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is no result.json of an evaluation: {problem!r}") from problem


def written(number: Estimate, name: str, sign: str = "") -> str:
    """`43.2 ± 1.8`: percent, or tokens."""
    scale = 1 if name.startswith("tokens") else 100
    error = "" if number["error"] is None else f" ± {scale * number['error']:.1f}"
    return f"{scale * number['value']:{sign},.1f}{error}"


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each number, a column for each benchmark; then its main number by level, subject and the like."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["numbers"]))
    rows = [["", *results]]
    rows += [[count, *(f"{result[count]:,}" for result in results.values())] for count in ("questions", "samples")]
    for name in names:
        cells = [result["numbers"].get(name) for result in results.values()]
        rows.append([name, *(written(cell, name) if cell else "" for cell in cells)])
    lines = [in_columns(rows), "in percent, ± the standard error over questions; tokens a response"]
    for benchmark, result in results.items():
        for column, groups in result["groups"].items():
            parts = [f"{group} {written(each, '')} ({each['questions']:,})" for group, each in groups.items()]
            lines.append(f"\n{benchmark}, {result['groups of']} by {column}:\n  " + "\n  ".join(parts))
    return "\n".join(lines)


def compare(before_path: str, after_path: str) -> str:
    """Every number that both results have: before, after, and their mean difference question by question, whose
    standard error is smaller than that of two separate means, as both were asked the same questions."""
    before, after = read_result(before_path), read_result(after_path)
    shared = [name for name in before["benchmarks"] if name in after["benchmarks"]]
    if not shared:
        raise UserError(f"{before_path} and {after_path} have no benchmark in common")
    rows = [["", "", "before", "after", "difference"]]
    for benchmark in shared:
        a, b = before["benchmarks"][benchmark], after["benchmarks"][benchmark]
        if a["fingerprint"] != b["fingerprint"]:
            raise UserError(
                f"{benchmark} has other questions in {before_path} than in {after_path}: evaluate one again"
            )
        for name in [name for name in a["numbers"] if name in b["numbers"]]:
            difference = estimate([y - x for x, y in zip(a["values"][name], b["values"][name], strict=True)])
            both = [written(result["numbers"][name], name) for result in (a, b)]
            rows.append([benchmark, name, *both, written(difference, name, sign="+")])
    lines = [f"before: {before_path}", f"after:  {after_path}", in_columns(rows)]
    for name, value in before["settings"].items():
        if value != after["settings"].get(name):
            lines.append(f"other settings: {name} {value} before, {after['settings'].get(name)} after")
    return "\n".join(lines)
