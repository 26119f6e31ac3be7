"""Find what is wrong with a rephrasing: pure functions of two strings that return a reason, or None.

A published set loses only what is certainly useless (`rewrite_fault`). A model that rewrites can be asked again, so
there a suspicion is enough (`strict_fault`). No gold answer decides here; `gives_away` alone looks at it.
"""

import re
from itertools import product

TEMPLATE_ECHO = re.compile(r"<[\w ]{1,40}>")
STATED_ANSWER = re.compile(r"\banswer(?: is|:| =)\s*(?:\$*\\boxed|[^\s?]{1,30}\s*$)", re.IGNORECASE)
FIGURE = re.compile(r"\[asy\](.*?)(?:\[/asy\]|\Z)", re.DOTALL)
# Not "a four-sided figure" or "this figure", which mean a shape.
NEEDS_FIGURE = re.compile(
    r"\b(?:the (?:\w+ )?figure|diagrams?|pictured?|shown|below|illustrat\w*|drawing|depict\w*)\b", re.IGNORECASE
)
# Not subscripts: a list x_1, ..., x_5 may become a, b, c, d, e.
NUMBER = re.compile(r"(?<![_\d])(?<!_\{)(?:\d{1,3}(?:(?:,|\{,\}|,\\!)\d{3})+(?![\d,])(?:\.\d+)?|\d*\.\d+|\d+)")
NUMBER_WORDS = """
2 two twice double doubled doubles doubling second half halves halved both pair pairs couple square squared;
3 three third thirds thrice triple tripled triples cube cubed;
4 four fourth fourths quarter quarters quadruple quadrupled; 5 five fifth fifths; 6 six sixth sixths;
7 seven seventh sevenths; 8 eight eighth eighths; 9 nine ninth ninths; 10 ten tenth tenths decade decades;
11 eleven eleventh; 12 twelve twelfth dozen dozens; 13 thirteen; 14 fourteen; 15 fifteen; 16 sixteen sixteenth;
17 seventeen; 18 eighteen; 19 nineteen; 20 twenty twentieth; 30 thirty; 40 forty; 50 fifty half; 60 sixty; 70 seventy;
80 eighty; 90 ninety; 100 hundred percent century; 1000 thousand; 1000000 million
"""
NUMBERS_OF_WORD: dict[str, set[str]] = {}
for number, *words in map(str.split, NUMBER_WORDS.split(";")):
    for word in words:
        NUMBERS_OF_WORD.setdefault(word, set()).add(number)
ASKS = re.compile(
    r"(?i)[?？]|\b(?:answer|calculate|combine|compute|convert|count|determine|enter|estimate|evaluate|express|factor|find"
    r"|give|how|identify|list|name|prove|provide|reduce|rewrite|round|show|simplify|solve|state|write|wh(?:at|en|ere|ich|o))\b"
)


def rewrite_fault(question: str, rewrite: str) -> str | None:
    # In brackets or not: Qwen3-32B returned questions inside those of its template.
    if len({re.sub(r"[\s<>]", "", text).casefold() for text in (question, rewrite)}) == 1:
        return "unchanged"
    if TEMPLATE_ECHO.fullmatch(rewrite.strip()):
        return "placeholder"
    if STATED_ANSWER.search(rewrite) or ("\\boxed" in rewrite and "\\boxed" not in question):
        return "answer leaked"
    # Two in three that leave out a figure need none, or say in words what it shows.
    if lacks_figure(question, rewrite) and (NEEDS_FIGURE.search(rewrite) or lost_numbers(question, rewrite)):
        return "figure lost"
    return None


def strict_fault(question: str, rewrite: str, gold: str | None) -> str | None:
    if fault := rewrite_fault(question, rewrite):
        return fault
    if lacks_figure(question, rewrite):  # the instruction is to copy it
        return "figure lost"
    if re.search(r"<[\w ]{3,40}>|RESULT_(?:START|END)|REWRITE:", rewrite):
        return "placeholder"
    before = len(visible(question))
    after = len(visible(rewrite))
    if not 0.4 * before - 20 <= after <= 3 * before + 150:
        return "too short or too long"
    if not ASKS.search(rewrite) and ASKS.search(question):
        return "asks nothing"
    if gives_away(question, rewrite, gold):
        return "answer leaked"
    return "numbers lost" if lost_numbers(question, rewrite) else None


def lacks_figure(question: str, rewrite: str) -> bool:
    return "[asy]" in question and "[asy]" not in rewrite


def visible(text: str) -> str:
    """Reduce the [asy] figures of a text to their labels, without coordinates or the pattern of a dashed line."""
    return FIGURE.sub(lambda figure: " ".join(re.findall(r'linetype\("[^"]*"|"([^"]*)"', figure[1])), text)


def numbers(text: str) -> set[str]:
    """Return the numbers that a reader sees as digits, without separators and leading zeros."""
    return {re.sub(r"[^\d.]", "", number).lstrip("0") for number in NUMBER.findall(visible(text))}


def lost_numbers(question: str, rewrite: str) -> set[str]:
    """Return the numbers of the question that the rewrite says neither as digits nor in a word.

    0 and 1 do not count: they come and go with `= 0`, `starting from 1` or `a single`.
    """
    said = numbers(rewrite).union(*(NUMBERS_OF_WORD.get(word, ()) for word in re.findall(r"[a-z]+", rewrite.lower())))
    for tens, units in re.findall(r"([a-z]+ty)[- ]([a-z]+)", rewrite.lower()):  # twenty-eight
        both = product(NUMBERS_OF_WORD.get(tens, ()), NUMBERS_OF_WORD.get(units, ()))
        said |= {ten[0] + unit for ten, unit in both}
    return numbers(question) - said - {"", "1"}


def gives_away(question: str, rewrite: str, gold: str | None) -> bool:
    number = (gold or "").strip("$ -").removesuffix(".0")
    return number in numbers(rewrite) and number in lost_numbers(rewrite, question)
