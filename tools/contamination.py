"""Which questions of a benchmark are in a training set, word for word or nearly so (sources/overlap.py)?

    python -m tools.contamination --train dapo --eval math500 math amc
    python train.py --data dapo --decontaminate math500 math amc       # trains without them

Of what it finds nearly alike, some questions only begin alike: look at the examples that it shows.
"""

import shutil
import textwrap
from dataclasses import dataclass

import tyro

from config import told_in_a_sentence
from data import Pair, load_benchmark, load_pairs
from sources.overlap import RUN, Overlap, overlaps


@dataclass(frozen=True)
class ContaminationSettings:
    train: str
    """training questions: a file, a folder or the name of a published set, as data.py reads them"""
    eval: tuple[str, ...]
    """benchmarks: names in sources/benchmarks.py, or files of one's own"""
    examples: int = 3
    """near matches to show for each benchmark, the least alike first"""
    data_dir: str = "data"
    """folder to search for the files of named benchmarks, before the Hugging Face hub"""
    question_column: str = "question"
    """in a training file of one's own"""


def example(overlap: Overlap, name: str, asked: Pair, trained: Pair) -> str:
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [f"  {overlap.share:.0%} of its runs of {RUN} words:"]
    for head, pair in ((f"{name} {asked.id}", asked), (f"training {trained.id}", trained)):
        text = f"{head}: {textwrap.shorten(pair.question, 500)}"
        lines.append(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="      "))
    return "\n".join(lines)


def show_overlaps(settings: ContaminationSettings) -> None:
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
            print(example(each, benchmark.name, asked[each.asked][1], training[each.trained]))
    dropped = len({each.trained for each in found})
    print(f"train.py --decontaminate {' '.join(settings.eval)} drops {dropped:,} of the training questions")


if __name__ == "__main__":
    with told_in_a_sentence():
        show_overlaps(tyro.cli(ContaminationSettings, description=__doc__))
