"""Long work in parts, each a JSONL file that is there whole or not at all: after a kill the same command makes those
that are missing, and any number of processes share them out without a word between them.

    process = stand_alone()                           # under torchrun every process has a model and a GPU of its own
    claim(folder, settings, out)                      # what is there already was begun with these settings
    make_parts("rephrasing", jobs, process, ...)      # those that are missing
    rows = read_whole(jobs)                           # for the process that finds nothing missing: the last
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from config import UserError
from store.files import Row, changes, read_rows, to_lines, write_whole

Job = TypeVar("Job")
Model = TypeVar("Model")


class Part(NamedTuple):
    path: Path
    rows: int  # when it is whole: at least one


def split(folder: Path, stem: str, count: int, size: int, rows: int = 1) -> dict[Part, range]:
    """Parts of `size` of `count` things, with `rows` rows for each of them; a part is named after the places of what it
    holds, so the last one of another count is another part."""
    places = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return {Part(folder / f"{stem}{at.start:06d}-{at.stop:06d}.jsonl", rows * len(at)): at for at in places}


def read_part(part: Part) -> list[Row]:
    """Its rows; none where it is missing, or so damaged that it has to be made again."""
    try:
        rows = read_rows(part.path)
    except (FileNotFoundError, UserError):
        return []
    return rows if len(rows) == part.rows else []


def read_whole(parts: Iterable[Part]) -> list[Row] | None:
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
        before = json.loads(record.read_text(encoding="utf-8", errors="replace")) if begun else settings
        if changed := changes(before, settings):
            raise UserError(f"{folder} was begun with other settings: {changed}; name another --out, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(dict(settings), indent=2, default=str) + "\n")
    except FileNotFoundError:
        raise UserError(f"{out} or a part of it is there already, but no {record}: name another --out") from None
    except (OSError, json.JSONDecodeError, AttributeError, TypeError) as problem:
        raise UserError(f"{record} cannot be used ({problem}): name another --out") from problem


def stand_alone() -> tuple[int, int]:
    """This process's rank and the number of processes. Then it forgets torchrun's variables and sees one GPU: it needs
    no other process, while vLLM would take them all for one engine."""
    rank, processes = int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1))
    visible, local_rank = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.pop("LOCAL_RANK", None)
    if local_rank is not None and visible != "":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(local_rank)] if visible else local_rank
    return rank, processes


def make_parts(
    stage: str,
    jobs: Mapping[Part, Job],
    process: tuple[int, int],
    work: Callable[[Job, Model], list[Row]],
    opened: AbstractContextManager[Model],
    tally: Callable[[Sequence[Row]], Counter[str]],
) -> bool:
    """Make those of this process's share of the parts that are missing, each from its job, with a model that is opened
    if there are any; the bar shows what was counted, in percent of the rows. Returns whether a model was opened."""
    rank, processes = process
    kept = {part: read_part(part) for part in list(jobs)[rank::processes]}
    missing, rows = [part for part in kept if not kept[part]], [row for rows in kept.values() for row in rows]
    if not missing:
        return False
    counted, total, done = tally(rows), len(rows), len(kept) - len(missing)
    with opened as model, tqdm(missing, stage, len(kept), initial=done, unit="batch", position=rank) as bar:
        for part in bar:
            rows = work(jobs[part], model)
            write_whole(part.path, to_lines(rows))
            counted.update(tally(rows))
            total += len(rows)
            bar.set_postfix({name: f"{number / total:.1%}" for name, number in counted.items()})
    return True
