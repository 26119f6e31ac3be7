"""`python data.py show SOURCE`: what is in a set, and what was wrong with it."""

import shutil
import textwrap
from collections import Counter
from itertools import zip_longest

from tyro.conf import Positional

from data import DataError, Pair, Report, load_pairs, spread
from prompts import epoch_order, prompt_pairs, read_chat_template


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
        raise DataError(f"no tokenizer at {name} ({str(problem).splitlines()[0]}): {cure}") from problem
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
