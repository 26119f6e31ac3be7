"""Long work in parts, each a JSONL file that is there whole or not at all: after a kill the same command makes those
that are missing, and any number of processes share them out without a word between them.

    process = leave_torchrun()                           # under torchrun every process has a model and a GPU of its own
    claim(folder, settings, out)                      # what is there already was begun with these settings
    missing = missing_parts(parts, process)           # of this process's share
    make_parts("rephrasing", missing, ...)            # each whole or not at all
    rows = read_whole(parts)                          # for the process that finds nothing missing: the last
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from config import UserError
from store.jsonl import Record, changes, read_rows, to_lines, write_atomic

Thing = TypeVar("Thing")


class Part(NamedTuple):
    path: Path
    rows: int  # when it is whole: at least one


def split(folder: Path, things: Sequence[Thing], size: int, rows: int = 1) -> dict[Part, Sequence[Thing]]:
    """Parts of `size` things, with `rows` rows for each of them."""
    starts = range(0, len(things), size)
    batches = {folder / f"{start:06d}.jsonl": things[start : start + size] for start in starts}
    return {Part(path, rows * len(batch)): batch for path, batch in batches.items()}


def read_part(part: Part) -> list[Record]:
    """Its rows; none where it is missing, or so damaged that it has to be made again."""
    try:
        rows = read_rows(part.path)
    except (FileNotFoundError, UserError):
        return []
    return rows if len(rows) == part.rows else []


def read_whole(parts: Iterable[Part]) -> list[Record] | None:
    """The rows of all parts in their order; None while one is missing."""
    each = [read_part(part) for part in parts]
    return [row for rows in each for row in rows] if all(each) else None


def claim(folder: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Take a folder for the parts of `out`: a new one, or one in which the same work was begun.

    Raises:
        UserError: what is there was made with other settings or with unknown ones; or the folder cannot be written.
    """
    record = folder / "settings.json"
    try:
        begun = out.exists() or any(folder.rglob("*.jsonl"))
        changed = changes(json.loads(record.read_text(encoding="utf-8")), settings) if begun else ""
        if not begun:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(record, json.dumps(dict(settings), indent=2, default=str) + "\n")
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise UserError(f"{record}, kept for {out}, cannot be used ({problem}): name another --out") from problem
    if changed:
        raise UserError(f"{folder} was begun with other settings: {changed}; name another --out, or delete it")


def leave_torchrun() -> tuple[int, int]:
    """This process's rank and the number of processes. Then it forgets torchrun's variables and sees one GPU: it needs
    no other process, while vLLM would take them all for one engine."""
    rank, processes = int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1))
    visible, local_rank = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.pop("LOCAL_RANK", None)
    if local_rank is not None and visible != "":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(local_rank)] if visible else local_rank
    return rank, processes


def missing_parts(parts: Sequence[Part], process: tuple[int, int]) -> list[Part]:
    """Those of this process's share that are still to be made."""
    rank, processes = process
    return [part for part in parts[rank::processes] if not read_part(part)]


def make_parts(stage: str, missing: Sequence[Part], work: Callable[[Part], list[Record]], shown: str) -> None:
    """Make each of them; the bar shows in how many rows of the last one the column `shown` holds something."""
    with tqdm(missing, stage, unit="batch") as bar:
        for part in bar:
            rows = work(part)
            part.path.parent.mkdir(exist_ok=True)
            write_atomic(part.path, to_lines(rows))
            bar.set_postfix({shown: f"{fmean(bool(row[shown]) for row in rows):.1%}"})
