"""teacher.py and the teacher's part in a training step: each test is named after the bug it prevents."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm, tiny_run
from torch import nn

import train
from data import Pair
from lm.decoding import TransformersSampler
from lm.model import frozen_copy
from lm.scoring import PackedLM
from rewards import VARIANTS
from teacher import ema_weight, update

# ---------------------------------------------------------------- schedule


def test_the_schedule_is_a_cosine_with_the_endpoints_of_table_5():
    for total in (50, 174, 330):
        assert ema_weight(0, total) == pytest.approx(0.99, abs=1e-12)
        assert ema_weight(total / 4, total) == pytest.approx(0.9914498, abs=1e-7)  # on a line 0.992475
        assert ema_weight(total / 2, total) == pytest.approx(0.99495, abs=1e-12)
        assert ema_weight(total, total) == pytest.approx(0.9999, abs=1e-12)


def test_the_schedule_rises_and_stays_between_its_ends():
    weights = [ema_weight(k, 174, 0.9, 0.999) for k in range(175)]
    assert weights == sorted(weights) and len(set(weights)) == 175
    assert (weights[0], weights[-1]) == pytest.approx((0.9, 0.999))


@pytest.mark.parametrize(("total", "share"), [(174, 0.412), (330, 0.187)])
def test_the_share_of_initial_weights_left_in_the_teacher(total, share):
    """The product of all weights of a run: the schedule is over the run's own steps."""
    assert math.prod(ema_weight(k, total) for k in range(total)) == pytest.approx(share, abs=1e-3)


def test_constant_schedule_and_frozen_teacher():
    assert {ema_weight(k, 10, 0.97, 0.5, "constant") for k in range(11)} == {0.97}
    assert {ema_weight(k, 10, 1.0, 1.0) for k in range(11)} == {1.0}


# ---------------------------------------------------------------- update


def test_the_average_is_weight_times_teacher_plus_rest_times_policy():
    policy, teacher = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        for module, value in ((policy, 1.0), (teacher, 3.0)):
            for parameter in module.parameters():
                parameter.fill_(value)
    update(teacher, policy, 0.75)
    assert [p.tolist() for p in teacher.parameters()] == [[[2.5, 2.5]], [2.5]]
    assert [p.tolist() for p in policy.parameters()] == [[[1.0, 1.0]], [1.0]]


def test_weights_zero_and_one_are_exact_to_the_bit():
    policy, teacher = tiny_lm(seed=1), tiny_lm(seed=2)
    before = copy.deepcopy(teacher.state_dict())
    update(teacher, policy, 1.0)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    update(teacher, policy, 0.0)
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in teacher.state_dict().items())


def test_tied_embeddings_are_averaged_once():
    policy = tiny_lm("qwen3", tied=True, seed=1)
    teacher = frozen_copy(PackedLM(tiny_lm("qwen3", tied=True, seed=2))).lm
    before, target = teacher.get_input_embeddings().weight.clone(), policy.get_input_embeddings().weight
    assert teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    update(teacher, policy, 0.9)
    assert teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    assert torch.allclose(teacher.get_input_embeddings().weight, 0.9 * before + 0.1 * target, atol=1e-7)


def test_buffers_are_copied_and_not_averaged():
    policy, teacher = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    policy.running_mean.fill_(8.0)
    policy.num_batches_tracked.fill_(5)
    update(teacher, policy, 0.99)
    assert teacher.running_mean.tolist() == [8.0, 8.0] and teacher.num_batches_tracked.item() == 5


def test_the_teacher_is_float32_because_bfloat16_rounds_its_motion_away():
    generator = torch.Generator().manual_seed(0)
    policy = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        policy.weight.copy_(policy.weight.bfloat16())  # so that both teachers start at the same place
    teacher, coarse = copy.deepcopy(policy), copy.deepcopy(policy).bfloat16()
    start = teacher.weight.double()
    exact = start
    for _ in range(100):
        with torch.no_grad():
            policy.weight.add_(torch.randn(64, 64, generator=generator), alpha=1e-3)
        for average in (teacher, coarse):
            update(average, policy, 0.999)
        exact = 0.999 * exact + 0.001 * policy.weight.detach().double()
    motion = (exact - start).norm()
    assert (coarse.weight - exact).norm() > 0.9 * motion
    assert (teacher.weight - exact).norm() < 1e-3 * motion


def test_the_teacher_is_a_copy_that_is_never_trained():
    policy = PackedLM(tiny_lm().train())
    teacher = frozen_copy(policy)
    assert {parameter.dtype for parameter in frozen_copy(PackedLM(tiny_lm().bfloat16())).parameters()} == {
        torch.float32
    }
    theirs = {parameter.data_ptr() for parameter in policy.parameters()}
    assert not any(p.requires_grad or p.data_ptr() in theirs for p in teacher.parameters())
    assert not teacher.training and policy.training
    assert all(p.requires_grad for p in policy.parameters())


# ---------------------------------------------------------------- in a training step

PAIRS = [Pair(str(i), "what is it", "which is it", "1") for i in range(3)]


def run_with_rewards(variant: str, **settings: object) -> train.Run:
    """A tiny model boxes no answers, so the rewards here are something else that varies: the rollouts' texts."""
    row = VARIANTS[variant]

    def parity(group):
        return [float(len(rollout.text) % 2) for rollout in group.rollouts]

    return tiny_run(replace(row, reward=parity), PAIRS, **settings)


def test_a_teacher_with_weight_zero_is_the_policy_and_its_kl_exactly_zero():
    run = run_with_rewards("II", ema_start=0.0, ema_schedule="constant")
    for step in range(3):
        seen, _ = train.train_step(run, step)
        assert seen["kl"] == 0.0 and seen["ema_weight"] == 0.0 and seen["grad_norm"] > 0
    assert any((p - q).abs().max() > 0 for p, q in zip(run.policy.parameters(), run.teacher.parameters(), strict=True))


def test_a_step_takes_the_weight_of_its_own_number_in_a_run_of_K():
    run = run_with_rewards("II", steps=10)
    assert [train.train_step(run, step)[0]["ema_weight"] for step in (0, 3)] == [0.99, ema_weight(3, 10)]


def test_a_frozen_teacher_never_changes():
    run = run_with_rewards("II", ema_start=1.0, ema_end=1.0)
    before = copy.deepcopy(run.teacher.state_dict())
    kls = [train.train_step(run, step)[0]["kl"] for step in range(3)]
    assert all(torch.equal(before[name], value) for name, value in run.teacher.state_dict().items())
    assert kls[0] == 0.0 and kls[1] > 0 and kls[2] > kls[1]


def test_the_teacher_moves_before_it_answers_and_before_the_policy_does():
    """The order of a step: policy rollouts, one update towards that same policy, teacher rollouts, optimizer step."""
    events = []

    class Watching(TransformersSampler):
        def loaded(self, lm):
            events.append((lm, lm.get_input_embeddings().weight.clone()))
            return super().loaded(lm)

    run = run_with_rewards("III", sampler=Watching([0]), ema_start=0.5, ema_schedule="constant")
    with torch.no_grad():
        for parameter in run.teacher.parameters():
            parameter.add_(1.0)
    policy_before, teacher_before = (m.lm.get_input_embeddings().weight.clone() for m in (run.policy, run.teacher))
    train.train_step(run, 0)
    (first, policy_sampled), (second, teacher_sampled) = events  # both views in one call per model
    assert first is run.policy.lm and second is run.teacher.lm
    assert torch.equal(policy_sampled, policy_before)
    assert torch.allclose(teacher_sampled, (teacher_before + policy_before) / 2, atol=1e-6)
    assert torch.equal(run.teacher.lm.get_input_embeddings().weight, teacher_sampled)
    assert not torch.equal(run.policy.lm.get_input_embeddings().weight, policy_before)
