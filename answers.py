r"""Answers: find the boxed one in a response, and tell whether two of them mean the same mathematics.

Two answers are compared in three stages, cheapest first:

1. equal strings, plain numbers and words are decided here, in microseconds;
2. the rest goes to Math-Verify (LaTeX -> SymPy), whose own normalisation `normalise` completes;
3. what Math-Verify cannot read is equal only if its normalised text is.

SymPy can loop forever or eat all memory on a short string (`9^{9^{9^9}}`), and nothing inside a Python
process stops it reliably. So Math-Verify runs in a few long-lived children that the kernel kills at a
deadline. A child is this very file, started as a program: unlike a fork it inherits no CUDA context, thread
or lock; unlike a `multiprocessing` spawn it neither imports the parent's `__main__` (torch and all) nor
needs one to exist. So torchrun, pytest, threads, notebooks and `python -` all work, and this file stays
cheap to import.
"""

import functools
import itertools
import json
import logging
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction

MAX_CHARACTERS = 400  # longer answers are compared as strings; the longest gold of MATH and OpenRS has 159
CPU_SECONDS = 2.0  # per comparison, in CPU time: a busy machine must not change a verdict
WALL_SECONDS = 60  # the same in real time, as a safety net, and the limit for a child to start
MEMORY_BYTES = 1 << 30  # address space of one child

# ----------------------------------------------------------------------------------------------------------
# Extraction


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


# ----------------------------------------------------------------------------------------------------------
# Normalisation: what Math-Verify misreads or reads slowly. Each rule holds for any answer of any data set.

SYMBOLS = r"− - – - ÷ / × \times · \cdot π \pi √ \sqrt ∞ \infty ≤ \le ≥ \ge ≠ \ne ∈ \in ∪ \cup ∩ \cap ∅ \emptyset ± \pm"
SYMBOLS += r" ² ^2 ³ ^3 ½ \frac{1}{2} ° ^\circ"
SYMBOL_TO_LATEX = str.maketrans(
    {symbol: f"{latex} " for symbol, latex in zip(SYMBOLS.split()[::2], SYMBOLS.split()[1::2], strict=True)}
)
TEXT = r"\\(?:text|textrm|textnormal|textbf|textit|mbox|mathrm|mathbf|rm)"
ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def repeating_decimal(digits: re.Match[str]) -> str:
    r"""`0.1\overline{6}` -> `\frac{15}{90}`."""
    whole, once, again = digits.groups()
    top, bottom = int(whole + once + again) - int("0" + whole + once), 10 ** len(once) * (10 ** len(again) - 1)
    return rf"\frac{{{top}}}{{{bottom}}}"


def twelve_hour_clock(half: re.Match[str]) -> str:
    return rf"\text{{ {(half[1] or half[2]).lower()}m}}"


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
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", repeating_decimal),
    # 1 1/2 is a mixed number, not 1 * 1/2.
    (r"^\s*(-?\d+) +(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),
    # Degrees, and a percent sign after anything but a decimal number, are units.
    (r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF](?![A-Za-z]))?|\\degree(?![A-Za-z])|(?<=[})])\s*\\?%", ""),
    (r"\s*(?:\\?%|\bper ?cent(?:age)?\b|\bpct\b)", "%"),
    # A system of equations is a list of equations.
    (r"\\\\(?=[^&]*\\end\{cases\})", ", "),
    (r"\\(?:begin|end)\{cases\}", ""),
    (rf",?\s*{TEXT}\s*\{{\s*,?\s*(?:and|or)\s*\}}", ", "),
    # Math-Verify takes i for the imaginary unit only where it stands alone.
    (r"(?<=\d)i(?![A-Za-z])", " i"),
    (rf"_\s*\{{?\s*{TEXT}\s*\{{([^{{}}]*)\}}\s*\}}?", r"_{\1}"),
    (rf"^\s*{TEXT}\s*\{{([^{{}}\\]*)\}}\s*$|{TEXT}\s*\{{\s*([\d.,]+)\s*\}}", r"\1\2"),
    (rf"{TEXT}\s*\{{\s*((?:{'|'.join(ZEROS)})\b[^{{}}]*)\}}", r" \1"),
    (rf"\b({'|'.join(ZEROS)})\b", lambda word: rf"\cdot 10^{{{ZEROS[word[1]]}}} "),
    (rf"(?<=\d)\s*\^?[\s{{]*(?:{TEXT}\s*\{{)?(?:st|nd|rd|th)[\s}}]*$", ""),
    (rf"(?i)(?<=\d)\s*(?:{TEXT}\s*\{{\s*([ap])\.?m\.?\s*\}}|([ap])\.?m)[.\s]*$", twelve_hour_clock),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (rf"^\s*(?:\\(?:approx|sim|simeq)(?![A-Za-z])|(?:{TEXT}\s*\{{\s*)?(?:approximately|about)\b\s*\}}?)", ""),
    # A congruence is read as an equation; the question has named the modulus.
    (r"\\equiv(?![A-Za-z])", "="),
    (r"\\p?mod\s*(?:\{[^{}]*\}|\d+)\s*$", ""),
    (r"(?:[\s.,;]|\\+$)+$", ""),
]
POWER = r"(?:\^\{?-?\d\}?)?"
TEXT_UNIT = rf"(?<=[\d}})i%])(?:[\s/]|\\cdot)*{TEXT}\s*\{{([^{{}}]*)\}}{POWER}(?!\s*\d)"  # not 3 feet 6 inches
PLAIN_UNIT = (
    r"(?P<value>[^A-Za-z\\]*(?:\\(?:frac|sqrt|pi|times|cdot)(?![A-Za-z])[^A-Za-z\\]*)*(?<=[\d})i ]))"
    rf"(?P<unit>[A-Za-z]+\.?{POWER}(?:[\s/*-]+[A-Za-z]+\.?{POWER})*)"
)
ABBREVIATED_UNIT = r"mm|cm|km|in|ft|yd|mi|mg|kg|lbs?|oz|m[lL]|hrs?|mph"
UNIT_AFTER_BLANK = r"[A-Za-z]{3,}|[mshgL]"  # 5 m is a length, 5m may be five times m
# Words after a number that change its value or belong to a formula; am and pm tell two times of day apart.
NOT_A_UNIT = (
    r"(?i)\b(?:and|or|mod|base|to|if|for|dozen|am|pm|e|i"
    r"|sqrt|sin|cos|tan|cot|csc|log|ln|exp|choose|inf|infinity)\b"
)


def drop_text_unit(unit: re.Match[str]) -> str:
    return unit[0] if re.search(NOT_A_UNIT, unit[1].replace(".", "")) else " "


def drop_plain_unit(answer: str) -> str:
    """`64 square feet` -> `64`, but `x^2 - 42 xy`, `3 and 4` and `1.5 million` as they are."""
    match = re.fullmatch(PLAIN_UNIT, answer)
    if not match or re.search(NOT_A_UNIT, match["unit"]):
        return answer
    unit = f"{ABBREVIATED_UNIT}|{UNIT_AFTER_BLANK}" if match["value"].endswith(" ") else ABBREVIATED_UNIT
    return match["value"] if re.match(rf"(?:{unit})(?![A-Za-z])", match["unit"]) else answer


@functools.lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    """The answer without delimiters, units and typographic variants, whatever it is compared with."""
    if plain_number(answer) is not None:
        return answer
    answer = (extract_boxed(answer) or answer).translate(SYMBOL_TO_LATEX)
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer)
    answer = re.sub(TEXT_UNIT, drop_text_unit, answer)
    return drop_plain_unit(" ".join(answer.split())).strip()


# ----------------------------------------------------------------------------------------------------------
# Verdicts that take no computer algebra

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


# ----------------------------------------------------------------------------------------------------------
# The child: Math-Verify

FUNCTION = r"\\(?:frac|sqrt|sin|cos|tan|log|ln|times|cdot|div|bmod|pi)(?![A-Za-z])"
NAME = rf"(?!.*{FUNCTION})\s*[A-Za-z\\(][^-+*/^<>|]*"  # x, AB, f(2), S_{10}, \angle ABC, (x, y)
ARITHMETIC = rf"(?:[^A-Za-z\\]|{FUNCTION})*"


def right_hand_side(answer: str) -> str:
    """`f(2) = 5` and `2 + 3 = 5` -> `5`; a true equation, `x^2 + y^2 = 1`, stays."""
    *left, right = sides = re.split(r"(?<![<>!\\])=", answer)
    named = all(re.fullmatch(NAME, side) for side in left)
    return right if named or all(re.fullmatch(ARITHMETIC, side) for side in sides) else answer


@functools.lru_cache(maxsize=4096)
def parse_answer(answer: str) -> list[object]:
    r"""Math-Verify's reading: [SymPy object, text], or [text] if it cannot read the answer.

    Its units are off, because they take the variable c off `f(x) = bx + c`, and so is its search for any
    number in an unreadable answer, which reads `0.\overline{3}` as 0.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(malformed_operators=True, nits=True, units=False, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    return list(parse(f"${answer}$", [config], extraction_mode="first_match", parsing_timeout=None))


def parse_in_two_stages() -> None:
    """Make Math-Verify's grammar three times as fast, as ANTLR advises: predict without context first, and only where
    that finds no reading with it. What the first stage accepts, it reads as the second would."""
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2 as grammar

    class TwoStageParser(grammar.PSParser):  # type: ignore[misc]
        def math(self) -> object:
            self._interp.predictionMode = PredictionMode.SLL
            with suppress(Exception):
                return super().math()
            self.reset()
            self._interp.predictionMode = PredictionMode.LL
            return super().math()

    grammar.PSParser = TwoStageParser


def are_far_apart(first: object, second: object) -> bool:
    """Two constants that differ by a percent: no rounding, and no algebra, makes them one."""
    from sympy import Expr

    if not (isinstance(first, Expr) and isinstance(second, Expr) and first.is_comparable and second.is_comparable):
        return False
    one, two = float(first), float(second)
    return abs(one - two) > 0.01 * max(abs(one), abs(two))


def verdict(first: str, second: str) -> bytes:
    """b"=" equal, b"!" not equal, b"?" at least one is unreadable.

    Math-Verify reads an equation as its right-hand side more readily on the answer's side than on the gold's;
    both orders must agree, so that the circle `x^2 + y^2 = 1` is not `1`.
    """
    from math_verify import verify
    from sympy.core.random import seed

    seed(0)  # SymPy tries equality at random points: a verdict must not depend on those before it
    if ("=" in first) != ("=" in second):
        first, second = right_hand_side(first), right_hand_side(second)
    if len(parse_answer(first)) < 2 or len(parse_answer(second)) < 2:
        return b"?"
    one, two = parse_answer(first), parse_answer(second)
    if are_far_apart(one[0], two[0]):
        return b"!"
    agree = functools.partial(verify, allow_set_relation_comp=True, timeout_seconds=None)
    return b"=" if agree(one, two) and agree(two, one) else b"!"


def serve() -> None:
    """The child's life: JSON pairs in, a byte of verdict out for each, until a deadline or end of input."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # what a library prints must not look like a verdict
    deadlines = (signal.SIGPROF, signal.SIGALRM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, deadlines)  # a parent's masks and ignored signals survive exec
    for deadline in deadlines:
        signal.signal(deadline, signal.SIG_DFL)
    with suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    signal.alarm(WALL_SECONDS)
    parse_in_two_stages()
    ready = verdict("x", "y")  # imports everything
    signal.alarm(0)
    os.dup2(devnull, 2)
    replies.write(ready)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(WALL_SECONDS)
        reply = verdict(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        replies.write(reply)


# ----------------------------------------------------------------------------------------------------------
# The parent


class Child:
    """One Math-Verify process, used by one thread at a time."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Returns at once; the first `judge` waits for the imports."""
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # SymPy's choices follow the order of its sets
            start_new_session=True,  # Ctrl-C is for the parent, which may want verdicts while it saves
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.ready = False

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.replies.close()
        self.start()

    def judge(self, first: str, second: str) -> bytes:
        """A byte of `verdict`, or b"" if this pair killed the child.

        Raises:
            RuntimeError: the child cannot start. A silent False here would make every reward 0.
        """
        if self.process.poll() is not None:
            self.restart()
        try:
            if not self.ready and not self.replies.read(1):
                raise RuntimeError("Math-Verify does not start, see above; pip install math-verify")
            self.ready = True
            with suppress(BrokenPipeError):
                self.requests.write(json.dumps([first, second]).encode() + b"\n")
            reply = self.replies.read(1)
        except BaseException:  # Ctrl-C here would leave a verdict for the next pair to read
            self.restart()
            raise
        if not reply:
            self.restart()
        return reply


def number_of_children() -> int:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // ranks_here))


@functools.cache
def idle_children() -> "queue.SimpleQueue[Child]":
    children: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for _ in range(number_of_children()):
        children.put(Child())
    return children


os.register_at_fork(after_in_child=idle_children.cache_clear)  # two processes on one pipe would mix verdicts

_counts = Counter(equivalence_timeouts=0, equivalence_unparsed=0)
_lock = threading.Lock()


@functools.lru_cache(maxsize=1 << 16)
def ask_child(first: str, second: str) -> bool:
    with _lock:  # or threads that ask first would each start a set
        children = idle_children()
    child = children.get()
    try:
        reply = child.judge(first, second)
    finally:
        children.put(child)
    with _lock:
        _counts["equivalence_timeouts"] += reply == b""
        _counts["equivalence_unparsed"] += reply == b"?"
    return reply == b"="


# ----------------------------------------------------------------------------------------------------------
# What the rest of the project calls


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
    hard = dict.fromkeys(pair for pair in itertools.starmap(decide_or_pair, pairs) if not isinstance(pair, bool))
    with ThreadPoolExecutor(number_of_children()) as threads:
        list(threads.map(lambda pair: ask_child(*pair), hard))
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


def counts() -> dict[str, int]:
    """Distinct comparisons so far that exceeded time or memory, and that Math-Verify could not read."""
    with _lock:
        return dict(_counts)


if __name__ == "__main__":
    serve()
