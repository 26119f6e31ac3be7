"""tools/contamination.py and sources/overlap.py: each test is named after the bug it prevents."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from config import UserError
from data import Benchmark, Pair, Report, load_benchmark, load_pairs, without_overlap
from sources.overlap import NEARLY, RUN, digits, overlaps, runs_of_words, squeezed

SETS = Path(__file__).resolve().parents[2] / "shared" / "data"
LONG = "A train leaves the station at 7 and drives for 3 hours at 60 miles an hour before it stops. How far is that?"


def shares(training: str, asked: str) -> list[tuple[float, bool]]:
    return [(overlap.share, overlap.exact) for overlap in overlaps([training], [asked])]


def test_other_line_breaks_hide_a_copy() -> None:
    assert shares(LONG.replace(" ", "\n  "), LONG) == [(1.0, True)]
    assert shares("What is 1+1?", "What  is 1+1? ") == [(1.0, True)], "too short for runs of words"


def test_added_sentence_or_other_layout_hides_a_copy() -> None:
    ((share, exact),) = shares(LONG.replace("7", "$7$").upper() + " Give the number of miles.", LONG)
    assert share == 1.0 and not exact


def test_same_exercise_with_other_numbers_counts_as_a_copy() -> None:
    assert shares(LONG.replace("60", "70"), LONG) == []


def test_index_disagrees_with_comparing_every_pair() -> None:
    rng = random.Random(0)
    words = [rng.choice("abcdefghijkl") * 2 for _ in range(400)] + ["1", "2"]
    texts = [" ".join(words[start : start + rng.randrange(5, 40)]) for start in rng.choices(range(390), k=120)]
    training, asked = texts[:80], [*texts[80:], texts[0], texts[1].replace(" ", "  ")]

    def expected(i: int, j: int) -> tuple[int, int, float, bool] | None:
        if training[i].split() == asked[j].split():
            return i, j, 1.0, True
        mine = [tuple(training[i].split()[k : k + RUN]) for k in range(len(training[i].split()) - RUN + 1)]
        runs = {tuple(asked[j].split()[k : k + RUN]) for k in range(len(asked[j].split()) - RUN + 1)}
        share = sum(run in mine for run in runs) / len(runs) if runs else 0.0
        has_numbers = all(asked[j].split().count(n) <= training[i].split().count(n) for n in "12")
        return (i, j, share, False) if share >= NEARLY and has_numbers else None

    every_pair = [expected(i, j) for i in range(len(training)) for j in range(len(asked))]
    found = [tuple(overlap) for overlap in overlaps(training, asked)]
    assert len(found) > 20 and sum(exact for *_, exact in found) >= 2
    assert sorted(found) == sorted(each for each in every_pair if each)


def test_helpers_split_inside_numbers_or_names() -> None:
    assert digits("12 and 1,200 and a_3") == {"12": 1, "1": 1, "200": 1, "3": 1}
    assert runs_of_words("a_{1} b c d e f g") == runs_of_words("A 1 (B) c, d; e f. g!") != set()
    assert squeezed(" a\n\n b\t") == "a b"


def test_decontaminated_set_keeps_a_copy_or_loses_the_rest() -> None:
    pairs = [Pair(str(i), f"{LONG} And what is {i} squared?") for i in (100, 200)] + [Pair("other", "What is 2+2?")]
    report = Report()
    benchmark = Benchmark("own", [Pair("0", f"{LONG} And what is 100 squared?", gold="1")])
    assert [pair.id for pair in without_overlap(pairs, [benchmark], report)] == ["200", "other"]
    assert report.dropped["in a benchmark"] == 1
    with pytest.raises(UserError, match="--decontaminate own leaves no training question"):
        without_overlap(pairs[:1], [benchmark], report)


def run_contamination(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.contamination", *arguments]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, check=False, capture_output=True, text=True, timeout=120)


def test_command_line_finds_nothing(tmp_path: Path) -> None:
    for name, questions in {"train": [LONG, LONG + " And when?"], "asked": [LONG, "What is 1+1?"]}.items():
        rows = [json.dumps({"question": question, "answer": "1"}) for question in questions]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    train, asked = (str(tmp_path / f"{name}.jsonl") for name in ("train", "asked"))
    printed = run_contamination("--train", train, "--eval", asked).stdout
    assert "asked: of 2 questions 1 word for word, 0 nearly" in printed
    assert "drops 2 of the training questions" in printed


def test_command_line_ends_in_a_traceback(tmp_path: Path) -> None:
    result = run_contamination("--train", str(tmp_path / "absent.jsonl"), "--eval", "math500")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.skipif(not SETS.exists(), reason="the published data sets are not here")
def test_published_overlap_is_not_found() -> None:
    """What the authors' training sets are known to contain of the test sets, word for word."""
    known = {"dapo": (971, 4, 11), "open-rs": (253, 6, 0), "math": (1, 0, 0)}
    asked = [
        (name, pair.question) for name in ("math", "math500", "amc") for pair in load_benchmark(name, str(SETS)).pairs
    ]
    for source, counts in known.items():
        training = [pair.question for pair in load_pairs(str(SETS / "corewarding" / source))]
        exact = {overlap.asked for overlap in overlaps(training, [question for _, question in asked]) if overlap.exact}
        found = Counter(asked[j][0] for j in exact)
        assert (found["math"], found["math500"], found["amc"]) == counts, source
