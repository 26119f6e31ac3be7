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
    harmonic-II     the same, of the policy's vote and the teacher's          ours, after DCRL, arXiv 2603.16223
    cuma            agreement with an absolute majority; without one, 0       CuMa, arXiv 2511.04902
    two-rewards     agreement and self-certainty, normalised apart            Two is better than one, arXiv 2605.22620
    ddrl            +1, -1 or 0, see `ddrl_reward`                            DDRL, arXiv 2604.21327
    disagreement    below 0 for disagreement with the vote, else 0            half of TTPO, arXiv 2608.27448
    semi            gold where it is known, elsewhere the own majority        semi-supervised, arXiv 2512.13106
    ttrl, intuitor, rent     other names of majority, self-certainty and entropy

KL terms are those of the paper's own baselines, so that only rewards differ. docs/METHODS.md has the official code of
each, the flags that come nearest to its published recipe, what then still differs, and what has no row here and why.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from statistics import fmean, stdev

from config import Method, UserError
from rewards import BOTH, VARIANTS, Group, Match, Variant, View, Vote, Voter, X, agreement, matches, self_certainty


def match_to_vote(vote: Vote, answers: Sequence[str | None], match: Match) -> list[str | None]:
    """Map each answer to the one that it matches in `vote.counts`, or to None."""
    name_of: dict[str | None, str] = {}
    for name in vote.counts:
        others = [answer for answer in dict.fromkeys(answers) if answer not in name_of]
        for answer, same in zip(others, matches([name] * len(others), others, match), strict=True):
            if same:
                name_of[answer] = name
    return [name_of.get(answer) for answer in answers]


def vote_shares(group: Group, vote: Vote) -> list[float]:
    """Return for each rollout of the group the share of a vote's rollouts that gave the same answer.

    The vote is the group's own or the one that labels it. Rollouts without an answer count, and have share 0.
    """
    names = match_to_vote(vote, group.answers, group.match)
    return [0.0 if name is None else vote.counts[name] / vote.rollouts for name in names]


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
    """Pay p_i in the group's own vote."""
    return vote_shares(group, group.vote)


def empo_reward(group: Group) -> list[float]:
    """Pay p_i, the share of one's own class of meaning: minus semantic entropy is the mean of log p (EMPO)."""
    shares = zip(soft_majority(group), group.answers, strict=True)
    return [share if answer is not None else 1 / group.vote.rollouts for share, answer in shares]


def soft_label(group: Group) -> list[float]:
    """Pay p_i in the vote that labels the group, instead of agreement with its winner."""
    return vote_shares(group, group.label_vote) if group.label_vote else [0.0] * len(group.rollouts)


# SCRL's thresholds.
MAJORITY = 0.5  # what a majority must have
MARGIN = 0.15  # what it must be ahead by
RARE = 0.15  # below which an answer is rare


def clear_winner(group: Group) -> str | None:
    """Return the most frequent answer if half of all rollouts gave it, clearly more than gave the next one (SCRL)."""
    shares = sorted((count / group.vote.rollouts for count in group.vote.counts.values()), reverse=True)
    first, second, *_ = [*shares, 0.0, 0.0]
    return group.vote.label if first >= MAJORITY and first - second > MARGIN else None


def scrl_reward(group: Group) -> list[float]:
    """Pay 1 for `clear_winner`; -1 for no answer, or for a rare and uncertain one; else 0 (SCRL).

    An answer is uncertain if its rollouts have at least the group's mean entropy.
    """
    names = match_to_vote(group.vote, group.answers, group.match)
    entropies: dict[str | None, list[float]] = defaultdict(list)
    for name, rollout in zip(names, group.rollouts, strict=True):
        entropies[name].append(rollout.token_stats["entropy"])
    group_mean = fmean(rollout.token_stats["entropy"] for rollout in group.rollouts)
    uncertain = {name for name, values in entropies.items() if fmean(values) >= group_mean}
    rare = {name for name, count in group.vote.counts.items() if count / group.vote.rollouts < RARE}
    winner = clear_winner(group)
    rewards = []
    for name in names:
        if name is None:
            rewards.append(-1.0)
        elif name == winner:
            rewards.append(1.0)
        else:
            rewards.append(-float(name in rare and name in uncertain))
    return rewards


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


def absolute_majority(group: Group) -> str | None:
    """Return the vote's winner if more than half of all rollouts gave it; without a label a group teaches nothing."""
    winner = group.vote.label
    return winner if winner is not None and group.vote.counts[winner] > group.vote.rollouts / 2 else None


def standardised(values: Sequence[float]) -> list[float]:
    """Move values to mean 0 and deviation 1; equal ones to 0.

    Without PyTorch, unlike `grpo.group_advantages`: mistakes in flags are answered from this file before its import.
    """
    deviation = stdev(values) or 1.0
    return [(value - fmean(values)) / deviation for value in values]


def vote_and_certainty(group: Group) -> list[float]:
    """Pay agreement plus self-certainty, each standardised in the group: else the one of larger scale would win."""
    agreed = standardised(agreement(group))
    certain = standardised(self_certainty(group))
    return [one + other for one, other in zip(agreed, certain, strict=True)]


def disagreement(group: Group) -> list[float]:
    """Pay the standardised agreement where it is below 0, if at least two rollouts agree with the label (TTPO)."""
    agrees = agreement(group)
    if sum(agrees) < 2:
        return [0.0] * len(agrees)
    return [min(value, 0.0) for value in standardised(agrees)]


def ddrl_reward(group: Group) -> list[float]:
    """Pay half of the rollouts, those with the commonest and the rarest answers: 1 for agreement, else -1 (DDRL).

    At most a half of this half has the commonest answers. The ambiguous ones between get 0.
    """
    names = match_to_vote(group.vote, group.answers, group.match)
    counts = [0 if name is None else group.vote.counts[name] for name in names]
    by_count = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)  # of equals, the first comes first
    half = len(counts) // 2
    common = min(max(counts), half // 2)
    kept = {*by_count[:common], *by_count[common - half :]}
    return [2 * agrees - 1 if i in kept else 0.0 for i, agrees in enumerate(agreement(group))]


CROSSED = VARIANTS["I"].label_of
VIEWS: dict[str, tuple[View, ...]] = {"original": X, "rephrased": ("x'",), "both": BOTH}

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
    "harmonic-II":   Variant(X,    X,  {"x": ("teacher", "x")}, "ema",  0.001, select_label=harmonic_winner),
    "cuma":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, select_label=absolute_majority),
    "two-rewards":   Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, vote_and_certainty,
                             needs_token_stats=True),
    "ddrl":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, ddrl_reward, fixed_advantages=True),
    "disagreement":  Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, disagreement, fixed_advantages=True),
    "semi":          Variant(X,    (), {"x": ("policy", "x")},  "init", 0.005, semi_supervised=True),
    "ttrl":          VARIANTS["majority"],
    "intuitor":      VARIANTS["self-certainty"],
    "rent":          VARIANTS["entropy"],
}
# fmt: on


def with_views(variant: Variant, views: tuple[View, ...]) -> Variant:
    """Move a baseline to other views, each labelled by itself: the paper's ablations without crossing."""
    voters: list[Voter] = [voter for voter, _ in variant.label_of.values()]
    label_of = {view: (voters[0], view) for view in views} if voters else {}
    return replace(variant, policy_views=views, label_of=label_of)


def choose_variant(method: Method) -> Variant:
    """Look the variant up in the tables, and change what the command line changes in it.

    Raises:
        UserError: there is no such variant, or it fixes its own views.
    """
    variants = VARIANTS | BASELINES
    if str(method.variant) not in variants:  # a config.json can hold anything
        plain = {name.lower(): name for name in variants}
        close = get_close_matches(str(method.variant).lower().removeprefix("co-rewarding-"), plain, n=1, cutoff=0.75)
        guess = f"did you mean {plain[close[0]]}? " if close else ""
        raise UserError(f"--variant {method.variant} is not known: {guess}choose from {', '.join(variants)}")
    variant = variants[method.variant]
    if method.views is not None:
        crossed = any(view != voted_view for view, (_, voted_view) in variant.label_of.items())
        if crossed or variant.teacher_views:
            raise UserError(
                f"--views {method.views} is for baselines, and variant {method.variant} fixes its own: "
                "try --variant majority"
            )
        variant = with_views(variant, VIEWS[method.views])
    if method.kl_coef is not None:
        variant = replace(variant, kl_coef=method.kl_coef)
    if method.kl_ref is not None:
        variant = replace(variant, kl_reference=method.kl_ref)
    return variant
