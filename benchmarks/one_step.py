"""One-step word problems of MAWPS and SVAMP, for real.py: read, solved by rule, reworded by rule, split in halves."""

import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from overlap import overlaps

from config import UserError
from sources.files import read_rows, svamp_question

IMITATED, TRAINED, ELSEWHERE = ("addsub", "singleeq"), "singleop", ("multiarith", "svamp")
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+"
DECIMALS = 2  # more of them are the source's rounding: 19.833333333333332 miles
OTHER_WORDS = {"altogether": "in total", "in all": "altogether"}  # of rewordings
CONDITION = re.compile(r"(?:if|suppose)\s+(.+?),\s*((?:how|what)\b.+)", re.I)  # and what is asked under it
TITLE = re.compile(r"\b(?:Mrs?|Ms|Dr)\.$")  # its full stop ends no sentence
Question = tuple[str, Decimal]  # its text, its gold answer


def normalised(text: str) -> str:
    """Words and numbers alone: spacing, punctuation and capitals do not make another question."""
    return " ".join(re.findall(r"[^\W\d_]+|\d+", text.casefold()))


def numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in re.findall(NUMBER, text)]


def find_file(data_dir: Path, name: str) -> Path:
    if found := sorted(data_dir.rglob(name)):
        return found[0]
    raise UserError(f"--data-dir {data_dir} has no {name} in it")


def read_questions(data_dir: Path, name: str) -> list[Question]:
    """Of one set, each normalised question once, in an order that a hash gives: the first so many are a sample."""
    if name == "svamp":
        cells = read_rows(find_file(data_dir, "SVAMP.json"))
        pairs = [(svamp_question(row), row["Answer"]) for row in cells]
    elif name.startswith("gsm8k"):
        rows = read_rows(find_file(data_dir, f"{name}.jsonl"))
        pairs = [(row["question"], row["answer"].rpartition("####")[2].replace(",", "").strip()) for row in rows]
    else:
        pairs = [(row["input"], row["target"]) for row in read_rows(find_file(data_dir, f"{name}.jsonl"))]
    unique = {normalised(text): (" ".join(text.split()), Decimal(str(gold))) for text, gold in pairs}
    return [unique[key] for key in sorted(unique, key=digest)]


def digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def exact(questions: list[Question]) -> list[Question]:
    """Those whose gold answer is no rounded one, such as 3.33333."""
    return [(text, gold) for text, gold in questions if places(gold) <= DECIMALS]


def plain(number: Decimal) -> str:
    """27.0 -> 27, 0.50 -> 0.5."""
    return f"{number.normalize():f}"


def places(number: Decimal) -> int:
    """Digits behind the point."""
    return len(plain(number).partition(".")[2])


def operations(question: str, gold: Decimal) -> list[str]:
    """Every `a + b`, `a - b`, `a * b`, `a / b` of two of the question's numbers that gives the gold answer."""
    said = numbers(question)
    found = []
    for i, a in enumerate(said):
        for j, b in enumerate(said):
            first = {"+": a + b, "*": a * b} if i < j else {}  # these two do not mind the order
            results = first | ({"-": a - b} if i != j else {}) | ({"/": a / b} if i != j and b else {})
            found += [f"{plain(a)} {sign} {plain(b)}" for sign, value in results.items() if value == gold]
    return list(dict.fromkeys(found))


def worked_solution(question: str, gold: Decimal) -> str | None:
    """`49 - 22 = 27. The answer is \\boxed{27}.`; None where no single operation explains the answer, or several do."""
    found = operations(question, gold)
    if len(found) != 1 or max(map(places, [gold, *numbers(question)])) > DECIMALS:
        return None
    return f"{found[0]} = {plain(gold)}. The answer is \\boxed{{{plain(gold)}}}."


def bare_sum(rng: random.Random) -> tuple[str, str]:
    """`67 - 52 =` and ` 15.`, with numbers as large as those of such questions."""
    sign, size = rng.choice("+-*/"), rng.choice((10, 100, 100, 1000))
    a, b = rng.randrange(1, size), rng.randrange(1, size)
    if sign in "*/":
        a, b = rng.randint(2, 12), rng.randint(2, rng.choice((12, 50)))
    if sign == "-":
        a, b = max(a, b), min(a, b)
    if sign == "/":
        a *= b
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    return f"{a} {sign} {b} =", f" {result}."


def without_overlap(questions: list[Question], asked: Sequence[str]) -> list[Question]:
    """Those that are not among `asked`: not normalised, and not nearly (see overlap.py)."""
    known = set(map(normalised, asked))
    nearly = {trained for trained, _ in overlaps([text for text, _ in questions], asked)}
    return [each for i, each in enumerate(questions) if i not in nearly and normalised(each[0]) not in known]


def imitation_set(data_dir: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Questions with a worked solution, none of which is trained or evaluated on; and how many became of how many."""
    asked = [text for name in (TRAINED, *ELSEWHERE) for text, _ in read_questions(data_dir, name)]
    kept: dict[str, tuple[str, str]] = {}
    counts = Counter[str]()
    for name in IMITATED:
        questions = read_questions(data_dir, name)
        solved = [(text, gold) for text, gold in questions if worked_solution(text, gold)]
        apart = without_overlap(solved, asked)
        counts |= {f"{name}: questions": len(questions), f"{name}: solved by the rule": len(solved)}
        counts[f"{name}: asked elsewhere, dropped"] = len(solved) - len(apart)
        kept |= {normalised(text): (text, str(worked_solution(text, gold))) for text, gold in apart}
    return list(kept.values()), dict(counts) | {"imitated": len(kept)}


def in_training(question: str) -> bool:
    """Which half of SingleOp: the same on every machine and for every spelling of the question."""
    return digest(normalised(question))[-1] % 2 == 0


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def reworded(question: str) -> str:
    """The same problem in another order: what is asked comes first, then the facts, with a few other words."""
    *facts, asked = sentences(question)
    if found := CONDITION.fullmatch(asked):
        facts, asked = [*facts, f"{found[1]}."], found[2]
    if not facts:
        return f"Please work this out: {asked}"
    told = " ".join(capital(re.sub(r"^if\s+", "", fact, flags=re.I)) for fact in facts)
    text = f"{capital(asked)} This is what we know: {told}"
    return re.sub(r"\b(altogether|in all)\b", lambda found: OTHER_WORDS[found[0]], text)


def rewordable(question: str) -> bool:
    """Tell whether the rule fits: clear facts, then a question, and every number kept."""
    *facts, asked = sentences(question)
    is_clear = bool(facts) and asked.endswith("?") and not TITLE.search(facts[-1])
    unconditional = not any(re.match(r"if\s", fact, re.I) for fact in facts)  # the rule would drop that word
    return is_clear and unconditional and sorted(numbers(question)) == sorted(numbers(reworded(question)))


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
