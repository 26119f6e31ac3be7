"""A source of questions -> its files -> their rows, each cell read as what it says.

A source is a file of one's own (.jsonl, .json, .csv or .parquet), a folder, or a set that the authors of Co-rewarding
published. Their layouts become ordinary rows here, so that nothing else knows them.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from config import UserError

# name: (folder in the authors' repository, data set on the Hugging Face hub)
PUBLISHED = {
    "math": ("math", "TMLR-Group-HF/Co-rewarding-RephrasedMATH"),
    "dapo": ("dapo", "TMLR-Group-HF/Co-rewarding-RephrasedDAPO-14k"),
    "open-rs": ("open-rs", "TMLR-Group-HF/Co-rewarding-RephrasedOpenRS"),
    "amc": ("AMC-TTT", None),
}
Cells = tuple[str, dict[str, Any]]  # where a row stands ("mine.jsonl, line 3"), what is in its columns


class Columns(NamedTuple):
    """What a file calls its columns."""

    question: str = "question"
    rephrased: str = "rephrased"
    answer: str = "answer"


class Row(NamedTuple):
    id: str
    question: str  # may be empty
    rephrased: str | None
    answer: str | None
    others: dict[str, Any]  # all other columns


def read_source(source: str, columns: Columns) -> list[Row]:
    """All rows of a source.

    Raises:
        UserError: nothing there, nothing readable, no such column, or one id for two questions.
    """
    path = locate(source)
    files, rewrites = files_of(path) if path.is_dir() else ([path], [])
    rows = read_files(files, columns)
    return joined(rows, read_files(rewrites, columns), path) if rewrites else rows


# ---------------------------------------------------------------- a source -> its files


def locate(source: str) -> Path:
    """The file or folder of a source; a published set that is not here is downloaded."""
    folder, hub_name = PUBLISHED.get(source, (source, None))
    for path in (Path(source), Path("data", source), Path("data", folder)):
        if os.path.exists(path):  # unlike Path.exists, no error where a name is too long
            return path
    if source not in PUBLISHED:
        raise UserError(f"{source} is no file, no folder and none of embedded, {', '.join(PUBLISHED)}")
    cure = f"copy data/{folder} of github.com/tmlr-group/Co-rewarding to data/{source}, or give its path"
    if hub_name is None:
        raise UserError(f"{source} is not on the Hugging Face hub: {cure}")
    return from_hub(hub_name, "*.parquet", cure)


def from_hub(name: str, pattern: str, cure: str) -> Path:
    """A folder with the files of a data set on the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=pattern))
    except Exception as problem:  # the hub client's own errors, its HTTP library's, the system's
        reason = type(problem).__name__
        raise UserError(f"{name} could not be had from the Hugging Face hub ({reason}): {cure}") from problem


def files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of its training set, or else of its test set, and the file of rewrites that belongs to them, if any."""
    for split in ("train", "test"):
        original, rewrites = f"{split}_original.parquet", sorted(folder.glob(f"{split}_rewrite_*.parquet"))
        if len(rewrites) > 1:
            raise UserError(f"{folder} holds {len(rewrites)} {split}_rewrite_*.parquet: leave one in it")
        for pattern in (original, f"{split}_pairs.parquet", f"{split}.*", f"data/{split}-*.parquet"):
            files = [file for file in sorted(folder.glob(pattern)) if file.suffix in READERS]
            if len({file.suffix for file in files}) > 1:
                raise UserError(f"{folder} holds {' and '.join(file.name for file in files)}: name the one to read")
            if files:
                return files, rewrites if pattern == original else []
    raise UserError(f"{folder} holds no train_original.parquet, train.* or test.*: name the file itself")


def joined(rows: list[Row], rewrites: list[Row], folder: Path) -> list[Row]:
    """By id, never by row number: the published files have gaps."""
    rewrite_of = {rewrite.id: rewrite for rewrite in rewrites}
    for i, row in enumerate(rows):
        rewrite = rewrite_of.get(row.id)
        if rewrite and rewrite.answer and row.answer and rewrite.answer != row.answer:
            golds = f"the answer {row.answer!r} and in its rewrite {rewrite.answer!r}"
            raise UserError(f"{folder}: question {row.id} has {golds}; these files do not belong together")
        if rewrite:
            rows[i] = row._replace(rephrased=rewrite.question or None)
    return rows


# ---------------------------------------------------------------- a file -> cells


def json_cells(path: Path) -> list[Cells]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return [(f"{path}, entry {number}", row) for number, row in enumerate(json.loads(text), 1)]
    rows = []
    # Not splitlines(): it also cuts at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [(f"{path}, line {number}", json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"line {number}: {problem}") from problem
    return rows


def csv_cells(path: Path) -> list[Cells]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell over 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        if twice := [name for name, count in Counter(reader.fieldnames).items() if count > 1]:
            raise ValueError(f"two columns are called {twice[0]!r}")
        return [(f"{path}, line {reader.line_num}", row) for row in reader]


def parquet_cells(path: Path) -> list[Cells]:
    rows = pq.read_table(path, partitioning=None).to_pylist()
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows)]


READERS = {".jsonl": json_cells, ".json": json_cells, ".csv": csv_cells, ".parquet": parquet_cells}


def read_cells(path: Path) -> list[Cells]:
    if path.suffix not in READERS:
        raise UserError(f"{path} is of no known kind: give one of {', '.join(READERS)}")
    if not path.is_file():  # reading a pipe would wait for its writer
        raise UserError(f"{path} is a folder, a pipe or a device: give a regular file")
    try:
        rows = READERS[path.suffix](path)
    except (OSError, ValueError, OverflowError, RecursionError, csv.Error, pa.ArrowException) as problem:
        reason = str(problem).partition("\n")[0]
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from problem
    if not rows:
        raise UserError(f"{path} holds no rows")
    for place, row in rows:
        if not isinstance(row, dict) or None in row:  # None: DictReader's name for cells beyond the header
            raise UserError(f"{place} is not a row of named columns")
    return rows


# ---------------------------------------------------------------- cells -> rows


def read_files(files: Sequence[Path], columns: Columns) -> list[Row]:
    return to_rows([cells for file in files for cells in read_cells(file)], columns, str(files[0]))


def to_rows(all_cells: list[Cells], columns: Columns, source: str) -> list[Row]:
    all_cells = [(place, in_plain_columns(cells, columns, place)) for place, cells in all_cells]
    available = sorted({name for _, cells in all_cells for name in cells})
    for role, name in columns._asdict().items():
        if name not in available and (role == "question" or name != role):
            cure = f"choose with --{role}-column from {', '.join(available)}"
            raise UserError(f"{source} has no column {name!r}: {cure}")
    rows, earlier = [], dict[str, tuple[str, str]]()
    for number, (place, cells) in enumerate(all_cells):
        row = Row(
            id=text_of(str(number if cells.get("id") is None else cells["id"]), "id", place),
            question=text_of(cells.get(columns.question), columns.question, place),
            rephrased=text_of(cells.get(columns.rephrased), columns.rephrased, place) or None,
            answer=gold_of(cells.get(columns.answer), columns.answer, place),
            others={name: value for name, value in cells.items() if name not in {"id", *columns}},
        )
        first_place, first_question = earlier.setdefault(row.id, (place, row.question))
        if first_question != row.question:
            raise UserError(f"{place} repeats the id {row.id!r} of {first_place}: make ids unique or leave them out")
        rows.append(row)
    return rows


def in_plain_columns(cells: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    """A row of the authors' two layouts under the column names of a plain file; any other row as it is."""
    if "original_question" in cells and columns.question not in cells:  # train_pairs.parquet of the hub
        name_of = dict(zip(("original_question", "rephrased_question", "solution"), columns, strict=True))
        return {name_of.get(name, name): value for name, value in cells.items()}
    if not ("prompt" in cells and isinstance(cells.get("reward_model"), dict)):
        return cells
    extra = cells.get("extra_info")
    if not isinstance(extra, dict) or extra.get("index") is None:
        raise UserError(f"{place} has no extra_info.index, by which questions and rewrites are joined")
    # Their data_source says MATH in every set.
    layout = {"prompt", "reward_model", "extra_info", "index", "data_source", "ability"}
    rest = {name: value for name, value in (cells | extra).items() if name not in layout}
    gold = cells["reward_model"].get("ground_truth")
    return rest | {"id": extra["index"], columns.question: cells["prompt"], columns.answer: gold}


def text_of(value: Any, column: str, place: str) -> str:
    """Text, or what the user says in a chat; empty where nothing is said."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        value = next((turn.get("content") for turn in value if turn.get("role") == "user"), None)
    if value is None or value != value:  # NaN: a missing cell in pandas
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} holds a {type(value).__name__}, not text")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: column {column!r} holds half of a surrogate pair, which is no character")
    return value if value.strip() else ""


def gold_of(value: Any, column: str, place: str) -> str | None:
    """A number as text, an answer alone in a list, or the end of a worked solution as in GSM8K: `#### 1,234`."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float) and value == value:
        value = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    _, mark, end = text_of(value, column, place).rpartition("####")
    return (end.strip().replace(",", "") if mark else end) or None
