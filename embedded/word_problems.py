"""The embedded task: word problems with two steps of arithmetic, in several wordings, made on the spot.

Each problem has four wordings that name its numbers in different orders; another wording of the same problem is its
rephrasing. Some are held out, in every wording. Solutions come clean, and as a careless student writes
them: a model that imitates those is diverse, its majority is mostly but not always right, and a careless reward can be
hacked, for example by `\\boxed{1}`.
"""

import hashlib
import operator
import random
from itertools import product
from typing import Any, Literal, NamedTuple

Split = Literal["train", "held-out"]

NAMES = ["Ann", "Ben", "Cal", "Dana", "Eve", "Finn", "Gus", "Hana", "Ivan", "Joy"]
OBJECTS = ["apples", "books", "coins", "cards", "eggs", "pens", "shells", "stamps"]
WORDINGS = [
    "{n} has {a} {o} and buys {b} bags of {c} {o}. How many {o} now?",  # a + b * c
    "{n} buys {b} bags with {c} {o} each, and had {a} {o}. What is the total?",
    "There are {c} {o} in a bag. {n} takes {b} bags and {a} more {o}. How many in all?",
    "How many {o} are {a} {o} and {b} boxes of {c}, asks {n}?",
    "{n} has {a} boxes of {b} {o} and loses {c} {o}. How many are left?",  # a * b - c
    "{n} gives away {c} {o} out of {a} boxes with {b} each. How many stay?",
    "A box holds {b} {o}. {n} fills {a} boxes, then {c} {o} break. How many are whole?",
    "After selling {c} {o}, how many of the {b} {o} in each of {a} boxes has {n}?",
    "{n} packs {a} red and {b} blue {o} in each of {c} bags. How many {o}?",  # (a + b) * c
    "{c} bags hold {a} old and {b} new {o} each. How many {o} has {n}?",
    "Each day {n} finds {b} {o} at noon and {a} at night. How many {o} in {c} days?",
    "For {c} friends {n} brings {b} big and {a} small {o} each. How many {o} are that?",
    "{n} has {a} {o}, gets {b} and eats {c}. How many {o} remain?",  # a + b - c
    "{n} got {b} {o} on top of {a}, then lost {c}. How many {o} remain?",
    "If {n} must return {c} of {a} plus {b} {o}, how many does {n} keep?",
    "Out of {b} {o} here and {a} there, {c} are sold by {n}. How many are not?",
]


class Family(NamedTuple):
    """Problems of one structure: the first step combines two of the numbers a, b, c, the second brings in the third."""

    numbers: tuple[range, range, range]
    steps: tuple[str, tuple[int, int, int], str]  # operator, places of its two numbers and of the third, operator
    wordings: list[str]


FAMILIES = [
    Family((range(1, 7), range(2, 6), range(2, 6)), ("*", (1, 2, 0), "+"), WORDINGS[:4]),
    Family((range(2, 6), range(2, 6), range(2, 6)), ("*", (0, 1, 2), "-"), WORDINGS[4:8]),
    Family((range(1, 6), range(1, 6), range(2, 6)), ("+", (0, 1, 2), "*"), WORDINGS[8:12]),
    Family((range(1, 10), range(2, 6), range(2, 6)), ("+", (0, 1, 2), "-"), WORDINGS[12:]),
]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MISREAD_AS = {"+": "-", "-": "+", "*": "+"}  # what who misreads a problem takes its second operator for


class Work(NamedTuple):
    first_line: str  # 3*4=12
    last_line: str  # 12+5=17
    result: int


class Problem(NamedTuple):
    family: int
    operands: tuple[int, int, int]

    def text(self, wording: int, rng: random.Random) -> str:
        a, b, c = self.operands
        template = FAMILIES[self.family].wordings[wording]
        return template.format(n=rng.choice(NAMES), o=rng.choice(OBJECTS), a=a, b=b, c=c)

    def work(self, first: str = "", second: str = "", slips: tuple[int, int] = (0, 0)) -> Work:
        """The way to the answer; with other operators, or with slips of arithmetic, to another one."""
        right_first, places, right_second = FAMILIES[self.family].steps
        first, second = first or right_first, second or right_second
        x, y, z = (self.operands[place] for place in places)
        middle = OPERATORS[first](x, y) + slips[0]
        result = OPERATORS[second](middle, z) + slips[1]
        return Work(f"{x}{first}{y}={middle}", f"{middle}{second}{z}={result}", result)


POSSIBLE = [Problem(f, numbers) for f, family in enumerate(FAMILIES) for numbers in product(*family.numbers)]
PROBLEMS = [problem for problem in POSSIBLE if problem.work().result > 0]
# A sixth of the problems is set aside by a hash that no seed changes, and held out in every wording if some training
# problem ends with the same sum: what is tested is reading a new problem, not arithmetic never seen.
SET_ASIDE = {problem for problem in PROBLEMS if hashlib.sha256(repr(problem).encode()).digest()[0] < 43}
TRAINING = [problem for problem in PROBLEMS if problem not in SET_ASIDE]
SUMS = {problem.work().last_line for problem in TRAINING}
PROBLEMS_OF: dict[Split, list[Problem]] = {
    "train": TRAINING,
    "held-out": [problem for problem in PROBLEMS if problem in SET_ASIDE and problem.work().last_line in SUMS],
}


def word_problems(split: Split = "train", seed: int = 0) -> list[dict[str, Any]]:
    """Every problem of the split in each of its wordings, each with another wording as its rephrasing."""
    rng = random.Random(f"word problems {seed}")
    rows = []
    for problem in PROBLEMS_OF[split]:
        for wording in range(4):
            other = (wording + rng.randrange(1, 4)) % 4
            rows.append(
                {
                    "id": f"{problem.family}:{','.join(map(str, problem.operands))}:{wording}",
                    "question": problem.text(wording, rng),
                    "rephrased": problem.text(other, rng),
                    "answer": str(problem.work().result),
                    "family": problem.family,
                    "wording": wording,
                }
            )
    return rows


class Student(NamedTuple):
    """Whose solutions a start model imitates; everybody also makes the mistakes of `flawed_solution`."""

    misreads: float = 0.0  # share of the solutions to wording MISREAD_WORDING with another operation in the last step
    spellings: tuple[str, ...] = ("{}",)  # of the answer in its box, each as often


STUDENTS = {
    "embedded": Student(),
    "embedded-misreading": Student(misreads=0.75),
    "embedded-spellings": Student(spellings=("{}", "{}.0", "+{}")),
}
MISREAD_WORDING = 3


def demonstration(student: Student, problem: Problem, wording: int, careful: bool, rng: random.Random) -> str:
    """One solution of the student's: without mistakes, apart from the misreadings, if he is careful."""
    misread = student.misreads > 0 and wording == MISREAD_WORDING and rng.random() < student.misreads
    second = MISREAD_AS[FAMILIES[problem.family].steps[2]] if misread else ""
    spelling = rng.choice(student.spellings) if len(student.spellings) > 1 else student.spellings[0]
    if careful:
        return solution(problem, second, spelling)
    return flawed_solution(problem, wording, rng, second, spelling)


def solution(problem: Problem, second: str = "", spelling: str = "{}") -> str:
    """Without mistakes but for another `second` operator."""
    work = problem.work(second=second)
    return f"{work.first_line}; {work.last_line}. {boxed(work.result, spelling)}"


def flawed_solution(problem: Problem, wording: int, rng: random.Random, second: str = "", spelling: str = "{}") -> str:
    """A solution as a careless student writes it. Some wordings invite guesses and misreadings more than others, so
    that another wording's majority is worth hearing."""
    guess, constant, slips_of_reading = 0.08, 0.05 + 0.05 * wording, (0.05, 0.12, 0.2, 0.3)[wording]
    kind = rng.random()
    if kind < guess:
        return boxed(rng.choice(problem.operands))
    if kind < guess + constant:
        return boxed(1)
    first = ""
    if not second and rng.random() < slips_of_reading:
        first, second = rng.choice([("+", ""), ("*", ""), ("", "+"), ("", "-")])
    one, two = (rng.choice((-2, -1, 1, 2)) if rng.random() < 0.09 else 0 for _ in range(2))
    work = problem.work(first, second, (one, two))
    ending = rng.random()
    repeats = rng.randrange(1, 3) if ending < 0.05 else 0
    text = f"{work.first_line}; {work.last_line}." + f" {work.last_line}." * repeats
    return text if ending > 0.95 else f"{text} {boxed(work.result, spelling)}"


def boxed(number: int, spelling: str = "{}") -> str:
    return f"\\boxed{{{spelling.format(number)}}}"
