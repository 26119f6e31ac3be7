"""Benchmarks: where their questions are, and how answers to them are read.

data.load_benchmark reads them.
"""

import ast
import pprint
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from answers.equivalence import extract_boxed
from config import UserError

Row = dict[str, Any]  # the other columns of a question


@dataclass(frozen=True)
class Files:
    """Files that belong together, and their columns; the authors' layout has columns of its own (see data.py)."""

    pattern: str
    question: str = "question"
    answer: str = "answer"


def as_written(question: str, _: Row) -> str:
    return question


def body_and_question(question: str, row: Row) -> str:
    """SVAMP tells its story in one column, often without its full stop, and asks in another."""
    body = row["Body"].strip()
    return f"{body if body.endswith('.') else body + '.'} {question.strip()}"


def multiple_choice(question: str, row: Row) -> str:
    options = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", row["options"], strict=False)]
    return "\n".join([question, *options, "Answer with the letter of the correct option."])


def output_prediction(question: str, row: Row) -> str:
    call = f"What does f({row['input']}) return? Answer with a Python literal."
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
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return answer.strip()
    return pprint.pformat(value, width=sys.maxsize)


@dataclass(frozen=True)
class Source:
    local: Files  # below the folder of data; the first match counts
    hub: str  # data set on the Hugging Face hub
    hub_files: Files  # all of them count
    ask: Callable[[str, Row], str] = as_written
    read: Callable[[str], str] = str.strip
    match: Literal["exact", "math"] = "math"


# fmt: off
SOURCES = {
    "math500": Source(
        Files("math500.jsonl", "problem"),
        "HuggingFaceH4/MATH-500", Files("test.jsonl", "problem"),
    ),
    "gsm8k": Source(
        Files("gsm8k_test.jsonl"),
        "openai/gsm8k", Files("main/test-*.parquet"),
    ),
    "amc": Source(  # 83 questions of the AMC 12 of 2022 and 2023, the authors' AMC-TTT
        Files("AMC-TTT/test.parquet"),
        "AI-MO/aimo-validation-amc", Files("data/train-*.parquet", "problem"),
    ),
    "amc23": Source(  # 40 of these 83
        Files("amc23.jsonl"),
        "math-ai/amc23", Files("*test-*.parquet"),
    ),
    "aime24": Source(
        Files("aime24.jsonl", "problem", "expected_answer"),
        "HuggingFaceH4/aime_2024", Files("data/train-*.parquet", "problem"),
    ),
    "aime25": Source(
        Files("aime25.jsonl", "problem", "expected_answer"),
        "MathArena/aime_2025", Files("data/train-*.parquet", "problem"),
    ),
    "math": Source(  # all 5,000 test questions
        Files("math/test.parquet"),
        "DigitalLearningGmbH/MATH-lighteval", Files("data/test-*.parquet", "problem", "solution"),
        read=inside_box,
    ),
    "olympiadbench": Source(  # mathematics in English, without figures, with an answer
        Files("olympiadbench_maths_en.jsonl", answer="final_answer"),
        "Hothan/OlympiadBench", Files("*OE_TO_maths_en_COMP.parquet", answer="final_answer"),
    ),
    "svamp": Source(  # all 1,000
        Files("SVAMP.json", "Question", "Answer"),
        "ChilleD/SVAMP", Files("data/*.parquet", "Question", "Answer"),
        ask=body_and_question,
    ),
    "multiarith": Source(
        Files("multiarith.jsonl", "input", "target"),
        "ChilleD/MultiArith", Files("*.json", "question", "final_ans"),
    ),
    "mmlu-pro": Source(  # without examples in the prompt
        Files("mmlu_pro_test.parquet"),
        "TIGER-Lab/MMLU-Pro", Files("data/test-*.parquet"),
        ask=multiple_choice, read=option_letter, match="exact",
    ),
    "crux": Source(  # CRUXEval-O, without examples in the prompt
        Files("cruxeval.jsonl", "code", "output"),
        "cruxeval-org/cruxeval", Files("test.jsonl", "code", "output"),
        ask=output_prediction, read=python_literal, match="exact",
    ),
}
# fmt: on


def find_files(name: str, source: Source, data_dir: Path) -> tuple[list[str], Files]:
    if found := sorted(map(str, data_dir.rglob(source.local.pattern))):
        return found[:1], source.local
    from huggingface_hub import snapshot_download

    reason = f"no {source.hub_files.pattern} in it"
    try:
        folder = Path(snapshot_download(source.hub, repo_type="dataset", allow_patterns=source.hub_files.pattern))
        if found := sorted(map(str, folder.rglob(source.hub_files.pattern))):
            return found, source.hub_files
    except Exception as problem:  # the hub client's own errors, its HTTP library's, the system's
        reason = type(problem).__name__
    cure = f"put {source.local.pattern} below {data_dir}, or say where it is with --data-dir"
    raise UserError(f"{name}: {source.hub} could not be had from the Hugging Face hub ({reason}): {cure}")
