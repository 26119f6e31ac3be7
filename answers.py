r"""Answers: find the boxed one in a response, and tell whether two of them mean the same mathematics.

Two answers are compared in three stages, cheapest first:

1. equal strings, plain numbers and words are decided here, in microseconds;
2. the rest goes to Math-Verify (LaTeX -> SymPy), whose own normalisation `normalise` completes;
3. what Math-Verify cannot read is equal only if its normalised text is.

SymPy can loop forever or eat all memory on a short string (`9^{9^{9^9}}`), and nothing inside a Python process can
stop it reliably. So Math-Verify runs in a few long-lived children that the kernel kills at a deadline. A child is this
very file, started as a program: unlike a fork it inherits no CUDA context, thread or lock; unlike a `multiprocessing`
spawn it neither imports the parent's `__main__` (torch and all) nor needs one. So torchrun, pytest, threads, notebooks
and `python -` all work, and this file must stay cheap to import.
"""

import functools
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
WALL_SECONDS = 60  # the same as a safety net in real time, and the limit for a child to start
MEMORY_BYTES = 1 << 30  # address space of one child
PAIRS_PER_CHILD = 10_000  # then a fresh child, because the parser's tables only grow

# ---------------------------------------------------------------------------------------------------------------------
# Extraction


def extract_boxed(text: str) -> str | None:
    r"""The content, as written, of the last `\boxed{...}` whose braces balance; None if there is none or it is blank.

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


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation: only what Math-Verify misreads, each rule right for any answer, not for a data set

UNICODE_TO_LATEX = str.maketrans(
    {
        "\u00a0": " ",
        "\u202f": " ",
        "−": "-",
        "–": "-",
        "÷": "/",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "°": r"^\circ",
    }
    | {"×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "∪": r"\cup "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in "}
)
TEXT = r"\\(?:text|textrm|textnormal|textbf|textit|mbox|mathrm|mathbf|rm)"
REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # Math delimiters and dollars: an answer is all mathematics, and in one currency.
        (r"\\?\$|(?<!\\)\\[()\[\]]|^\s*[€£](?=\s*[\d.])", ""),
        # Thousands: 1,\!657 and 1{,}657; Math-Verify reads 10\,000 and 10 000 as 10 * 000 = 0.
        (r"\\!\s*", ""),
        (r"\{,\}", ","),
        (r"(?<=\d)(?:\\,|\\ |~)\s*(?=\d{3}(?!\d))", ","),
        (r"^\s*-?\d{1,3}(?: \d{3})+\s*$", lambda number: number[0].replace(" ", "")),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
        # Math-Verify does these three itself; here they make most spellings equal strings or plain numbers.
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:left|right)(?![A-Za-z])\.?", ""),
        # 1 1/2 is a mixed number, not 1 * 1/2.
        (r"^\s*(-?\d+) +(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),
        # Degrees, and a percent sign after anything but a decimal number, are units.
        (r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF](?![A-Za-z]))?|\\degree(?![A-Za-z])|(?<=[})])\s*\\?%", ""),
        # A system of equations is a list of equations; a case distinction, with its &, is not.
        (r"\\begin\{cases\}([^&]*)\\end\{cases\}", lambda system: system[1].replace(r"\\", ", ")),
        (rf",?\s*{TEXT}\s*\{{\s*,?\s*(and|or)\s*\}}", ", "),
        # Upright e, i, d; and Math-Verify knows the imaginary unit only where it stands alone.
        (rf"{TEXT}\s*\{{([eid])\}}", r" \1 "),
        (r"(?<=\d)i(?![A-Za-z])", " i"),
        (rf"_\s*\{{?\s*{TEXT}\s*\{{([^{{}}]*)\}}\s*\}}?", r"_{\1}"),
        (rf"^\s*{TEXT}\s*\{{([^{{}}\\]*)\}}\s*$", r"\1"),
        (r"\s*(?:\\?%|\bper ?cent(?:age)?\b|\bpct\b)", "%"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"^\s*\\(?:approx|sim|simeq)(?![A-Za-z])", ""),
        (r"(?:[\s.,;]|\\+$)+$", ""),
    ]
]
TEXT_UNIT = re.compile(rf"(?<=[\d}})iI])(?:[\s/]|\\cdot)*{TEXT}\s*\{{([^{{}}]*)\}}(?:\^\{{?-?\d\}}?)?")
PLAIN_UNIT = re.compile(
    r"(?P<value>[^A-Za-z\\]*(?:\\(?:frac|sqrt|pi|times|cdot)(?![A-Za-z])[^A-Za-z\\]*)*(?<=[\d})i ]))"
    r"(?P<unit>[A-Za-z]+\.?(?:\^\{?-?\d\}?)?(?:[\s/*-]+[A-Za-z]+\.?(?:\^\{?-?\d\}?)?)*)"
)
SHORT_UNITS = frozenset(
    ["mm", "cm", "km", "in", "ft", "yd", "mi", "mg", "kg", "lb", "lbs", "oz", "ml", "mL", "hr", "hrs", "mph"]
)
ONE_LETTER_UNITS = frozenset("mshgL")  # only after a blank: 5 m is a length, 5m may be five times m
# Words after a number that change its value or belong to a formula; am and pm tell two times of day apart.
NOT_UNITS = frozenset(
    [
        "and",
        "or",
        "mod",
        "base",
        "to",
        "if",
        "for",
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "dozen",
        "percent",
        "pct",
        "percentage",
        "am",
        "pm",
        "e",
        "i",
        "sqrt",
        "sin",
        "cos",
        "tan",
        "cot",
        "csc",
        "log",
        "ln",
        "exp",
        "choose",
        "infinity",
        "inf",
    ]
)


def drop_unit_in_text(unit: re.Match[str]) -> str:
    words = re.findall(r"[A-Za-z]+", unit[1].replace(".", "").lower())
    return unit[0] if NOT_UNITS.intersection(words) else " "


def drop_plain_unit(answer: str) -> str:
    """`64 square feet` -> `64`, but `x^2 - 42 xy`, `3 and 4` and `1.5 million` as they are."""
    match = PLAIN_UNIT.fullmatch(answer)
    if not match:
        return answer
    words = re.findall(r"[A-Za-z]+", match["unit"])
    after_blank = match["value"].endswith(" ")
    is_unit = words[0] in SHORT_UNITS or (after_blank and (len(words[0]) > 2 or words[0] in ONE_LETTER_UNITS))
    return match["value"] if is_unit and not NOT_UNITS.intersection(word.lower() for word in words) else answer


@functools.lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    """The answer without delimiters, units and typographic variants. Depends on this answer alone, not on its rival."""
    answer = extract_boxed(answer) or answer
    answer = answer.translate(UNICODE_TO_LATEX)
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = drop_plain_unit(" ".join(TEXT_UNIT.sub(drop_unit_in_text, answer).split()))
    return answer.strip()


NUMBER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
RATIONAL = re.compile(rf"([+-]?)\s*(?:({NUMBER})|(\d+)\s*/\s*(\d+)|\\frac\s*\{{(\d+)\}}\s*\{{(\d+)\}})", re.ASCII)
WORDS = re.compile(r"[A-Za-z]{4,}|[A-Za-z]+(?: [A-Za-z]+)+")


def plain_number(answer: str) -> Fraction | None:
    """`-1,234.50`, `007`, `3/4` and `\\frac{3}{4}` exactly; None for anything else."""
    match = RATIONAL.fullmatch(answer)
    if not match:
        return None
    sign, number, *fraction = match.groups()
    top, bottom = (number.replace(",", ""), "1") if number else [part for part in fraction if part]
    if int(bottom) == 0:
        return None
    return Fraction(sign + top) / int(bottom)


def same_number(first: Fraction, second: Fraction, exact: bool) -> bool:
    """Equal, or, where a decimal may be rounded, equal to six decimals (Math-Verify's convention) and five digits."""
    gap, size = abs(first - second), max(abs(first), abs(second))
    return gap == 0 or (not exact and gap < Fraction(1, 10**6) and gap < size / 10**5)


def decide_here(first: str, second: str) -> bool | None:
    """The verdict on two normalised answers where it takes no computer algebra, else None."""
    if "".join(first.split()) == "".join(second.split()):
        return first != ""
    one, two = plain_number(first.removesuffix("%")), plain_number(second.removesuffix("%"))
    if one is not None and two is not None:
        # 50% is 50 where the question asks for percent, and 0.5 elsewhere; only the question could tell.
        hundredth = first.endswith("%") - second.endswith("%")
        exact = "." not in first + second
        return same_number(one, two, exact) or same_number(one / 100**hundredth, two, exact)
    if WORDS.fullmatch(first) and WORDS.fullmatch(second):  # letters that Math-Verify would multiply: on = no
        return first.casefold() == second.casefold()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The child


FUNCTION = r"\\(?:frac|sqrt|sin|cos|tan|log|ln|times|cdot|div|bmod|left|right|pi|[,; ])"
NAME = re.compile(rf"(?!.*{FUNCTION})\s*[A-Za-z\\(][^-+*/^<>|]*")  # x, AB, f(2), S_{10}, \angle ABC, (x, y)
ARITHMETIC = re.compile(rf"(?:[^A-Za-z\\]|{FUNCTION})*")


def right_hand_side(answer: str) -> str:
    """`f(2) = 5` and `2 + 3 = 5` -> `5`; a true equation, `x^2 + y^2 = 1`, stays."""
    *left, right = sides = re.split(r"(?<![<>!\\])=", answer)
    named = all(NAME.fullmatch(side) for side in left)
    return right if named or all(ARITHMETIC.fullmatch(side) for side in sides) else answer


@functools.lru_cache(maxsize=4096)
def parse_answer(answer: str) -> list[object]:
    """Math-Verify's reading: [SymPy object, text], or [text] where it cannot read the answer.

    No boxes or units (`normalise` is done with both; Math-Verify's units take the c off `f(x) = bx + c`) and no search
    for any number in an unreadable answer (which reads `0.\\overline{3}` as 0).
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(
        basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none"
    )
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    return parse(f"${answer}$", [config], parsing_timeout=None)


def verdict(first: str, second: str) -> bytes:
    """b"=" equal, b"!" not equal, b"?" not equal and at least one was unreadable.

    Math-Verify's `verify` reads an equation on the gold side more strictly than on the other; both orders must agree,
    so a circle `x^2 + y^2 = 1` is not `1`.
    """
    from math_verify import verify

    if ("=" in first) != ("=" in second):
        first, second = right_hand_side(first), right_hand_side(second)
    readings = parse_answer(first), parse_answer(second)
    if all(
        verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)
        for gold, answer in (readings, readings[::-1])
    ):
        return b"="
    return b"!" if all(len(reading) == 2 for reading in readings) else b"?"


def serve() -> None:
    """The child's life: read a JSON pair per line, write one byte of verdict, die at the deadline or with the parent."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints must not look like a verdict
    for deadline in (signal.SIGALRM, signal.SIGPROF):  # a parent's handlers and masks survive exec
        signal.signal(deadline, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGPROF))
    with suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.alarm(WALL_SECONDS)
    logging.disable()
    replies.write(verdict("1", "1 + 0"))  # imports everything and says "ready"
    sys.stderr = open(os.devnull, "w")
    signal.alarm(0)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(WALL_SECONDS)
        reply = verdict(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        replies.write(reply)


# ---------------------------------------------------------------------------------------------------------------------
# The parent


class Child:
    """One Math-Verify process. Used by one thread at a time."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Returns at once; the first `judge` waits for the imports. Fixed hashing keeps SymPy's choices repeatable."""
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the parent, which may want a verdict while it saves
        )
        self.judged = -1

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def judge(self, first: str, second: str) -> bytes:
        """A byte of `verdict`, or b"" if the child died of this pair.

        Raises:
            RuntimeError: the child cannot start, so that every verdict would be False.
        """
        if self.judged >= PAIRS_PER_CHILD or self.process.poll() is not None:
            self.restart()
        assert self.process.stdin and self.process.stdout
        try:
            if self.judged < 0 and not self.process.stdout.read(1):
                raise RuntimeError("Math-Verify does not start (its message is above): pip install math-verify")
            self.judged = max(self.judged, 0) + 1
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps([first, second]).encode() + b"\n")
            reply: bytes = self.process.stdout.read(1)
        except BaseException:  # Ctrl-C here would leave a verdict for the next pair to read
            self.restart()
            raise
        if not reply:
            self.restart()
        return reply


def number_of_children() -> int:
    processors = os.cpu_count() or 1
    return max(1, min(8, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@functools.cache
def idle_children() -> "queue.SimpleQueue[Child]":
    children: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for _ in range(number_of_children()):
        children.put(Child())
    return children


os.register_at_fork(after_in_child=idle_children.cache_clear)  # two processes on one pipe would mix up verdicts


_counts: Counter[str] = Counter(equivalence_timeouts=0, equivalence_unparsed=0)
_counts_lock = threading.Lock()


@functools.lru_cache(maxsize=1 << 16)
def ask_child(first: str, second: str) -> bool:
    children = idle_children()
    child = children.get()
    try:
        reply = child.judge(first, second)
    finally:
        children.put(child)
    with _counts_lock:
        _counts["equivalence_timeouts"] += reply == b""
        _counts["equivalence_unparsed"] += reply == b"?"
    return reply == b"="


# ---------------------------------------------------------------------------------------------------------------------
# What the rest of the project calls


def prepare(gold: str | None, answer: str | None) -> tuple[bool | None, tuple[str, str]]:
    """The verdict, if it needs no child, and the pair to ask a child about: normalised, in an order of its own."""
    first, second = (gold or "").strip(), (answer or "").strip()
    if not first or not second:
        return False, ("", "")
    if first == second or max(len(first), len(second)) > MAX_CHARACTERS:
        return first == second, ("", "")
    first, second = sorted((normalise(first), normalise(second)))
    return decide_here(first, second), (first, second)


def equivalent(gold: str | None, answer: str | None) -> bool:
    """Whether two answers mean the same mathematics; symmetric. A missing or blank answer equals nothing.

    Never raises because of its input, never hangs: a comparison that exceeds its time or memory is False and counted.
    """
    known, pair = prepare(gold, answer)
    return ask_child(*pair) if known is None else known


def equivalent_many(pairs: Sequence[tuple[str | None, str | None]]) -> list[bool]:
    """`equivalent` of each pair, with the distinct hard ones spread over all children."""
    hard = dict.fromkeys(pair for known, pair in (prepare(*pair) for pair in pairs) if known is None)
    if len(hard) > 1:
        with ThreadPoolExecutor(number_of_children()) as threads:
            list(threads.map(lambda pair: ask_child(*pair), hard))
    return [equivalent(*pair) for pair in pairs]


def representatives(answers: Sequence[str]) -> list[str]:
    """Each answer's class, named by its first member: an answer joins the first class whose name it is equivalent to."""
    class_of: dict[str, str] = {}
    waiting = list(dict.fromkeys(answers))
    while waiting:
        name, *others = waiting
        same = equivalent_many([(name, other) for other in others])
        class_of |= {name: name} | {other: name for other, joins in zip(others, same, strict=True) if joins}
        waiting = [other for other, joins in zip(others, same, strict=True) if not joins]
    return [class_of[answer] for answer in answers]


def counts() -> dict[str, int]:
    """Distinct comparisons since the start that died at the deadline or memory limit, and that were unreadable."""
    with _counts_lock:
        return dict(_counts)


if __name__ == "__main__":
    serve()
