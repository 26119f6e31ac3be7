"""Long work in parts, each a JSONL file that is there whole or not at all: after a kill the same command makes those
that are missing, and any number of processes share them out without a word between them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from config import UserError

Row = dict[str, Any]
Model = TypeVar("Model")


def write_whole(path: Path, text: str) -> None:
    """Aside, then renamed: never half a file, whatever happens."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair becomes JSON's escape
    os.replace(aside, path)


def read_part(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def claim(out: Path, settings: dict[str, str]) -> Path:
    """The folder for the parts of OUT: a new one, or one that was begun with the same settings."""
    folder = Path(f"{out}.parts")
    record = folder / "settings.json"
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if changed := sorted(name for name in before | settings if before.get(name) != settings.get(name)):
            changes = ", ".join(f"{name} (was {before.get(name)}, is {settings.get(name)})" for name in changed)
            raise UserError(f"{folder} was begun with other settings: {changes}; name another --out, or delete it")
    elif out.exists():
        raise UserError(f"{out} is there already, and {folder} is not: name another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(settings, indent=2) + "\n")
    return folder


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
    parts: Sequence[Path],
    share: range,
    work: Callable[[int, Model], list[Row]],
    opened: AbstractContextManager[Model],
    tally: Callable[[list[Row]], Counter[str]],
) -> None:
    """Those of this process's share of the parts that are missing, with a model that is loaded if there are any; the
    bar shows the sum of their tallies."""
    if all(parts[i].exists() for i in share):
        return
    shown = Counter[str]()
    with opened as model, tqdm(share, desc=stage, unit="batch", position=share.start) as bar:
        for i in bar:
            if not parts[i].exists():
                rows = work(i, model)
                write_whole(parts[i], "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
            shown += tally(read_part(parts[i]))
            bar.set_postfix(shown)
