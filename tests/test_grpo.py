"""grpo.py: each test is named after the bug it prevents."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, gradients, largest_gap, stopping_lm
from transformers import AutoModelForCausalLM

import grpo
from grpo import aggregate, group_advantages, k3, learning_rate, policy_loss, step_denominator, token_weights
from lm.packing import PackedLM, pack
from rollout import Rollout

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
        return aggregate(per_token, mask, how, step_denominator(how, 3, 7, 9))

    assert torch.autograd.gradcheck(loss, z)


# ---------------------------------------------------------------- aggregation

PER_TOKEN = torch.tensor([[1.0, 2.0, 3.0], [4.0, 50.0, 60.0]])  # 50 and 60 are padding
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(("how", "expected"), [("token", 10 / 4), ("sequence", (2 + 4) / 2), ("dr-grpo", 10 / (2 * 5))])
def test_aggregations_by_hand(how, expected):
    denominator = step_denominator(how, sequences=2, tokens=4, max_tokens=5)
    assert aggregate(PER_TOKEN, MASK, how, denominator).item() == pytest.approx(expected)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_mean_is_that_of_the_step_and_not_of_a_micro_batch(how):
    denominator = step_denominator(how, sequences=2, tokens=4, max_tokens=5)
    parts = [aggregate(PER_TOKEN[i : i + 1], MASK[i : i + 1], how, denominator) for i in range(2)]
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
    loss = aggregate(per_token, mask, how, step_denominator(how, 5, int(mask.sum()), 9))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- learning rate


def test_the_first_step_is_not_wasted_on_a_rate_of_zero():
    assert learning_rate(0, 174, 3e-6, 0.1, "cosine") == pytest.approx(3e-6 / 17)


def test_learning_rate_warms_up_then_follows_a_cosine_to_zero():
    rates = [learning_rate(step, 174, 3e-6, 0.1, "cosine") for step in range(174)]
    assert rates[:17] == pytest.approx([3e-6 * (step + 1) / 17 for step in range(17)])
    assert rates[17] == pytest.approx(3e-6)
    assert rates[17:] == pytest.approx(list(3e-6 * (1 + np.cos(np.pi * np.arange(157) / 157)) / 2))
    assert learning_rate(174, 174, 3e-6, 0.1, "cosine") == pytest.approx(0.0, abs=1e-20)
    assert 0 < rates[-1] < 1e-3 * 3e-6


def test_learning_rate_without_warm_up_or_without_decay():
    assert learning_rate(0, 10, 1.0, 0.0, "cosine") == 1.0
    assert [learning_rate(step, 4, 1.0, 0.5, "constant") for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate(0, 1, 1.0, 0.1, "cosine") == 1.0  # one step: no warm-up to speak of


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
    old_logp, ref_logp = (
        seen[f"{who}_per_token_logps"][:, : batch.mask.shape[1]][batch.mask] for who in ("old", "ref")
    )
    advantage = advantages[:, None].expand_as(batch.mask)[batch.mask]
    weight = token_weights(batch.mask, how, step_denominator(how, 8, int(mask.sum()), 9))[batch.mask]

    def token_loss(logp, tokens):
        alone = logp[:, None]  # each token a row
        surrogate = policy_loss(alone, old_logp[tokens, None], advantage[tokens], torch.ones_like(alone))
        return (surrogate + 0.04 * k3(alone, ref_logp[tokens, None])).squeeze(1) * weight[tokens]

    loss = PackedLM(lm)(batch, 0.7, token_loss).loss
    loss.backward()
    assert loss.item() == pytest.approx(seen["loss"].item(), rel=1e-4)
    assert largest_gap(seen["gradients"], gradients(lm)) < 1e-4
