"""tools/look.py: each test is named after the bug it prevents."""

import io
import json
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from config import UserError
from tools import look
from tools.look import side_by_side


def test_texts_beside_each_other_run_into_each_other_or_out_of_the_terminal_or_are_taken_for_markup():
    texts = [
        r"so \frac{1}{2} + " + r"\sqrt{x^2}" * 40,
        "两个数的和是十二。" * 20,
        "[bold]a short[/bold] :smile:",
        "",
        "ligne après ligne\n\nfin",
    ]
    for width in (40, 80, 130, 200):
        console = Console(width=width, file=io.StringIO())
        console.print(side_by_side([f"[red]{i}" for i in range(5)], texts))
        shown = console.file.getvalue()
        assert max(cell_len(line) for line in shown.splitlines()) <= width
        assert shown.count("两") == 20 and "[bold]a short[/bold] :smile:" in shown and "[red]4" in shown
        assert ("[red]0" in shown.splitlines()[0] and "[red]1" in shown.splitlines()[0]) == (width >= 130)


ROW = {
    "step": 3, "id": "q", "view": "x", "question": "What is it?", "gold": None, "label": "4",
    "label_from": "teacher on x'", "label_share": 0.75, "answers": ["4", None], "rewards": [1.0, 0.0],
    "votes": {"policy on x": ["4", None], "teacher on x'": ["4", "4"]}, "texts": ["\\boxed{4}", "no\u2028box"],
}  # fmt: skip


def test_a_step_is_shown_without_its_votes_or_another_step_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [ROW | {"step": 2, "question": "Another?"}, ROW]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    look.look(tmp_path)
    shown = capsys.readouterr().out
    assert "step 3" in shown and "Another?" not in shown
    assert "the vote of the teacher on x' (75%)" in shown and "4 x1   (none) x1" in shown
    assert "1. reward 1, answer 4" in shown and "2. reward 0, answer None" in shown
    with pytest.raises(UserError, match="has no step 7: its last is 3"):
        look.look(tmp_path, step=7)
    with pytest.raises(UserError, match="is no run's folder"):
        look.look(tmp_path / "nowhere")
