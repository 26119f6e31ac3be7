"""Label-free rewards of other papers, as rows beside those of rewards.py: one loop, one recipe, other rewards.

p_i is the share of rollout i's answer among all rollouts of a vote, those without an answer included (`vote_shares`).

    random          1 or 0 by a coin                                          Spurious Rewards, arXiv 2506.10947
    format          1 where an answer is boxed                                the same
    soft-majority   p_i; 0 without an answer                                  the vote's whole distribution
    empo            p_i; 1/V without an answer, a class of its own            EMPO, arXiv 2504.05812
    scrl            +1, -1 or 0, see `scrl_reward`                            SCRL, arXiv 2603.19880
    soft-I          p_i in the vote on the other wording                      Co-rewarding-I, with soft labels
    soft-II         p_i in the teacher's vote                                 Co-rewarding-II, with soft labels
    self-harmony    agreement with `harmonic_winner`                          Self-Harmony, arXiv 2511.01191
    semi            gold where it is known, elsewhere the own majority        semi-supervised, arXiv 2512.13106
    ttrl, intuitor, rent     other names of majority, self-certainty and entropy

KL terms are those of the paper's own baselines, so that only rewards differ. docs/METHODS.md has the official code of
each, the flags that come nearest to its published recipe, what then still differs, and what has no row here and why.
"""

import random
from collections import defaultdict
from dataclasses import replace
from statistics import fmean

from config import Method, UserError
from rewards import BOTH, VARIANTS, VIEWS, Group, Variant, X, match_to_vote, vote_shares, with_views


def random_reward(group: Group) -> list[float]:
    """Pay 1 or 0 by a fair coin.

    All texts of the group seed the coin: every rank and every resumed run toss alike, and one text gets another reward
    beside other texts.
    """
    coin = random.Random("\0".join(rollout.text for rollout in group.rollouts))
    return [float(coin.random() < 0.5) for _ in group.rollouts]


def format_reward(group: Group) -> list[float]:
    return [float(answer is not None) for answer in group.answers]


def soft_majority(group: Group) -> list[float]:
    return vote_shares(group, group.vote)


def empo_reward(group: Group) -> list[float]:
    """Pay p_i, the share of one's own class of meaning: minus semantic entropy is the mean of log p (EMPO)."""
    shares = zip(soft_majority(group), group.answers, strict=True)
    return [share if answer is not None else 1 / group.vote.rollouts for share, answer in shares]


def soft_label(group: Group) -> list[float]:
    return vote_shares(group, group.label_vote) if group.label_vote else [0.0] * len(group.rollouts)


def clear_winner(group: Group) -> str | None:
    """Return the most frequent answer if half of all rollouts gave it, and 0.15 more than the next one (SCRL)."""
    shares = sorted((count / group.vote.rollouts for count in group.vote.counts.values()), reverse=True)
    first, second, *_ = [*shares, 0.0, 0.0]
    return group.vote.label if first >= 0.5 and first - second > 0.15 else None


def scrl_reward(group: Group) -> list[float]:
    """Pay 1 for `clear_winner`; -1 for no answer, or for a rare and uncertain one; else 0 (SCRL).

    An answer is rare below a share of 0.15, and uncertain if its rollouts have at least the group's mean entropy.
    """
    names = match_to_vote(group.vote, group.answers, group.match)
    entropies: dict[str | None, list[float]] = defaultdict(list)
    for name, rollout in zip(names, group.rollouts, strict=True):
        entropies[name].append(rollout.token_stats["entropy"])
    group_mean = fmean(rollout.token_stats["entropy"] for rollout in group.rollouts)
    uncertain = {name for name, values in entropies.items() if fmean(values) >= group_mean}
    rare = {name for name, count in group.vote.counts.items() if count / group.vote.rollouts < 0.15}
    good = {clear_winner(group)} - {None}
    bad = {None, *(rare & uncertain)}
    return [float(name in good) - float(name in bad) for name in names]


def harmonic_winner(group: Group) -> str | None:
    """Return the answer with the highest harmonic mean n m / (n + m) of its counts n, m in two votes (Self-Harmony).

    The votes are the group's own and the one on the other wording. Of equals, for example where no answer was given to
    both, the most frequent one wins.
    """
    if group.label_vote is None:
        return None
    own = group.vote.counts
    other = group.label_vote.counts
    names = dict(zip(own, match_to_vote(group.label_vote, list(own), group.match), strict=True))
    counts = {answer: (n, other.get(str(names[answer]), 0)) for answer, n in own.items()}
    counts |= {answer: (0, m) for answer, m in other.items() if answer not in names.values()}
    scores = {answer: (n * m / (n + m), n + m) for answer, (n, m) in counts.items()}
    return max(scores, key=scores.__getitem__, default=None)


CROSSED = VARIANTS["I"].label_of

# fmt: off
BASELINES: dict[str, Variant] = {
    "random":        Variant(X,    (), {}, "init", 0.005, random_reward),
    "format":        Variant(X,    (), {}, "init", 0.005, format_reward),
    "soft-majority": Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, soft_majority),
    "empo":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, empo_reward),
    "scrl":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, scrl_reward, needs_token_stats=True,
                             select_label=clear_winner),
    "soft-I":        Variant(BOTH, (), CROSSED,                 "init", 0.005, soft_label),
    "soft-II":       Variant(X,    X,  {"x": ("teacher", "x")}, "ema",  0.001, soft_label),
    "self-harmony":  Variant(BOTH, (), CROSSED,                 "init", 0.005, select_label=harmonic_winner),
    "semi":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, semi_supervised=True),
    "ttrl":          VARIANTS["majority"],
    "intuitor":      VARIANTS["self-certainty"],
    "rent":          VARIANTS["entropy"],
}
# fmt: on


def choose_variant(method: Method) -> Variant:
    variants = VARIANTS | BASELINES
    if method.variant not in variants:
        raise UserError(f"--variant {method.variant} is not known: choose from {', '.join(variants)}")
    variant = variants[method.variant]
    if method.views is not None:
        if not variant.is_baseline:
            fixed = f"variant {method.variant} fixes its own: try --variant majority"
            raise UserError(f"--views {method.views} is for baselines, and {fixed}")
        variant = with_views(variant, VIEWS[method.views])
    kl_coef = variant.kl_coef if method.kl_coef is None else method.kl_coef
    return replace(variant, kl_coef=kl_coef, kl_reference=method.kl_ref or variant.kl_reference)
