"""Votes, pseudo-labels, rewards, and the table of variants (arXiv 2508.00410, Section 4): pure functions.

A view is one wording of a question: x as written, x' rephrased. A group is the G rollouts on one view of one question.
Every variant is a row of VARIANTS: which views the policy and the teacher answer, whose vote labels which view, and
what the KL term anchors to. The training loop knows rows, not names; baselines.py has rows of other papers. Labels from
another view, or from a teacher that lags behind, are what keeps a policy from agreeing with itself on wrong answers.

Where this differs from the paper's code: a gold answer is compared by mathematical equivalence everywhere; votes and
pseudo-labels compare raw strings as in that code, unless match="math" is asked for.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from answers.equivalence import equivalent, equivalent_many, extract_boxed, vote_classes

__all__ = ["equivalent", "extract_boxed"]  # part of the contract under this name, defined in answers/

Match = Literal["exact", "math"]
View = Literal["x", "x'"]
Voter = Literal["policy", "teacher", "gold"]
X: tuple[View, ...] = ("x",)
BOTH: tuple[View, ...] = ("x", "x'")
VIEWS: dict[str, tuple[View, ...]] = {"original": X, "rephrased": ("x'",), "both": BOTH}


@dataclass(frozen=True)
class Vote:
    """The outcome of a majority vote over one group's answers."""

    label: str | None  # the most frequent answer as first written; None if nobody answered
    share: float  # of the answers given, how many agree with the label
    distinct: int  # number of different answers
    answered: int  # number of rollouts with an answer
    counts: dict[str, int] = field(default_factory=dict, compare=False)  # of each answer, as first written
    rollouts: int = field(default=0, compare=False)  # that could vote, those without an answer included


def majority_vote(answers: Sequence[str | None], match: Match = "exact") -> Vote:
    """The most frequent answer; missing ones (None) do not vote, and ties go to the answer that was seen first."""
    given = [answer for answer in answers if answer is not None]
    if not given:
        return Vote(label=None, share=0.0, distinct=0, answered=0, rollouts=len(answers))
    counts = Counter(vote_classes(given, match))
    label, count = counts.most_common(1)[0]  # of equals, the one that was counted first
    return Vote(label, count / len(given), len(counts), len(given), dict(counts), len(answers))


class Response(NamedTuple):
    """What one rollout says."""

    text: str
    tokens: int  # the stop token included
    finished: bool  # by itself; False: cut at the limit


@dataclass(frozen=True)
class Group:
    """G rollouts on one view of one question: what they say, how they vote and, once labelled, what they should say.
    With `--votes` more than these G have voted."""

    texts: list[str]
    boxed: list[str | None]
    tokens: list[int]
    finished: list[bool]
    vote: Vote  # of these rollouts themselves, and of those beside them that only vote
    match: Match  # how answers are compared with each other and with the label
    label: str | None = None  # from the vote or the gold answer that the variant's row names
    label_share: float = 0.0  # of the commonest answer in the vote that labels; 1 for a gold answer, 0 without a label
    label_vote: Vote | None = None  # that the label was taken from; None for a gold answer, and without one
    means: dict[str, list[float]] = field(default_factory=dict)  # of lm.scoring.TokenStats, if the row asks for them


def read_groups(responses: Sequence[Response], votes: int, match: Match, kept: int | None = None) -> list[Group]:
    """Q groups from Q * V responses, groups contiguous: answers are read, and every group of V = `votes` votes (Eqs.
    7-10). The first G = `kept` of each are those of the group (None: all)."""
    groups = []
    for start in range(0, len(responses), votes):
        answers = [extract_boxed(response.text) for response in responses[start : start + votes]]
        group, boxed = responses[start : start + votes][:kept], answers[:kept]
        groups.append(
            Group(
                texts=[response.text for response in group],
                boxed=boxed,
                tokens=[response.tokens for response in group],
                finished=[response.finished for response in group],
                vote=majority_vote(answers, match),
                match=match,
            )
        )
    return groups


def are_equal(labels: Sequence[str | None], answers: Sequence[str | None], match: Match) -> list[bool]:
    """Whether each answer equals its label; one that is missing on either side does not."""
    if match == "exact":
        return [label is not None and label == answer for label, answer in zip(labels, answers, strict=True)]
    given = [(a, b) for a, b in zip(labels, answers, strict=True) if a is not None and b is not None]
    verdict = dict(zip(given, equivalent_many(given), strict=True))
    return [verdict.get((label, answer), False) for label, answer in zip(labels, answers, strict=True)]  # type: ignore[arg-type]


def classes(vote: Vote, answers: Sequence[str | None], match: Match) -> list[str | None]:
    """Of each answer, which one of the vote's it equals, named as in `vote.counts`; None for one that it has not."""
    class_of: dict[str | None, str] = {}
    for name in vote.counts:
        others = [answer for answer in dict.fromkeys(answers) if answer not in class_of]
        same = are_equal([name] * len(others), others, match)
        class_of |= {answer: name for answer, equal in zip(others, same, strict=True) if equal}
    return [class_of.get(answer) for answer in answers]


def shares(group: Group, vote: Vote) -> list[float]:
    """Of each rollout, the share of all rollouts of the vote, those without an answer included, that gave its answer:
    in its own vote (`group.vote`) or in the one that labels it (`group.label_vote`). 0 without an answer."""
    of_rollouts = classes(vote, group.boxed, group.match)
    return [0.0 if name is None else vote.counts[name] / vote.rollouts for name in of_rollouts]


def agreement(groups: Sequence[Group]) -> list[list[float]]:
    """1 for an answer that equals the group's label, else 0; all 0 in a group without a label (Eqs. 7-10)."""
    return [
        [float(same) for same in are_equal([group.label] * len(group.boxed), group.boxed, group.match)]
        for group in groups
    ]


def negative_entropy(groups: Sequence[Group]) -> list[list[float]]:
    """RENT (arXiv 2505.22660): minus the mean token entropy of the policy."""
    return [[-value for value in group.means["entropy"]] for group in groups]


def self_certainty(groups: Sequence[Group]) -> list[list[float]]:
    """Intuitor (arXiv 2505.19590): the mean over response tokens of KL(uniform || policy) + log |vocabulary|, which is
    logsumexp(z) - mean(z) of the logits z; the constant vanishes among rewards of a group."""
    return [group.means["self_certainty"] for group in groups]


@dataclass(frozen=True)
class Variant:
    """One row of the table below; a row whose reward needs no labels has none in `label_of`."""

    policy_views: tuple[View, ...]  # what the policy answers and is trained on
    teacher_views: tuple[View, ...]  # what the teacher answers
    label_of: dict[View, tuple[Voter, View]]  # whose vote, on which view, labels the policy's rollouts on this view
    kl_reference: Literal["init", "ema"]  # frozen initial policy, or the moving teacher
    kl_coef: float
    reward: Callable[[Sequence[Group]], list[list[float]]] = agreement
    reward_reads_logits: bool = False  # the reward needs entropy and self-certainty of the policy's own rollouts
    elect: Callable[[Group], str | None] | None = None  # the label of the policy's group, instead of the commonest
    gold_where_known: bool = False  # semi-supervised: a gold answer takes the vote's place where the question has one

    def __post_init__(self) -> None:
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

    @property
    def is_baseline(self) -> bool:
        """No teacher answers, and each view is labelled by itself (or by gold), if at all."""
        return not self.teacher_views and all(view == source for view, (_, source) in self.label_of.items())


# fmt: off
VARIANTS: dict[str, Variant] = {
    #                  policy answers, teacher answers, {view: whose vote on which view labels it}, KL term to, weight
    "I":              Variant(BOTH, (),   {"x": ("policy", "x'"), "x'": ("policy", "x")},   "init", 0.005),
    "II":             Variant(X,    X,    {"x": ("teacher", "x")},                          "ema",  0.001),
    "III":            Variant(BOTH, BOTH, {"x": ("teacher", "x'"), "x'": ("teacher", "x")}, "ema",  0.001),
    "gt":             Variant(X,    (),   {"x": ("gold", "x")},                             "init", 0.005),
    "majority":       Variant(X,    (),   {"x": ("policy", "x")},                           "init", 0.005),
    "self-certainty": Variant(X,    (),   {}, "init", 0.005, self_certainty,   reward_reads_logits=True),
    "entropy":        Variant(X,    (),   {}, "init", 0.005, negative_entropy, reward_reads_logits=True),
}
# fmt: on


def on_views(variant: Variant, views: tuple[View, ...]) -> Variant:
    """A baseline moved to other views, each labelled by itself: the paper's ablations without crossing."""
    label_of = {view: (voter, view) for view in views for voter, _ in variant.label_of.values()}
    return replace(variant, policy_views=views, label_of=label_of)


def label_groups(
    variant: Variant, voted: Mapping[tuple[Voter, View], Sequence[Group]], golds: Sequence[str | None]
) -> list[Group]:
    """The policy's groups by view, then by question, each with the label that the row names: the one place where a
    label comes from. A gold answer becomes one only where the row says so, and is compared as mathematics."""
    labelled = []
    for view in variant.policy_views:
        voter, voted_view = variant.label_of.get(view, (None, view))
        for q, group in enumerate(voted["policy", view]):
            if voter == "gold" or (variant.gold_where_known and golds[q] is not None):
                group = replace(group, label=golds[q], label_share=float(golds[q] is not None), match="math")
            elif voter is not None:
                vote = voted[voter, voted_view][q].vote
                group = replace(group, label=vote.label, label_share=vote.share, label_vote=vote)
                group = replace(group, label=variant.elect(group)) if variant.elect else group
            labelled.append(group)
    return labelled


def with_means(groups: Sequence[Group], means: Mapping[str, Sequence[float]]) -> list[Group]:
    """The groups with each statistic's mean [N] over every rollout's tokens."""
    size = len(groups[0].texts)
    return [
        replace(group, means={name: list(values[i * size : (i + 1) * size]) for name, values in means.items()})
        for i, group in enumerate(groups)
    ]
