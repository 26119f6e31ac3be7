"""Find questions of a benchmark in a training set, word for word or nearly so.

Half of the benchmark question's runs of 8 words, or more, stand in one training question, which also has all its
numbers: the same exercise with other numbers is another exercise. A question of fewer words is found if it is equal
but for white space. This sees a question through another layout or a sentence added, not through a rephrasing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

RUN = 8  # words
NEARLY = 0.5  # share of a benchmark question's runs


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """Return all runs of 8 words, without case and punctuation; of a shorter text the one run that it is itself."""
    words = re.findall(r"[^\W_]+", text.casefold())
    if len(words) < RUN:
        return {tuple(text.split())}
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def digits(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+", text))


def overlaps(training: Sequence[str], asked: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield (i, j) wherever training question i and benchmark question j are the same, exactly or nearly."""
    holding = defaultdict(list)
    runs_in = [runs_of_words(question) for question in asked]
    for j, runs in enumerate(runs_in):
        for run in runs:
            holding[run].append(j)
    for i, question in enumerate(training):
        shared: Counter[int] = Counter()
        for run in runs_of_words(question):
            shared.update(holding.get(run, ()))
        for j, count in shared.items():
            if count >= NEARLY * len(runs_in[j]) and digits(asked[j]) <= digits(question):
                yield i, j
