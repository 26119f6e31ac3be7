"""Benchmarks: where their questions are, how they are asked, and how answers to them are read."""

import ast
import pprint
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from answers.equivalence import extract_boxed
from config import UserError
from sources.files import Columns, from_hub


class Files(NamedTuple):
    """Files that belong together, and their columns (the authors' layout is known by itself)."""

    pattern: str
    columns: Columns = Columns()


def body_and_question(question: str, others: dict[str, Any]) -> str:
    """SVAMP tells its story in one column, often without its full stop, and asks in another."""
    body = others["Body"].strip()
    return f"{body if body.endswith('.') else body + '.'} {question.strip()}"


def multiple_choice(question: str, others: dict[str, Any]) -> str:
    options = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", others["options"], strict=False)]
    return "\n".join([question, *options, "Answer with the letter of the correct option."])


def output_prediction(question: str, others: dict[str, Any]) -> str:
    call = f"What does f({others['input']}) return? Answer with a Python literal."
    return f"```python\n{question}\n```\n{call}"


def inside_box(answer: str) -> str:
    """MATH publishes whole solutions."""
    return (extract_boxed(answer) or answer).strip()


def option_letter(answer: str) -> str:
    """`C`, `(C)`, `\\text{C}` and `C. 5 metres` -> `C`; anything else as it is."""
    match = re.match(r"(?:\\text\w*\{|[\s($])*([A-J])\b", answer)
    return match[1] if match else answer.strip()


def python_literal(answer: str) -> str:
    """A literal as Python would print it, without LaTeX's escapes and with dicts and sets in order."""
    try:
        value = ast.literal_eval(re.sub(r"\\([{}_%#&$])", r"\1", answer.strip()))
        return pprint.pformat(value, width=sys.maxsize)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # too deep, too long a number, {[]: 1}
        return answer.strip()


@dataclass(frozen=True)
class Source:
    local: Files  # below the folder of data; the first match counts
    hub: str  # data set on the Hugging Face hub
    hub_files: Files  # all of them count
    ask: Callable[[str, dict[str, Any]], str] = lambda question, _: question
    read: Callable[[str], str] = str.strip
    match: Literal["exact", "math"] = "math"


# fmt: off
PROBLEM, SOLUTION = Columns("problem"), Columns("problem", answer="solution")
AIME, FINAL = Columns("problem", answer="expected_answer"), Columns(answer="final_answer")
SVAMP, CODE = Columns("Question", answer="Answer"), Columns("code", answer="output")
SOURCES = {
    "math500": Source(Files("math500.jsonl", PROBLEM), "HuggingFaceH4/MATH-500", Files("test.jsonl", PROBLEM)),
    "gsm8k": Source(Files("gsm8k_test.jsonl"), "openai/gsm8k", Files("main/test-*.parquet")),
    # 83 questions of the AMC 12 of 2022 and 2023, the authors' AMC-TTT, and 40 of them
    "amc": Source(Files("AMC-TTT/test.parquet"), "AI-MO/aimo-validation-amc", Files("data/train-*.parquet", PROBLEM)),
    "amc23": Source(Files("amc23.jsonl"), "math-ai/amc23", Files("*test-*.parquet")),
    "aime24": Source(Files("aime24.jsonl", AIME), "HuggingFaceH4/aime_2024", Files("data/train-*.parquet", PROBLEM)),
    "aime25": Source(Files("aime25.jsonl", AIME), "MathArena/aime_2025", Files("data/train-*.parquet", PROBLEM)),
    "math": Source(  # all 5,000 test questions
        Files("math/test.parquet"), "DigitalLearningGmbH/MATH-lighteval", Files("data/test-*.parquet", SOLUTION),
        read=inside_box,
    ),
    "olympiadbench": Source(  # mathematics in English, without figures, with an answer
        Files("olympiadbench_maths_en.jsonl", FINAL),
        "Hothan/OlympiadBench", Files("*OE_TO_maths_en_COMP.parquet", FINAL),
    ),
    "svamp": Source(  # all 1,000
        Files("SVAMP.json", SVAMP), "ChilleD/SVAMP", Files("data/*.parquet", SVAMP), ask=body_and_question,
    ),
    "mmlu-pro": Source(  # without examples in the prompt
        Files("mmlu_pro_test.parquet"), "TIGER-Lab/MMLU-Pro", Files("data/test-*.parquet"),
        ask=multiple_choice, read=option_letter, match="exact",
    ),
    "crux": Source(  # CRUXEval-O, without examples in the prompt
        Files("cruxeval.jsonl", CODE), "cruxeval-org/cruxeval", Files("test.jsonl", CODE),
        ask=output_prediction, read=python_literal, match="exact",
    ),
}
# fmt: on


def find_files(source: Source, data_dir: Path) -> tuple[list[str], Files]:
    if found := sorted(map(str, data_dir.rglob(source.local.pattern))):
        return found[:1], source.local
    pattern, cure = source.hub_files.pattern, f"put {source.local.pattern} below {data_dir}"
    if found := sorted(map(str, from_hub(source.hub, pattern, cure).rglob(pattern))):
        return found, source.hub_files
    raise UserError(f"{source.hub} on the Hugging Face hub holds no {pattern}: {cure}")
