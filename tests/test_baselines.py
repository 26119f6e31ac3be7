"""baselines.py against the formulas of the methods' own code, written again from their description, and the identities
that follow from them."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ScriptedSampler, group_of, tiny_run

import train
from baselines import (
    BASELINES,
    clear_winner,
    ddrl_reward,
    disagreement,
    empo_reward,
    format_reward,
    harmonic_winner,
    match_to_vote,
    random_reward,
    scrl_reward,
    soft_label,
    vote_shares,
)
from data import Pair
from grpo import assign_advantages
from rewards import VARIANTS, Group, Match, Variant, View, X, label_groups, majority_vote, rollouts_of

ANSWERS = st.lists(st.sampled_from(["1", "2", "3", "4", None]), min_size=2, max_size=24)


def labelled_by(answers: list[str | None], other: list[str | None], match: Match = "exact") -> Group:
    """A group whose label is by another vote."""
    vote = majority_vote(other, match)
    return replace(group_of(answers, match=match), label_vote=vote, label=vote.label)


def labelled_by_itself(answers: list[str | None]) -> Group:
    return labelled_by(answers, answers)


def with_stats(group: Group, **stats: list[float]) -> Group:
    for i, rollout in enumerate(group.rollouts):
        rollout.token_stats = {name: values[i] for name, values in stats.items()}
    return group


def labelled(row: Variant, answers: list[list[str | None]], golds: list[str | None]) -> list[Group]:
    """The policy's groups where policy and teacher give the same answers to every wording of each question."""
    certain = {"entropy": [0.5] * 9, "self_certainty": [1.0] * 9}

    def groups(views: tuple[View, ...]) -> list[Group]:
        asked = [(view, place) for view in views for place in range(len(answers))]
        return [with_stats(group_of(answers[place], view, place), **certain) for view, place in asked]

    policy_groups = groups(row.policy_views)
    label_groups(row, policy_groups, groups(row.teacher_views), golds)
    return policy_groups


@given(ANSWERS)
def test_a_share_counts_all_rollouts_of_its_own_vote(answers):
    expected = [answers.count(answer) / len(answers) if answer else 0.0 for answer in answers]
    group = group_of(answers)
    assert vote_shares(group, group.vote) == expected


@given(ANSWERS, ANSWERS)
def test_a_soft_label_is_the_share_in_the_other_vote_and_not_in_the_own_one(answers, other):
    assert soft_label(labelled_by(answers, other)) == [
        other.count(answer) / len(other) if answer else 0.0 for answer in answers
    ]


def test_shares_are_of_equal_mathematics_where_votes_are():
    group = labelled_by(["1/2", "0.5", "2", None], ["0.50", "3", "3", "3"], "math")
    assert vote_shares(group, group.vote) == [1 / 2, 1 / 2, 1 / 4, 0]
    assert vote_shares(group, group.label_vote) == [1 / 4, 1 / 4, 0, 0]
    assert match_to_vote(group.label_vote, group.answers, "math") == ["0.50", "0.50", None, None]


@given(ANSWERS)
def test_empo_gives_an_empty_answer_a_class_of_its_own(answers):
    clusters = [answer or f"empty {i}" for i, answer in enumerate(answers)]
    assert empo_reward(group_of(answers)) == [clusters.count(cluster) / len(clusters) for cluster in clusters]


def scrl(answers: list[str | None], entropies: list[float]) -> list[float]:
    """As its scrl_utils.py and scrl_math/__init__.py compute it, in binary mode with the thresholds written there."""
    total, named = len(answers), [answer or "__NONE__" for answer in answers]
    proportion = {name: named.count(name) / total for name in named}
    candidates = [name for name, _ in Counter(named).most_common() if name != "__NONE__"]
    positive = None
    ahead = [proportion[name] for name in candidates] + [0.0, 0.0]
    if ahead[0] >= 0.5 and (len(candidates) == 1 or ahead[0] - ahead[1] > 0.15):
        positive = candidates[0]
    overall, negative = math.fsum(entropies) / total, set()
    for name in candidates:
        inside = [h for h, n in zip(entropies, named, strict=True) if n == name]
        if name != positive and proportion[name] < 0.15 and math.fsum(inside) / len(inside) >= overall:
            negative.add(name)
    pays = {"__NONE__": -1.0} | dict.fromkeys(negative, -1.0) | ({positive: 1.0} if positive else {})
    return [pays.get(name, 0.0) for name in named]


@settings(max_examples=300)
@given(ANSWERS, st.randoms(use_true_random=False))
def test_scrl_rewards_a_clear_majority_and_punishes_what_is_rare_and_uncertain(answers, rng):
    entropies = [rng.random() for _ in answers]
    assert scrl_reward(with_stats(group_of(answers), entropy=entropies)) == scrl(answers, entropies)


def test_scrl_knows_thirds_halves_and_margins():
    assert clear_winner(group_of(["1", "1", "2", "2"])) is None  # no margin
    assert clear_winner(group_of(["1", "1", "2", None])) == "1"
    assert clear_winner(group_of(["1", None, None])) is None  # a third, of all rollouts
    many = ["1"] * 8 + ["2"] + ["3"] * 2  # the rare one alone is uncertain
    group = with_stats(group_of(many), entropy=[0.1] * 8 + [2.0] + [0.1] * 2)
    assert scrl_reward(group) == [1.0] * 8 + [-1.0] + [0.0] * 2


def self_harmony(own: list[str | None], other: list[str | None]) -> float:
    """The best score of its harmonic_mean_score: n n' / (n + n') of an answer's counts in both wordings."""
    named = {answer for answer in own + other if answer}
    return max(own.count(a) * other.count(a) / (own.count(a) + other.count(a)) for a in named)


@given(ANSWERS, ANSWERS)
def test_self_harmony_takes_the_answer_that_both_wordings_give(own, other):
    winner = harmonic_winner(labelled_by(own, other))
    if winner is None:
        assert not any(own + other)
        return
    n, m = own.count(winner), other.count(winner)
    assert n * m / (n + m) == self_harmony(own, other)
    equals = [
        a for a in {*own, *other} - {None}
        if own.count(a) * other.count(a) / (own.count(a) + other.count(a)) == n * m / (n + m)
    ]  # fmt: skip
    assert n + m == max(own.count(a) + other.count(a) for a in equals)


def test_self_harmony_prefers_agreement_of_wordings_to_either_majority():
    group = labelled_by(["1"] * 5 + ["2"] * 3, ["3"] * 5 + ["2"] * 3)
    assert harmonic_winner(group) == "2"
    assert harmonic_winner(labelled_by(["1", "1", "2"], ["3"])) == "1"  # nothing in common: the most frequent


def test_the_harmonic_vote_of_policy_and_teacher_is_another_formula_or_of_other_voters():
    row = BASELINES["harmonic-II"]
    own, teachers = group_of(["1"] * 5 + ["2"] * 3), group_of(["3"] * 5 + ["2"] * 3)
    label_groups(row, [own], [teachers], [None])
    assert own.label == "2" and row.reward(own) == [0.0] * 5 + [1.0] * 3


@given(ANSWERS)
def test_a_group_without_an_absolute_majority_is_trained_on(answers):
    group = group_of(answers)
    label_groups(BASELINES["cuma"], [group], [], [None])
    winners = [a for a in {*answers} - {None} if 2 * answers.count(a) > len(answers)]
    assert group.label == (winners[0] if winners else None)
    assert BASELINES["cuma"].reward(group) == [float(a in winners) for a in answers]


@given(ANSWERS, st.randoms(use_true_random=False))
def test_the_reward_of_larger_scale_outweighs_the_other(answers, rng):
    certain = [rng.randrange(1000) / 10 for _ in answers]
    label = majority_vote(answers).label
    agreed = [float(a is not None and a == label) for a in answers]

    def apart(values: list[float]) -> torch.Tensor:
        exact = torch.tensor(values, dtype=torch.float64)
        return torch.zeros(len(values)) if len(set(values)) == 1 else (exact - exact.mean()) / exact.std()

    group = with_stats(replace(group_of(answers), label=label), self_certainty=certain)
    expected = (apart(agreed) + apart(certain)).tolist()
    assert BASELINES["two-rewards"].reward(group) == pytest.approx(expected, abs=1e-9)


def ddrl(answers: list[str | None]) -> list[float]:
    """As its select_top_k_per_prompt_cnt selects half of the votes, and its estimator `dae` pays the selected."""
    k, counter = len(answers) // 2, Counter(answer for answer in answers if answer)
    label, most = counter.most_common(1)[0] if counter else ("None", 0)
    ranked = sorted([(i, counter[answer]) for i, answer in enumerate(answers)], key=lambda pair: pair[1], reverse=True)
    high = min(most, k // 2)
    advantages = dict.fromkeys(range(len(answers)), 0.0)  # what is not selected is not trained on
    for i, _ in ranked[:high] + ranked[-(k - high) :]:
        advantages[i] = ((1.0 if answers[i] == label else 0.0) - 0.5) * 2
    return [advantages[i] for i in range(len(answers))]


@settings(max_examples=300)
@given(ANSWERS)
def test_ddrl_drops_what_is_neither_common_nor_rare(answers):
    assert ddrl_reward(labelled_by_itself(answers)) == ddrl(answers)


def test_ddrl_trains_on_unanimous_groups_and_against_silent_ones():
    assert ddrl_reward(labelled_by_itself(["1"] * 4 + ["2"] * 3 + ["3"])) == [1, 1, 0, 0, 0, 0, -1, -1]
    assert ddrl_reward(labelled_by_itself(["1"] * 4)) == [1, 0, 0, 1]
    assert ddrl_reward(labelled_by_itself([None] * 4)) == [0, 0, -1, -1]


@given(ANSWERS)
def test_disagreement_is_punished_as_in_ttpo_and_agreement_never_paid(answers):
    """As its _generate_all_items computes the advantages that its loss of negative samples reads."""
    counter = Counter(answer for answer in answers if answer)
    label, count = counter.most_common(1)[0] if counter else (None, 0)
    total, positive = len(answers), count if count >= 2 else 0  # its min_consensus_count
    share = positive / total
    deviation = math.sqrt((positive * (1 - share) ** 2 + (total - positive) * share**2) / total)
    unbiased = math.sqrt((total - 1) / total)  # ours divides by n - 1
    penalty = -share / (deviation + 1e-6) * unbiased if deviation else 0.0
    expected = [penalty if answer != label or answer is None else 0.0 for answer in answers]
    assert disagreement(labelled_by_itself(answers)) == pytest.approx(expected, rel=1e-4)


def test_the_coin_is_fair_the_same_on_every_rank_and_not_always_the_same_for_a_text():
    groups = [group_of([str(i), "1", "1", "1"]) for i in range(2000)]
    thrown = [random_reward(group) for group in groups]
    assert thrown == [random_reward(group) for group in groups]
    assert abs(sum(sum(each) for each in thrown) / 8000 - 0.5) < 0.03
    assert len({tuple(each) for each in thrown}) == 16  # "1" is paid by chance, again and again


def test_the_format_is_paid_whatever_is_in_the_box():
    assert format_reward(group_of(["1", "2", None])) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("answers", [["7"] * 4, [None] * 4], ids=["unanimous", "silent"])
def test_a_group_that_agrees_or_is_silent_teaches_nothing(name, answers):
    if name in ("random", "ddrl"):
        return
    row = BASELINES[name]
    groups = labelled(row, [answers], [None])
    assign_advantages(groups, [row.reward(group) for group in groups], row.fixed_advantages)
    assert [rollout.advantage for rollout in rollouts_of(groups)] == [0.0] * 4 * len(groups)


# ---------------------------------------------------------------- through a step

PAIRS = [Pair("0", "a", "b", gold="1"), Pair("1", "c", "d", gold="2")]


def says(_: object, prompt: str, g: int) -> str:
    return f"\\boxed{{{random.Random(prompt + str(g)).randrange(1, 4)}}}"


def rewards_of(variant: object, pairs: list[Pair], **how: object) -> list[object]:
    _, records = train.train_step(tiny_run(variant, pairs, ScriptedSampler(says), **how), 0)
    return [(row["label"], row["rewards"]) for row in records["rollouts"]]


def test_semi_supervised_with_all_golds_is_gt_and_with_none_majority():
    without = [replace(pair, gold=None) for pair in PAIRS]
    assert rewards_of(BASELINES["semi"], PAIRS) == rewards_of("gt", PAIRS)
    assert rewards_of(BASELINES["semi"], without) == rewards_of("majority", without)
    row = BASELINES["semi"]
    assert [group.label for group in labelled(row, [["3", "3", "1"]] * 2, ["1", None])] == ["1", "3"]


def test_gold_never_reaches_a_row_that_does_not_ask_for_it():
    for name, row in (VARIANTS | BASELINES).items():
        if name in ("gt", "semi"):
            continue
        answers: list[list[str | None]] = [["3", "3", "1"]]
        assert labelled(row, answers, ["1"]) == labelled(row, answers, [None])


def test_fixed_advantages_are_normalised_all_the_same():
    for fixed in (False, True):
        row = Variant(X, (), {}, "init", 0.0, lambda group: [0.5] * len(group.rollouts), fixed_advantages=fixed)
        seen, _ = train.train_step(tiny_run(row, PAIRS, ScriptedSampler(says)), 0)
        assert (seen["grad_norm"] > 0) == fixed and seen["reward"] == 0.5
    group = group_of(["1", "2", "3"])
    assign_advantages([group], [[1.0, -1.0, 0.0]], fixed=True)
    assert [(rollout.reward, rollout.advantage) for rollout in group.rollouts] == [(1, 1), (-1, -1), (0, 0)]


def test_more_votes_than_rollouts_change_the_label_and_not_what_is_trained_on():
    def last_ones_know(_: object, prompt: str, g: int) -> str:
        return "\\boxed{5}" if g >= 4 else f"\\boxed{{{g}}}"

    run = tiny_run("majority", PAIRS, ScriptedSampler(last_ones_know), votes=8)
    seen, records = train.train_step(run, 0)
    (sample,) = records["rollouts"]
    assert sample["answers"] == ["0", "1", "2", "3"] and sample["label"] == "5"
    assert sample["label_share"] == 1 / 2 and seen["reward"] == 0
    as_rollouts, without = rewards_of("majority", PAIRS, votes=4), rewards_of("majority", PAIRS)
    assert as_rollouts == without


def test_teacher_votes_are_as_many_as_the_policys():
    asked: list[int] = []

    class Counting(ScriptedSampler):
        def loaded(self, lm):
            manager = super().loaded(lm)
            sample = manager.__enter__()

            class Holding:
                def __enter__(self):
                    def counted(prompts, seeds, n, **how):
                        asked.append(n)
                        return sample(prompts, seeds, n, **how)

                    return counted

                def __exit__(self, *_):
                    manager.__exit__(None, None, None)

            return Holding()

    train.train_step(tiny_run("II", PAIRS, Counting(says), votes=6), 0)
    assert asked == [6, 6]
