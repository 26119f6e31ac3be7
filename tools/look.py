"""What a step of a run said: a question in all its wordings, who voted for what, the label, and all texts side by side.

    python -m tools.look runs/II-embedded-seed0              # the last step
    python -m tools.look runs/II-embedded-seed0 --step 12

rollouts.jsonl keeps one question of every step. The paper's run would write about 35 MB of it: 174 steps, 8 answers of
up to 3,072 tokens on each of two wordings.
"""

import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from unicodedata import east_asian_width

import tyro
from tyro.conf import Positional

from config import UserError, told_in_a_sentence
from store.files import Row, read_rows

COLUMN = 58  # characters that make a text legible


def width_of(text: str) -> int:
    """Columns of a terminal: Chinese and its like take two."""
    return sum(1 + (east_asian_width(character) in "WF") for character in text)


def wrapped(text: str, width: int) -> list[str]:
    narrow = width if width_of(text) == len(text) else width // 2
    return [part for line in text.splitlines() for part in textwrap.wrap(line, narrow) or [""]]


def side_by_side(texts: Sequence[str], width: int) -> str:
    """As many beside each other as stay legible."""
    count = max(1, (width + 3) // (COLUMN + 3))
    column = (width + 3) // count - 3
    blocks = []
    for start in range(0, len(texts), count):
        lines = zip_longest(*(wrapped(text, column) for text in texts[start : start + count]), fillvalue="")
        rows = [" | ".join(part + " " * (column - width_of(part)) for part in line).rstrip() for line in lines]
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def described(row: Row, width: int) -> str:
    """One wording of the question: who voted for what, and what the policy said."""
    lines = [f"{'=' * width}\nstep {row['step']}, question {row['id']}, wording {row['view']}, gold {row['gold']}"]
    lines += [*wrapped(str(row["question"]), width), ""]
    for who, answers in row["votes"].items():
        counts = Counter("(none)" if answer is None else answer for answer in answers)
        said = "   ".join(f"{answer} x{count}" for answer, count in counts.most_common())
        lines += textwrap.wrap(f"{who:<14} {said}", width, subsequent_indent=" " * 15)
    source = f", the vote of the {row['label_from']} ({row['label_share']:.0%})" if row["label_from"] else ""
    lines.append(f"{'label':<14} {row['label']}{source}\n")
    rollouts = zip(row["rewards"], row["answers"], row["texts"], strict=True)
    texts = [f"{i}. reward {r:.3g}, answer {answer}\n{text}" for i, (r, answer, text) in enumerate(rollouts, 1)]
    return "\n".join([*lines, side_by_side(texts, width)])


def look(run: Positional[Path], step: int | None = None) -> None:
    """Show what was asked and said in a step of a run."""
    file = run / "rollouts.jsonl"
    if not file.is_file():
        raise UserError(f"{run} is no run's folder: it holds no rollouts.jsonl")
    rows = read_rows(file)
    steps = sorted({int(row["step"]) for row in rows})
    wanted = step if step is not None else max(steps, default=0)
    if wanted not in steps:
        raise UserError(f"{file} has steps {min(steps, default=0)} to {max(steps, default=0)}, and no {wanted}")
    width = shutil.get_terminal_size((120, 24)).columns
    print("\n\n".join(described(row, width) for row in rows if row["step"] == wanted))


if __name__ == "__main__":
    with told_in_a_sentence():
        tyro.cli(look, description=__doc__)
