"""rewards.py and the labels of a training step: each test is named after the bug it prevents."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, ScriptedSampler, group_of, tiny_lm, tiny_rollouts, tiny_run

import train
from baselines import VIEWS, with_views
from data import Pair
from grpo import assign_denominators
from lm.packing import micro_batches
from lm.scoring import PackedLM, assign_token_stats
from rewards import (
    VARIANTS,
    Group,
    Match,
    Variant,
    Vote,
    equivalent,
    extract_boxed,
    label_groups,
    majority_vote,
    rollouts_of,
)

# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ 5 }", " 5 "),  # as written: " 5 " and "5" are rivals in a vote
        (r"\boxed{}", None),
        (r"\boxed{   }", None),
        (r"\boxed{12", None),
        (r"\boxed{1} then \boxed{2", "1"),
        ("the answer is 12", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_balanced_box_as_written(text, answer):
    assert extract_boxed(text) == answer


# ---------------------------------------------------------------- votes


def official_vote(answers: list[str | None]) -> tuple[str | None, float, int, int]:
    """The authors' vote, written independently: missing answers are dropped, the most frequent raw string wins, and
    of equals the one that came first."""
    given_answers = [answer for answer in answers if answer is not None]
    best: str | None = None
    for answer in given_answers:
        if best is None or given_answers.count(answer) > given_answers.count(best):
            best = answer
    count = given_answers.count(best) if best is not None else 0
    return best, count / max(len(given_answers), 1), len(set(given_answers)), len(given_answers)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([None, "1", "2", " 1", r"\frac{1}{2}", "0.5", "x"]), max_size=12))
def test_the_vote_is_the_official_one(answers):
    vote = majority_vote(answers)
    assert (vote.label, vote.share, vote.distinct, vote.answered) == official_vote(answers)


def test_ties_go_to_the_first_seen_and_not_to_the_last_or_the_smallest():
    assert majority_vote(["7", "3", "7", "3"]).label == "7"
    assert majority_vote([None, "b", "a", "b", "a", "c"]).label == "b"


def test_nobody_answering_gives_no_label_instead_of_an_empty_one():
    assert majority_vote([None, None]) == Vote(label=None, share=0.0, distinct=0, answered=0)
    assert majority_vote([]) == Vote(label=None, share=0.0, distinct=0, answered=0)


def test_missing_answers_neither_vote_nor_dilute_the_share():
    assert majority_vote([None, None, None, "4", "4", "5"]) == Vote("4", 2 / 3, 2, 3)


def test_raw_strings_are_rivals_unless_mathematical_votes_are_asked_for():
    answers = ["0.5", "3", r"\frac{1}{2}", "3", "1/2"]
    assert majority_vote(answers).label == "3"
    assert majority_vote(answers, "math") == Vote("0.5", 3 / 5, 2, 5)


# ---------------------------------------------------------------- the table of variants

# policy views, teacher views, source of each view's label, KL reference, KL coefficient (arXiv 2508.00410, Section 4)
TABLE = {
    "I": ({"x", "x'"}, set(), {"x": ("policy", "x'"), "x'": ("policy", "x")}, "init", 0.005),
    "II": ({"x"}, {"x"}, {"x": ("teacher", "x")}, "ema", 0.001),
    "III": ({"x", "x'"}, {"x", "x'"}, {"x": ("teacher", "x'"), "x'": ("teacher", "x")}, "ema", 0.001),
    "gt": ({"x"}, set(), {"x": ("gold", "x")}, "init", 0.005),
    "majority": ({"x"}, set(), {"x": ("policy", "x")}, "init", 0.005),
    "self-certainty": ({"x"}, set(), {}, "init", 0.005),
    "entropy": ({"x"}, set(), {}, "init", 0.005),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_variant_is_the_row_of_the_paper(name):
    row = VARIANTS[name]
    assert (set(row.policy_views), set(row.teacher_views), row.label_of, row.kl_reference, row.kl_coef) == TABLE[name]
    assert row.needs_token_stats == (name in {"self-certainty", "entropy"})
    for voter, view in row.label_of.values():
        assert voter == "gold" or view in (row.policy_views if voter == "policy" else row.teacher_views)


def test_no_variant_is_missing():
    assert VARIANTS.keys() == TABLE.keys()


def test_a_baseline_on_both_views_labels_each_by_itself():
    both = with_views(VARIANTS["majority"], VIEWS["both"])
    assert both.label_of == {"x": ("policy", "x"), "x'": ("policy", "x'")}
    assert with_views(VARIANTS["majority"], VIEWS["rephrased"]).label_of == {"x'": ("policy", "x'")}
    assert with_views(VARIANTS["gt"], VIEWS["both"]).label_of == {"x": ("gold", "x"), "x'": ("gold", "x'")}
    assert with_views(VARIANTS["entropy"], VIEWS["both"]).label_of == {}


# ---------------------------------------------------------------- labels and rewards of a step, by hand


def said(*answers: str) -> list[str]:
    return [rf"I say \boxed{{{answer}}}" if answer else "I do not know" for answer in answers]


# Two questions, three rollouts; every source votes for something of its own, "" is no box.
VOTES = {
    ("policy", "x"): ["112", "   "],
    ("policy", "x'"): ["221", "566"],
    ("teacher", "x"): ["322", "6 6"],
    ("teacher", "x'"): ["113", " 55"],
}


def groups_by(voter: str, views: tuple[str, ...]) -> list[Group]:
    """Groups by view, then by question, as a step makes them."""
    groups = []
    for view in views:
        for place, answers in enumerate(VOTES[voter, view]):
            groups.append(group_of([answer.strip() or None for answer in answers], view, place))
    return groups


def labelled(row: Variant, golds: list[str | None]) -> list[Group]:
    groups = groups_by("policy", row.policy_views)
    label_groups(row, groups, groups_by("teacher", row.teacher_views), golds)
    return groups


GOLDS = ["2.0", "6"]

# variant -> labels of each view and the rewards of its groups, in the order x then x'
BY_HAND = {
    "I": ({"x": ["2", "6"], "x'": ["1", None]}, [[0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]]),
    "II": ({"x": ["2", "6"]}, [[0, 0, 1], [0, 0, 0]]),
    "III": ({"x": ["1", "5"], "x'": ["2", "6"]}, [[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 1]]),
    "majority": ({"x": ["1", None]}, [[1, 1, 0], [0, 0, 0]]),
    "gt": ({"x": ["2.0", "6"]}, [[0, 0, 1], [0, 0, 0]]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_labels_come_from_the_source_that_the_variant_names(name):
    expected_labels, expected_rewards = BY_HAND[name]
    row = VARIANTS[name]
    groups = labelled(row, GOLDS)
    assert [group.label for group in groups] == [label for view in row.policy_views for label in expected_labels[view]]
    assert [row.reward(group) for group in groups] == expected_rewards


def test_two_questions_of_one_id_are_not_mixed_up():
    """With --keep-bad-rewrites an id may repeat in a step: labels follow the question's place, never its id."""
    row = VARIANTS["II"]
    groups, teacher_groups = groups_by("policy", ("x",)), groups_by("teacher", ("x",))
    for group in groups + teacher_groups:
        group.question_id = "the same"
    label_groups(row, groups, teacher_groups, GOLDS)
    assert [group.label for group in groups] == BY_HAND["II"][0]["x"]


def paid(row: Variant, answers: list[str | None], label: str | None, match: Match = "exact") -> list[float]:
    return row.reward(replace(group_of(answers), label=label, match=match))


def test_gold_compares_as_mathematics_and_pseudo_labels_as_strings():
    answers = [r"\frac{1}{2}", "1/2", "0.5", " 0.5", "2", None]
    assert paid(VARIANTS["majority"], answers, "0.5") == [0, 0, 1, 0, 0, 0]
    assert paid(VARIANTS["majority"], answers, "0.5", "math") == [1, 1, 1, 1, 0, 0]
    group = group_of(answers)
    label_groups(VARIANTS["gt"], [group], [], ["0.5"])
    assert VARIANTS["gt"].reward(group) == [1, 1, 1, 1, 0, 0]
    assert equivalent(r"\frac12", "0.5") and not equivalent("0.5", "2")


def test_a_group_without_a_label_has_no_reward_even_where_nobody_answered():
    assert paid(VARIANTS["II"], [None, "1", None], None) == [0, 0, 0]


def test_the_certainty_of_a_label_is_that_of_the_vote_that_gave_it_and_not_of_the_answers_it_labels():
    def shares(name: str) -> list[float]:
        return [group.label_share for group in labelled(VARIANTS[name], ["2.0", None])]

    assert shares("I") == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0])
    assert shares("II") == pytest.approx([2 / 3, 1])
    assert (shares("gt"), shares("entropy")) == ([1, 0], [0, 0])


def test_a_row_that_asks_a_vote_of_somebody_who_does_not_answer_is_refused():
    with pytest.raises(ValueError, match="by the policy's vote on x', which it does not answer: see policy_views"):
        replace(VARIANTS["majority"], label_of={"x": ("policy", "x'")})
    with pytest.raises(ValueError, match="teacher_views"):
        replace(VARIANTS["I"], label_of={"x": ("teacher", "x")})


# ---------------------------------------------------------------- intrinsic rewards


def test_intrinsic_rewards_go_to_the_rollout_that_they_belong_to():
    """Against a softmax by hand, with micro-batches that sort the rollouts by length."""
    policy, rollouts = PackedLM(tiny_lm()), tiny_rollouts(6)
    batches = micro_batches(rollouts, 25, CPU)
    assert len(batches) > 2 and torch.cat([b.rows for b in batches]).tolist() != list(range(6))
    assign_token_stats(policy, rollouts, 25, CPU, temperature=0.7)

    policy.lm.set_attn_implementation("eager")
    entropy, certainty = [], []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            z = policy.lm(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].double() / 0.7
        p = z.exp() / z.exp().sum(-1, keepdim=True)
        entropy.append(-(p * p.log()).sum(-1).mean().item())
        # KL(uniform || p) + log V, which differs from logsumexp(z) - mean(z) by nothing
        certainty.append(((1 / 257) * ((1 / 257) / p).log()).sum(-1).mean().item() + torch.tensor(257.0).log().item())

    for name, expected in {"entropy": [-e for e in entropy], "self-certainty": certainty}.items():
        group = replace(group_of([None] * 6), rollouts=rollouts)
        assert VARIANTS[name].reward(group) == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- identities of a whole step

PAIRS = [Pair("a", "what", "what", "1"), Pair("b", "how many", "how many", "2")]


def by_question(_: object, prompt: str, g: int) -> str:
    """Answers that depend on the wording and the rollout alone."""
    return {"what": said("1", "1", "7", "3"), "how many": said("5", "", "2", "2"), "who": said("7", "1", "7", "")}[
        prompt
    ][g]


def step_of(variant: str | Variant, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch, **settings: object) -> dict:
    """What one training step hands to the optimizer, and the metrics that come back."""
    seen: dict = {}

    def watched(groups: list[Group], *how: object) -> None:
        assign_denominators(groups, *how)
        for name in ("advantage", "denominator"):
            seen[f"{name}s"] = torch.tensor([getattr(rollout, name) for rollout in rollouts_of(groups)])

    monkeypatch.setattr(train, "assign_denominators", watched)
    run = tiny_run(variant, pairs, ScriptedSampler(by_question), **settings)
    seen["metrics"], records = train.train_step(run, 0)
    seen["samples"] = records["rollouts"]
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("how", ["token", "sequence", "dr-grpo"])
def test_variant_i_with_equal_wordings_is_two_majority_runs(how, monkeypatch):
    one, two = (step_of(name, PAIRS, monkeypatch, loss_agg=how) for name in ("majority", "I"))
    assert one["advantages"].abs().max() > 0.5
    assert torch.equal(two["advantages"], one["advantages"].repeat(2))
    tokens = sum(len(by_question(None, pair.question, g)) + 1 for pair in PAIRS for g in range(4))  # bytes and a stop
    assert one["denominators"].tolist() == [{"token": tokens, "sequence": 8, "dr-grpo": 8 * 16}[how]] * 8
    assert torch.equal(two["denominators"], one["denominators"].repeat(2))
    assert [s["label"] for s in two["samples"]] == [one["samples"][0]["label"]] * 2
    assert [s["rewards"] for s in two["samples"]] == [one["samples"][0]["rewards"]] * 2
    assert two["metrics"]["reward"] == one["metrics"]["reward"]
    # the objective is the sum over views, not their mean
    assert two["metrics"]["grad_norm"] == pytest.approx(2 * one["metrics"]["grad_norm"], rel=1e-5)


def test_variant_i_crosses_the_views_and_majority_on_both_does_not(monkeypatch):
    pairs = [Pair("a", "what", "who", "1")]  # "what" votes 1, "who" votes 7
    crossed = step_of("I", pairs, monkeypatch)["samples"]
    straight = step_of(with_views(VARIANTS["majority"], VIEWS["both"]), pairs, monkeypatch)["samples"]
    assert [(s["view"], s["label"], s["rewards"]) for s in crossed] == [
        ("x", "7", [0, 0, 1, 0]),
        ("x'", "1", [0, 1, 0, 0]),
    ]
    assert [(s["view"], s["label"], s["rewards"]) for s in straight] == [
        ("x", "1", [1, 1, 0, 0]),
        ("x'", "7", [1, 0, 1, 0]),
    ]


def test_answers_are_not_graded_against_another_question(monkeypatch):
    """Prompts lie AAAABBBB and so must samples; ABABABAB was a peer's bug."""
    seen = step_of("gt", PAIRS, monkeypatch)
    what, how_many = [True, True, False, False], [False, False, True, True]  # which of their answers are right
    (sample,) = seen["samples"]  # of the question that this step asks first
    in_order = what + how_many if sample["id"] == "a" else how_many + what
    assert (seen["advantages"] > 0).tolist() == in_order


def test_gold_answers_do_not_change_a_training_without_them(monkeypatch):
    for name in ("I", "II", "III", "majority", "self-certainty", "entropy"):
        with_gold = step_of(name, PAIRS, monkeypatch)
        without = step_of(name, [Pair(p.id, p.question, p.rephrased) for p in PAIRS], monkeypatch)
        assert torch.equal(with_gold["advantages"], without["advantages"])
        assert with_gold["metrics"]["grad_norm"] == without["metrics"]["grad_norm"]
        assert "label_accuracy" not in without["metrics"]


def test_the_same_seed_gives_the_same_step_to_the_bit():
    def weights_after(seed: int) -> dict[str, torch.Tensor]:
        run = tiny_run("entropy", PAIRS, seed=seed)
        train.train_step(run, 0)
        return run.policy.state_dict()

    first, again, other = weights_after(1), weights_after(1), weights_after(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
