"""Load pairs of wordings from a source, and check them; load a benchmark: questions with their answers.

Gold never decides which pairs are kept: a set trains the same with and without it.

A source is a folder as the authors of Co-rewarding publish theirs (train_original.parquet, train_rewrite_*.parquet),
one's own .jsonl, .json or .parquet, or a name: embedded, math, dapo, open-rs, amc.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median_low
from typing import TypeVar

from config import Data, UserError
from embedded.word_problems import Split, word_problems
from sources.benchmarks import SOURCES, Files, find_files
from sources.faults import rewrite_fault
from sources.files import PUBLISHED, Columns, locate, read_source, to_pairs
from sources.files import Pair as Pair

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
    "no rephrasing": "pair dropped: this run needs its rephrasing",
    "no gold": "pair dropped: this run needs the answer",
    "too long": "pair dropped: a prompt is over the limit",
}


@dataclass
class Report:
    """The fate of a set's rows; filled in while they are read, checked and tokenised."""

    source: str = ""
    rows: int = 0
    questions: int = 0
    paired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, list[int]] = field(default_factory=dict)  # view -> lengths, too long prompts included

    def usable(self, kept: list[T], of: Sequence[object], reason: str, cure: str) -> list[T]:
        """Return those that are kept, and count the others; it is an error if none is kept."""
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
    """Load all questions of a source from these columns; a question with a bad rephrasing stays without it.

    `keep_bad_rewrites` leaves rows as published: not checked, not repaired, duplicates and all.

    Raises:
        UserError: Nothing there, nothing readable, or no question in it.
    """
    report = Report() if report is None else report
    if source in EMBEDDED:
        rows = to_pairs(word_problems(EMBEDDED[source]), Columns(), source)
    else:
        rows = read_source(source, Columns(question, rephrased, answer))
    report.source = source
    report.rows = len(rows)
    asking = [row for row in rows if row.question]
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
    return replace(pair, question=question, rephrased=None if fault else rephrased)


def without_duplicates(pairs: list[Pair], report: Report) -> list[Pair]:
    """Keep one of each question, preferably one with a rephrasing; its gold only if all copies agree."""
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


def check_sources(data: Data) -> None:
    """Refuse a file that is not there and a benchmark that nobody knows; nothing is read or downloaded.

    Raises:
        UserError: there is no such thing.
    """
    if data.source not in {*EMBEDDED, *PUBLISHED}:
        locate(data.source)
    if data.eval_data is not None:
        check_benchmark(data.eval_data)


def check_benchmark(name: str) -> None:
    """Refuse a name that is neither a benchmark nor a source of questions."""
    if name not in {*SOURCES, *EMBEDDED, *PUBLISHED} and not os.path.exists(name):
        raise UserError(f"{name} is no file, no folder and no benchmark: choose from {', '.join(SOURCES)}")


def load_benchmark(
    name: str, data_dir: str = "data", question_column: str = "question", answer_column: str = "answer"
) -> Benchmark:
    """Load a benchmark by its name in SOURCES, or any source of data.py with the columns of one's own file."""
    check_benchmark(name)
    source = SOURCES.get(name)
    if source:
        paths, files = find_files(source, Path(data_dir))
    else:
        paths = [name]
        files = Files(name, Columns(question_column, answer=answer_column))
    load = partial(load_pairs, **files.columns._asdict(), keep_bad_rewrites=True)
    pairs = list(chain.from_iterable(map(load, paths)))
    if missing := sum(pair.gold is None for pair in pairs):
        cure = "take them out, or name the column of answers (--answer-column, in training --eval-answer-column)"
        raise UserError(f"{name}: {missing:,} of {len(pairs):,} questions have no gold answer: {cure}")
    if not source:
        return Benchmark(Path(name).stem.replace(":", "-"), pairs)
    return Benchmark(name, [replace(pair, question=source.ask(pair.question, pair.meta)) for pair in pairs])
