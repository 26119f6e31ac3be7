"""Files that are there whole or not at all, lines of JSON, and whether two pieces of work had the same settings."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from config import UserError

Record = dict[str, Any]


def write_atomic(path: Path, text: str) -> None:
    """Write a file aside and rename it: never half a file, whatever happens."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair becomes JSON's escape
    os.replace(aside, path)


def to_lines(rows: Iterable[Record]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def append_rows(path: Path, rows: Iterable[Record]) -> None:
    with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(to_lines(rows))


def read_rows(path: Path, is_whole: Callable[[Record], bool] = lambda row: True) -> list[Record]:
    r"""Read the whole lines of a file; half of one, which a kill may have left at the end, is none.

    Split at "\n" alone: `splitlines` also cuts at U+2028 and its like, which JSON allows inside a string.

    Raises:
        UserError: a line that is no JSON object, or not a whole one.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append({**json.loads(line)})
            if not is_whole(rows[-1]):
                raise ValueError("an entry is missing or of another kind")
        except (ValueError, TypeError, RecursionError) as problem:
            complaint = f"{path}, line {number} is damaged ({problem})"
            raise UserError(f"{complaint}: repair it or move the file away") from problem
    return rows


def fingerprint(thing: object) -> str:
    """Hash whatever has a repr: equal things have equal fingerprints on every machine."""
    return blake2b(repr(thing).encode(errors="backslashreplace"), digest_size=8).hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any], harmless: Iterable[str] = ()) -> str:
    """Describe the settings that differ as a sentence's end, `rollouts (was 8, is 16)`; empty if none do."""
    before, now = json.loads(json.dumps([before, now], default=str))
    differing = [name for name in sorted({*before, *now} - set(harmless)) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} (was {before.get(name)}, is {now.get(name)})" for name in differing)
