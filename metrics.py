"""What one sees while it trains: the numbers of a step, its labels, a readable sample, and an alarm for collapse.

Label-free rewards cannot be trusted to show their own failure: under majority voting the reward goes to 1 while the
model agrees with itself on one wrong answer. Every number here is a mean over the step; gold answers, where there are
any, are only ever used for measuring.
"""

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import Any, TypeVar

import torch

from data import Pair, PromptedPair
from rewards import Group, Variant, View, Voter, are_equal
from store.files import Row

Item = TypeVar("Item")

# ---------------------------------------------------------------- time and memory


class Clock:
    """Seconds by phase: `clock.lap("rollout")` counts what has passed since the last lap as seconds_rollout."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def lap(self, phase: str, sync: float | None = None) -> None:
        """`sync`: of these seconds, those that it took to give an engine its weights, which are counted apart."""
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"] += now - self.last - (sync or 0.0)
        if sync is not None:
            self.seconds["seconds_sync"] += sync
        self.last = now


def peak_memory_gb(sleeping_bytes: int = 0) -> float:
    """Of the trainer on the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() - sleeping_bytes) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---------------------------------------------------------------- one step


def commonest_answer(groups: Sequence[Group]) -> float:
    """Share of the most frequent answer among all that are given, to whatever question."""
    given = Counter(answer for group in groups for answer in group.boxed if answer is not None)
    return max(given.values(), default=0) / max(given.total(), 1)


# One row a statistic of groups; each is logged of all, and by view and of the teacher where there are several.
STATISTICS: dict[str, Callable[[Sequence[Group]], float]] = {
    "response_tokens": lambda groups: fmean(tokens for group in groups for tokens in group.tokens),
    "truncated": lambda groups: fmean(not finished for group in groups for finished in group.finished),
    "answered": lambda groups: fmean(answer is not None for group in groups for answer in group.boxed),
    "vote_share": lambda groups: fmean(group.vote.share for group in groups),
    "distinct_answers": lambda groups: fmean(group.vote.distinct for group in groups),
    "commonest_answer": commonest_answer,
}


def step_metrics(
    variant: Variant,
    voted: Mapping[tuple[Voter, View], Sequence[Group]],
    groups: Sequence[Group],
    golds: Sequence[str | None],
    rewards: Sequence[Sequence[float]],
    labels: Sequence[Row],
) -> dict[str, float]:
    """Means over the policy's `groups` of a step; /x and /x' by view where there are two, /teacher for the teacher."""
    of_view = by_view(variant, groups)
    parts: dict[str, Sequence[Group]] = {"": groups}
    metrics = {"reward": fmean(r for group in rewards for r in group)}
    metrics["zero_std_groups"] = fmean(len(set(group)) == 1 for group in rewards)
    if len(of_view) > 1:
        parts |= {f"/{view}": part for view, part in of_view.items()}
        metrics |= {
            f"reward/{view}": fmean(r for group in part for r in group)
            for view, part in by_view(variant, rewards).items()
        }
    if variant.teacher_views:
        parts["/teacher"] = [group for view in variant.teacher_views for group in voted["teacher", view]]
    for suffix, part in parts.items():
        metrics |= {f"{name}{suffix}": statistic(part) for name, statistic in STATISTICS.items()}
    return metrics | label_metrics(labels) | gold_metrics(groups, golds, rewards)


def by_view(variant: Variant, items: Sequence[Item]) -> dict[View, Sequence[Item]]:
    size = len(items) // len(variant.policy_views)
    return {view: items[i * size : (i + 1) * size] for i, view in enumerate(variant.policy_views)}


def label_records(step: int, variant: Variant, questions: Sequence[PromptedPair], groups: Sequence[Group]) -> list[Row]:
    """Of each label by a vote: whether it is equivalent to the gold answer, where there is one (a missing label is
    not), and whether the policy's own vote on the same view agrees (under plain majority it does)."""
    of_views = by_view(variant, groups).items()
    asked = [(view, q.pair, group) for view, of_view in of_views for q, group in zip(questions, of_view, strict=True)]
    voted = [(view, pair, group) for view, pair, group in asked if group.label_vote is not None]
    right = are_equal([pair.gold for _, pair, _ in voted], [group.label for _, _, group in voted], "math")
    records = []
    for (view, pair, group), is_right in zip(voted, right, strict=True):
        record = {"step": step, "id": pair.id, "view": view, "label": group.label, "share": group.label_share}
        record |= {"agrees": group.vote.label == group.label}
        records.append(record | ({} if pair.gold is None else {"right": is_right}))
    return records


def label_metrics(labels: Sequence[Row]) -> dict[str, float]:
    """label_accuracy: share of labels that are right, of those whose gold answer is known. label_agreement: with the
    policy's own vote on the same view."""
    views = dict.fromkeys(label["view"] for label in labels)
    known = [label for label in labels if "right" in label]
    shares = {"label_agreement": [label["agrees"] for label in labels]}
    shares["label_accuracy"] = [label["right"] for label in known]
    for view in views if len(views) > 1 else ():
        shares[f"label_accuracy/{view}"] = [label["right"] for label in known if label["view"] == view]
    return {key: fmean(part) for key, part in shares.items() if part}


def gold_metrics(
    groups: Sequence[Group], golds: Sequence[str | None], rewards: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Where the gold answer is known: rollout_accuracy, the share of the policy's rollouts that are right, and for
    rewards of 0 or 1 reward_accuracy, the share of them that gold would have given alike."""
    known = [each for each in zip(cycle(golds), groups, rewards, strict=False) if each[0] is not None]
    answers = [answer for _, group, _ in known for answer in group.boxed]
    right = are_equal([gold for gold, group, _ in known for _ in group.boxed], answers, "math")
    paid = [reward for _, _, of_group in known for reward in of_group]
    metrics = {"rollout_accuracy": fmean(right)} if right else {}
    if right and set(paid) <= {0.0, 1.0}:
        metrics["reward_accuracy"] = fmean(r == float(is_right) for r, is_right in zip(paid, right, strict=True))
    return metrics


def readable_sample(
    step: int,
    variant: Variant,
    question: Pair,
    voted: Mapping[tuple[Voter, View], Sequence[Group]],
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float]],
) -> list[dict[str, Any]]:
    """The step's first question in each of the policy's views: for rollouts.jsonl, which tools/look.py shows."""
    sample = []
    rewards_of = by_view(variant, rewards)
    votes = {f"{who} on {view}": said[0].boxed for (who, view), said in voted.items()}
    for view, (group, *_) in by_view(variant, groups).items():
        voter, voted_view = variant.label_of.get(view, (None, None))
        row = {"step": step, "id": question.id, "view": view, "question": question.wording(view), "gold": question.gold}
        row |= {"label": group.label, "label_from": f"{voter} on {voted_view}" if voter else None}
        row |= {"label_share": group.label_share, "votes": votes, "answers": group.boxed}
        sample.append(row | {"rewards": rewards_of[view][0], "texts": group.texts})
    return sample


# ---------------------------------------------------------------- the alarm

WINDOW = 5  # steps that an alarm averages over
# One row a sign of collapse: its metric, and when its means over the first and the last steps are alarming.
SIGNS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "one answer to many questions": ("commonest_answer", lambda first, now: now > max(0.4, 1.5 * first)),
    "answers stop coming": ("answered", lambda first, now: now < first - 0.2),
    "responses run into the limit": ("truncated", lambda first, now: now > first + 0.2),
    "responses shrink": ("response_tokens", lambda first, now: now < 0.4 * first),
    "entropy explodes": ("entropy", lambda first, now: now > 3 * first + 0.1),
}


def first_step_signs(seen: dict[str, float]) -> dict[str, str]:
    """What the first step shows of a run that cannot work: {sign: what was seen, and a cure}."""
    signs = {}
    if seen["answered"] < 0.1:
        signs["no box"] = (
            f"{seen['answered']:.0%} of the answers are boxed, {seen['truncated']:.0%} are cut at the limit: "
            "raise --max-response-tokens, or show the form with --chat-template docs/two-examples.jinja"
        )
    if seen["zero_std_groups"] == 1:
        signs["no difference"] = "all rewards are equal in every group, so that nothing is learnt from this step"
    if "label_agreement" in seen and "label_accuracy" not in seen:
        signs["no gold"] = "no gold answers: whether labels are right is not known"
    return signs


def collapse_signs(history: Sequence[dict[str, float]]) -> dict[str, str]:
    """Signs that the policy games its reward, comparing the last steps with the first: {sign: what was seen}.

    Sharpening alone raises the vote share and lowers entropy in healthy runs too; what gives collapse away is the same
    answer to different questions, answers that stop coming, or a length or an entropy that leaves its range.
    """
    if len(history) < 2 * WINDOW:
        return {}
    seen = {}
    for sign, (key, is_alarming) in SIGNS.items():
        first, now = (fmean(m.get(key, 0.0) for m in part) for part in (history[:WINDOW], history[-WINDOW:]))
        if is_alarming(first, now):
            seen[sign] = f"{key} {first:.2f} -> {now:.2f}"
    return seen


def signs(history: Sequence[dict[str, float]], first: bool) -> dict[str, str]:
    """What is to be warned of after a step: of the `first` one what it shows at once, of all signs of collapse."""
    seen = first_step_signs(history[-1]) if first else {}
    if history[-1]["skipped_steps"]:
        seen["skipped"] = "its gradient is not finite, the weights stay as they were; lower --lr if it comes again"
    return seen | {sign: f"collapse? {sign} ({what})" for sign, what in collapse_signs(history).items()}
