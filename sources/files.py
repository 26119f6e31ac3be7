"""Read the questions of a source: find its files, read their rows, and make each cell what it says.

A source is a file of one's own (.jsonl, .json or .parquet), a folder, or a set that the authors of Co-rewarding
published. Their layouts and SVAMP's become ordinary rows here, so that no other file knows them.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from answers.equivalence import extract_boxed
from config import UserError

# name: (folder in the authors' repository, data set on the Hugging Face hub)
PUBLISHED = {
    "math": ("math", "TMLR-Group-HF/Co-rewarding-RephrasedMATH"),
    "dapo": ("dapo", "TMLR-Group-HF/Co-rewarding-RephrasedDAPO-14k"),
    "open-rs": ("open-rs", "TMLR-Group-HF/Co-rewarding-RephrasedOpenRS"),
    "amc": ("AMC-TTT", None),
}


class Columns(NamedTuple):
    question: str = "question"
    rephrased: str = "rephrased"
    answer: str = "answer"


@dataclass(frozen=True)
class Pair:
    id: str
    question: str  # x
    rephrased: str | None = None  # x'
    gold: str | None = None  # the true answer
    meta: dict[str, Any] = field(default_factory=dict)  # all other columns of its row

    def wording(self, view: str) -> str | None:
        return {"x": self.question, "x'": self.rephrased}[view]


def read_source(source: str, columns: Columns) -> list[Pair]:
    path = locate(source)
    files, rewrites = files_of(path) if path.is_dir() else ([path], [])
    pairs = read_pairs(files, columns)
    return joined(pairs, read_pairs(rewrites, columns), path) if rewrites else pairs


# ---------------------------------------------------------------- a source -> its files


def locate(source: str) -> Path:
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
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=pattern))
    except Exception as problem:  # the hub client's own errors, its HTTP library's, the system's
        raise UserError(f"{name} could not be had from huggingface.co ({type(problem).__name__}): {cure}") from problem


def files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """Find the files of a folder's training set, or else of its test set, and the file of their rewrites, if any."""
    for split in ("train", "test"):
        original = f"{split}_original.parquet"
        rewrites = sorted(folder.glob(f"{split}_rewrite_*.parquet"))
        if len(rewrites) > 1:
            raise UserError(f"{folder} holds {len(rewrites)} {split}_rewrite_*.parquet: leave one in it")
        for pattern in (original, f"{split}_pairs.parquet", f"{split}.*", f"data/{split}-*.parquet"):
            files = sorted(file for file in folder.glob(pattern) if file.suffix in READERS)
            if len({file.suffix for file in files}) > 1:
                raise UserError(f"{folder} holds {' and '.join(file.name for file in files)}: name the one to read")
            if files:
                return files, rewrites if pattern == original else []
    raise UserError(f"{folder} holds no train_original.parquet, train.* or test.*: name the file itself")


def joined(pairs: list[Pair], rewrites: list[Pair], folder: Path) -> list[Pair]:
    """Give each question its rewrite by id, never by row number: the published files have gaps."""
    rewrite_of = {rewrite.id: rewrite for rewrite in rewrites}
    whole = []
    for pair in pairs:
        rewrite = rewrite_of.get(pair.id, Pair("", ""))
        if pair.gold and rewrite.gold and pair.gold != rewrite.gold:
            raise UserError(f"{folder}: gold of question {pair.id} differs: its two files do not belong together")
        whole.append(replace(pair, rephrased=rewrite.question or None))
    return whole


# ---------------------------------------------------------------- a file -> its rows


def json_rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        # Lines become one array, and the parser names the line of an error. Not splitlines(): it also cuts at U+2028.
        text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
    return list(json.loads(text))


def parquet_rows(path: Path) -> list[Any]:
    return list(pq.read_table(path, partitioning=None).to_pylist())


READERS = {".jsonl": json_rows, ".json": json_rows, ".parquet": parquet_rows}


def read_rows(path: Path) -> list[Any]:
    if path.suffix not in READERS:
        raise UserError(f"{path} is of no known kind: give one of {', '.join(READERS)}")
    if not path.is_file():  # reading a pipe would wait for its writer
        raise UserError(f"{path} is a folder, a pipe or a device: give a regular file")
    try:
        rows = READERS[path.suffix](path)
    except (OSError, ValueError, OverflowError, RecursionError, pa.ArrowException) as problem:
        reason = str(problem).partition("\n")[0]
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from problem
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


# ---------------------------------------------------------------- rows -> pairs


def read_pairs(files: Sequence[Path], columns: Columns) -> list[Pair]:
    return to_pairs(list(chain.from_iterable(map(read_rows, files))), columns, str(files[0]))


def to_pairs(rows: Sequence[Any], columns: Columns, source: str) -> list[Pair]:
    cells_at = {}
    for number, row in enumerate(rows, 1):
        place = f"{source}, row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{place} is not a row of named columns")
        cells_at[place] = in_plain_columns(row, columns, place)
    available = sorted(set().union(*cells_at.values()))
    for role, name in columns._asdict().items():
        if name in available:
            continue
        if role == "question" or name != role:
            raise UserError(f"{source} has no column {name!r}: choose with --{role}-column from {', '.join(available)}")
        spelt = {column.lower(): column for column in available}
        for close in get_close_matches(name, spelt, n=1, cutoff=0.85):
            print(f"warning: {source}: column {spelt[close]!r} is ignored; rename it to {name!r} if it is that")
    answers = [cells.get(columns.answer) for cells in cells_at.values()]
    if missing := sum(answer != answer for answer in answers):
        print(f"warning: {source}: {missing:,} answers are NaN, and count as none")
    pairs: list[Pair] = []
    question_of: dict[str, str] = {}
    for place, cells in cells_at.items():
        pair = Pair(
            id=text_of(str(len(pairs) if cells.get("id") is None else cells["id"]), "id", place),
            question=text_of(cells.get(columns.question), columns.question, place),
            rephrased=text_of(cells.get(columns.rephrased), columns.rephrased, place) or None,
            gold=gold_of(cells.get(columns.answer), columns.answer, place),
            meta={name: value for name, value in cells.items() if name not in {"id", *columns}},
        )
        if question_of.setdefault(pair.id, pair.question) != pair.question:
            raise UserError(f"{place} repeats the id {pair.id!r} of another: make ids unique or leave them out")
        pairs.append(pair)
    return pairs


def in_plain_columns(cells: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    """Give a row of the authors' two layouts, or of SVAMP, the columns of a plain file; return others as they are."""
    if "original_question" in cells and columns.question not in cells:  # train_pairs.parquet of the hub
        name_of = dict(zip(("original_question", "rephrased_question", "solution"), columns, strict=True))
        return {name_of.get(name, name): value for name, value in cells.items()}
    if columns.question == "Question" and {"Body", "Question"} <= cells.keys():
        return cells | {"Question": svamp_question(cells)}
    if not ("prompt" in cells and isinstance(cells.get("reward_model"), dict)):
        return cells
    extra = cells.get("extra_info")
    if not isinstance(extra, dict) or extra.get("index") is None:
        raise UserError(f"{place} has no extra_info.index, by which questions and rewrites are joined")
    # Their data_source says MATH in every set.
    layout = {"prompt", "reward_model", "extra_info", "index", "data_source", "ability"}
    rest = {name: value for name, value in (cells | extra).items() if name not in layout}
    own = {"id": extra["index"], columns.question: cells["prompt"]}
    return rest | own | {columns.answer: cells["reward_model"].get("ground_truth")}


def svamp_question(cells: dict[str, Any]) -> str:
    """Join two columns of SVAMP: the story, often without its full stop, and the question."""
    return f"{str(cells['Body']).strip().removesuffix('.')}. {str(cells['Question']).strip()}"


def text_of(value: Any, column: str, place: str) -> str:
    """Return a cell's text, or what the user says in a chat; empty where nothing is said."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        value = next((turn.get("content") for turn in value if turn.get("role") == "user"), None)
    if value is None or value != value:  # NaN: a missing cell in pandas
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} must hold text, not {type(value).__name__}")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: column {column!r} holds half of a surrogate pair, which is no character")
    return value if value.strip() else ""


def gold_of(value: Any, column: str, place: str) -> str | None:
    """Return a gold answer as text, or None: a number, an answer alone in a list, or the end of a worked solution.

    A solution of GSM8K ends with `#### 1,234`, one of MATH has the answer in a box.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float) and value == value:
        value = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    _, mark, end = text_of(value, column, place).rpartition("####")
    return (end.strip().replace(",", "") if mark else extract_boxed(end) or end) or None
