r"""Make the embedded task: word problems with two steps of arithmetic, in several wordings, made on the spot.

Each problem has four wordings that name its numbers in different orders; another wording of the same problem is its
rephrasing. Some are held out, in every wording. models/ holds start models, which `benchmarks/start_models.py` has
taught by imitation of solutions such as `3*4=12; 5+12=17. \\boxed{17}`, with mistakes: 0.2M parameters, whose answers
differ, whose majority is mostly but not always right, and which a careless reward can make box nothing but 1.
"""

import hashlib
import operator
import random
from itertools import chain, product, starmap
from typing import Any, NamedTuple

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


class Work(NamedTuple):
    first_line: str  # 3*4=12
    last_line: str  # 12+5=17
    result: int


class Problem(NamedTuple):
    family: int
    operands: tuple[int, int, int]

    def text(self, wording: int, rng: random.Random) -> str:
        a, b, c = self.operands
        return FAMILIES[self.family].wordings[wording].format(n=rng.choice(NAMES), o=rng.choice(OBJECTS), a=a, b=b, c=c)

    def work(self, first: str = "", second: str = "", slips: tuple[int, int] = (0, 0)) -> Work:
        """Work out the answer, or another one with other operators or with slips of arithmetic."""
        right_first, places, right_second = FAMILIES[self.family].steps
        x, y, z = (self.operands[place] for place in places)
        first = first or right_first
        second = second or right_second
        middle = OPERATORS[first](x, y) + slips[0]
        result = OPERATORS[second](middle, z) + slips[1]
        return Work(f"{x}{first}{y}={middle}", f"{middle}{second}{z}={result}", result)


POSSIBLE = [product([number], product(*family.numbers)) for number, family in enumerate(FAMILIES)]
PROBLEMS = [problem for problem in starmap(Problem, chain.from_iterable(POSSIBLE)) if problem.work().result > 0]
# A sixth of the problems is set aside by a hash that no seed changes, and held out in every wording if some training
# problem ends with the same sum: what is tested is reading a new problem, not arithmetic never seen.
SET_ASIDE = {problem for problem in PROBLEMS if hashlib.sha256(repr(problem).encode()).digest()[0] < 43}
TRAINING = [problem for problem in PROBLEMS if problem not in SET_ASIDE]
SUMS = {problem.work().last_line for problem in TRAINING}
PROBLEMS_OF = {
    "train": TRAINING,
    "held-out": [problem for problem in PROBLEMS if problem in SET_ASIDE and problem.work().last_line in SUMS],
}


def word_problems(split: str = "train") -> list[dict[str, Any]]:
    rng = random.Random("word problems 0")
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
