"""Which questions of a benchmark are in a training set, word for word or nearly so (sources/overlap.py)?

    python -m tools.contamination --train dapo --eval math500 math amc
    python train.py --data dapo --decontaminate math500 math amc       # trains without them

Of what it finds nearly alike, some questions only begin alike: look at the examples that it shows.
"""

import textwrap

import tyro

from config import told_in_a_sentence
from data import load_benchmark, load_pairs
from sources.overlap import RUN, overlaps


def show_overlaps(train: str, eval: tuple[str, ...], question_column: str = "question") -> None:
    """Show how many questions of each benchmark are in the training set, and the least alike of those found.

    Args:
        train: training questions: a file, a folder or the name of a published set, as data.py reads them
        eval: benchmarks: names in sources/benchmarks.py, or files of one's own
        question_column: in a training file of one's own
    """
    training = load_pairs(train, question=question_column)
    benchmarks, dropped = [load_benchmark(name) for name in eval], set[int]()
    print(f"{train}: {len(training):,} training questions")
    for benchmark in benchmarks:
        asked = [pair.question for pair in benchmark.pairs]
        found = sorted(overlaps([pair.question for pair in training], asked), key=lambda each: each.share)
        exact = {each.asked for each in found if each.exact}
        nearly = {each.asked: each for each in found if each.asked not in exact}  # the last one counts
        dropped |= {each.trained for each in found}
        print(f"{benchmark.name}: of {len(asked):,} questions {len(exact):,} word for word, {len(nearly):,} nearly")
        for each in sorted(nearly.values(), key=lambda each: each.share)[:3]:
            print(f"  {each.share:.0%} of its runs of {RUN} words:")
            for who, pair in ((benchmark.name, benchmark.pairs[each.asked]), ("training", training[each.trained])):
                print(f"    {who} {pair.id}: {textwrap.shorten(pair.question, 500)}")
    print(f"train.py --decontaminate {' '.join(eval)} drops {len(dropped):,} of the training questions")


if __name__ == "__main__":
    with told_in_a_sentence():
        tyro.cli(show_overlaps, description=__doc__)
