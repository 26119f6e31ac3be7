"""Label-free rewards of other papers, as rows beside those of rewards.py: one loop, one recipe, other rewards.

p_i is the share of rollout i's answer among all rollouts of a vote, those without an answer included (`shares`).

    random          1 or 0 by a coin                                          Spurious Rewards, arXiv 2506.10947
    format          1 where an answer is boxed                                the same
    soft-majority   p_i; 0 without an answer                                  the vote's whole distribution
    empo            p_i; 1/V without an answer, a class of its own            EMPO, arXiv 2504.05812
    scrl            +1, -1 or 0, see `selective`                              SCRL, arXiv 2603.19880
    soft-I          p_i in the vote on the other wording                      Co-rewarding-I, with soft labels
    soft-II         p_i in the teacher's vote                                 Co-rewarding-II, with soft labels
    self-harmony    agreement with `harmonic_winner`                          Self-Harmony, arXiv 2511.01191
    semi            gold where it is known, elsewhere the own majority        semi-supervised, arXiv 2512.13106
    ttrl, intuitor, rent     other names of majority, self-certainty and entropy

KL terms are those of the paper's own baselines, so that only rewards differ. docs/METHODS.md has the official code of
each, the flags that come nearest to its published recipe, what then still differs, and what has no row here and why.
"""

import random
from collections.abc import Sequence
from statistics import fmean

from rewards import BOTH, VARIANTS, Group, Variant, X, classes, shares


def coin(groups: Sequence[Group]) -> list[list[float]]:
    """1 or 0, each as often. Thrown by what the whole group says, so that every rank and every resumed run throws the
    same, while the same text beside other texts is paid by chance again."""
    coins = [random.Random("\0".join(group.texts)) for group in groups]
    return [[float(c.random() < 0.5) for _ in group.texts] for c, group in zip(coins, groups, strict=True)]


def has_answer(groups: Sequence[Group]) -> list[list[float]]:
    return [[float(answer is not None) for answer in group.boxed] for group in groups]


def soft_majority(groups: Sequence[Group]) -> list[list[float]]:
    return [shares(group, group.vote) for group in groups]


def semantic_share(groups: Sequence[Group]) -> list[list[float]]:
    """EMPO: minus semantic entropy is the mean of log p; its reward is p, the share of one's own class of meaning."""
    return [
        [share if answer is not None else 1 / group.vote.rollouts for share, answer in zip(p, group.boxed, strict=True)]
        for group, p in zip(groups, soft_majority(groups), strict=True)
    ]


def soft_label(groups: Sequence[Group]) -> list[list[float]]:
    """The labelling vote's whole distribution instead of its winner."""
    return [shares(group, group.label_vote) if group.label_vote else [0.0] * len(group.boxed) for group in groups]


# SCRL's thresholds: what a majority must have, what it must be ahead by, and below what an answer is rare.
MAJORITY, MARGIN, RARE = 0.5, 0.15, 0.15


def clear_winner(group: Group) -> str | None:
    """SCRL: the most frequent answer if half of all rollouts gave it, and clearly more than gave the next one."""
    of_answers = [count / group.vote.rollouts for count in group.vote.counts.values()]
    first, second, *_ = [*sorted(of_answers, reverse=True), 0.0, 0.0]
    return group.vote.label if first >= MAJORITY and first - second > MARGIN else None


def selective(groups: Sequence[Group]) -> list[list[float]]:
    """SCRL: +1 for `clear_winner`; -1 without an answer, or for one that is rare and whose rollouts are less certain
    than the group's mean; else 0."""
    rewards = []
    for group in groups:
        entropy, named = group.means["entropy"], classes(group.vote, group.boxed, group.match)
        winner, of_group = clear_winner(group), fmean(entropy)
        rare = {name for name, count in group.vote.counts.items() if count / group.vote.rollouts < RARE}
        of_class = {name: fmean(h for h, n in zip(entropy, named, strict=True) if n == name) for name in named}
        rewards.append(
            [
                -1.0 if name is None else 1.0 if name == winner else -float(name in rare and of_class[name] >= of_group)
                for name in named
            ]
        )
    return rewards


def harmonic_winner(group: Group) -> str | None:
    """Self-Harmony: of the answers to either wording that with the highest harmonic mean of its two counts, n m / (n +
    m); of equals, for example where no answer was given to both, the most frequent one."""
    own, other = group.vote.counts, group.label_vote
    if other is None:
        return None
    named = dict(zip(own, classes(other, list(own), group.match), strict=True))
    counts = {answer: (n, other.counts.get(str(named[answer]), 0)) for answer, n in own.items()}
    counts |= {answer: (0, m) for answer, m in other.counts.items() if answer not in named.values()}
    scores = {answer: (n * m / (n + m), n + m) for answer, (n, m) in counts.items()}
    return max(scores, key=scores.__getitem__, default=None)


CROSSED = VARIANTS["I"].label_of

# fmt: off
BASELINES: dict[str, Variant] = {
    "random":        Variant(X,    (), {}, "init", 0.005, coin),
    "format":        Variant(X,    (), {}, "init", 0.005, has_answer),
    "soft-majority": Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, soft_majority),
    "empo":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, semantic_share),
    "scrl":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, selective, reward_reads_logits=True,
                             elect=clear_winner),
    "soft-I":        Variant(BOTH, (), CROSSED,                 "init", 0.005, soft_label),
    "soft-II":       Variant(X,    X,  {"x": ("teacher", "x")}, "ema",  0.001, soft_label),
    "self-harmony":  Variant(BOTH, (), CROSSED,                 "init", 0.005, elect=harmonic_winner),
    "semi":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, gold_where_known=True),
    "ttrl":          VARIANTS["majority"],
    "intuitor":      VARIANTS["self-certainty"],
    "rent":          VARIANTS["entropy"],
}
# fmt: on
