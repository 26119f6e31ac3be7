"""Is a question of a benchmark in a training set, word for word or nearly so?

Word for word: equal but for white space. Nearly: half of the benchmark question's runs of 8 words, or more, stand in
one training question, which also has all its numbers (the same exercise with other numbers is another exercise). This
sees a question through another layout or a sentence added ("give the value of m + n"), not through a rephrasing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

RUN = 8  # words
NEARLY = 0.5  # share of a benchmark question's runs


def squeezed(text: str) -> str:
    return " ".join(text.split())


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.casefold())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def digits(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+", text))


def overlaps(training: Sequence[str], asked: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(i, j) wherever training question i and benchmark question j are the same, exactly or nearly."""
    equal_to, holding = defaultdict(list), defaultdict(list)
    runs_in = [runs_of_words(question) for question in asked]
    for j, question in enumerate(asked):
        equal_to[squeezed(question)].append(j)
        for run in runs_in[j]:
            holding[run].append(j)
    for i, question in enumerate(training):
        exact = equal_to.get(squeezed(question), [])
        yield from ((i, j) for j in exact)
        shared = Counter(j for run in runs_of_words(question) for j in holding.get(run, ()))
        for j, count in shared.items():
            if j not in exact and count >= NEARLY * len(runs_in[j]) and digits(asked[j]) <= digits(question):
                yield i, j
