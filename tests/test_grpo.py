"""grpo.py: each test is named after the bug it prevents."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    CPU,
    EOS,
    ScriptedSampler,
    byte_tokenizer,
    config_with,
    gradients,
    group_of,
    largest_gap,
    naive_stats,
    stopping_lm,
    tiny_lm,
    tiny_rollouts,
    tiny_run,
    twin_of,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import grpo
import train
from answers.equivalence import extract_boxed
from config import Config, Optimisation
from data import Pair
from grpo import (
    aggregate,
    assign_denominators,
    group_advantages,
    k3,
    learning_rate,
    mask_answers,
    optimizer_step,
    policy_loss,
    select_with_gradient,
)
from lm.packing import micro_batches, pack
from lm.record import Rollout
from lm.scoring import PackedLM, score
from metrics import Clock
from prepare import build_optimizer
from rewards import VARIANTS
from rollout import Run

AGGREGATIONS = ["token", "sequence", "dr-grpo"]

# ---------------------------------------------------------------- advantages

# k successes of 8 -> advantage of a success and of a failure, as verl computes it (unbiased, eps 1e-6)
GOLDEN = {
    1: (2.4748667, -0.3535524),
    2: (1.6201817, -0.5400606),
    3: (1.2076124, -0.7245674),
    4: (0.9354126, -0.9354126),
}


@pytest.mark.parametrize("successes", GOLDEN)
def test_advantages_use_the_unbiased_deviation_and_eps_of_the_authors(successes):
    advantages = group_advantages(torch.tensor([1.0] * successes + [0.0] * (8 - successes)), 8)
    success, failure = GOLDEN[successes]
    expected = [success] * successes + [failure] * (8 - successes)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_advantages_with_the_eps_of_trl_are_those_of_trl():
    one = group_advantages(torch.tensor([1.0] + [0.0] * 7), 8, eps=1e-4)
    half = group_advantages(torch.tensor([1.0] * 4 + [0.0] * 4), 8, eps=1e-4)
    assert one[:2].tolist() == pytest.approx([2.4741739, -0.3534534], abs=1e-6)
    assert half[[0, 7]].tolist() == pytest.approx([0.9352394, -0.9352394], abs=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -2.7, 12345.678])
@pytest.mark.parametrize("group_size", [2, 7, 8])
def test_equal_rewards_give_exactly_no_advantage_whatever_their_mean_rounds_to(reward, group_size):
    rewards = torch.tensor([reward] * group_size + [0.0, 1.0] + [0.0] * (group_size - 2))
    advantages = group_advantages(rewards, group_size)
    assert advantages[:group_size].tolist() == [0.0] * group_size
    assert group_advantages(rewards, group_size, scale_by_std=False)[:group_size].tolist() == [0.0] * group_size
    assert advantages[group_size:].abs().min() > 0


def verl_grpo_outcome_advantage(scores: list[float], uid: list[int], eps: float = 1e-6) -> list[float]:
    """What verl 0.9.1's `core_algos.compute_grpo_outcome_advantage` publishes, in float64."""
    by_uid = {u: [score for score, v in zip(scores, uid, strict=True) if v == u] for u in uid}
    return [(s - np.mean(by_uid[u])) / (np.std(by_uid[u], ddof=1) + eps) for s, u in zip(scores, uid, strict=True)]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 9), st.integers(1, 4))
def test_advantages_do_not_mix_groups(data, group_size, groups):
    scores = data.draw(st.lists(st.integers(-8, 8), min_size=groups * group_size, max_size=groups * group_size))
    expected = verl_grpo_outcome_advantage([s / 4 for s in scores], [i // group_size for i in range(len(scores))])
    advantages = group_advantages(torch.tensor(scores) / 4, group_size)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_advantages_without_scaling_are_centred_rewards():
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 0, 3, 1, 1, 1]), 4, scale_by_std=False)
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25, 1.5, -0.5, -0.5, -0.5]


def test_a_batch_that_is_not_whole_groups_is_refused():
    with pytest.raises(ValueError, match="whole groups of 4"):
        group_advantages(torch.zeros(10), 4)


# ---------------------------------------------------------------- KL


def two_distributions(size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a policy and of a reference over a small vocabulary, in float64."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(2, size, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1))


def test_k3_with_its_ratio_upside_down_would_not_be_the_kl_by_enumeration():
    logp, ref_logp = two_distributions()
    p = logp.exp()
    kl = (p * (logp - ref_logp)).sum()
    assert kl > 0.1
    assert (p * k3(logp, ref_logp)).sum().item() == pytest.approx(kl.item(), abs=1e-9)


def test_the_gradient_of_k3_on_policy_is_that_of_kl_from_reference_to_policy():
    _, ref_logp = two_distributions()
    z = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(-1)
    (gradient,) = torch.autograd.grad((logp.exp().detach() * k3(logp, ref_logp)).sum(), z, retain_graph=True)
    (expected,) = torch.autograd.grad((ref_logp.exp() * (ref_logp - logp)).sum(), z)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_k3_golden_values():
    d = torch.tensor([-0.1, 0.1, 1.0, -1.0, 0.0], dtype=torch.float64)
    expected = [0.004837418, 0.005170918, 0.718281828, 0.367879441, 0.0]
    assert k3(torch.zeros_like(d), d).tolist() == pytest.approx(expected, abs=1e-9)


def test_k3_is_never_negative_not_even_by_rounding():
    d = torch.cat([torch.logspace(-9, 1, 500), -torch.logspace(-9, 2, 500)])
    assert (k3(torch.zeros_like(d), d) >= 0).all()


def authors_k3(d: torch.Tensor) -> torch.Tensor:
    """verl's `kl_penalty("low_var_kl")`, which the authors use: two clamps."""
    d = d.clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def test_a_cap_of_10_is_the_authors_clamp_in_value_and_gradient():
    d = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-1e3, 2.6, 2.62, -10.99, -11.01, 1e3])]).double()
    (ours, theirs), gradients_of = (d.clone().requires_grad_() for _ in range(2)), []
    for value, logits in ((k3(torch.zeros_like(d), ours, cap=10.0), ours), (authors_k3(theirs), theirs)):
        gradients_of.append(torch.autograd.grad(value.sum(), logits)[0])
        assert torch.allclose(value, authors_k3(d))
    assert torch.allclose(*gradients_of) and gradients_of[0].isfinite().all()
    assert not gradients_of[0][(d > 2.62) | (d < -11.01)].any() and gradients_of[0][d.abs() < 2].any()


# ---------------------------------------------------------------- clipped surrogate


def test_clipping_acts_off_policy_and_only_against_the_gain():
    ratio = torch.tensor([[1.5], [0.5], [1.1], [1.5], [0.5], [0.9]], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    loss = policy_loss(logp, torch.zeros_like(ratio), advantages, torch.ones_like(ratio), clip=0.2)
    loss.sum().backward()
    assert loss.squeeze(1).tolist() == pytest.approx([-1.2, -0.5, -1.1, 1.5, 0.8, 0.9])
    # a clipped token has no gradient; the others have d/dlogp (-A ratio) = -A ratio
    assert logp.grad.squeeze(1).tolist() == pytest.approx([0.0, -0.5, -1.1, 1.5, 0.0, 0.9])


def test_on_policy_the_gradient_is_minus_the_advantage_although_the_ratio_is_one():
    logp = torch.randn(3, 4, requires_grad=True)
    advantages, mask = torch.tensor([1.0, -2.0, 0.0]), torch.ones(3, 4)
    loss = policy_loss(logp, logp.detach(), advantages, mask)
    loss.sum().backward()
    assert torch.equal(logp.grad, -advantages[:, None].expand(3, 4))


def test_weights_multiply_the_surrogate_and_masked_tokens_are_zero():
    logp = torch.zeros(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    weights = torch.tensor([[0.5, 2.0, 9.0], [1.5, 9.0, 9.0]])
    loss = policy_loss(logp, logp, torch.tensor([1.0, -1.0]), mask, weights=weights)
    assert loss.tolist() == [[-0.5, -2.0, 0.0], [1.5, 0.0, 0.0]]


def test_importance_weights_are_truncated_and_carry_no_gradient():
    logp = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    weights = grpo.truncated_importance_weight(logp, torch.zeros(3), cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)])
    assert not weights.requires_grad


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_gradients_of_the_whole_loss_by_finite_differences(how):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, tokens = randn(3, 4, 5).requires_grad_(), torch.randint(5, (3, 4, 1), generator=generator)
    logp = z.detach().log_softmax(-1).gather(-1, tokens).squeeze(-1)
    old_logp, ref_logp = logp + 0.4 * randn(3, 4), logp + 0.5 * randn(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    advantages, weights = torch.tensor([1.2, -0.7, 0.5], dtype=torch.float64), randn(3, 4).exp()
    ratio = (logp - old_logp).exp()
    assert ((ratio - 1).abs() > 0.21)[mask == 1].any() and ((ratio - 1).abs() < 0.19)[mask == 1].any()

    def loss(z: torch.Tensor) -> torch.Tensor:
        logp = z.log_softmax(-1).gather(-1, tokens).squeeze(-1)
        per_token = policy_loss(logp, old_logp, advantages, mask, 0.2, weights) + 0.1 * k3(logp, ref_logp)
        return aggregate(per_token, mask, how, {"token": 7, "sequence": 3, "dr-grpo": 27}[how])

    assert torch.autograd.gradcheck(loss, z)


# ---------------------------------------------------------------- aggregation

PER_TOKEN = torch.tensor([[1.0, 2.0, 3.0], [4.0, 50.0, 60.0]])  # 50 and 60 are padding
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
TWO = [Rollout([1], [2, 2, 2], [0.0] * 3, False), Rollout([1], [2], [0.0], False)]


def denominators(how: str, rollouts: list[Rollout], max_tokens: int, views: int = 1) -> torch.Tensor:
    """What each rollout is divided by [N], where the first part of them is one view and the second another."""
    size = len(rollouts) // views
    groups = []
    for i, view in enumerate(("x", "x'")[:views]):
        groups.append(replace(group_of([], view), rollouts=rollouts[i * size : (i + 1) * size]))
    assign_denominators(groups, how, max_tokens)
    return torch.tensor([rollout.denominator for rollout in rollouts])


def with_advantages(rollouts: list[Rollout], advantages: torch.Tensor) -> list[Rollout]:
    for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
        rollout.advantage = advantage
    return rollouts


@pytest.mark.parametrize(("how", "expected"), [("token", 10 / 4), ("sequence", (2 + 4) / 2), ("dr-grpo", 10 / (2 * 5))])
def test_aggregations_by_hand(how, expected):
    denominator = denominators(how, TWO, max_tokens=5)
    assert aggregate(PER_TOKEN, MASK, how, denominator).item() == pytest.approx(expected)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_mean_is_that_of_the_step_and_not_of_a_micro_batch(how):
    denominator = denominators(how, TWO, max_tokens=5)
    parts = [aggregate(PER_TOKEN[i : i + 1], MASK[i : i + 1], how, denominator[i : i + 1]) for i in range(2)]
    assert sum(parts).item() == pytest.approx(aggregate(PER_TOKEN, MASK, how, denominator).item())


def test_views_are_averaged_by_themselves_and_added():
    together = aggregate(PER_TOKEN, MASK, "token", torch.tensor([3.0, 1.0]))
    assert together.item() == pytest.approx((1 + 2 + 3) / 3 + 4 / 1)


# verl 0.9.1's loss_agg_mode for each of ours; its "seq-mean-token-sum-norm" takes the longest response allowed
def verl_agg_loss(loss: np.ndarray, mask: np.ndarray, how: str, longest: int) -> float:
    """`core_algos.agg_loss`, in float64."""
    if how == "token":  # token-mean
        return (loss * mask).sum() / mask.sum()
    if how == "sequence":  # seq-mean-token-mean
        return ((loss * mask).sum(-1) / mask.sum(-1)).mean()
    return ((loss * mask).sum(-1) / longest).mean()  # seq-mean-token-sum-norm


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_loss_is_that_of_verls_published_formulas(how):
    """`compute_policy_loss_vanilla` and `kl_penalty("low_var_kl")` where its clamps and its dual clip do not act."""
    rng = np.random.default_rng(0)
    logp, mask = -rng.exponential(2.0, (5, 7)), np.arange(7) < np.array([7, 1, 4, 6, 2])[:, None]
    old_logp, ref_logp = (logp + rng.normal(0, 0.3, logp.shape) for _ in range(2))
    advantages, weights = rng.normal(size=5), rng.exponential(1.0, logp.shape)
    ratio = np.exp(logp - old_logp)
    surrogate = np.maximum(-advantages[:, None] * ratio, -advantages[:, None] * np.clip(ratio, 0.8, 1.2))
    kl = np.exp(ref_logp - logp) - (ref_logp - logp) - 1
    expected = verl_agg_loss(surrogate * weights, mask, how, 9) + 0.1 * verl_agg_loss(kl, mask, how, 9)

    logp, old_logp, ref_logp, advantages, weights, mask = map(
        torch.from_numpy, (logp, old_logp, ref_logp, advantages, weights, mask)
    )
    per_token = policy_loss(logp, old_logp, advantages, mask, 0.2, weights) + 0.1 * k3(logp, ref_logp)
    loss = aggregate(per_token, mask, how, {"token": int(mask.sum()), "sequence": 5, "dr-grpo": 45}[how])
    assert loss.item() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- learning rate


def rate(step: int, total_steps: int, lr: float, warmup: float, schedule: str) -> float:
    return learning_rate(step, total_steps, Optimisation(lr=lr, warmup=warmup, lr_schedule=schedule))


def test_the_first_step_is_not_wasted_on_a_rate_of_zero():
    assert rate(0, 174, 3e-6, 0.1, "cosine") == pytest.approx(3e-6 / 17)


def test_learning_rate_warms_up_then_follows_a_cosine_to_zero():
    rates = [rate(step, 174, 3e-6, 0.1, "cosine") for step in range(174)]
    assert rates[:17] == pytest.approx([3e-6 * (step + 1) / 17 for step in range(17)])
    assert rates[17] == pytest.approx(3e-6)
    assert rates[17:] == pytest.approx(list(3e-6 * (1 + np.cos(np.pi * np.arange(157) / 157)) / 2))
    assert rate(174, 174, 3e-6, 0.1, "cosine") == pytest.approx(0.0, abs=1e-20)
    assert 0 < rates[-1] < 1e-3 * 3e-6


def test_learning_rate_without_warm_up_or_without_decay():
    assert rate(0, 10, 1.0, 0.0, "cosine") == 1.0
    assert [rate(step, 4, 1.0, 0.5, "constant") for step in range(4)] == [
        0.5,
        1.0,
        1.0,
        1.0,
    ]
    assert rate(0, 1, 1.0, 0.1, "cosine") == 1.0  # one step: no warm-up to speak of


# ---------------------------------------------------------------- one optimizer step


def step_config(**settings: Any) -> Config:
    return config_with(**(dict(temperature=0.7, tis_cap=0.0, max_grad_norm=1e9) | settings))


def seen_gradients(
    policy: PackedLM, reference: PackedLM, rollouts: list[Rollout], tokens: int, kl_coef: float, config: Config
) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
    """Gradients that reach the optimizer, metrics, and the number of micro-batches."""
    denominators(config.method.loss_agg, rollouts, 20, views=2)
    batches = micro_batches(with_advantages(rollouts, torch.linspace(-1.5, 2, len(rollouts))), tokens, CPU)
    seen = {}

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.update(gradients(policy.lm))

    optimizer = Watching(policy.parameters(), lr=0.0)
    for batch, stats in zip(batches, score(reference, batches, 0.7), strict=True):
        batch.reference_logp = stats.logp if kl_coef else None
    measured = optimizer_step(policy, optimizer, batches, 1.0, kl_coef, config)
    return seen, measured, len(batches)


def brute_force_steps(run: Run, parts: list[list[list[Rollout]]]) -> dict[str, torch.Tensor]:
    """Eqs. 4-6 in float64, a sequence at a time, whole logits, an AdamW step for each mini-batch: the weights."""
    lm, reference, settings = twin_of(run.policy.lm), twin_of(run.initial.lm), run.config.optimisation
    old_lm = copy.deepcopy(lm)
    rate = learning_rate(0, run.total_steps, settings)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    for part in parts:
        loss = 0.0
        for of_view in part:
            tokens = sum(len(rollout.response_ids) for rollout in of_view)
            for rollout in of_view:
                logp, advantage = naive_stats(lm, rollout, 1.0)[0], rollout.advantage
                d = naive_stats(reference, rollout, 1.0)[0].detach() - logp
                ratio = (logp - naive_stats(old_lm, rollout, 1.0)[0].detach()).exp()
                clipped = ratio.clamp(1 - run.config.method.clip, 1 + run.config.method.clip_high)
                terms = -torch.minimum(ratio * advantage, clipped * advantage) + 0.005 * (d.exp() - d - 1)
                loss = loss + terms.sum() / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return dict(lm.named_parameters())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_steps_on_one_batch_are_those_of_a_float64_brute_force(count):
    """The old log-probs are of the policy that has answered, not of the one that the mini-batch before has left."""
    pairs = [Pair(str(i), "a", "b") for i in range(5)]
    how = dict(rollouts=2, mini_batches=count, clip=0.02, clip_high=0.05, lr=1e-2, kl_coef=0.005, warmup=0.0)
    run = tiny_run("I", pairs, **how)
    rollouts = with_advantages(tiny_rollouts(20), torch.linspace(-1.5, 2, 20))
    views = {"x": rollouts[:10], "x'": rollouts[10:]}
    groups = []
    for view, of_view in views.items():
        groups += [replace(group_of([], view, q), rollouts=of_view[2 * q : 2 * q + 2]) for q in range(5)]
    questions = [range(0, 5)] if count == 1 else [range(0, 2), range(2, 5)] if count == 2 else None
    questions = questions or [range(0, 1), range(1, 3), range(3, 5)]
    parts = [[of_view[2 * q.start : 2 * q.stop] for of_view in views.values()] for q in questions]
    before = {name: weight.detach().clone() for name, weight in run.policy.lm.named_parameters()}
    expected = brute_force_steps(run, parts)
    train.update_policy(run, groups, 0, Clock())
    moved = {name: weight.detach() - before[name] for name, weight in run.policy.lm.named_parameters()}
    wanted = {name: (weight.detach() - before[name]).float() for name, weight in expected.items()}
    assert max(step.abs().max() for step in wanted.values()) > 0.9e-2
    # AdamW's step is a quotient: where a gradient is nearly 0 its sign is rounding's, so that most must agree, not all.
    gaps = torch.cat([(moved[name] - wanted[name]).abs().flatten() for name in wanted])
    assert gaps.quantile(0.99) < 1e-5


def test_an_asymmetric_clip_bounds_each_side_by_its_own():
    logp, old, mask = torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2), torch.ones(1, 2)
    up, down = (policy_loss(logp, old, torch.tensor([a]), mask, 0.2, clip_high=0.3) for a in (1.0, -1.0))
    assert up.tolist()[0] == pytest.approx([-1.3, -math.exp(-1)])
    assert down.tolist()[0] == pytest.approx([math.e, 0.8])


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_gradients_do_not_depend_on_how_the_step_is_split(how):
    """Averaging per-micro-batch means as if they were equal is the bug of the official code and of two peers."""
    rollouts = tiny_rollouts(10, longest=16)
    rollouts = [replace(r, logp=[-4.0] * len(r.logp)) for r in rollouts]
    policy, reference = PackedLM(tiny_lm("qwen3", tied=True)), PackedLM(tiny_lm("qwen3", tied=True, seed=3))
    config = step_config(loss_agg=how, tis_cap=2.0)
    splits = [seen_gradients(policy, reference, rollouts, tokens, 0.3, config) for tokens in (10_000, 40, 1)]
    assert splits[0][2] == 1 and 2 < splits[1][2] < 10 and splits[2][2] == 10  # micro-batches
    for gradient, measured, _ in splits[1:]:
        assert largest_gap(splits[0][0], gradient) < 1e-5
        assert measured == pytest.approx(splits[0][1], rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_gradient_of_a_step_is_that_of_the_naive_loss(how, masked):
    """Every sequence alone, whole logits, float64, the loss spelled out; with --mask-answer, without some tokens."""
    rollouts, lm, reference = tiny_rollouts(6), tiny_lm("qwen2", tied=True), tiny_lm("qwen2", tied=True, seed=3)
    for rollout in rollouts if masked else []:
        rollout.untrained = range(
            len(rollout.response_ids) // 2, len(rollout.response_ids) - len(rollout.response_ids) % 2
        )
    config = step_config(loss_agg=how)
    gradient, measured, _ = seen_gradients(PackedLM(lm), PackedLM(reference), rollouts, 50, 0.3, config)

    twin, twin_reference, loss, kls, entropies = twin_of(lm), twin_of(reference), 0.0, [], []
    for row, rollout in enumerate(rollouts):
        logp, entropy, _ = naive_stats(twin, rollout, 0.7)
        d = naive_stats(twin_reference, rollout, 0.7)[0].detach() - logp
        k3 = d.exp() - d - 1
        advantage = torch.linspace(-1.5, 2, 6)[row].item()
        trained = [t for t in range(len(rollout.response_ids)) if t not in rollout.untrained]
        logp, k3, entropy = logp[trained], k3[trained], entropy[trained]
        per_token = -advantage * (logp - logp.detach()).exp() + 0.3 * k3
        view = rollouts[:3] if row < 3 else rollouts[3:]
        scale = {
            "token": 1 / sum(len(r.response_ids) - len(r.untrained) for r in view),
            "sequence": 1 / len(view) / max(len(trained), 1),
            "dr-grpo": 1 / len(view) / 20,
        }[how]
        loss = loss + per_token.sum() * scale
        kls, entropies = [*kls, *k3.tolist()], [*entropies, *entropy.tolist()]
    loss.backward()
    assert largest_gap(gradients(twin), {name: g.double() for name, g in gradient.items()}) < 1e-5
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients(twin).values()))
    assert measured["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert measured["kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert measured["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE that has learnt `d{1`, `}.` and the like: its tokens reach over the ends of a box."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    texts = [f"so é{i} \\boxed{{{i}}}. Next \\boxed{{{i}}}." for i in range(10, 40)] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@given(st.text("ab {}\\é.17", max_size=12), st.text("17{}é", max_size=4), st.text("b }é.1", max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_mask_of_characters_misses_tokens_that_reach_over_the_ends_of_the_box(before, answer, after, merges):
    tokenizer = merging_tokenizer() if merges else byte_tokenizer()
    text = f"{before}\\boxed{{{answer}}}{after}"
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    rollout = Rollout([1], ids, [0.0] * len(ids), True, text=text, answer=extract_boxed(text))
    mask_answers([rollout], tokenizer)
    if rollout.answer is None:
        assert not rollout.untrained
        return
    box = text.rindex(f"\\boxed{{{rollout.answer}}}")
    wanted = set(range(box, box + len(f"\\boxed{{{rollout.answer}}}")))
    starts = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
    touching = [i for i, (start, stop) in enumerate(starts) if wanted & set(range(start, stop))]
    assert list(rollout.untrained) == touching, "the stop token and all others stay"


def test_a_micro_batch_of_nothing_but_answers_breaks_the_step():
    rollouts = with_advantages(tiny_rollouts(4), torch.ones(4))
    for rollout in rollouts:
        rollout.untrained = range(len(rollout.response_ids))
    assert denominators("token", rollouts, 20).tolist() == [1.0] * 4
    policy = PackedLM(tiny_lm())
    optimizer = build_optimizer(policy, (0.9, 0.999), 0.0)
    measured = optimizer_step(policy, optimizer, micro_batches(rollouts, 50, CPU), 1e-3, 0.0, step_config())
    assert measured["grad_norm"] == 0 and measured["skipped_steps"] == 0


def test_masked_answers_move_the_policy_or_rewards_do_not_see_them():
    """Two wrong of four: with the mask the tokens before the box alone move, and rewards are those without it."""
    said = ["so 4 \\boxed{4}", "so 4 \\boxed{4}", "so 4 \\boxed{5}", "so 4 \\boxed{6}"]
    seen = {}
    for mask in (False, True):
        run = tiny_run("gt", [Pair("a", "2+2", gold="4")], ScriptedSampler(lambda _, __, g: said[g]), mask_answer=mask)
        measured, _ = train.train_step(run, 0)
        seen[mask] = measured
    assert seen[True]["reward"] == seen[False]["reward"] == 0.5
    assert 0 < seen[True]["grad_norm"] != seen[False]["grad_norm"]


def test_the_stop_token_gets_its_gradient_although_it_is_the_pad_token():
    lm, rollouts = (
        tiny_lm(),
        [Rollout([5, 6], [7, EOS], [0.0] * 2, True), Rollout([5, 6], [8, 9, 10], [0.0] * 3, False)],
    )
    policy, seen = PackedLM(lm), {}

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.update(gradients(lm))

    assert denominators("token", rollouts, 20).tolist() == [5.0, 5.0]
    batches = micro_batches(with_advantages(rollouts, torch.tensor([1.0, 0.0])), 1000, CPU)
    optimizer = Watching(policy.parameters(), lr=0.0)
    optimizer_step(policy, optimizer, batches, 1.0, 0.0, step_config(temperature=1.0))
    twin = twin_of(lm)
    (-naive_stats(twin, rollouts[0], 1.0)[0].sum() / 5).backward()  # log p(7) + log p(stop)
    assert largest_gap(gradients(twin), {name: g.double() for name, g in seen.items()}) < 1e-5
    # the step makes the stop token likelier: its row of the head moves along the hidden state that predicts it
    with torch.no_grad():
        hidden = twin.base_model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
    assert seen["lm_head.weight"][EOS].double() @ hidden < -0.1


def test_importance_weights_correct_the_surrogate_but_not_the_kl():
    rollouts = [Rollout([5, 6], [7, 8], [-100.0, -100.0], False)]  # ratio far over the cap: the weight is the cap
    lm, reference = tiny_lm(), PackedLM(tiny_lm(seed=3))

    def gradient(tis_cap: float, advantage: float, kl_coef: float) -> dict[str, torch.Tensor]:
        policy, seen = PackedLM(lm), {}

        class Watching(torch.optim.SGD):
            def step(self, closure=None):
                seen.update(gradients(lm))

        denominators("token", rollouts, 20)
        (batch,) = micro_batches(with_advantages(rollouts, torch.tensor([advantage])), 1000, CPU)
        batch.reference_logp = score(reference, [batch], 1.0)[0].logp
        config = step_config(temperature=1.0, tis_cap=tis_cap)
        optimizer_step(policy, Watching(policy.parameters(), lr=0.0), [batch], 1.0, kl_coef, config)
        return seen

    plain, kl = gradient(0.0, 1.0, 0.0), gradient(0.0, 0.0, 0.5)
    weighted = gradient(2.0, 1.0, 0.5)
    assert largest_gap({name: 2 * plain[name] + kl[name] for name in plain}, weighted) < 1e-5


# ---------------------------------------------------------------- steps that must not be taken


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(poison):
    policy, rollouts = PackedLM(tiny_lm()), tiny_rollouts(4)
    optimizer = build_optimizer(policy, (0.9, 0.999), 0.01)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    denominators("token", rollouts, 20, views=2)

    def step(advantages: torch.Tensor, rate: float) -> dict[str, float]:
        batches = micro_batches(with_advantages(rollouts, advantages), 40, CPU)
        return optimizer_step(policy, optimizer, batches, rate, 0.0, step_config())

    assert step(advantages, 1e-3)["skipped_steps"] == 0.0
    before = copy.deepcopy((policy.state_dict(), optimizer.state_dict()))

    poisoned = advantages.clone()
    poisoned[2] = poison
    measured = step(poisoned, 5e-3)
    assert measured["skipped_steps"] == 1.0 and not math.isfinite(measured["grad_norm"])
    assert all(p.grad is None for p in policy.parameters())
    weights, state = before
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    for index, entry in state["state"].items():
        assert all(torch.equal(entry[key], now["state"][index][key]) for key in entry)

    assert step(advantages, 1e-3)["skipped_steps"] == 0.0
    assert any(not torch.equal(weights[name], value) for name, value in policy.state_dict().items())


def test_a_long_gradient_is_scaled_down_and_reported_as_it_was():
    policy, rollouts = PackedLM(tiny_lm()), tiny_rollouts(4)
    whole, measured, _ = seen_gradients(policy, policy, rollouts, 100, 0.0, step_config())
    clipped, again, _ = seen_gradients(policy, policy, rollouts, 100, 0.0, step_config(max_grad_norm=0.01))
    norm = measured["grad_norm"]
    assert norm > 0.1 and again["grad_norm"] == pytest.approx(norm)
    assert largest_gap(whole, {name: g * norm / 0.01 for name, g in clipped.items()}) < 1e-4


def test_the_step_is_adamw_at_the_rate_of_this_step():
    """The first step of AdamW is lr * sign(g), less lr * weight decay of the weight."""
    policy, rollouts = PackedLM(tiny_lm()), tiny_rollouts(4)
    gradient, _, _ = seen_gradients(policy, policy, rollouts, 100, 0.0, step_config())
    before = {name: p.detach().clone() for name, p in policy.lm.named_parameters()}
    optimizer = build_optimizer(policy, (0.9, 0.999), 0.01)
    batches = micro_batches(rollouts, 100, CPU)  # with the advantages and denominators of before
    measured = optimizer_step(policy, optimizer, batches, 1e-3, 0.0, step_config())
    assert measured["lr"] == 1e-3 and "kl" not in measured
    for name, parameter in policy.lm.named_parameters():
        clear = gradient[name].abs() > 1e-5  # well over AdamW's eps of 1e-8
        expected = before[name] * (1 - 1e-3 * 0.01) - 1e-3 * gradient[name].sign()
        assert torch.allclose(parameter[clear], expected[clear], atol=2e-6)


def test_the_gap_between_sampler_and_trainer_is_measured():
    rollouts = [Rollout([5, 6], [7, 8, 9], [0.0] * 3, False)]
    policy = PackedLM(tiny_lm())
    (stats,) = score(policy, [pack(rollouts, [0], CPU)], 1.0)
    sampled = (stats.logp[0] + torch.tensor([0.0, 0.3, -0.6])).tolist()
    batches = [pack([replace(rollouts[0], logp=sampled, advantage=1.0, denominator=3.0)], [0], CPU)]
    optimizer = build_optimizer(policy, (0.9, 0.999), 0.0)
    measured = optimizer_step(policy, optimizer, batches, 0.0, 0.0, step_config(temperature=1.0))
    assert measured["mismatch_mean"] == pytest.approx(0.3, abs=1e-5)
    assert measured["mismatch_max"] == pytest.approx(0.6, abs=1e-5)


# ---------------------------------------------------------------- rollouts without advantage


def test_leaving_out_rollouts_without_advantage_changes_no_weight():
    rollouts = with_advantages(tiny_rollouts(8), torch.tensor([1.0, -1.0, 0.0, 0.0, 0.5, 0.0, 0.0, -0.5]))
    denominators("token", rollouts, 20)
    assert len(select_with_gradient(rollouts)) == 4
    weights = []
    for trained in (rollouts, select_with_gradient(rollouts)):
        policy = PackedLM(tiny_lm())
        batches = micro_batches(trained, 30, CPU)
        optimizer = build_optimizer(policy, (0.9, 0.99), 0.0)
        optimizer_step(policy, optimizer, batches, 1e-3, 0.0, step_config())
        weights.append({name: p.detach() for name, p in policy.lm.named_parameters()})
    assert largest_gap(*weights) < 1e-5


def test_a_step_without_a_kl_term_trains_on_telling_rollouts_alone(monkeypatch):
    trained = []
    step = train.optimizer_step

    def watched(policy, optimizer, batches, *rest, **how):
        trained.append(sorted(bool(advantage) for batch in batches for advantage in batch.advantages))
        return step(policy, optimizer, batches, *rest, **how)

    monkeypatch.setattr(train, "optimizer_step", watched)
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    row = replace(VARIANTS["majority"], kl_coef=0.0, reward=lambda group: rewards[group.place])
    run = tiny_run(row, [Pair(str(i), f"question {i}", None, None, {}) for i in range(2)])
    for kl_coef, expected in ((0.0, [True] * 4), (0.1, [False] * 4 + [True] * 4)):
        run.variant = replace(row, kl_coef=kl_coef)
        train.train_step(run, 0)
        assert trained[-1] == expected
    rewards[0], run.variant = [0.0] * 4, row
    train.train_step(run, 0)
    assert trained[-1] == [False]  # the optimizer sees a gradient of 0


# ---------------------------------------------------------------- other objectives need no other head


def test_a_sequence_level_objective_takes_a_few_lines_and_no_other_head():
    """GSPO (arXiv 2507.18071): the ratio of a whole sequence, to the power of 1 / length, clipped."""
    rollouts, lm, old = tiny_rollouts(6), tiny_lm(), tiny_lm(seed=5)
    advantages, batch = torch.linspace(-1, 2, 6), pack(rollouts, range(6), CPU)
    (old_stats,) = score(PackedLM(old), [batch], 1.0)

    logp = PackedLM(lm)(batch, 1.0).logp  # [B, T]
    length = batch.mask.sum(1)
    log_ratio = ((logp - old_stats.logp) * batch.mask).sum(1) / length  # [B]
    per_sequence = policy_loss(log_ratio[:, None], torch.zeros(6, 1), advantages, torch.ones(6, 1), clip=0.5)
    per_sequence.mean().backward()

    twin, old_twin, losses = twin_of(lm), twin_of(old), []
    for rollout, advantage in zip(rollouts, advantages.double(), strict=True):
        new, before = naive_stats(twin, rollout, 1.0)[0], naive_stats(old_twin, rollout, 1.0)[0].detach()
        ratio = (new.sum() - before.sum()).div(len(new)).exp()
        losses.append(-torch.minimum(advantage * ratio, advantage * ratio.clamp(0.5, 1.5)))
    torch.stack(losses).mean().backward()
    assert largest_gap(gradients(twin), {name: g.double() for name, g in gradients(lm).items()}) < 1e-5
    assert not torch.allclose(log_ratio, torch.zeros(6), atol=0.1)


# ---------------------------------------------------------------- a peer's trainer on the same rollouts

LOSS_TYPE = {"token": "dapo", "sequence": "grpo", "dr-grpo": "dr_grpo"}  # our name -> TRL's


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_loss_and_gradients_are_those_of_trl(how, tmp_path: Path):
    """One step of TRL's own trainer: its rollouts, rewards and advantages, with an old policy and a reference that
    differ from the policy so that clipping and KL act; then ours on the same rollouts."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    generator, seen = torch.Generator().manual_seed(0), {}

    class Watched(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            with torch.no_grad():
                prompt_and_completion = [
                    torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")
                ]
                logp, *_ = self._get_per_token_logps_and_entropies(
                    model, *prompt_and_completion, inputs["completion_ids"].shape[1]
                )
            for key in ("old_per_token_logps", "ref_per_token_logps"):
                inputs[key] = logp + 0.3 * torch.randn(logp.shape, generator=generator)
            seen.update(inputs)
            seen["loss"] = super()._compute_loss(model, inputs)
            return seen["loss"]

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen["gradients"] = gradients(self.model)
            return loss

    def reward(completion_ids, **_):
        rewards = [float(sum(ids) % 3) for ids in completion_ids]
        advantages = group_advantages(torch.tensor(rewards), 4, eps=1e-4)
        seen["advantage_of"] = dict(zip(map(tuple, completion_ids), advantages.tolist(), strict=True))
        return rewards

    stopping_lm().save_pretrained(tmp_path / "lm")  # TRL loads its reference from where the policy came from
    trainer = Watched(
        AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32),
        reward,
        trl.GRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=9,
            beta=0.04,
            use_bias_correction_kl=False,  # by default TRL multiplies the KL term by the ratio
            loss_type=LOSS_TYPE[how],
            temperature=0.7,
            max_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        datasets.Dataset.from_list([{"prompt": "one"}, {"prompt": "another"}] * 4),
        processing_class=byte_tokenizer(),
    )
    trainer.train()

    lm, mask = stopping_lm(), seen["completion_mask"].bool()
    rollouts = []
    for row in range(8):
        prompt = seen["prompt_ids"][row][seen["prompt_mask"][row].bool()].tolist()
        response = seen["completion_ids"][row][mask[row]].tolist()
        rollouts.append(Rollout(prompt, response, [0.0] * len(response), finished=True))
    advantages = torch.tensor([seen["advantage_of"][tuple(rollout.response_ids)] for rollout in rollouts])
    assert torch.allclose(advantages, seen["advantages"], atol=1e-6) and advantages.abs().max() > 0.5
    assert len(set(mask.sum(1).tolist())) > 2
    batch = pack(rollouts, range(8), torch.device("cpu"))
    width = batch.mask.shape[1]
    old_logp, ref_logp = (seen[f"{who}_per_token_logps"][:, :width] for who in ("old", "ref"))
    logp = PackedLM(lm)(batch, 0.7).logp
    per_token = policy_loss(logp, old_logp, advantages, batch.mask) + 0.04 * k3(logp, ref_logp)
    loss = aggregate(per_token, batch.mask, how, denominators(how, rollouts, 9))
    loss.backward()
    assert loss.item() == pytest.approx(seen["loss"].item(), rel=1e-4)
    assert largest_gap(seen["gradients"], gradients(lm)) < 1e-4
