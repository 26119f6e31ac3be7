r"""Answers: find the boxed one in a response, and tell whether two of them mean the same mathematics.

Two answers are compared in three stages, cheapest first:

1. equal strings, plain numbers and words are decided here, in microseconds;
2. the rest goes to Math-Verify (algebra.py), whose own normalisation `normalise` completes;
3. what Math-Verify cannot read is equal only if its normalised text is.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from answers.algebra import ask_child, ask_children

MAX_CHARACTERS = 400  # longer answers are compared as strings; the longest gold of MATH and OpenRS has 159

# ------------------------------------------------------------ extraction


def extract_boxed(text: str) -> str | None:
    r"""The content, as written, of the last `\boxed{...}` whose braces balance; None if missing or blank.

    Last is the one that opens last. Escaped braces `\{` and `\}` are text, as in LaTeX, and do not count:
    `\boxed{\left\{x\right.}` balances, `\boxed{5\}` does not. Linear in the length of the text.
    """
    open_braces: list[tuple[int, bool]] = []
    box_start, box_end = -1, -1
    for token in re.finditer(r"(?<=\\)boxed\{|\\[\\{}]|[{}]", text):
        if token[0] in ("boxed{", "{"):
            open_braces.append((token.end(), token[0] == "boxed{"))
        elif token[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and start > box_start:
                box_start, box_end = start, token.start()
    content = text[box_start:box_end] if box_start >= 0 else ""
    return content if content.strip() else None


# ------------------------------------------------------------ normalisation
# What Math-Verify misreads or reads slowly. Each rule is about how mathematics is written anywhere.

SYMBOLS = r"− - – - ÷ / × \times · \cdot π \pi √ \sqrt ∞ \infty ≤ \le ≥ \ge ≠ \ne ∈ \in ∪ \cup ∩ \cap ∅ \emptyset ± \pm"
SYMBOLS += r" ² ^2 ³ ^3 ½ \frac{1}{2} ° ^\circ"
SYMBOL_TO_LATEX = str.maketrans(
    {symbol: f"{latex} " for symbol, latex in zip(SYMBOLS.split()[::2], SYMBOLS.split()[1::2], strict=True)}
)
ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
TEXT = r"\\(?:text|textrm|textnormal|textbf|textit|mbox|mathrm|mathbf|rm)\s*\{([^{}\\]*)\}"
POWER = r"(?:\s*\^\{?-?\d\}?)?"
# Without a blank, a letter is a variable: 5 m is a length, 5m may be five times m.
IS_UNIT = (
    r"(?:[cmk]m|in|ft|yd|mi|[mk]g|lbs?|oz|m[lL]|hrs?|mph|sq|st|nd|rd|th|(?<= )(?:[A-Za-z]{3,}|[mshgL]))(?![A-Za-z])"
)
UNIT = re.compile(
    r"(?P<value>[^A-Za-z\\]*(?:\\(?:frac|sqrt|pi|times|cdot)(?![A-Za-z])[^A-Za-z\\]*)*(?<=[\d})i ]))"
    rf"(?P<unit>(?={IS_UNIT})[A-Za-z]+\.?{POWER}(?:[\s/*-]+[A-Za-z]+\.?{POWER})*)"
)
# Words after a number that change its value or belong to a formula; am and pm tell two times of day apart.
NOT_A_UNIT = (
    rf"(?i)\b(?:and|or|{'|'.join(ZEROS)}|mod|base|to|if|for|dozen|am|pm|e|i"
    r"|sqrt|sin|cos|tan|cot|csc|log|ln|exp|choose|inf|infinity)\b"
)


def drop_text_unit(unit: re.Match[str]) -> str:
    return unit[0] if re.search(NOT_A_UNIT, unit[1].replace(".", "")) else " "


def drop_unit(answer: str) -> str:
    """`64 square feet` -> `64`, but `x^2 - 42 xy`, `3 to 4` and `7 pm` as they are."""
    match = UNIT.fullmatch(answer)
    return match["value"] if match and not re.search(NOT_A_UNIT, match["unit"]) else answer


REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # Math delimiters and currencies: an answer is all mathematics, and in one currency.
    (r"\\?\$|(?<!\\)\\[()\[\]]|[€£¢]", ""),
    # Thousands: 1,\!657 and 1{,}657; Math-Verify reads 10\,000 and 10 000 as 10 * 000 = 0.
    (r"\\!\s*", ""),
    (r"\{,\}", ","),
    (r"(?<![\d.])(\d{1,3})(?:\\,|\\ |~|\s)\s*(?=\d{3}(?!\d))", r"\1,"),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    # Math-Verify does these three itself; here they make most spellings equal strings or plain numbers.
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\(?:left|right)(?![A-Za-z])\.?", ""),
    # 0.1\overline{6} is (16 - 1)/90.
    (
        r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}",
        lambda d: (
            rf"\frac{{{int(d[1] + d[2] + d[3]) - int('0' + d[1] + d[2])}}}{{{'9' * len(d[3]) + '0' * len(d[2])}}}"
        ),
    ),
    # 1 1/2 is a mixed number, not 1 * 1/2.
    (r"^\s*(-?\d+) +(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),
    # Degrees, and a percent sign after anything but a decimal number, are units.
    (r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF](?![A-Za-z]))?|\\degree(?![A-Za-z])|(?<=[})])\s*\\?%", ""),
    (r"\s*(?:\\?%|\bper ?cent(?:age)?\b|\bpct\b)", "%"),
    # Text after a number is its unit; other text is words, in whatever command.
    (rf"(?<=[\d}})i%])(?:[\s/]|\\cdot)*{TEXT}{POWER}(?!\s*\d)", drop_text_unit),
    (TEXT, r" \1"),
    (r",?\s*\b(?:and|or)\b", ", "),
    (rf"\b({'|'.join(ZEROS)})\b", lambda word: rf"\cdot 10^{{{ZEROS[word[1]]}}} "),
    (r"(?i)(?<=\d)\s*([ap])\.?m\.?[.\s]*$", lambda half: f" {half[1].lower()}m"),
    # Math-Verify takes i for the imaginary unit only where it stands alone.
    (r"(?<=\d)i(?![A-Za-z])", " i"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"^\s*\\(?:approx|sim|simeq)(?![A-Za-z])", ""),
    # A congruence is read as an equation; the question has named the modulus.
    (r"\\equiv(?![A-Za-z])", "="),
    (r"\\p?mod\s*(?:\{[^{}]*\}|\d+)\s*$", ""),
    (r"(?:[\s.,;]|\\+$)+$", ""),
]


@functools.lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    """The answer without delimiters, units and typographic variants, whatever it is compared with. A very long one
    comes back as it is: some patterns take quadratic time."""
    if len(answer) > MAX_CHARACTERS or plain_number(answer) is not None:
        return answer
    answer = (extract_boxed(answer) or answer).translate(SYMBOL_TO_LATEX)
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer)
    return drop_unit(" ".join(answer.split())).strip()


# ------------------------------------------------------------ verdicts without computer algebra

NUMBER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
RATIONAL = re.compile(
    rf"([+-]?)\s*(?:((?:{NUMBER})(?:[eE][+-]?\d{{1,2}})?)|(\d+)\s*/\s*(\d+)|\\frac\{{(\d+)\}}\{{(\d+)\}})", re.ASCII
)
BLANKS = r"(?<!\d) | (?!\d)"  # but not the one of `3 20`
WORDS = re.compile(r"[A-Za-z]{4,}|[A-Za-z]+(?: [A-Za-z]+)+")


def plain_number(answer: str) -> Fraction | None:
    r"""`-1,234.50`, `007`, `3/4` and `\frac{3}{4}` exactly; None for anything else."""
    match = RATIONAL.fullmatch(answer)
    if not match:
        return None
    sign, *parts = match.groups()
    top, bottom = [*filter(None, parts), "1"][:2]
    return Fraction(sign + top.replace(",", "")) / int(bottom) if int(bottom) else None


def same_number(first: Fraction, second: Fraction, exact: bool) -> bool:
    """Equal, or, where a decimal may be rounded, to six decimals (as in Math-Verify) and five digits."""
    gap, size = abs(first - second), max(abs(first), abs(second))
    return gap == 0 or (not exact and gap < Fraction(1, 10**6) and gap < size / 10**5)


def decide_here(first: str, second: str) -> bool | None:
    """The verdict on two normalised answers, or None where only algebra can tell."""
    if not first or not second:
        return False
    if re.sub(BLANKS, "", first) == re.sub(BLANKS, "", second):
        return True
    one, two = plain_number(first.removesuffix("%")), plain_number(second.removesuffix("%"))
    if one is not None and two is not None:
        # 50% is 50 where the question asks for percent, and 0.5 elsewhere; only the question could tell.
        percent = Fraction(100) ** (first.endswith("%") - second.endswith("%"))
        exact = "." not in first + second
        return same_number(one, two, exact) or same_number(one / percent, two, exact)
    if WORDS.fullmatch(first) and WORDS.fullmatch(second):  # Math-Verify multiplies letters: listen = silent
        return first.casefold() == second.casefold()
    return None


# ------------------------------------------------------------ what the rest of the project calls


def decide_or_pair(gold: str | None, answer: str | None) -> bool | tuple[str, str]:
    """The verdict if it is cheap, else the normalised pair, in an order of its own, to ask a child about."""
    first, second = (gold or "").strip(), (answer or "").strip()
    if not first or not second:
        return False
    if first == second or max(len(first), len(second)) > MAX_CHARACTERS:
        return first == second
    first, second = sorted((normalise(first), normalise(second)))
    known = decide_here(first, second)
    return (first, second) if known is None else known


def equivalent(gold: str | None, answer: str | None) -> bool:
    """Whether two answers mean the same mathematics. Symmetric; a missing or blank answer equals nothing.

    Never hangs, and never raises because of its input: a comparison that exceeds its time or memory is False,
    and counted.
    """
    verdict_or_pair = decide_or_pair(gold, answer)
    return verdict_or_pair if isinstance(verdict_or_pair, bool) else ask_child(*verdict_or_pair)


def equivalent_many(pairs: Sequence[tuple[str | None, str | None]]) -> list[bool]:
    """`equivalent` of each pair; the distinct hard ones are spread over the children."""
    ask_children(dict.fromkeys(pair for pair in itertools.starmap(decide_or_pair, pairs) if not isinstance(pair, bool)))
    return [equivalent(*pair) for pair in pairs]


def vote_classes(answers: Sequence[str], match: str = "exact") -> list[str]:
    """Each answer's class, named by its first member.

    match="exact": equal strings, as in the released code. match="math": an answer joins the first class whose
    name it is equivalent to, so each has one class although equivalence is not transitive (50, 50% and 0.5).
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
