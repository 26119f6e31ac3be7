"""benchmarks/overlap.py: each test is named after the bug it prevents."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from sources.pairs import load_benchmark, load_pairs

ROOT = Path(__file__).resolve().parents[1]
SETS = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "benchmarks"))

from overlap import NEARLY, RUN, digits, overlaps, runs_of_words  # noqa: E402

LONG = "A train leaves the station at 7 and drives for 3 hours at 60 miles an hour before it stops. How far is that?"


def test_other_line_breaks_hide_a_copy() -> None:
    assert list(overlaps([LONG.replace(" ", "\n  ")], [LONG])) == [(0, 0)]
    assert list(overlaps(["What is 1+1?"], ["What  is 1+1? "])) == [(0, 0)], "too short for runs of words"


def test_added_sentence_or_other_layout_hides_a_copy() -> None:
    assert list(overlaps([LONG.replace("7", "$7$").upper() + " Give the number of miles."], [LONG])) == [(0, 0)]


def test_same_exercise_with_other_numbers_counts_as_a_copy() -> None:
    assert list(overlaps([LONG.replace("60", "70")], [LONG])) == []


def test_index_disagrees_with_comparing_every_pair() -> None:
    rng = random.Random(0)
    words = [rng.choice("abcdefghijkl") * 2 for _ in range(400)] + ["1", "2"]
    texts = [" ".join(words[start : start + rng.randrange(5, 40)]) for start in rng.choices(range(390), k=120)]
    training, asked = texts[:80], [*texts[80:], texts[0], texts[1].replace(" ", "  ")]

    def same(i: int, j: int) -> bool:
        if training[i].split() == asked[j].split():
            return True
        mine = [tuple(training[i].split()[k : k + RUN]) for k in range(len(training[i].split()) - RUN + 1)]
        runs = {tuple(asked[j].split()[k : k + RUN]) for k in range(len(asked[j].split()) - RUN + 1)}
        share = sum(run in mine for run in runs) / len(runs) if runs else 0.0
        has_numbers = all(asked[j].split().count(n) <= training[i].split().count(n) for n in "12")
        return share >= NEARLY and has_numbers

    found = list(overlaps(training, asked))
    assert len(found) > 20 and {(0, 40), (1, 41)} <= set(found)
    assert sorted(found) == [(i, j) for i in range(len(training)) for j in range(len(asked)) if same(i, j)]


def test_helpers_split_inside_numbers_or_names() -> None:
    assert digits("12 and 1,200 and a_3") == {"12": 1, "1": 1, "200": 1, "3": 1}
    assert runs_of_words("a_{1} b c d e f g") == runs_of_words("A 1 (B) c, d; e f. g!") != set()
    assert runs_of_words(" a\n\n b\t") == {("a", "b")}


@pytest.mark.skipif(not SETS.exists(), reason="the published data sets are not here")
def test_published_overlap_is_not_found() -> None:
    """What the authors' training sets are known to contain of the test sets, word for word."""
    known = {"dapo": (971, 4, 11), "open-rs": (253, 6, 0), "math": (1, 0, 0)}
    asked = [
        (name, pair.question) for name in ("math", "math500", "amc") for pair in load_benchmark(name, str(SETS)).pairs
    ]
    for source, counts in known.items():
        training = [pair.question for pair in load_pairs(str(SETS / "corewarding" / source))]
        found_pairs = overlaps(training, [question for _, question in asked])
        exact = {j for i, j in found_pairs if training[i].split() == asked[j][1].split()}
        found = Counter(asked[j][0] for j in exact)
        assert (found["math"], found["math500"], found["amc"]) == counts, source
