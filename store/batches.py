"""Long work in batches that survives a kill: the rows of a batch are appended to a JSONL, and work goes on behind them.

    with claim_folder(folder, settings, out):                 # nobody else writes there, and it is the same work
        rows = work_through(folder / "rows.jsonl", things, size, work)

Under torchrun every rank takes part in a batch, with a model and a GPU of its own; rank 0 writes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from config import UserError
from lm import distributed
from store.folder import lock
from store.jsonl import Record, append_rows, changes, read_rows, to_lines, write_atomic


@contextmanager
def claim_folder(folder: Path, settings: Mapping[str, Any], out: Path) -> Iterator[None]:
    """Take a folder for the work on `out`: a new one, or one in which the same work was begun. Others are kept out.

    Raises:
        UserError: what is there was made with other or unknown settings, or the folder cannot be used.
    """
    record = folder / "settings.json"

    def compare(held: ExitStack) -> None:
        held.enter_context(lock(folder))
        try:
            begun = out.exists() or any(folder.glob("*.jsonl"))
            changed = changes(json.loads(record.read_text(encoding="utf-8")), settings) if begun else ""
            if not begun:
                write_atomic(record, json.dumps(dict(settings), indent=2, default=str) + "\n")
        except (OSError, ValueError, AttributeError, TypeError) as problem:
            raise UserError(f"{record}, kept for {out}, cannot be used ({problem}): name another --out") from problem
        if changed:
            raise UserError(f"{folder} was begun with other settings: {changed}; name another --out, or delete it")

    with ExitStack() as held:
        distributed.run_on_rank0(lambda: compare(held))
        yield


def work_through(
    file: Path,
    things: Sequence[Any],
    size: int,
    work: Callable[[Sequence[Any]], list[Record]],
    shown: str,
    rows_per_thing: int = 1,
) -> list[Record]:
    """Work through all things in batches of `size`; return the rows of all of them, in order.

    Every rank calls it. A thing has an id, and so have its rows. The progress bar shows in how many rows of a batch the
    column `shown` holds something.
    """
    rows = distributed.run_on_rank0(lambda: rows_so_far(file, things, rows_per_thing))
    batches = range(len(rows) // rows_per_thing, len(things), size)
    with tqdm(batches, file.stem, unit="batch", disable=not distributed.is_rank0()) as bar:
        for start in bar:
            new = work(things[start : start + size])
            rows += new
            distributed.run_on_rank0(partial(append_rows, file, new))
            bar.set_postfix({shown: f"{fmean(bool(row[shown]) for row in new):.1%}"})
    return rows


def rows_so_far(file: Path, things: Sequence[Any], rows_per_thing: int) -> list[Record]:
    """Return the rows of the things that are done; cut the file behind them, where a kill may have left some rows."""
    if not file.exists():
        return []
    rows = read_rows(file)
    rows = rows[: len(rows) - len(rows) % rows_per_thing]
    for place, row in enumerate(rows):
        if place // rows_per_thing >= len(things) or row.get("id") != things[place // rows_per_thing].id:
            raise UserError(f"{file}, line {place + 1} is of another question: move the file away")
    write_atomic(file, to_lines(rows))
    return rows
