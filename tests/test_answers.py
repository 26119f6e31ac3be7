"""Answers: extraction, equivalence, voting. Each test is named after the bug it prevents."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from answers import equivalence
from answers.equivalence import equivalent, equivalent_many, extract_boxed, extract_lenient, normalise, vote_classes

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "equivalence"
LATEX = st.lists(
    st.sampled_from([r"\boxed{", r"\frac{", "{", "}", r"\{", r"\}", "\\", "1", "x", " ", "\n", "boxed{", "^", ","])
).map("".join)


# ---------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{2", None),
        (r"\boxed{a \boxed{b}", "b"),
        (r"{ \boxed{5} } }", "5"),
        (r"\boxed{1} \boxed{ }", None),
        ("none", None),
        ("", None),
        (r"\boxed {5} \fbox{5} boxed{5}", None),
        (r"\\boxed{5}", "5"),
    ],
)
def test_box_extraction_takes_the_last_balanced_box(text: str, boxed: str | None) -> None:
    assert extract_boxed(text) == boxed


def test_box_content_is_not_stripped_because_exact_votes_count_raw_strings() -> None:
    assert extract_boxed(r"\boxed{ 5 }") == " 5 "


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{5\}", None),
        (r"\boxed{\begin{matrix}1\\2\\\end{matrix}\\}", r"\begin{matrix}1\\2\\\end{matrix}\\"),
    ],
)
def test_escaped_braces_are_text(text: str, boxed: str | None) -> None:
    assert extract_boxed(text) == boxed


@settings(deadline=None)
@given(LATEX)
def test_extraction_agrees_with_counting_braces_from_every_box(text: str) -> None:
    def content(start: int) -> str | None:
        depth, position = 1, start
        while position < len(text):
            if text[position : position + 2] in (r"\{", r"\}", "\\\\"):
                position += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position]
            position += 1
        return None

    starts = [i + len(r"\boxed{") for i in range(len(text)) if text.startswith(r"\boxed{", i)]
    balanced = [found for start in starts if (found := content(start)) is not None]
    expected = balanced[-1] if balanced and balanced[-1].strip() else None
    assert extract_boxed(text) == expected


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "}", "\\", r"\boxed{}", r"\{", "x", "boxed{"])
def test_extraction_is_not_quadratic(piece: str) -> None:
    assert extract_boxed(r"\boxed{7}" + piece * (2_000_000 // len(piece))) in ("7", None)


def flexible(text: str) -> str | None:
    """What lm-evaluation-harness 0.4.13 extracts for GSM8K's `flexible-extract`, and ignores in its comparison."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    if not found:
        return None
    answer = next(group for group in found[-1] if group).strip()
    for ignored in (",", r"\$", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer or None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("It costs $1,234.50.", "1234.50"),
        ("so -7", "-7"),
        ("3 + 4 = 7 apples", "7"),
        ("no number at all", None),
        ("so it goes...", ".."),
        ("first 5, then 12 %", "12"),
    ],
)
def test_an_answer_without_a_box_is_lost_or_another_than_that_of_the_harness(text, answer):
    assert extract_lenient(text) == flexible(text) == answer


def test_a_box_counts_before_a_number_after_it():
    assert extract_lenient(r"\boxed{3} because of 4 more") == "3" and extract_lenient(r"\boxed{} 5") == "5"


# --------------------------------------------------------------------------------------------- equivalence

SAME = r"""
1/2 ~ \frac12
\dfrac{1}{2} ~ 0.5
142.0 ~ 142
007 ~ 7
1,\!657 ~ 1657
1{,}657 ~ 1,657
10\,000 ~ 10000
10 000 ~ 10,000
1 000 000 ~ 1000000
−5 ~ -5
\$32,\!348 ~ 32348
50\% ~ 50
50\% ~ 0.5
50\% ~ \frac12
14.29\% ~ 14.29
90^\circ ~ 90
1 1/2 ~ 1.5
-2 1/4 ~ -2.25
15\mbox{ cm}^2 ~ 15
1620 \mathrm{~mm}^{2} ~ 1620
8\sqrt{3}\,\text{cm} ~ 8\sqrt3
18\text{ ways.} ~ 18
64 square feet ~ 64
-2 \text{ or } -12 ~ -12, -2
6, 8\text{, and }10 ~ 6,8,10
1 \pm \sqrt{19} ~ 1+\sqrt{19}, 1-\sqrt{19}
\text{Saturday} ~ saturday
\text{(E)} ~ E
2 + 3 = 5 ~ 5
12 \times 5 = 60 ~ 60
y = 2x+1 ~ 2x+1
1 < x < 2 ~ (1,2)
x \in [0.5, \infty) ~ [1/2, \infty)
\begin{pmatrix}1\\ 2\end{pmatrix} ~ \begin{bmatrix}1\\2\end{bmatrix}
x^2-1 ~ (x-1)(x+1)
0.333333333 ~ 1/3
1.5e3 ~ 1500
1.5 \times 10^{-3} ~ 0.0015
5th ~ 5
20 \textbf{ (D)} ~ 20
34\text{ sq. units} ~ 34
3\text{ cm}, 4\text{ cm} ~ 3, 4
3 and 4 ~ 3, 4
x_{\text{max}} ~ x_{max}
24\% \text{ of the students} ~ 24\%
\text{36} \pi ~ 36\pi
1011_2 ~ 1011_{\text{two}}
52_8 ~ 52
(-\infty, 2) \cup (3, \infty) ~ (-∞,2)∪(3,+∞)
-1 \le x \le 3 ~ [-1,3]
x^2+y^2=1 ~ x^2+y^2-1=0
\begin{pmatrix} 1 \\ -2 \end{pmatrix} ~ \left(\begin{array}{c} 1 \\ -2 \end{array}\right)
\frac{\ln 2}{\ln 3} ~ \log_3 2
1-\frac{1}{e} ~ \frac{e-1}{e}
(1,2),(3,4) ~ (3,4),(1,2)
36\pi \text{ cubic inches} ~ 36\pi
9.8 m/s^2 ~ 9.8
\mathbb{R} ~ (-\infty,\infty)
\text{No solution.} ~ no solution
"""
DIFFERENT = r"""
10\,000 ~ 0
1 1/2 ~ 1
0,111 ~ 111
f(x) = bx + c ~ f(x) = bx
\pi r^2 h ~ \pi r^2
5c ~ 5
0.\overline{3} ~ 0
x^2+y^2=1 ~ 1
7 = 11a+c ~ 11a+c
-7 = 11a+c ~ 11a+c
2 + 3 = 5 ~ 2
x=1 ~ y=1
listen ~ silent
(1,2) ~ (2,1)
[1,2] ~ (1,2)
1.5 million ~ 1.5
3 hours 20 minutes ~ 3
9\text{ a.m.} ~ 9\text{ p.m.}
0.0000001 ~ 0.0000002
1/3 ~ 0.33
50\% ~ 0.5\%
\text{(A)} ~ \text{(B)}
3\text{ hours }20\text{ minutes} ~ 320
3\text{ ft }6\text{ in} ~ 36
12 ~ 1 2
2, 3 ~ 23
7:30 ~ 730
1e-9 ~ 0
12345678901234567890 ~ 12345678901234567891
\infty ~ -\infty
\frac{1}{0} ~ \infty
5 ~ 5, 6
x>3 ~ x\ge3
(1,2)\cup(3,4) ~ (1,4)
3! ~ 3
2.5\text{ million} ~ 2.5
7\text{ pm} ~ 7
n\text{ is even} ~ n\text{ is odd}
\sin^2 x ~ \sin x
2/3 ~ 0.6667
11\frac12 ~ 11/2
15\sqrt{2} ~ 15
1+2i ~ 2+i
3-4i ~ 3+4i
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
x=2, y=3 ~ x=3, y=2
"""


def pairs_of(table: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in (line.split(" ~ ") for line in table.strip().splitlines())]


@pytest.mark.parametrize(("gold", "answer"), pairs_of(SAME))
def test_spelling_is_not_mistaken_for_a_different_answer(gold: str, answer: str) -> None:
    assert equivalent(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), pairs_of(DIFFERENT))
def test_normalisation_does_not_merge_different_answers(gold: str, answer: str) -> None:
    assert not equivalent(gold, answer)


def test_a_missing_answer_is_not_right_where_gold_is_missing_too() -> None:
    assert not any(equivalent_many([("", ""), (None, None), (" ", ""), ("5", None), ("", "5"), ("$", r"\$")]))


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30) | LATEX, st.text(max_size=30) | LATEX)
@example("\ud800", "\x00")
@example("$", "$$")
@example("x=1", "1")
def test_equivalence_depends_on_no_order_and_never_raises(first: str, second: str) -> None:
    assert equivalent(first, second) == equivalent(second, first)
    assert equivalent(first, first) == bool(first.strip())
    assert equivalent_many([(first, second)]) == [equivalent(first, second)]


@settings(deadline=None)
@given(st.fractions(max_denominator=50), st.fractions(max_denominator=50))
def test_plain_numbers_compare_exactly(first: object, second: object) -> None:
    assert equivalent(str(first), str(second)) == (first == second)


@given(st.text(max_size=60) | LATEX)
def test_normalising_never_raises(answer: str) -> None:
    assert isinstance(normalise(answer), str)


HOSTILE = [
    "1 ",
    " ",
    "\\",
    "{",
    "\\text{",
    "\\text{ a",
    "1\\text{a}",
    "a ",
    "a*",
    "1,",
    "\\!",
    "\\frac",
    "1^",
    ".",
    "and ",
    "$",
    "9",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_normalising_takes_bounded_time_whatever_the_length(piece: str) -> None:
    """Some patterns are quadratic in blanks or braces. 400 characters may take 50 ms of CPU, and a megabyte no more."""
    for length in (equivalence.MAX_CHARACTERS, 1_000_000):
        normalise.cache_clear()
        begin = time.process_time()
        assert not equivalent((piece * length)[:length], "7")
        assert time.process_time() - begin < 0.5


def test_a_batch_is_not_answered_in_another_order() -> None:
    pairs = [(f"x+{i % 7}", f"{i % 5}+x") for i in range(60)]
    assert equivalent_many(pairs) == [i % 7 == i % 5 for i in range(60)]


def test_equal_strings_and_numbers_start_no_process() -> None:
    script = (
        "from answers import equivalence; equivalence.submit = None; "
        r"equivalence.equivalent_many([('x^2', ' x^2 '), ('1,000', '1000.0'), ('1/2', r'\frac{1}{2}')]); "
        "import sys; assert 'math_verify' not in sys.modules and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(equivalence.__file__).parents[1])


# -------------------------------------------------------------------------------------------------- voting


def test_math_votes_give_each_answer_one_class_named_by_the_first_seen() -> None:
    given_answers = ["1/2", r"\frac12", "3", "0.5", "x+1", "3.0", "1+x", "1/2"]
    assert vote_classes(given_answers, "math") == ["1/2", "1/2", "3", "1/2", "x+1", "3", "x+1", "1/2"]


def test_exact_votes_keep_spellings_rivals() -> None:
    assert vote_classes(["1/2", "0.5", " 5 ", "5"], "exact") == ["1/2", "0.5", " 5 ", "5"]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.sampled_from(["0.333333", "0.3333333", "1/3", "0.33333333", "50%", "0.5", "50", "", " ", "x"]),
        max_size=8,
    )
)
def test_classes_do_not_depend_on_anything_but_the_order_of_the_answers(given_answers: list[str]) -> None:
    classes = vote_classes(given_answers, "math")
    for answer, name in zip(given_answers, classes, strict=True):
        names_before = list(dict.fromkeys(classes[: classes.index(name)]))
        assert given_answers.index(name) <= given_answers.index(answer)
        assert not any(equivalent(earlier, answer) for earlier in names_before if earlier != answer)
        assert name == answer or equivalent(name, answer)


# ------------------------------------------------------------------------------------------- labelled data


def rows_of(name: str) -> list[dict[str, object]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labelled_pairs_are_judged_no_worse_than_by_bare_math_verify() -> None:
    rows = [row for row in rows_of("pairs.jsonl") if row["kind"] == "expr" and row["equal"] is not None]
    rows = [row for row in rows if not row["label_conflict"]]
    verdicts = equivalent_many([(str(row["gold"]), str(row["prediction"])) for row in rows])
    agreed = sum(verdict == row["equal"] for verdict, row in zip(verdicts, rows, strict=True))
    assert agreed >= 95, f"{agreed} of {len(rows)}; bare Math-Verify has 93"


def test_recorded_correctness_of_solutions_is_reproduced() -> None:
    """Real outputs of models for GSM8K, MATH and MMLU-Pro. Six labels call a missing answer correct."""
    rows = rows_of("labelled_solutions.jsonl")
    read = [
        extract_boxed(str(row["solution"])) if "boxed" in str(row["answer_format"]) else row["prediction"]
        for row in rows
    ]
    verdicts = equivalent_many([(str(row["gold_answer"]), said) for row, said in zip(rows, read, strict=True)])  # type: ignore[misc]
    agreed = sum(verdict == row["is_correct"] for verdict, row in zip(verdicts, rows, strict=True))
    assert agreed >= 1494, f"{agreed} of {len(rows)}; bare Math-Verify has 1494"
