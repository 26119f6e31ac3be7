"""Questions in two wordings: read, check, pair.

A Pair is a question x, its rephrasing x' if there is one (other words, same answer) and its gold answer if there is
one. Gold never decides which pairs are kept: a set trains the same with and without it.

    python data.py show math                                        # what is in a set, and what was wrong with it
    python data.py show mine.jsonl --question-column problem --tokenizer Qwen/Qwen3-8B-Base
    python data.py check --train dapo --eval math500 math                                   # see contamination.py
    python data.py rephrase --data mine.jsonl --model Qwen3-32B --out pairs.jsonl           # see rephrase.py

A source is a folder as the authors of Co-rewarding publish theirs (train_original.parquet, train_rewrite_*.parquet),
one's own .jsonl, .json, .parquet or .csv, or a name: embedded, math, dapo, open-rs, amc.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from jinja2 import TemplateError
from tyro.conf import Positional

from config import SYSTEM_PROMPT, UserError
from embedded.word_problems import Split, word_problems
from sources.benchmarks import SOURCES, Files, find_files
from sources.faults import rewrite_fault
from sources.overlap import overlaps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# name: (folder in the authors' repository, data set on the Hugging Face hub)
PUBLISHED = {
    "math": ("math", "TMLR-Group-HF/Co-rewarding-RephrasedMATH"),
    "dapo": ("dapo", "TMLR-Group-HF/Co-rewarding-RephrasedDAPO-14k"),
    "open-rs": ("open-rs", "TMLR-Group-HF/Co-rewarding-RephrasedOpenRS"),
    "amc": ("AMC-TTT", None),
}
EMBEDDED: dict[str, Split] = {"embedded": "train", "embedded:held-out": "held-out"}

# Everything that can be wrong with a row, and what becomes of it.
CONSEQUENCES = {
    "empty question": "row dropped",
    "duplicate": "row dropped, one of each stays",
    "conflicting gold": "gold dropped: equal questions, unequal answers",
    "broken \\frac": "repaired: a form feed stood for the \\f",
    "unchanged": "rephrasing dropped: a copy of the question",
    "placeholder": "rephrasing dropped: the rewriter echoed its template",
    "answer leaked": "rephrasing dropped: it states an answer",
    "figure lost": "rephrasing dropped: it needs the [asy] figure that it left out",
    "no rephrasing": "pair dropped: this run needs both wordings",
    "no gold": "pair dropped: this run needs the answer",
    "too long": "pair dropped: a prompt is over the limit",
    "in a benchmark": "pair dropped: --decontaminate found its question there",
}


@dataclass(frozen=True)
class Pair:
    id: str
    question: str
    rephrased: str | None = None
    gold: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # all other columns of its row

    def wording(self, view: str) -> str | None:
        return {"x": self.question, "x'": self.rephrased}[view]


class Columns(NamedTuple):
    question: str = "question"
    rephrased: str = "rephrased"
    answer: str = "answer"


@dataclass
class Report:
    """What became of a set's rows; filled in while they are read, checked and tokenised."""

    source: str = ""
    rows: int = 0
    questions: int = 0
    paired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, list[int]] = field(default_factory=dict)  # view -> lengths, too long prompts included

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows:,} rows read, {self.questions:,} questions, {self.paired:,} pairs"]
        for reason, consequence in CONSEQUENCES.items():
            if self.dropped[reason]:
                lines.append(f"{self.dropped[reason]:>8,}  {reason:<17} {consequence}")
        for view, lengths in self.tokens.items():
            lines.append(f"  prompt tokens of {view:<2}  {spread(lengths)}")
        return "\n".join(lines)


def spread(lengths: Sequence[int]) -> str:
    return f"min {min(lengths):,}, median {statistics.median_low(lengths):,}, max {max(lengths):,}"


def load_pairs(
    source: str,
    *,
    question: str = "question",
    rephrased: str = "rephrased",
    answer: str = "answer",
    keep_bad_rewrites: bool = False,
    report: Report | None = None,
) -> list[Pair]:
    """All questions of a source, read from these columns; a bad rephrasing is taken off its question, which stays.

    `keep_bad_rewrites` leaves rows as published: not checked, not repaired, duplicates and all.

    Raises:
        UserError: nothing there, nothing readable, or no question in it.
    """
    report = Report() if report is None else report
    report.source, columns = source, Columns(question, rephrased, answer)
    if source in EMBEDDED:
        pairs = to_pairs([(source, row) for row in word_problems(EMBEDDED[source])], Columns(), source)
    elif (path := find(source)).is_dir():
        pairs = from_folder(path, columns)
    else:
        pairs = from_files([path], columns)
    report.rows = len(pairs)
    pairs = [pair for pair in pairs if pair.question.strip()]
    report.dropped["empty question"] = report.rows - len(pairs)
    if not pairs:
        raise UserError(f"{source}: every question is empty")
    if not keep_bad_rewrites:
        pairs = without_duplicates([checked(pair, report) for pair in pairs], report)
    report.questions = len(pairs)
    report.paired = sum(pair.rephrased is not None for pair in pairs)
    return pairs


# ---------------------------------------------------------------- a source -> its files


def find(source: str) -> Path:
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
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_name, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as problem:  # the hub client's own errors, its HTTP library's, the system's
        raise UserError(f"{hub_name} was not downloaded ({type(problem).__name__}): {cure}") from problem


def from_files(files: Sequence[Path], columns: Columns) -> list[Pair]:
    return to_pairs([row for file in files for row in read_rows(file)], columns, files[0])


def from_folder(folder: Path, columns: Columns) -> list[Pair]:
    """Its training set, or else its test set: two files to join, or all files of the first pattern that has any."""
    for split in ("train", "test"):
        original = folder / f"{split}_original.parquet"
        rewrites = sorted(folder.glob(f"{split}_rewrite_*.parquet"))
        if len(rewrites) > 1:
            raise UserError(f"{folder} holds {len(rewrites)} {split}_rewrite_*.parquet: leave one in it")
        if original.exists() and rewrites:
            return joined(from_files([original], columns), from_files(rewrites, columns), folder)
        for pattern in (original.name, f"{split}_pairs.parquet", f"{split}.*", f"data/{split}-*.parquet"):
            files = [file for file in sorted(folder.glob(pattern)) if file.suffix in READERS]
            if len({file.suffix for file in files}) > 1:
                raise UserError(f"{folder} holds {' and '.join(file.name for file in files)}: name the one to read")
            if files:
                return from_files(files, columns)
    raise UserError(f"{folder} holds no train_original.parquet, train.* or test.*: name the file itself")


def joined(originals: list[Pair], rewrites: list[Pair], folder: Path) -> list[Pair]:
    """By id, never by row number: the published files have gaps."""
    rewrite_of = {rewrite.id: rewrite for rewrite in rewrites}
    pairs = []
    for pair in originals:
        rewrite = rewrite_of.get(pair.id)
        if rewrite and rewrite.gold and pair.gold and rewrite.gold != pair.gold:
            golds = f"the answer {pair.gold!r} and in its rewrite {rewrite.gold!r}"
            raise UserError(f"{folder}: question {pair.id} has {golds}; these files do not belong together")
        pairs.append(replace(pair, rephrased=unless_blank(rewrite.question)) if rewrite else pair)
    return pairs


# ---------------------------------------------------------------- files -> rows

Row = tuple[str, dict[str, Any]]  # where it stands ("mine.jsonl, line 3"), what it holds


def json_rows(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return [(f"{path}, entry {number}", row) for number, row in enumerate(json.loads(text), 1)]
    rows = []
    # Not splitlines(): it also cuts at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append((f"{path}, line {number}", json.loads(line)))
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"line {number}: {problem}") from problem
    return rows


def csv_rows(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell over 131,072 characters
    text = path.read_text(encoding="utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if twice := [name for name, count in Counter(reader.fieldnames).items() if count > 1]:
        raise ValueError(f"two columns are called {twice[0]!r}")
    return [(f"{path}, line {reader.line_num}", row) for row in reader]


def parquet_rows(path: Path) -> list[Row]:
    rows = pq.read_table(path, partitioning=None).to_pylist()
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows)]


READERS = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}


def read_rows(path: Path) -> list[Row]:
    if path.suffix not in READERS:
        raise UserError(f"{path} is of no known kind: give one of {', '.join(READERS)}")
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


# ---------------------------------------------------------------- rows -> pairs


def to_pairs(rows: list[Row], columns: Columns, source: str | Path) -> list[Pair]:
    rows = [(place, in_plain_columns(row, columns, place)) for place, row in rows]
    available = sorted({name for _, row in rows for name in row})
    for role, name in columns._asdict().items():
        if name not in available and (role == "question" or name != role):
            cure = f"choose with --{role}-column from {', '.join(available)}"
            raise UserError(f"{source} has no column {name!r}: {cure}")
    pairs, earlier = [], dict[str, tuple[str, str]]()
    for number, (place, row) in enumerate(rows):
        pair = Pair(
            id=text_of(str(number if row.get("id") is None else row["id"]), "id", place),
            question=text_of(row.get(columns.question), columns.question, place),
            rephrased=unless_blank(text_of(row.get(columns.rephrased), columns.rephrased, place)),
            gold=gold_of(row.get(columns.answer), columns.answer, place),
            meta={name: value for name, value in row.items() if name not in {"id", *columns}},
        )
        first_place, first_question = earlier.setdefault(pair.id, (place, pair.question))
        if first_question != pair.question:
            cure = "make ids unique or leave them out"
            raise UserError(f"{place} repeats the id {pair.id!r} of {first_place}: {cure}")
        pairs.append(pair)
    return pairs


def in_plain_columns(row: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    """A row of the authors' two layouts under the column names of a plain file; any other row as it is."""
    if "original_question" in row and columns.question not in row:  # train_pairs.parquet of the hub
        theirs = ("original_question", "rephrased_question", "solution")
        name_of = dict(zip(theirs, columns, strict=True))
        return {name_of.get(name, name): value for name, value in row.items()}
    if not ("prompt" in row and isinstance(row.get("reward_model"), dict)):
        return row
    extra = row.get("extra_info")
    if not isinstance(extra, dict) or extra.get("index") is None:
        raise UserError(f"{place} has no extra_info.index, by which questions and rewrites are joined")
    # Their data_source says MATH in every set.
    layout = {"prompt", "reward_model", "extra_info", "index", "data_source", "ability"}
    rest = {name: value for name, value in (row | extra).items() if name not in layout}
    gold = row["reward_model"].get("ground_truth")
    return rest | {"id": extra["index"], columns.question: row["prompt"], columns.answer: gold}


def text_of(value: Any, column: str, place: str) -> str:
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        value = next((turn.get("content") for turn in value if turn.get("role") == "user"), None)
    if value is None or value != value:  # NaN: a missing cell in pandas
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} holds a {type(value).__name__}, not text")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: column {column!r} holds half of a surrogate pair, which is no character")
    return value


def gold_of(value: Any, column: str, place: str) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and value == value:
        value = str(value)
    text = text_of(value, column, place)
    if "####" in text:  # GSM8K: a worked solution, then "#### 1,234"
        text = text.rpartition("####")[2].strip().replace(",", "")
    return unless_blank(text)


def unless_blank(text: str) -> str | None:
    return text if text.strip() else None


# ---------------------------------------------------------------- checks


def checked(pair: Pair, report: Report) -> Pair:
    # DAPO's other form feeds stand for a lost "fi" or for nothing at all, which cannot be told apart: they stay.
    question = pair.question.replace("\frac{", "\\frac{")
    rephrased = pair.rephrased and pair.rephrased.replace("\frac{", "\\frac{")
    report.dropped["broken \\frac"] += (question, rephrased) != (pair.question, pair.rephrased)
    fault = rewrite_fault(question, rephrased) if rephrased else None
    if fault:
        report.dropped[fault] += 1
    return replace(pair, question=question, rephrased=None if fault else rephrased)


def without_duplicates(pairs: list[Pair], report: Report) -> list[Pair]:
    """One of each question, preferably one with a rephrasing; its gold only if all copies agree."""
    copies = defaultdict(list)
    for pair in pairs:
        copies[pair.question].append(pair)
    unique = []
    for group in copies.values():
        kept = next((pair for pair in group if pair.rephrased), group[0])
        golds = {pair.gold for pair in group if pair.gold}
        report.dropped["duplicate"] += len(group) - 1
        report.dropped["conflicting gold"] += len(golds) > 1
        unique.append(replace(kept, gold=golds.pop() if len(golds) == 1 else None))
    return unique


def without_overlap(pairs: list[Pair], benchmarks: Sequence[Benchmark], report: Report) -> list[Pair]:
    """The pairs whose question is in none of the benchmarks; it is an error if no pair is left."""
    asked = [pair.question for benchmark in benchmarks for pair in benchmark.pairs]
    found = {overlap.trained for overlap in overlaps([pair.question for pair in pairs], asked)}
    report.dropped["in a benchmark"] += len(found)
    if len(found) == len(pairs):
        names = " ".join(benchmark.name for benchmark in benchmarks)
        raise UserError(f"--decontaminate {names} leaves no training question: it is the training set itself")
    return [pair for i, pair in enumerate(pairs) if i not in found]


# ---------------------------------------------------------------- benchmarks


@dataclass(frozen=True)
class Benchmark:
    name: str
    pairs: list[Pair]  # each with a gold answer
    read: Callable[[str], str] = str.strip  # what a boxed answer says; golds have been read already
    match: Literal["exact", "math"] = "math"  # how two read answers are compared


def load_benchmark(
    name: str, data_dir: str = "data", question_column: str = "question", answer_column: str = "answer"
) -> Benchmark:
    """A benchmark by its name in SOURCES, or any source of data.py; the columns are those of one's own file."""
    source = SOURCES.get(name)
    if source:
        files, columns = find_files(name, source, Path(data_dir))
    elif name in {*EMBEDDED, *PUBLISHED} or Path(name).exists():
        files, columns = [name], Files(name, question_column, answer_column)
    else:
        raise UserError(f"{name} is no file, no folder and no benchmark: choose from {', '.join(SOURCES)}")
    pairs: list[Pair] = []
    for file in files:
        pairs += load_pairs(file, question=columns.question, answer=columns.answer, keep_bad_rewrites=True)
    if missing := sum(pair.gold is None for pair in pairs):
        cure = "take them out, or name the column of answers with --answer-column"
        raise UserError(f"{name}: {missing:,} of {len(pairs):,} questions have no gold answer: {cure}")
    if not source:
        return Benchmark(Path(name).stem.replace(":", "-"), pairs)
    pairs = [
        replace(pair, question=source.ask(pair.question, pair.meta), gold=source.read(str(pair.gold))) for pair in pairs
    ]
    return Benchmark(name, pairs, source.read, source.match)


# ---------------------------------------------------------------- prompts and their order


@dataclass(frozen=True)
class PromptedPair:
    pair: Pair
    prompts: dict[str, list[int]]  # view, x or x' -> token ids


# ---------------------------------------------------------------- one question -> token ids


def read_chat_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise UserError(f"the chat template {path} cannot be read: {problem}") from problem


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str, chat_template: str | None = None) -> str:
    name, cure = tokenizer.name_or_path, "give one with --chat-template FILE.jinja"
    if not (chat_template or tokenizer.chat_template):
        raise UserError(f"the tokenizer of {name} has no chat template: {cure}")
    complaint = "it leaves out the question"
    for messages in (
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}],
        # Gemma's template refuses a system message, others pass over it without a word.
        [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{question}"}],
    ):
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=chat_template, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, ValueError) as problem:
            complaint = str(problem)
            continue
        if SYSTEM_PROMPT in text and question.strip() in text:
            return str(text)
    raise UserError(f"the chat template of {name} cannot be used ({complaint}): {cure}")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, chat_template: str | None = None) -> list[int]:
    text = prompt_text(tokenizer, question, chat_template)
    # A template writes the BOS itself: a tokenizer left to add its special tokens would double it.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---------------------------------------------------------------- a set -> prompts


def prompt_pairs(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    *,
    views: Sequence[str] = ("x",),
    needs_gold: bool = False,
    chat_template: str | None = None,
    report: Report | None = None,
) -> list[PromptedPair]:
    """The pairs that a run on these views can use, with their prompts."""
    report = Report() if report is None else report
    paired = [pair for pair in pairs if all(pair.wording(view) for view in views)]
    cure = "make rephrasings with `python data.py rephrase`, or train a variant that needs none, such as II"
    pairs = unless_none_left(paired, pairs, "no rephrasing", cure, report)
    if needs_gold:
        labelled = [pair for pair in pairs if pair.gold]
        cure = "name the column of answers with --answer-column, or train a variant that needs none"
        pairs = unless_none_left(labelled, pairs, "no gold", cure, report)
    prompted = []
    for pair in pairs:
        prompts = {view: prompt_ids(tokenizer, str(pair.wording(view)), chat_template) for view in views}
        prompted.append(PromptedPair(pair, prompts))
    report.tokens = {view: [len(each.prompts[view]) for each in prompted] for view in views}
    fitting = [each for each in prompted if max(map(len, each.prompts.values())) <= max_prompt_tokens]
    report.dropped["too long"] = len(prompted) - len(fitting)
    if not fitting:
        spreads = "; ".join(f"{view}: {spread(lengths)}" for view, lengths in report.tokens.items())
        raise UserError(f"no prompt fits --max-prompt-tokens {max_prompt_tokens} (tokens of {spreads})")
    return fitting


def unless_none_left(usable: list[Pair], pairs: list[Pair], reason: str, cure: str, report: Report) -> list[Pair]:
    report.dropped[reason] = len(pairs) - len(usable)
    if not usable:
        raise UserError(f"none of {len(pairs):,} questions can be used ({reason}): {cure}")
    return usable


# ---------------------------------------------------------------- order


@lru_cache(maxsize=4)
def epoch_order(questions: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of range(questions): question i goes where the hash of (seed, epoch, i) puts it.

    A hash, because neither numpy nor `random` promises the same shuffle in its next version.
    """
    places = [blake2b(f"{seed}/{epoch}/{i}".encode(), digest_size=8).digest() for i in range(questions)]
    return tuple(sorted(range(questions), key=places.__getitem__))


def steps_per_epoch(questions: int, per_step: int) -> int:
    return math.ceil(questions / per_step)


def questions_of_step(questions: Sequence[T], per_step: int, seed: int, step: int) -> list[T]:
    """Those that step 0, 1, ... asks: each exactly once an epoch, in steps that differ in size by at most one."""
    count, steps = len(questions), steps_per_epoch(len(questions), per_step)
    epoch, k = divmod(step, steps)
    return [questions[i] for i in epoch_order(count, seed, epoch)[k * count // steps : (k + 1) * count // steps]]


# ---------------------------------------------------------------- command line


def show(
    source: Positional[str],
    tokenizer: str | None = None,
    chat_template: str | None = None,
    max_prompt_tokens: int = 512,
    question_column: str = "question",
    rephrased_column: str = "rephrased",
    answer_column: str = "answer",
    keep_bad_rewrites: bool = False,
    pairs: int = 3,
) -> None:
    """Print what is in a set: rows and faults, lengths, levels, a few pairs side by side."""
    report = Report()
    loaded = load_pairs(
        source,
        question=question_column,
        rephrased=rephrased_column,
        answer=answer_column,
        keep_bad_rewrites=keep_bad_rewrites,
        report=report,
    )
    if tokenizer:
        count_tokens(loaded, tokenizer, chat_template, max_prompt_tokens, report)
    print(report)
    print(f"  characters of x   {spread([len(pair.question) for pair in loaded])}")
    if report.paired:
        print(f"  characters of x'  {spread([len(pair.rephrased) for pair in loaded if pair.rephrased])}")
    print(f"  with a gold answer  {sum(pair.gold is not None for pair in loaded):,}")
    for key in ("level", "type", "split", "source"):
        if counts := Counter(str(pair.meta[key]) for pair in loaded if key in pair.meta):
            print(f"  {key}: " + ", ".join(f"{value} {count:,}" for value, count in sorted(counts.items())))
    for i in epoch_order(len(loaded), seed=0, epoch=0)[:pairs]:
        print(side_by_side(loaded[i]))


def count_tokens(pairs: list[Pair], name: str, chat_template: str | None, limit: int, report: Report) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as problem:
        cure = "give a folder, or OWNER/NAME on the Hugging Face hub"
        raise UserError(f"no tokenizer at {name} ({str(problem).splitlines()[0]}): {cure}") from problem
    template = read_chat_template(chat_template) if chat_template else None
    views = ("x", "x'") if report.paired else ("x",)
    prompt_pairs(pairs, tokenizer, limit, views=views, chat_template=template, report=report)


def side_by_side(pair: Pair) -> str:
    width = shutil.get_terminal_size((120, 24)).columns // 2 - 2
    columns = [
        [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
        for text in (pair.question, pair.rephrased or "(no rephrasing)")
    ]
    lines = [f"{left:<{width}} | {right}" for left, right in zip_longest(*columns, fillvalue="")]
    return "\n".join([f"--- {pair.id}, gold {pair.gold}", *lines])


def main() -> None:
    try:
        tyro.cli(show, description=__doc__)
    except UserError as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
