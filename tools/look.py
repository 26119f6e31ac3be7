"""What a step of a run said: a question in all its wordings, who voted for what, the label, and all texts side by side.

    python -m tools.look runs/II-embedded-seed0              # the last step
    python -m tools.look runs/II-embedded-seed0 --step 12

rollouts.jsonl keeps one question of every step.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich import print
from rich.columns import Columns
from rich.console import Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from config import UserError, exit_on_user_error
from store.jsonl import Record
from store.log import read_log


def side_by_side(headings: Sequence[str], texts: Sequence[str]) -> Columns:
    said = zip(headings, texts, strict=True)
    return Columns(Panel(Text(text, overflow="fold"), title=Text(heading), width=60) for heading, text in said)


def described(row: Record) -> Group:
    votes = Table.grid(padding=(0, 2))
    for who, answers in row["votes"].items():
        counts = Counter("(none)" if answer is None else answer for answer in answers).most_common()
        votes.add_row(Text(who), Text("   ".join(f"{answer} x{count}" for answer, count in counts)))
    source = f", the vote of the {row['label_from']} ({row['label_share']:.0%})" if row["label_from"] else ""
    votes.add_row("label", Text(f"{row['label']}{source}"))
    rollouts = zip(row["rewards"], row["answers"], strict=True)
    headings = [f"{i}. reward {reward:.3g}, answer {answer}" for i, (reward, answer) in enumerate(rollouts, 1)]
    title = f"step {row['step']}, question {row['id']}, wording {row['view']}, gold {row['gold']}"
    return Group(Rule(Text(title)), Text(f"{row['question']}\n"), votes, "", side_by_side(headings, row["texts"]))


def look(run: Positional[Path], step: int | None = None) -> None:
    file = run / "rollouts.jsonl"
    if not file.is_file():
        raise UserError(f"{run} is no run's folder: it holds no rollouts.jsonl")
    rows = read_log(file)
    last = rows[-1]["step"] if rows else 0
    wanted = last if step is None else step
    shown = [described(row) for row in rows if row["step"] == wanted]
    if not shown:
        raise UserError(f"{file} has no step {wanted}: its last is {last}")
    print(*shown, sep="\n")


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(look, description=__doc__, prog="python -m tools.look")
