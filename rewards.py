"""Answers -> votes -> pseudo-labels -> rewards, and the table of variants (arXiv 2508.00410, Section 4).

A view is a wording of a question: x as written, x' rephrased. A group is the rollouts to one question in one view: V of
them vote, the first G are trained on. A reward is a function of one group that returns G numbers. A variant is a row of
VARIANTS: which views the policy and the teacher answer, whose vote labels which view, and what the KL term refers to.
The training loop reads these fields and knows no names; baselines.py has rows of other papers. Labels from another
view, or from a teacher that lags behind, are what keeps a policy from agreeing with itself on wrong answers.

Where this differs from the paper's code: a gold answer is compared by mathematical equivalence everywhere. Votes and
pseudo-labels compare strings, as that code does, unless match="math" is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal

from answers.equivalence import equivalent, equivalent_many, extract_boxed, vote_classes
from lm.record import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["equivalent", "extract_boxed"]  # part of the contract under this name, defined in answers/

Match = Literal["exact", "math"]
View = Literal["x", "x'"]
Voter = Literal["policy", "teacher", "gold"]
X: tuple[View, ...] = ("x",)
BOTH: tuple[View, ...] = ("x", "x'")


@dataclass(frozen=True)
class Vote:
    label: str | None  # the most frequent answer as first written; None if nobody answered
    share: float  # of the answers given, how many agree with the label
    distinct: int  # number of different answers
    answered: int  # number of rollouts with an answer
    counts: dict[str, int] = field(default_factory=dict, compare=False)  # of each answer, as first written
    rollouts: int = field(default=0, compare=False)  # that could vote, those without an answer included


@dataclass
class Group:
    """The rollouts to one question in one view, their vote and, once labelled, their label.

    No gold answer is in it: a reward sees one group, and so gold only where `label_groups` made it the label.
    """

    place: int  # of the question in the step
    question_id: str
    view: View
    rollouts: list[Rollout]  # G, which are trained on
    votes_only: list[Rollout]  # V - G, which only vote (--votes)
    vote: Vote  # of all V
    match: Match  # how answers are compared with each other and with the label
    label: str | None = None  # None: nobody voted, or the variant has no labels
    label_share: float = 0.0  # of the labelling vote's winner, even if `select_label` chose another; 1 for gold
    label_vote: Vote | None = None  # the vote that gave the label; None for a gold answer, or without labels

    @property
    def answers(self) -> list[str | None]:
        return [rollout.answer for rollout in self.rollouts]

    @property
    def sampled_tokens(self) -> int:
        return sum(len(rollout.response_ids) for rollout in self.rollouts + self.votes_only)


def rollouts_of(groups: Iterable[Group]) -> list[Rollout]:
    return list(chain.from_iterable(group.rollouts for group in groups))


def read_answers(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> None:
    """Give each rollout its text, and the answer in the text's last box."""
    texts = tokenizer.batch_decode([rollout.response_ids for rollout in rollouts], skip_special_tokens=True)
    for rollout, text in zip(rollouts, texts, strict=True):
        rollout.text = text
        rollout.answer = extract_boxed(text)


def majority_vote(answers: Sequence[str | None], match: Match = "exact") -> Vote:
    """Find the most frequent answer. Missing ones (None) do not vote; ties go to the answer that was seen first."""
    given = [answer for answer in answers if answer is not None]
    if not given:
        return Vote(label=None, share=0.0, distinct=0, answered=0, rollouts=len(answers))
    counts = Counter(vote_classes(given, match))
    label, count = counts.most_common(1)[0]  # of equals, the one that was counted first
    return Vote(label, count / len(given), len(counts), len(given), dict(counts), len(answers))


def vote_of(rollouts: Sequence[Rollout], match: Match) -> Vote:
    return majority_vote([rollout.answer for rollout in rollouts], match)


def matches(labels: Sequence[str | None], answers: Sequence[str | None], match: Match) -> list[bool]:
    """Compare each answer with its label; one that is missing on either side does not match."""
    pairs = list(zip(labels, answers, strict=True))
    if match == "exact":
        return [label is not None and label == answer for label, answer in pairs]
    return equivalent_many(pairs)


def agreement(group: Group) -> list[float]:
    """Pay 1 for an answer that matches the group's label, else 0; without a label, 0 (Eqs. 7-10)."""
    labels = [group.label] * len(group.rollouts)
    return [float(same) for same in matches(labels, group.answers, group.match)]


def negative_entropy(group: Group) -> list[float]:
    """Pay minus the mean token entropy of the policy (RENT, arXiv 2505.22660)."""
    return [-rollout.token_stats["entropy"] for rollout in group.rollouts]


def self_certainty(group: Group) -> list[float]:
    """Pay the mean over tokens of logsumexp(z) - mean(z) of their logits z (Intuitor, arXiv 2505.19590).

    That is KL(uniform || policy) plus a constant, the logarithm of the vocabulary's size.
    """
    return [rollout.token_stats["self_certainty"] for rollout in group.rollouts]


@dataclass(frozen=True)
class Variant:
    """A row of the table below; `label_of` is empty where the reward needs no labels."""

    policy_views: tuple[View, ...]  # what the policy answers and is trained on
    teacher_views: tuple[View, ...]  # what the teacher answers
    label_of: dict[View, tuple[Voter, View]]  # whose vote, on which view, labels the policy's rollouts in this view
    kl_reference: Literal["init", "ema"]  # the frozen initial policy, or the moving teacher
    kl_coef: float
    reward: Callable[[Group], list[float]] = agreement
    needs_token_stats: bool = False  # the reward reads the policy's entropy or self-certainty of each rollout
    select_label: Callable[[Group], str | None] | None = None  # None: the winner of the vote that labels
    fixed_advantages: bool = False  # rewards are the advantages as they are, not normalised within their group
    semi_supervised: bool = False  # where a question has a gold answer, that is the label instead of the vote's

    def __post_init__(self) -> None:
        """Refuse a row with a label by a vote that nobody casts, or without one label for each view."""
        answers = {"policy": self.policy_views, "teacher": self.teacher_views}
        for voter, view in self.label_of.values():
            if voter != "gold" and view not in answers[voter]:
                raise ValueError(
                    f"a label by the {voter}'s vote on {view}, which it does not answer: see {voter}_views"
                )
        needs_labels = bool(self.label_of) or self.reward is agreement
        if needs_labels and self.label_of.keys() != set(self.policy_views):
            raise ValueError(f"labels for {sorted(self.label_of)}, while the policy answers {self.policy_views}")

    @property
    def has_teacher(self) -> bool:
        return bool(self.teacher_views) or (self.kl_coef > 0 and self.kl_reference == "ema")

    @property
    def has_frozen_reference(self) -> bool:
        return self.kl_coef > 0 and self.kl_reference == "init"


# fmt: off
VARIANTS: dict[str, Variant] = {
    #                  policy answers, teacher answers, {view: whose vote on which view labels it}, KL term to, weight
    "I":              Variant(BOTH, (),   {"x": ("policy", "x'"), "x'": ("policy", "x")},   "init", 0.005),
    "II":             Variant(X,    X,    {"x": ("teacher", "x")},                          "ema",  0.001),
    "III":            Variant(BOTH, BOTH, {"x": ("teacher", "x'"), "x'": ("teacher", "x")}, "ema",  0.001),
    "gt":             Variant(X,    (),   {"x": ("gold", "x")},                             "init", 0.005),
    "majority":       Variant(X,    (),   {"x": ("policy", "x")},                           "init", 0.005),
    "self-certainty": Variant(X,    (),   {}, "init", 0.005, self_certainty,   needs_token_stats=True),
    "entropy":        Variant(X,    (),   {}, "init", 0.005, negative_entropy, needs_token_stats=True),
}
# fmt: on


def label_groups(
    variant: Variant, groups: Sequence[Group], teacher_groups: Sequence[Group], gold_answers: Sequence[str | None]
) -> None:
    """Give each of the policy's groups its label, as the variant says: the one place where labels come from.

    A gold answer (one for each question of the step) is a label only where the variant says so, and is then compared
    as mathematics.
    """
    votes = {("policy", group.view, group.place): group.vote for group in groups}
    votes |= {("teacher", group.view, group.place): group.vote for group in teacher_groups}
    for group in groups:
        voter, view = variant.label_of.get(group.view, (None, group.view))
        gold = gold_answers[group.place]
        if voter == "gold" or (variant.semi_supervised and gold is not None):
            group.label = gold
            group.label_share = float(gold is not None)
            group.match = "math"
        elif voter is not None:
            group.label_vote = votes[voter, view, group.place]
            group.label_share = group.label_vote.share
            group.label = variant.select_label(group) if variant.select_label else group.label_vote.label
