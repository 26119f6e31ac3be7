"""The published numbers: what the abstract says of the tables, computed from the tables as docs/PAPER.md gives them.

A score has one decimal there and two in the abstract, so each sum comes with what rounding leaves open.
"""

import csv
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from answers.equivalence import extract_boxed

DOCS = Path(__file__).resolve().parents[1] / "docs"
QUESTIONS = (500, 1319, 83)  # of MATH500, GSM8K, AMC
ANSWERS = (500, 1319, 83 * 8)  # that a score counts: one a question, of AMC eight
BASELINES, OURS = ("self-certainty", "entropy", "majority"), ("I", "II")
LLAMA = ("3B MATH", "3B DAPO")
TABLES_1_AND_2 = ("8B MATH", "8B DAPO", "4B MATH", "4B DAPO", *LLAMA)  # OpenRS is in Table 8

Range = tuple[float, float]  # lowest and highest of what a number may be
Column = tuple[float, float, float]


def table_after(text: str, heading: str) -> dict[str, dict[str, str]]:
    """Row name -> column name -> cell, of the first table below a heading whose header has `8B MATH`."""
    below = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(below) if line.startswith("|") and "8B MATH" in line)
    names, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table_lines(below[start:])]
    return {name: dict(zip(names[-7:], cells, strict=True)) for name, *cells in rows}


def table_lines(lines: Sequence[str]) -> list[str]:
    return lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]


@cache
def published() -> dict[str, dict[str, Column]]:
    table = table_after((DOCS / "PAPER.md").read_text(), "## The published experiments")
    return {
        method: {column: tuple(map(float, cell.split("/"))) for column, cell in row.items() if "/" in cell}
        for method, row in table.items()
    }


def as_printed(score: float, _: int) -> Range:
    return score, score


def before_rounding(score: float, answers: int) -> Range:
    return (score, score) if answers == 500 else (score - 0.05, score + 0.05)


def as_counted(score: float, answers: int) -> Range:
    """The lowest and highest k of so many answers that round to this score; what rounding leaves where none does."""
    counts = [k for k in range(answers + 1) if abs(100 * k / answers - score) <= 0.05]
    return (100 * counts[0] / answers, 100 * counts[-1] / answers) if counts else before_rounding(score, answers)


def gain(
    columns: Sequence[str],
    reading: Callable[[float, int], Range] = as_printed,
    of: Sequence[str] = OURS,
    over: Sequence[str] = BASELINES,
    each: bool = True,
    in_points: bool = False,
) -> Range:
    """Mean over cells of a method's score over the best baseline's, minus 1 (%), or their difference in points; with
    `each` every method of `of` counts by itself, else the best of them in the cell."""
    gains: list[Range] = []
    for column in columns:
        for benchmark, answers in enumerate(ANSWERS):

            def scores(methods, column=column, benchmark=benchmark, answers=answers) -> list[Range]:
                return [reading(published()[method][column][benchmark], answers) for method in methods]

            best_low, best_high = map(max, zip(*scores(over), strict=True))
            mine = scores(of) if each else [tuple(map(max, zip(*scores(of), strict=True)))]
            for low, high in mine:
                far = (low - best_high, high - best_low)
                gains.append(far if in_points else (100 * far[0] / best_high, 100 * far[1] / best_low))
    low, high = (sum(bound) / len(gains) for bound in zip(*gains, strict=True))
    return low, high


def test_the_table_holds_the_cells_of_tables_1_and_2():
    for method in (*BASELINES, *OURS, "gt"):
        assert len(published()[method]) == 7 and set(TABLES_1_AND_2) < set(published()[method])
    assert as_counted(published()["II"]["8B DAPO"][1], 1319)[1] == pytest.approx(94.01, abs=0.005), "of the abstract"


@pytest.mark.parametrize(
    ("columns", "in_points", "from_one_decimal", "open_by_rounding", "from_counts", "in_abstract"),
    [
        (TABLES_1_AND_2, False, 3.292, (3.142, 3.442), (3.291, 3.315), 3.31),
        (LLAMA, False, 7.473, (7.242, 7.706), (7.482, 7.506), 7.49),
        (TABLES_1_AND_2, True, 1.158, (1.092, 1.225), (1.151, 1.172), None),
        (LLAMA, True, 2.167, (2.100, 2.233), (2.163, 2.182), None),
    ],
    ids=["all", "Llama", "all in points", "Llama in points"],
)
def test_the_gains_of_the_abstract_are_relative_means_of_i_and_ii_over_the_best_baseline(
    columns, in_points, from_one_decimal, open_by_rounding, from_counts, in_abstract
):
    assert gain(columns, in_points=in_points) == pytest.approx((from_one_decimal,) * 2, abs=6e-4)
    assert gain(columns, before_rounding, in_points=in_points) == pytest.approx(open_by_rounding, abs=6e-4)
    low, high = gain(columns, as_counted, in_points=in_points)
    assert (low, high) == pytest.approx(from_counts, abs=6e-4)
    assert in_abstract is None or low <= in_abstract <= high


@pytest.mark.parametrize(
    ("reading", "of_all", "of_llama"),
    [
        (dict(of=["I"]), 1.763, 7.010),
        (dict(of=["II"]), 4.821, 7.937),
        (dict(each=False), 5.923, 10.234),
        (dict(over=["majority"]), 6.718, 8.849),
        (dict(in_points=True), 1.158, 2.167),
    ],
    ids=["I alone", "II alone", "the better one", "over majority", "in points"],
)
def test_other_readings_of_the_gains_are_outside_what_rounding_leaves_open(reading, of_all, of_llama):
    for columns, expected, in_abstract in ((TABLES_1_AND_2, of_all, 3.31), (LLAMA, of_llama, 7.49)):
        assert gain(columns, **reading)[0] == pytest.approx(expected, abs=6e-4)
        low, high = gain(columns, before_rounding, **reading)
        assert not low <= in_abstract <= high


def test_with_openrs_the_mean_would_be_another():
    columns = (*TABLES_1_AND_2, "8B OpenRS")
    assert gain(columns)[0] == pytest.approx(2.841, abs=6e-4) and gain(columns, before_rounding)[1] < 3.31


def test_the_scores_to_expect_of_the_authors_checkpoints_are_those_of_the_tables_with_their_errors():
    with (DOCS / "results" / "published.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["method"] for row in rows} == {"gt", *BASELINES, *OURS}
    short = {"Qwen3-8B-Base": "8B", "Qwen3-4B-Base": "4B", "Llama-3.2-3B-Instruct": "3B"}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        key = (row["method"], f"{short[row['model']]} {row['trained on']}")
        found.setdefault(key, []).append((float(row["accuracy"]), float(row["error"])))
    assert len(found) == 6 * 7
    for (method, column), numbers in found.items():
        scores = published()[method][column]
        errors = [math.sqrt(s * (100 - s) / n) for s, n in zip(scores, QUESTIONS, strict=True)]
        assert numbers == [(s, round(e, 1)) for s, e in zip(scores, errors, strict=True)], (method, column)


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        (r"\boxed{5} \boxed{", "5"),
        (r"\boxed{x}\boxed5", "x"),
        (r"\boxed {7}", None),
        (r"\fbox{7}", None),
        (r"\boxed{3} \fbox{7}", "3"),
    ],
)
def test_boxes_that_the_authors_read_otherwise(text, ours):
    assert extract_boxed(text) == ours
