"""Which questions of a benchmark are in a training set, word for word or nearly so?

    python data.py check --train dapo --eval math500 math amc
    python train.py --data dapo --decontaminate math500 math amc       # trains without them

Word for word: equal but for white space. Nearly: half of the benchmark question's runs of 8 words, or more, stand in
one training question, which also has all its numbers (the same exercise with other numbers is another exercise). This
sees a question through another layout or a sentence added ("give the value of m + n"), not through a rephrasing; of
what it finds, some questions only begin alike, so look at the examples that it shows.
"""

import re
import shutil
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tyro.conf import OmitArgPrefixes

from benchmark_data import Benchmark, load_benchmark
from data import DataError, Pair, Report, load_pairs

RUN = 8  # words
NEARLY = 0.5  # share of a benchmark question's runs


class Overlap(NamedTuple):
    trained: int  # which training question
    asked: int  # which question of the benchmark
    share: float  # of its runs of words that are in the training question; 1 if it is there word for word
    exact: bool


def flat(text: str) -> str:
    return " ".join(text.split())


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.casefold())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+", text))


def overlaps(training: Sequence[str], asked: Sequence[str]) -> Iterator[Overlap]:
    """Every pair of a training question and a benchmark question that are the same, exactly or nearly."""
    equal_to, holding = defaultdict(list), defaultdict(list)
    runs_in = [runs_of_words(question) for question in asked]
    numbers_in = [numbers(question) for question in asked]
    for j, question in enumerate(asked):
        equal_to[flat(question)].append(j)
        for run in runs_in[j]:
            holding[run].append(j)
    for i, question in enumerate(training):
        exact = equal_to.get(flat(question), [])
        yield from (Overlap(i, j, 1.0, exact=True) for j in exact)
        own_numbers = numbers(question)
        shared = Counter(j for run in runs_of_words(question) for j in holding.get(run, ()))
        for j, count in shared.items():
            share = count / len(runs_in[j])
            if share >= NEARLY and j not in exact and numbers_in[j] <= own_numbers:
                yield Overlap(i, j, share, exact=False)


def without_overlap(pairs: list[Pair], benchmarks: Sequence[Benchmark], report: Report) -> list[Pair]:
    """The pairs whose question is in none of the benchmarks; it is an error if no pair is left."""
    asked = [pair.question for benchmark in benchmarks for pair in benchmark.pairs]
    found = {overlap.trained for overlap in overlaps([pair.question for pair in pairs], asked)}
    report.dropped["in a benchmark"] += len(found)
    if len(found) == len(pairs):
        names = " ".join(benchmark.name for benchmark in benchmarks)
        raise DataError(f"--decontaminate {names} leaves no training question: it is the training set itself")
    return [pair for i, pair in enumerate(pairs) if i not in found]


@dataclass(frozen=True)
class Settings:
    train: str
    """training questions: a file, a folder or the name of a published set, as data.py reads them"""
    eval: tuple[str, ...]
    """benchmarks: names in benchmark_data.py, or files of one's own"""
    examples: int = 3
    """near matches to show for each benchmark, the least alike first"""
    data_dir: str = "data"
    """folder to search for the files of named benchmarks, before the Hugging Face hub"""
    question_column: str = "question"
    """in a training file of one's own"""


def side_by_side(overlap: Overlap, name: str, asked: Pair, trained: Pair) -> str:
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [f"  {overlap.share:.0%} of its runs of {RUN} words:"]
    for head, pair in ((f"{name} {asked.id}", asked), (f"training {trained.id}", trained)):
        text = f"{head}: {textwrap.shorten(pair.question, 500)}"
        lines.append(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="      "))
    return "\n".join(lines)


def check(settings: OmitArgPrefixes[Settings]) -> None:
    """Show how many questions of each benchmark are in the training set, and examples."""
    training = load_pairs(settings.train, question=settings.question_column)
    benchmarks = [load_benchmark(name, settings.data_dir) for name in settings.eval]
    asked = [(benchmark, pair) for benchmark in benchmarks for pair in benchmark.pairs]
    found = list(overlaps([pair.question for pair in training], [pair.question for _, pair in asked]))
    print(f"{settings.train}: {len(training):,} training questions")
    for benchmark in benchmarks:
        mine = sorted((each for each in found if asked[each.asked][0] is benchmark), key=lambda each: each.share)
        exact = {each.asked for each in mine if each.exact}
        best = {each.asked: each for each in mine if each.asked not in exact}  # the last one counts
        counts = f"{len(exact):,} word for word, {len(best):,} nearly"
        print(f"{benchmark.name}: of {len(benchmark.pairs):,} questions {counts}")
        for each in sorted(best.values(), key=lambda each: each.share)[: settings.examples]:
            print(side_by_side(each, benchmark.name, asked[each.asked][1], training[each.trained]))
    dropped = len({each.trained for each in found})
    print(f"train.py --decontaminate {' '.join(settings.eval)} drops {dropped:,} of the training questions")
