r"""Answers: find the boxed one in a response, and tell whether two of them mean the same mathematics.

Two answers are compared in three stages, cheapest first:

1. equal strings, plain numbers and words are decided here, in microseconds;
2. the rest goes to Math-Verify (algebra.py), after `normalise`, which completes its own normalisation;
3. an answer that Math-Verify cannot read equals only the same normalised text.
"""

import functools
import re
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from fractions import Fraction

from answers.algebra import submit

# Longer answers are compared as strings: patterns take quadratic time. Golds of MATH have at most 159 characters.
MAX_CHARACTERS = 400

# ------------------------------------------------------------ extraction


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` whose braces balance, as written; None if missing or blank.

    The last box is the one that opens last. Escaped braces `\{` and `\}` are text, as in LaTeX, and do not count:
    `\boxed{\left\{x\right.}` balances, `\boxed{5\}` does not. The time is linear in the length of the text.
    """
    open_braces: list[tuple[int, bool]] = []
    box_start = -1
    content = ""
    for token in re.finditer(r"(?<=\\)boxed\{|\\[\\{}]|[{}]", text):
        if token[0] in ("boxed{", "{"):
            open_braces.append((token.end(), token[0] == "boxed{"))
        elif token[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and start > box_start:
                box_start = start
                content = text[start : token.start()]
    return content if content.strip() else None


NUMBER_IN_TEXT = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")  # of lm-evaluation-harness's flexible extraction, for GSM8K


def extract_lenient(text: str) -> str | None:
    """Return the content of the last box, or else the last number of the text; None if there is neither."""
    numbers = NUMBER_IN_TEXT.findall(text)
    last = re.sub(r"[$,]|\.$", "", numbers[-1]) if numbers else ""
    return extract_boxed(text) or last or None


# ------------------------------------------------------------ normalisation

# What Math-Verify misreads or reads slowly. Each rule is about how mathematics is written anywhere.

SYMBOLS = r"−:- –:- ×:\times ·:\cdot π:\pi √:\sqrt ∞:\infty ∈:\in ∪:\cup ∩:\cap ≤:\le ≥:\ge ²:^2 ³:^3 °:^\circ"
SYMBOL_TO_LATEX = str.maketrans({pair[0]: f"{pair[2:]} " for pair in SYMBOLS.split()})
TEXT = r"\\(?:text|textrm|textnormal|textbf|textit|mbox|mathrm|mathbf|rm)\s*"
POWER = r"(?:\s*\^\{?-?\d\}?)?"
VALUE = r"[^A-Za-z\\]*(?:\\(?:frac|sqrt|pi|times|cdot)(?![A-Za-z])[^A-Za-z\\]*)*(?<=[\d})i\s])"
# Without a blank, a letter is a variable: 5 m is a length, 5m may be five times m.
A_UNIT = (
    r"(?:[cmk]m|in|ft|yd|mi|[mk]g|lbs?|oz|m[lL]|hrs?|mph|sq|st|nd|rd|th|(?<=\s)(?:[A-Za-z]{3,}|[mshgL]))(?![A-Za-z])"
)
# Words after a number that change its value or belong to a formula; am and pm tell two times of day apart.
NO_UNIT = (
    r"(?i:[^{}]*\b(?:and|or|hundred|thousand|million|billion|trillion|mod|base|to|if|for|dozen|[ap]\.?m|e|i"
    r"|sqrt|sin|cos|tan|cot|csc|log|ln|exp|choose|inf|infinity)\b)"
)
REWRITES = [
    # Thousands: Math-Verify reads 10\,000 and 10 000 as 10 * 000 = 0.
    (r"(?<![\d.])(\d{1,3})(?:\\,|\\ |~|\s)\s*(?=\d{3}(?!\d))", r"\1,"),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    # 1 1/2 is a mixed number, not 1 * 1/2.
    (r"^\s*(-?\d+) +(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),
    # The result of a calculation: 2 + 3 = 5.
    (r"^[\d\s.,()]+(?:(?:[-+*/]|\\times|\\cdot)[\d\s.,()]+)+=(?!.*=)", ""),
    (r"\s*(?:\\?%|\bper ?cent(?:age)?\b|\bpct\b)", "%"),
    # Text after a number is its unit; other text is words, in whatever command.
    (rf"(?<=[\d}})i%])(?:[\s/]|\\cdot)*{TEXT}\{{(?!{NO_UNIT})[^{{}}\\]*\}}{POWER}(?!\s*\d)", " "),
    (rf"{TEXT}\{{([^{{}}\\]*)\}}", r" \1"),
    (r"^\s+|(?:[\s.,;]|\\+$)+$", ""),
    # 64 square feet is 64, but x^2 - 42 xy, 3 to 4 and 7 pm stay.
    (rf"^({VALUE})(?={A_UNIT})(?!{NO_UNIT})[A-Za-z]+\.?{POWER}(?:[\s/*-]+[A-Za-z]+\.?{POWER})*$", r"\1"),
]


@functools.lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    answer = (extract_boxed(answer) or answer).translate(SYMBOL_TO_LATEX)
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer)
    return " ".join(answer.split())


# ------------------------------------------------------------ comparison

DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,2})?"
NUMBER = re.compile(rf"[+-]?\s*(?:{DECIMAL}|\d+\s*/\s*\d+|\\frac\{{\d+\}}\{{\d+\}})", re.ASCII)
BLANKS = r"(?<!\d) | (?!\d)"  # but not the one of `3 20`
WORDS = re.compile(r"[A-Za-z]{4,}|[A-Za-z]+(?: [A-Za-z]+)+")


def plain_number(answer: str) -> Fraction | None:
    r"""Return the exact value of `-1,234.50`, `007`, `3/4` or `\frac{3}{4}`; None for anything else."""
    if NUMBER.fullmatch(answer):
        ratio = answer.replace("}{", "/").replace("\\frac{", "").rstrip("}")
        with suppress(ZeroDivisionError):
            return Fraction(re.sub(r"[\s,]", "", ratio))
    return None


def compare_fast(first: str, second: str) -> bool | None:
    """Decide on two normalised answers, or return None where only algebra can tell."""
    if not first or not second:
        return False
    if re.sub(BLANKS, "", first) == re.sub(BLANKS, "", second):
        return True
    one = plain_number(first.removesuffix("%"))
    two = plain_number(second.removesuffix("%"))
    if one is not None and two is not None:
        # 50% is 50 where the question asks for percent, and 0.5 elsewhere; only the question could tell.
        percent = Fraction(100) ** (first.endswith("%") - second.endswith("%"))
        # A decimal may be rounded: to six decimals, as in Math-Verify, and to five digits.
        rounding = min(Fraction(1, 10**6), abs(two) / 10**5) if "." in first + second else Fraction(0)
        return any(abs(number - two) <= rounding for number in (one, one / percent))
    if WORDS.fullmatch(first) and WORDS.fullmatch(second):  # Math-Verify multiplies letters: listen = silent
        return first.casefold() == second.casefold()
    return None


def compare(gold: str | None, answer: str | None) -> bool | Future[bytes]:
    first = (gold or "").strip()
    second = (answer or "").strip()
    if not first or not second:
        return False
    if first == second or max(len(first), len(second)) > MAX_CHARACTERS:
        return first == second
    first, second = sorted((normalise(first), normalise(second)))
    known = compare_fast(first, second)
    return submit(first, second) if known is None else known


def equivalent(gold: str | None, answer: str | None) -> bool:
    """Tell whether two answers mean the same mathematics.

    The order does not matter, and a missing or blank answer equals nothing. This never hangs, and never raises because
    of its input: a comparison that exceeds its time or memory is False.
    """
    return equivalent_many([(gold, answer)])[0]


def equivalent_many(pairs: Sequence[tuple[str | None, str | None]]) -> list[bool]:
    verdicts = [compare(*pair) for pair in pairs]
    return [verdict if isinstance(verdict, bool) else verdict.result() == b"=" for verdict in verdicts]


def vote_classes(answers: Sequence[str], match: str = "exact") -> list[str]:
    """Return each answer's class, named by its first member.

    match="exact": equal strings, as in the released code. match="math": an answer joins the first class whose
    name it is equivalent to. So each has one class, although equivalence is not transitive (50, 50% and 0.5).
    """
    if match == "exact":
        return list(answers)
    class_of: dict[str, str] = {}
    waiting = list(dict.fromkeys(answers))
    while waiting:
        name, *others = waiting
        joins = equivalent_many([(name, other) for other in others])
        class_of |= {name: name} | {other: name for other, same in zip(others, joins, strict=True) if same}
        waiting = [other for other in others if other not in class_of]
    return [class_of[answer] for answer in answers]
