"""A source -> pairs of wordings, checked; a benchmark -> its questions with their answers.

A Pair is a question x, its rephrasing x' if there is one (other words, same answer) and its gold answer if there is
one. Gold never decides which pairs are kept: a set trains the same with and without it.

A source is a folder as the authors of Co-rewarding publish theirs (train_original.parquet, train_rewrite_*.parquet),
one's own .jsonl, .json, .parquet or .csv, or a name: embedded, math, dapo, open-rs, amc.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low
from typing import Any, TypeVar

from config import UserError
from embedded.word_problems import Split, word_problems
from sources.benchmarks import SOURCES, Files, find_files
from sources.faults import rewrite_fault
from sources.files import PUBLISHED, Columns, read_source, to_rows
from sources.overlap import overlaps

T = TypeVar("T")
EMBEDDED: dict[str, Split] = {"embedded": "train", "embedded:held-out": "held-out"}

# Everything that can be wrong with a row, and what becomes of it.
CONSEQUENCES = {
    "empty question": "row dropped",
    "duplicate": "row dropped, one of each stays",
    "conflicting gold": "gold dropped: equal questions, unequal answers",
    "broken \\frac": "repaired: a form feed stood for the \\f",
    "unchanged": "rephrasing dropped: a copy of the question",
    "placeholder": "rephrasing dropped: the rewriter echoed its template",
    "answer leaked": "rephrasing dropped: it states an answer",
    "figure lost": "rephrasing dropped: it needs the [asy] figure that it left out",
    "no rephrasing": "pair dropped: this run needs both wordings",
    "no gold": "pair dropped: this run needs the answer",
    "too long": "pair dropped: a prompt is over the limit",
    "in a benchmark": "pair dropped: --decontaminate found its question there",
}


@dataclass(frozen=True)
class Pair:
    id: str
    question: str
    rephrased: str | None = None
    gold: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # all other columns of its row

    def wording(self, view: str) -> str | None:
        return {"x": self.question, "x'": self.rephrased}[view]


@dataclass
class Report:
    """What became of a set's rows; filled in while they are read, checked and tokenised."""

    source: str = ""
    rows: int = 0
    questions: int = 0
    paired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, list[int]] = field(default_factory=dict)  # view -> lengths, too long prompts included

    def usable(self, kept: list[T], of: Sequence[object], reason: str, cure: str) -> list[T]:
        """Those that are kept; the others are counted, and it is an error if none is."""
        self.dropped[reason] = len(of) - len(kept)
        if not kept:
            raise UserError(f"none of {len(of):,} questions can be used ({reason}): {cure}")
        return kept

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows:,} rows read, {self.questions:,} questions, {self.paired:,} pairs"]
        for reason, consequence in CONSEQUENCES.items():
            if self.dropped[reason]:
                lines.append(f"{self.dropped[reason]:>8,}  {reason:<17} {consequence}")
        for view, lengths in self.tokens.items():
            lines.append(f"  prompt tokens of {view:<2}  {min_median_max(lengths)}")
        return "\n".join(lines)


def min_median_max(lengths: Sequence[int]) -> str:
    return f"min {min(lengths):,}, median {median_low(lengths):,}, max {max(lengths):,}"


def load_pairs(
    source: str,
    *,
    question: str = "question",
    rephrased: str = "rephrased",
    answer: str = "answer",
    keep_bad_rewrites: bool = False,
    report: Report | None = None,
) -> list[Pair]:
    """All questions of a source, read from these columns; a bad rephrasing is taken off its question, which stays.

    `keep_bad_rewrites` leaves rows as published: not checked, not repaired, duplicates and all.

    Raises:
        UserError: nothing there, nothing readable, or no question in it.
    """
    report = Report() if report is None else report
    if source in EMBEDDED:
        rows = to_rows([(source, problem) for problem in word_problems(EMBEDDED[source])], Columns(), source)
    else:
        rows = read_source(source, Columns(question, rephrased, answer))
    report.source, report.rows = source, len(rows)
    asking = [Pair(*row) for row in rows if row.question]
    pairs = report.usable(asking, rows, "empty question", f"fill the column of questions of {source}")
    if not keep_bad_rewrites:
        pairs = without_duplicates([checked(pair, report) for pair in pairs], report)
    report.questions = len(pairs)
    report.paired = sum(pair.rephrased is not None for pair in pairs)
    return pairs


# ---------------------------------------------------------------- checks


def checked(pair: Pair, report: Report) -> Pair:
    # DAPO's other form feeds stand for a lost "fi" or for nothing at all, which cannot be told apart: they stay.
    question = pair.question.replace("\frac{", "\\frac{")
    rephrased = pair.rephrased and pair.rephrased.replace("\frac{", "\\frac{")
    report.dropped["broken \\frac"] += (question, rephrased) != (pair.question, pair.rephrased)
    fault = rewrite_fault(question, rephrased) if rephrased else None
    if fault:
        report.dropped[fault] += 1
    return Pair(pair.id, question, None if fault else rephrased, pair.gold, pair.meta)


def without_duplicates(pairs: list[Pair], report: Report) -> list[Pair]:
    """One of each question, preferably one with a rephrasing; its gold only if all copies agree."""
    copies = defaultdict(list)
    for pair in pairs:
        copies[pair.question].append(pair)
    unique = []
    for group in copies.values():
        kept = next((pair for pair in group if pair.rephrased), group[0])
        golds = {pair.gold for pair in group if pair.gold}
        report.dropped["duplicate"] += len(group) - 1
        report.dropped["conflicting gold"] += len(golds) > 1
        unique.append(kept if len(group) == 1 else replace(kept, gold=golds.pop() if len(golds) == 1 else None))
    return unique


# ---------------------------------------------------------------- benchmarks


@dataclass(frozen=True)
class Benchmark:
    name: str
    pairs: list[Pair]  # each with a gold answer


def load_benchmark(
    name: str, data_dir: str = "data", question_column: str = "question", answer_column: str = "answer"
) -> Benchmark:
    """A benchmark by its name in SOURCES, or any source of data.py; the columns are those of one's own file."""
    source = SOURCES.get(name)
    if source:
        paths, files = find_files(source, Path(data_dir))
    elif name in {*EMBEDDED, *PUBLISHED} or Path(name).exists():
        paths, files = [name], Files(name, Columns(question_column, answer=answer_column))
    else:
        raise UserError(f"{name} is no file, no folder and no benchmark: choose from {', '.join(SOURCES)}")
    columns = files.columns._asdict()
    pairs = [pair for path in paths for pair in load_pairs(path, **columns, keep_bad_rewrites=True)]
    if missing := sum(pair.gold is None for pair in pairs):
        cure = "take them out, or name the column of answers (--answer-column, in training --eval-answer-column)"
        raise UserError(f"{name}: {missing:,} of {len(pairs):,} questions have no gold answer: {cure}")
    if not source:
        return Benchmark(Path(name).stem.replace(":", "-"), pairs)
    pairs = [
        replace(pair, question=source.ask(pair.question, pair.meta), gold=source.gold(str(pair.gold))) for pair in pairs
    ]
    return Benchmark(name, pairs)


def without_overlap(pairs: list[Pair], benchmarks: Sequence[Benchmark], report: Report) -> list[Pair]:
    """The pairs whose question is in none of the benchmarks; it is an error if no pair is left."""
    asked = [pair.question for benchmark in benchmarks for pair in benchmark.pairs]
    found = {i for i, _ in overlaps([pair.question for pair in pairs], asked)}
    names = " ".join(benchmark.name for benchmark in benchmarks)
    cure = f"--decontaminate {names} leaves no training question: it is the training set itself"
    return report.usable([pair for i, pair in enumerate(pairs) if i not in found], pairs, "in a benchmark", cure)
