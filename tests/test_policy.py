"""policy.py: each test is named after the bug it prevents."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import CPU, EOS, gradients, largest_gap, naive_stats, tiny_lm, tiny_rollouts, twin_of

from config import UserError
from grpo import step_denominator
from lm.model import (
    Objective,
    build_optimizer,
    check_length,
    load,
    optimizer_step,
    resolve,
    score,
    verify_head,
)
from lm.packing import PackedLM, micro_batches, pack
from rollout import Rollout, TransformersSampler

# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "hub_name"),
    [
        ("Qwen3-8B-Base", "Qwen/Qwen3-8B-Base"),
        ("Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B-Base"),
        ("someone/a-model", "someone/a-model"),
    ],
)
def test_bare_names_of_known_families_get_their_owner(name, hub_name):
    assert resolve(name) == hub_name


@pytest.mark.parametrize("name", ["nonsense", "./missing/folder", "/missing/folder", "a/b/c", "~/model"])
def test_nonsense_is_refused_before_anything_is_downloaded(name):
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        resolve(name)


def test_a_folder_is_taken_as_it_is_and_an_empty_one_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == str(tmp_path)


def test_a_broken_folder_is_one_clear_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot load"):
        load(str(tmp_path), CPU)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_without_dropout_in_float32(tmp_path, tokenizer, tied):
    lm = tiny_lm("gpt2", tied, n_embd=32, n_layer=2, n_head=4)
    lm.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, loaded_tokenizer = load(str(tmp_path), CPU)
    assert loaded_tokenizer.eos_token_id == EOS
    assert not any(module.training for module in policy.lm.modules())  # gpt2 drops a tenth when it trains
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    is_tied = policy.lm.get_output_embeddings().weight is policy.lm.get_input_embeddings().weight
    assert is_tied == tied


# ---------------------------------------------------------------- families of models

# What transformers' own configurations call them, with a window shorter than the sequences here where there is one.
RIGHT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 6},
}
REFUSED: dict[str, dict[str, Any]] = {
    "cohere": {},  # multiplies its logits
    "granite": {"logits_scaling": 8.0},  # divides them
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},  # caps them
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4},  # adds a sink to its attention
    "phi": {},  # has a bias in its head
    "falcon": {"alibi": True},  # adds a bias to its attention
    "stablelm": {},  # does not pass on what packed attention needs
    "mamba": {"state_size": 4},  # has no attention that could be cut between sequences
}


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_that_is_accepted_is_sampled_and_scored_alike(family):
    """Sampler, packed scoring and the family's own attention agree, past its sliding window."""
    lm = tiny_lm(family, **RIGHT[family])
    policy = PackedLM(lm)
    verify_head(policy, family)
    with TransformersSampler([EOS]).holding(lm) as sample:
        rollouts = sample([[5, 6, 7], [8] * 9, [9]], [1, 2, 3], n=1, temperature=0.7, max_tokens=12)
    assert any(len(rollout.response_ids) > 10 for rollout in rollouts)
    (stats,) = score(policy, [pack(rollouts, range(3), CPU)], 0.7)
    lm.set_attn_implementation("eager")
    for row, rollout in enumerate(rollouts):
        with torch.no_grad():
            own = naive_stats(lm, rollout, 0.7)[0]
        assert rollout.logp == pytest.approx(own.tolist(), abs=1e-4)
        assert stats.logp[row, : len(own)].tolist() == pytest.approx(own.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_packing_gets_wrong_is_refused_by_name(family):
    policy = PackedLM(tiny_lm(family, **REFUSED[family]))
    with pytest.raises(UserError, match=f"family '{family}'"):
        verify_head(policy, family)


def test_a_response_past_the_positions_that_a_model_knows_is_refused():
    check_length(tiny_lm(), 256)
    with pytest.raises(UserError, match="257 tokens together: the model knows 256 positions; ask for shorter resp"):
        check_length(tiny_lm(), 257)


def test_positions_that_depend_on_the_longest_neighbour_are_refused():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    lm = tiny_lm(max_position_embeddings=16, rope_parameters=rope)
    short, long = (Rollout([5, 6, 7], [8] * n, [0.0] * n, finished=False) for n in (13, 60))
    with torch.no_grad():
        alone, beside = (PackedLM(lm)(pack([short, other], [0, 1], CPU), 1.0).logp[0, :13] for other in (short, long))
    assert not torch.allclose(alone, beside, atol=1e-3), "transformers does it by itself now: drop the check"
    check_length(lm, 16)
    with pytest.raises(UserError, match="knows 16 positions"):
        check_length(lm, 17)


# ---------------------------------------------------------------- one optimizer step

AGGREGATIONS = ["token", "sequence", "dr-grpo"]


def setting(how: str, rollouts: list[Rollout], **changes: Any) -> Objective:
    """Two views, the first half of the rollouts and the second."""
    half, denominators = len(rollouts) // 2, []
    for view in (rollouts[:half], rollouts[half:]):
        tokens = sum(len(rollout.response_ids) for rollout in view)
        denominators += [float(step_denominator(how, len(view), tokens, 20))] * len(view)
    objective = Objective(0.7, 0.2, 0.3, 0.0, how, torch.tensor(denominators), 1e9)
    return replace(objective, **changes)


def seen_gradients(
    policy: PackedLM, reference: PackedLM, rollouts: list[Rollout], tokens: int, objective: Objective
) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
    """Gradients that reach the optimizer, metrics, and the number of micro-batches."""
    advantages = torch.linspace(-1.5, 2, len(rollouts))
    batches, seen = micro_batches(rollouts, tokens, CPU), {}

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.update(gradients(policy.lm))

    optimizer = Watching(policy.parameters(), lr=0.0)
    measured = optimizer_step(policy, optimizer, batches, advantages, score(reference, batches, 0.7), objective, 1.0)
    return seen, measured, len(batches)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_gradients_do_not_depend_on_how_the_step_is_split(how):
    """Averaging per-micro-batch means as if they were equal is the bug of the official code and of two peers."""
    rollouts = tiny_rollouts(10, longest=16)
    rollouts = [replace(r, logp=[-4.0] * len(r.logp)) for r in rollouts]
    policy, reference = PackedLM(tiny_lm("qwen3", tied=True)), PackedLM(tiny_lm("qwen3", tied=True, seed=3))
    objective = setting(how, rollouts, tis_cap=2.0)
    splits = [seen_gradients(policy, reference, rollouts, tokens, objective) for tokens in (10_000, 40, 1)]
    assert splits[0][2] == 1 and 2 < splits[1][2] < 10 and splits[2][2] == 10  # micro-batches
    for gradient, measured, _ in splits[1:]:
        assert largest_gap(splits[0][0], gradient) < 1e-5
        assert measured == pytest.approx(splits[0][1], rel=1e-4)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_gradient_of_a_step_is_that_of_the_naive_loss(how):
    """Every sequence alone, whole logits, float64, the loss spelled out."""
    rollouts, lm, reference = tiny_rollouts(6), tiny_lm("qwen2", tied=True), tiny_lm("qwen2", tied=True, seed=3)
    objective = setting(how, rollouts)
    gradient, measured, _ = seen_gradients(PackedLM(lm), PackedLM(reference), rollouts, 50, objective)

    twin, twin_reference, loss, kls, entropies = twin_of(lm), twin_of(reference), 0.0, [], []
    for row, rollout in enumerate(rollouts):
        logp, entropy, _ = naive_stats(twin, rollout, 0.7)
        d = naive_stats(twin_reference, rollout, 0.7)[0].detach() - logp
        k3 = d.exp() - d - 1
        advantage = torch.linspace(-1.5, 2, 6)[row].item()
        per_token = -advantage * (logp - logp.detach()).exp() + 0.3 * k3
        view = rollouts[:3] if row < 3 else rollouts[3:]
        scale = {
            "token": 1 / sum(len(r.response_ids) for r in view),
            "sequence": 1 / len(view) / len(rollout.response_ids),
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


def test_the_stop_token_gets_its_gradient_although_it_is_the_pad_token():
    lm, rollouts = (
        tiny_lm(),
        [Rollout([5, 6], [7, EOS], [0.0] * 2, True), Rollout([5, 6], [8, 9, 10], [0.0] * 3, False)],
    )
    objective = Objective(1.0, 0.2, 0.0, 0.0, "token", torch.tensor([5.0, 5.0]), 1e9)
    policy, seen = PackedLM(lm), {}

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.update(gradients(lm))

    batches = micro_batches(rollouts, 1000, CPU)
    optimizer_step(
        policy, Watching(policy.parameters(), lr=0.0), batches, torch.tensor([1.0, 0.0]), None, objective, 1.0
    )
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
    denominators = torch.tensor([2.0])

    def gradient(tis_cap: float, advantage: float, kl_coef: float) -> dict[str, torch.Tensor]:
        policy, seen = PackedLM(lm), {}

        class Watching(torch.optim.SGD):
            def step(self, closure=None):
                seen.update(gradients(lm))

        batches = micro_batches(rollouts, 1000, CPU)
        objective = Objective(1.0, 0.2, kl_coef, tis_cap, "token", denominators, 1e9)
        scored = score(reference, batches, 1.0)
        optimizer_step(
            policy, Watching(policy.parameters(), lr=0.0), batches, torch.tensor([advantage]), scored, objective, 1.0
        )
        return seen

    plain, kl = gradient(0.0, 1.0, 0.0), gradient(0.0, 0.0, 0.5)
    weighted = gradient(2.0, 1.0, 0.5)
    assert largest_gap({name: 2 * plain[name] + kl[name] for name in plain}, weighted) < 1e-5


# ---------------------------------------------------------------- steps that must not be taken


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(poison):
    policy, rollouts = PackedLM(tiny_lm()), tiny_rollouts(4)
    optimizer, batches = build_optimizer(policy, (0.9, 0.999), 0.01), micro_batches(rollouts, 40, CPU)
    objective = setting("token", rollouts, kl_coef=0.0)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    assert optimizer_step(policy, optimizer, batches, advantages, None, objective, 1e-3)["skipped_steps"] == 0.0
    before = copy.deepcopy((policy.state_dict(), optimizer.state_dict()))

    poisoned = advantages.clone()
    poisoned[2] = poison
    measured = optimizer_step(policy, optimizer, batches, poisoned, None, objective, 5e-3)
    assert measured["skipped_steps"] == 1.0 and not math.isfinite(measured["grad_norm"])
    assert all(p.grad is None for p in policy.parameters())
    weights, state = before
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    for index, entry in state["state"].items():
        assert all(torch.equal(entry[key], now["state"][index][key]) for key in entry)

    assert optimizer_step(policy, optimizer, batches, advantages, None, objective, 1e-3)["skipped_steps"] == 0.0
    assert any(not torch.equal(weights[name], value) for name, value in policy.state_dict().items())


def test_a_long_gradient_is_scaled_down_and_reported_as_it_was():
    policy, rollouts = PackedLM(tiny_lm()), tiny_rollouts(4)
    objective = setting("token", rollouts, kl_coef=0.0)
    whole, measured, _ = seen_gradients(policy, policy, rollouts, 100, objective)
    clipped, again, _ = seen_gradients(policy, policy, rollouts, 100, replace(objective, max_grad_norm=0.01))
    norm = measured["grad_norm"]
    assert norm > 0.1 and again["grad_norm"] == pytest.approx(norm)
    assert largest_gap(whole, {name: g * norm / 0.01 for name, g in clipped.items()}) < 1e-4


def test_the_step_is_adamw_at_the_rate_of_this_step():
    """The first step of AdamW is lr * sign(g), less lr * weight decay of the weight."""
    policy, rollouts = PackedLM(tiny_lm()), tiny_rollouts(4)
    objective = setting("token", rollouts, kl_coef=0.0)
    gradient, _, _ = seen_gradients(policy, policy, rollouts, 100, objective)
    before = {name: p.detach().clone() for name, p in policy.lm.named_parameters()}
    optimizer = build_optimizer(policy, (0.9, 0.999), 0.01)
    batches = micro_batches(rollouts, 100, CPU)
    measured = optimizer_step(policy, optimizer, batches, torch.linspace(-1.5, 2, 4), None, objective, 1e-3)
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
    batches = [pack([replace(rollouts[0], logp=sampled)], [0], CPU)]
    optimizer = build_optimizer(policy, (0.9, 0.999), 0.0)
    objective = Objective(1.0, 0.2, 0.0, 0.0, "token", torch.tensor([3.0]), 1.0)
    measured = optimizer_step(policy, optimizer, batches, torch.tensor([1.0]), None, objective, 0.0)
    assert measured["mismatch_mean"] == pytest.approx(0.3, abs=1e-5)
    assert measured["mismatch_max"] == pytest.approx(0.6, abs=1e-5)
