"""Each optimisation against its naive twin: what is saved must not change what is computed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CPU, EOS, gradients, largest_gap, stopping_lm, tiny_lm, tiny_rollouts, tiny_run, twin_of
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

import metrics
import train
from data import Pair
from grpo import aggregate, token_weights
from lm import packing
from lm.model import Objective, build_optimizer, optimizer_step
from lm.packing import ChunkedHead, PackedLM, micro_batches, pack
from rewards import VARIANTS
from rollout import TransformersSampler

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- the head


def test_the_head_multiplies_three_times_not_four(monkeypatch):
    """Gradients are formed with the logits at hand; a backward pass that computes them again costs a third more."""
    monkeypatch.setattr(packing, "LOGITS_PER_CHUNK", 257 * 8)
    hidden, targets = torch.randn(20, 32, requires_grad=True), torch.arange(20)
    weight = tiny_lm().get_output_embeddings().weight
    with torch.profiler.profile() as profiler:
        ChunkedHead.apply(hidden, weight, targets, 1.0, lambda logp, _: -logp)[0].backward()
    products = sum(event.count for event in profiler.key_averages() if event.key in ("aten::mm", "aten::addmm_"))
    assert products == 3 * 3  # chunks of 8, 8 and 4 tokens


def test_the_gradient_of_the_head_reaches_float32_weights_unrounded(monkeypatch):
    """Summed over chunks in float32 and rounded afterwards, it would have lost what the sum was for."""
    monkeypatch.setattr(packing, "LOGITS_PER_CHUNK", 30 * 8)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8, dtype=torch.bfloat16), torch.randn(30, 8).requires_grad_()
    ChunkedHead.apply(hidden, weight, torch.arange(20), 1.0, lambda logp, _: -logp)[0].backward()
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("training", [False, True])
def test_the_head_holds_the_logits_of_one_chunk_alone(monkeypatch, training):
    """The last chunk's probabilities beside the next one's logits and log-probs: half as much again for nothing."""
    monkeypatch.setattr(packing, "LOGITS_PER_CHUNK", 5000 * 100)
    hidden, weight, tracker = torch.randn(300, 8), torch.randn(5000, 8), MemTracker()
    loss = (lambda logp, _: -logp) if training else None
    with tracker:
        ChunkedHead.apply(hidden, weight, torch.arange(300), 1.0, loss)
    assert tracker.get_tracker_snapshot("peak")[CPU]["Total"] < 2.5 * 4 * packing.LOGITS_PER_CHUNK


def test_scoring_forms_no_gradients():
    batch = pack(tiny_rollouts(4), range(4), CPU)
    with torch.profiler.profile() as profiler, torch.no_grad():
        PackedLM(tiny_lm())(batch, 1.0)
    assert not any(event.key == "aten::addmm_" for event in profiler.key_averages())


@pytest.mark.parametrize("how", ["token", "sequence", "dr-grpo"])
def test_token_weights_add_up_to_the_aggregate(how):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    per_token, denominators = torch.randn(2, 3), torch.tensor([4.0, 7.0])
    expected = sum(
        per_token[b][mask[b]].sum() / denominators[b] / (mask[b].sum() if how == "sequence" else 1) for b in range(2)
    )
    assert torch.allclose(aggregate(per_token, mask, how, denominators), expected)
    assert not token_weights(mask, how, denominators)[0, 2]


# ---------------------------------------------------------------- attention


def reference_varlen(query, key, value, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What torch.nn.attention.varlen says it computes, one sequence at a time with a mask."""
    assert bounds.dtype == torch.int32 and (bounds is bounds_k) and longest == longest_k == int(bounds.diff().max())
    outputs = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left = window_size[0] if window_size[0] >= 0 else end
        seen = (distance >= -window_size[1]) & (distance <= left)
        outputs.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa))
    return torch.cat([output.transpose(0, 1) for output in outputs])


@pytest.mark.parametrize("family, settings", [("qwen3", {}), ("qwen2", {}), ("mistral", {"sliding_window": 3})])
def test_flash_attention_of_variable_length_gets_what_it_expects(monkeypatch, family, settings):
    """A GPU's path on a CPU, with a stand-in for the kernel: bounds, layout, causality and window."""
    batch, seen = pack(tiny_rollouts(5), range(5), CPU), {}
    for flash in (False, True):
        monkeypatch.setattr(packing, "runs_flash", lambda _, flash=flash: flash)
        monkeypatch.setattr(packing, "varlen_attn", reference_varlen)
        lm = tiny_lm(family, **settings)
        loss = PackedLM(lm)(batch, 1.0, lambda logp, _: logp).loss
        loss.backward()
        seen[flash] = loss.item(), gradients(lm)
    assert seen[True][0] == pytest.approx(seen[False][0], rel=1e-5)
    assert largest_gap(seen[True][1], seen[False][1]) < 1e-5


# ---------------------------------------------------------------- rollouts without advantage


def test_leaving_out_rollouts_without_advantage_changes_no_weight():
    rollouts, advantages = tiny_rollouts(8), torch.tensor([1.0, -1.0, 0.0, 0.0, 0.5, 0.0, 0.0, -0.5])
    objective = Objective(1.0, 0.2, 0.0, 0.0, "token", torch.full((8,), 40.0), 1.0)
    weights = []
    for rows in (range(8), advantages.nonzero().flatten().tolist()):
        policy = PackedLM(tiny_lm())
        batches = micro_batches(rollouts, 30, CPU, rows)
        optimizer_step(policy, build_optimizer(policy, (0.9, 0.99), 0.0), batches, advantages, None, objective, 1e-3)
        weights.append({name: p.detach() for name, p in policy.lm.named_parameters()})
    assert largest_gap(*weights) < 1e-5


def test_a_step_without_a_kl_term_trains_on_telling_rollouts_alone(monkeypatch):
    trained = []
    step = train.optimizer_step

    def watched(policy, optimizer, batches, *rest):
        trained.append(sorted(row for batch in batches for row in batch.rows.tolist()))
        return step(policy, optimizer, batches, *rest)

    monkeypatch.setattr(train, "optimizer_step", watched)
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    row = replace(VARIANTS["majority"], kl_coef=0.0, reward=lambda groups: rewards)
    run = tiny_run(row, [Pair(str(i), f"question {i}", None, None, {}) for i in range(2)])
    for reference, expected in ((None, [0, 1, 2, 3]), (run.reference, list(range(8)))):
        run.reference = reference
        train.train_step(run, 0)
        assert trained[-1] == expected
    rewards[0] = [0.0] * 4
    run.reference = None
    train.train_step(run, 0)
    assert trained[-1] == [0]  # the optimizer sees a gradient of 0


# ---------------------------------------------------------------- the sampler


def test_a_sampler_that_drops_finished_rows_says_what_a_single_row_says():
    """Compaction mixed up with the order of rows would give one rollout another's tokens."""
    lm = stopping_lm()
    prompts, seeds = [[5, 6, 7], [8], [9, 10]], [100, 200, 300]
    with TransformersSampler([EOS]).holding(lm) as sample:
        together = sample(prompts, seeds, n=4, temperature=1.0, max_tokens=12)
        alone = [
            sample([prompt], [seed + g], n=1, temperature=1.0, max_tokens=12)[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
            for g in range(4)
        ]
    assert [r.response_ids for r in together] == [r.response_ids for r in alone]
    assert len({len(r.response_ids) for r in together}) > 3
    twin = twin_of(lm)
    for rollout in together:
        sequence = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        logits = twin(sequence).logits[0, len(rollout.prompt_ids) - 1 :]
        expected = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        assert rollout.logp == pytest.approx(expected.tolist(), abs=1e-4)


# ---------------------------------------------------------------- the trace


def test_a_trace_is_written_when_wanted_and_only_then(tmp_path):
    for wanted in (False, True):
        with metrics.tracing(tmp_path / "trace.json", wanted):
            torch.ones(3) @ torch.ones(3)
        assert (tmp_path / "trace.json").exists() == wanted
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


# ---------------------------------------------------------------- the benchmarks

BENCHMARKS = {
    "growth.py": ["--doublings", "1", "--questions", "2", "--repeats", "1", "--hidden", "32"],
    "gpu.py head": ["--tokens", "40", "--hidden", "8", "--vocabulary", "50", "--repeats", "1", "--no-compiled"],
    "gpu.py loop": ["--model", "tiny", "--steps", "2", "--questions", "2", "--response-tokens", "6"],
    "gpu.py training": ["--models", "tiny", "--response-tokens", "20", "--tokens", "800", "--repeats", "1"],
    "step_vs_trl.py": ["--questions", "4", "--rollouts", "2", "--response-tokens", "6", "--steps", "1"],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_on_a_cpu(name):
    """A change of the trainer must not be found out on a rented GPU."""
    if name == "step_vs_trl.py":
        pytest.importorskip("trl")
    file, *subcommand = name.split()
    command = [sys.executable, str(ROOT / "benchmarks" / file), *subcommand, *BENCHMARKS[name]]
    output = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert output.returncode == 0, output.stderr
    assert "| --- |" in output.stdout
