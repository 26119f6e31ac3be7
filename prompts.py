"""What a run asks: the pairs as prompts, and which of them each step asks.

The prompt is the authors': a system message, then the bare question, for base models too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from data import DataError, Pair, Report, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPT = "Let's think step by step and output the final answer within \\boxed{}."


@dataclass(frozen=True)
class PromptedPair:
    pair: Pair
    prompts: dict[str, list[int]]  # view, x or x' -> token ids


# ---------------------------------------------------------------- one question -> token ids


def read_chat_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise DataError(f"the chat template {path} cannot be read: {problem}") from problem


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str, chat_template: str | None = None) -> str:
    name, cure = tokenizer.name_or_path, "give one with --chat-template FILE.jinja"
    if not (chat_template or tokenizer.chat_template):
        raise DataError(f"the tokenizer of {name} has no chat template: {cure}")
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
    raise DataError(f"the chat template of {name} cannot be used ({complaint}): {cure}")


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
        raise DataError(f"no prompt fits --max-prompt-tokens {max_prompt_tokens} (tokens of {spreads})")
    return fitting


def unless_none_left(usable: list[Pair], pairs: list[Pair], reason: str, cure: str, report: Report) -> list[Pair]:
    report.dropped[reason] = len(pairs) - len(usable)
    if not usable:
        raise DataError(f"none of {len(pairs):,} questions can be used ({reason}): {cure}")
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


def questions_of_step(questions: int, per_step: int, seed: int, step: int) -> list[int]:
    """Which questions step 0, 1, ... asks: each exactly once an epoch, in steps that differ in size by at most one."""
    steps = steps_per_epoch(questions, per_step)
    epoch, k = divmod(step, steps)
    return list(epoch_order(questions, seed, epoch)[k * questions // steps : (k + 1) * questions // steps])
