"""Questions in two wordings, read and checked by sources/pairs.py: turned into prompts, ordered.

python data.py math                                             # what is in a set, and what was wrong with it
python data.py mine.jsonl --question-column problem --pairs 20
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import tyro
from tyro.conf import Positional

from config import exit_on_user_error
from sources.pairs import Pair as Pair
from sources.pairs import Report
from sources.pairs import load_pairs as load_pairs


@dataclass(frozen=True)
class PromptedPair:
    pair: Pair
    prompts: dict[str, list[int]]  # view, x or x' -> token ids


def tokenize_pairs(
    pairs: list[Pair],
    encode: Callable[[str], list[int]],
    max_prompt_tokens: int,
    views: Sequence[str] = ("x",),
    needs_gold: bool = False,
    report: Report | None = None,
) -> list[PromptedPair]:
    """Turn the pairs that a run on these views can use into prompts; `encode` makes a question's tokens.

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
    prompted = [PromptedPair(pair, {view: encode(str(pair.wording(view))) for view in views}) for pair in pairs]
    tokens = [max(map(len, each.prompts.values())) for each in prompted]
    fitting = [each for each, length in zip(prompted, tokens, strict=True) if length <= max_prompt_tokens]
    cure = f"no prompt fits --max-prompt-tokens {max_prompt_tokens}: the shortest has {min(tokens):,}"
    return report.usable(fitting, prompted, "too long", cure)


# ---------------------------------------------------------------- order


@lru_cache(maxsize=4)
def epoch_order(questions: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Permute range(questions): question i goes where the hash of (seed, epoch, i) puts it.

    A hash, because neither numpy nor `random` promises the same shuffle in its next version.
    """
    places = [blake2b(f"{seed}/{epoch}/{i}".encode(), digest_size=8).digest() for i in range(questions)]
    return tuple(sorted(range(questions), key=places.__getitem__))


def steps_per_epoch(questions: int, per_step: int) -> int:
    return math.ceil(questions / per_step)


def questions_of_step(questions: Sequence[PromptedPair], per_step: int, seed: int, step: int) -> list[PromptedPair]:
    """Return the questions of step 0, 1, ...: each once an epoch, in steps that differ in size by at most one."""
    count = len(questions)
    steps = steps_per_epoch(count, per_step)
    epoch, k = divmod(step, steps)
    order = epoch_order(count, seed, epoch)
    return [questions[i] for i in order[k * count // steps : (k + 1) * count // steps]]


# ---------------------------------------------------------------- command line


def show(
    source: Positional[str],
    question_column: str = "question",
    rephrased_column: str = "rephrased",
    answer_column: str = "answer",
    pairs: int = 3,
) -> None:
    report = Report()
    loaded = load_pairs(
        source, question=question_column, rephrased=rephrased_column, answer=answer_column, report=report
    )
    print(report)
    for pair in loaded[:pairs]:
        print(f"--- {pair.id}, gold {pair.gold}", pair.question, pair.rephrased or "(no rephrasing)", sep="\n\n")


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(show, description=__doc__)
