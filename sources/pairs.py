"""Load pairs of wordings from a source, and check them; load a benchmark: questions with their answers.

Gold never decides which pairs are kept: a set trains the same with and without it.

A source is a folder as the authors of Co-rewarding publish theirs (train_original.parquet, train_rewrite_*.parquet),
one's own .jsonl, .json or .parquet, or a name: embedded, math, dapo, open-rs, amc.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from embedded.word_problems import word_problems
from sources.faults import rewrite_fault
from sources.files import PUBLISHED, Columns, from_hub, read_source, to_pairs
from sources.files import Pair as Pair

EMBEDDED = {"embedded": "train", "embedded:held-out": "held-out"}

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

    rows: int = 0
    paired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def usable(self, kept: list[Any], of: Sequence[Any], reason: str, cure: str) -> list[Any]:
        """Return those that are kept, and count the others; it is an error if none is kept."""
        self.dropped[reason] = len(of) - len(kept)
        if not kept:
            raise UserError(f"none of {len(of):,} questions can be used ({reason}): {cure}")
        return kept

    def __str__(self) -> str:
        lines = [f"{self.rows:>8,}  rows read", f"{self.paired:>8,}  questions with a rephrasing"]
        for reason, consequence in CONSEQUENCES.items():
            if self.dropped[reason]:
                lines.append(f"{self.dropped[reason]:>8,}  {reason:<17} {consequence}")
        return "\n".join(lines)


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
    report.rows = len(rows)
    asking = [row for row in rows if row.question]
    pairs = report.usable(asking, rows, "empty question", f"fill the column of questions of {source}")
    if not keep_bad_rewrites:
        pairs = without_duplicates([checked(pair, report) for pair in pairs], report)
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


class Source(NamedTuple):
    """Where a benchmark is, and its columns there (those of the authors' layouts are known by themselves)."""

    local: str  # below the folder of data; the first match counts
    columns: Columns
    hub: str  # data set on the Hugging Face hub
    hub_files: str  # all of them count
    hub_columns: Columns


PLAIN = Columns()
PROBLEM = Columns("problem")
FINAL = Columns(answer="final_answer")
SVAMP = Columns("Question", answer="Answer")
AIME = Columns("problem", answer="expected_answer")
SOLUTION = Columns("problem", answer="solution")
# fmt: off
SOURCES = {
    "math500": Source("math500.jsonl", PROBLEM, "HuggingFaceH4/MATH-500", "test.jsonl", PROBLEM),
    "gsm8k": Source("gsm8k_test.jsonl", PLAIN, "openai/gsm8k", "main/test-*.parquet", PLAIN),
    # 83 questions of the AMC 12 of 2022 and 2023, the authors' AMC-TTT, and 40 of them
    "amc": Source("AMC-TTT/test.parquet", PLAIN, "AI-MO/aimo-validation-amc", "data/train-*.parquet", PROBLEM),
    "amc23": Source("amc23.jsonl", PLAIN, "math-ai/amc23", "*test-*.parquet", PLAIN),
    "aime24": Source("aime24.jsonl", AIME, "HuggingFaceH4/aime_2024", "data/train-*.parquet", PROBLEM),
    "aime25": Source("aime25.jsonl", AIME, "MathArena/aime_2025", "data/train-*.parquet", PROBLEM),
    # all 5,000 test questions
    "math": Source("math/test.parquet", PLAIN, "DigitalLearningGmbH/MATH-lighteval", "data/test-*.parquet", SOLUTION),
    # mathematics in English, without figures, with an answer
    "olympiadbench": Source(
        "olympiadbench_maths_en.jsonl", FINAL, "Hothan/OlympiadBench", "*OE_TO_maths_en_COMP.parquet", FINAL
    ),
    "svamp": Source("SVAMP.json", SVAMP, "ChilleD/SVAMP", "data/*.parquet", SVAMP),  # all 1,000
}
# fmt: on


def check_sources(*names: str | None) -> None:
    """Refuse what is no file, no folder and no name of questions; nothing is read or downloaded."""
    known = [*EMBEDDED, *PUBLISHED, *SOURCES]
    for name in filter(None, names):
        if name not in known and not (os.path.exists(name) or os.path.exists(Path("data", name))):
            raise UserError(f"{name} is no file, no folder and none of {', '.join(known)}")


def load_benchmark(
    name: str, data_dir: str = "data", question_column: str = "question", answer_column: str = "answer"
) -> Benchmark:
    """Load a benchmark by its name in SOURCES, or any source of data.py with the columns of one's own file."""
    check_sources(name)
    paths = [name]
    columns = Columns(question_column, answer=answer_column)
    if name in SOURCES:
        paths, columns = find_files(SOURCES[name], Path(data_dir))
    pairs = []
    for path in paths:
        pairs += load_pairs(path, **columns._asdict(), keep_bad_rewrites=True)
    if missing := sum(pair.gold is None for pair in pairs):
        cure = "take them out, or name the column of answers (--answer-column, in training --eval-answer-column)"
        raise UserError(f"{name}: {missing:,} of {len(pairs):,} questions have no gold answer: {cure}")
    return Benchmark(Path(name).stem.replace(":", "-"), pairs)


def find_files(source: Source, data_dir: Path) -> tuple[list[str], Columns]:
    if found := sorted(map(str, data_dir.rglob(source.local))):
        return found[:1], source.columns
    cure = f"put {source.local} below {data_dir}"
    if found := sorted(map(str, from_hub(source.hub, source.hub_files, cure).rglob(source.hub_files))):
        return found, source.hub_columns
    raise UserError(f"{source.hub} on the Hugging Face hub holds no {source.hub_files}: {cure}")
