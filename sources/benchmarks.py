"""List the benchmarks of mathematics: where their questions are, and how they are asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from sources.files import Columns, from_hub


class Files(NamedTuple):
    """Files that belong together, and their columns (the authors' layout is known by itself)."""

    pattern: str
    columns: Columns = Columns()


def body_and_question(question: str, others: dict[str, Any]) -> str:
    """Join the columns of SVAMP: the story, often without its full stop, and the question."""
    body = others["Body"].strip()
    return f"{body if body.endswith('.') else body + '.'} {question.strip()}"


@dataclass(frozen=True)
class Source:
    local: Files  # below the folder of data; the first match counts
    hub: str  # data set on the Hugging Face hub
    hub_files: Files  # all of them count
    ask: Callable[[str, dict[str, Any]], str] = lambda question, _: question


PROBLEM = Columns("problem")
SOLUTION = Columns("problem", answer="solution")
AIME = Columns("problem", answer="expected_answer")
FINAL = Columns(answer="final_answer")
SVAMP = Columns("Question", answer="Answer")
# fmt: off
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
    ),
    "olympiadbench": Source(  # mathematics in English, without figures, with an answer
        Files("olympiadbench_maths_en.jsonl", FINAL),
        "Hothan/OlympiadBench", Files("*OE_TO_maths_en_COMP.parquet", FINAL),
    ),
    "svamp": Source(  # all 1,000
        Files("SVAMP.json", SVAMP), "ChilleD/SVAMP", Files("data/*.parquet", SVAMP), ask=body_and_question,
    ),
}
# fmt: on


def find_files(source: Source, data_dir: Path) -> tuple[list[str], Files]:
    if found := sorted(map(str, data_dir.rglob(source.local.pattern))):
        return found[:1], source.local
    pattern = source.hub_files.pattern
    cure = f"put {source.local.pattern} below {data_dir}"
    if found := sorted(map(str, from_hub(source.hub, pattern, cure).rglob(pattern))):
        return found, source.hub_files
    raise UserError(f"{source.hub} on the Hugging Face hub holds no {pattern}: {cure}")
