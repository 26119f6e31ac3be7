"""Questions in two wordings, read and checked by sources/pairs.py: turned into prompts, ordered.

python data.py math                                             # what is in a set, and what was wrong with it
python data.py mine.jsonl --question-column problem --pairs 20
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

import tyro
from tyro.conf import Positional

from config import told_in_a_sentence
from lm.prompts import prompt_ids
from sources.files import Columns
from sources.pairs import Pair as Pair
from sources.pairs import Report, min_median_max
from sources.pairs import load_pairs as load_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True)
class PromptedPair:
    pair: Pair
    prompts: dict[str, list[int]]  # view, x or x' -> token ids


def prompt_pairs(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    *,
    views: Sequence[str] = ("x",),
    needs_gold: bool = False,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> list[PromptedPair]:
    """The pairs that a run on these views can use, with their prompts.

    Raises:
        UserError: no pair can be used, or the chat template cannot.
    """
    report = Report() if report is None else report
    paired = [pair for pair in pairs if all(pair.wording(view) for view in views)]
    cure = "make rephrasings with `python -m tools.rephrase`, or train a variant that needs none, such as II"
    pairs = report.usable(paired, pairs, "no rephrasing", cure)
    if needs_gold:
        labelled = [pair for pair in pairs if pair.gold]
        cure = "name the column of answers with --answer-column, or train a variant that needs none"
        pairs = report.usable(labelled, pairs, "no gold", cure)
    prompted = []
    for pair in pairs:
        how = template_options or {}
        ids = {view: prompt_ids(tokenizer, str(pair.wording(view)), chat_template, **how) for view in views}
        prompted.append(PromptedPair(pair, ids))
    report.tokens = {view: [len(each.prompts[view]) for each in prompted] for view in views}
    fitting = [each for each in prompted if max(map(len, each.prompts.values())) <= max_prompt_tokens]
    lengths = "; ".join(f"{view}: {min_median_max(each)}" for view, each in report.tokens.items())
    cure = f"no prompt fits --max-prompt-tokens {max_prompt_tokens} (tokens of {lengths})"
    return report.usable(fitting, prompted, "too long", cure)


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
    question_column: str = "question",
    rephrased_column: str = "rephrased",
    answer_column: str = "answer",
    keep_bad_rewrites: bool = False,
    pairs: int = 3,
) -> None:
    """Print what is in a set: rows and faults, gold answers, a few pairs."""
    report, columns = Report(), Columns(question_column, rephrased_column, answer_column)
    loaded = load_pairs(source, **columns._asdict(), keep_bad_rewrites=keep_bad_rewrites, report=report)
    print(report)
    print(f"  with a gold answer  {sum(pair.gold is not None for pair in loaded):,}")
    for pair in [loaded[i] for i in epoch_order(len(loaded), seed=0, epoch=0)[:pairs]]:
        print(f"--- {pair.id}, gold {pair.gold}", pair.question, pair.rephrased or "(no rephrasing)", sep="\n\n")


if __name__ == "__main__":
    with told_in_a_sentence():
        tyro.cli(show, description=__doc__)
