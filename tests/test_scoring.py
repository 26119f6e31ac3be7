"""lm/scoring.py against naive twins with whole logits: each test is named after the bug it prevents."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import CPU, VOCABULARY, tiny_lm, tiny_rollouts
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm import scoring
from lm.packing import pack
from lm.scoring import ChunkedHead, PackedLM

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = 0.7

# ---------------------------------------------------------------- the chunked head


def naive_head(hidden, weight, targets, temperature):
    z = hidden @ weight.T / temperature
    logp = z.log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1) - z.mean(-1)


def head_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=dtype).requires_grad_() for n in (11, 13))
    return hidden, weight, torch.randint(13, (11,), generator=generator)


def curved_loss(logp):
    """Of a slope that differs from token to token and depends on the log-prob, as the KL term's does."""
    return (torch.linspace(-1, 2, 11, dtype=logp.dtype) * logp.square()).sum()


@pytest.mark.parametrize("logits_per_chunk", [1, 13, 40, 2**25])  # 1, 1, 3 and all 11 tokens at a time
def test_the_chunked_head_is_the_naive_one_forward_and_backward(monkeypatch, logits_per_chunk):
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", logits_per_chunk)
    hidden, weight, targets = head_inputs()
    expected = naive_head(hidden, weight, targets, TEMPERATURE)
    expected_loss = curved_loss(expected[0])
    stats = ChunkedHead.apply(hidden, weight, targets, TEMPERATURE)
    loss = curved_loss(stats[0])
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for one, other in zip(stats, expected, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)
    naive = torch.autograd.grad(3 * expected_loss, (hidden, weight))
    for one, other in zip(torch.autograd.grad(3 * loss, (hidden, weight)), naive, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_the_gradient_of_the_chunked_head_by_finite_differences(monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 40)
    hidden, weight, targets = head_inputs()

    def loss(hidden, weight):
        return curved_loss(ChunkedHead.apply(hidden, weight, targets, TEMPERATURE)[0])

    # the head works in float32: differences over 1e-3 carry an error of about 1e-3
    assert torch.autograd.gradcheck(loss, (hidden, weight), eps=1e-2, atol=2e-2, rtol=1e-2, nondet_tol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 4.0, 12.0, 16.0])
def test_what_a_likely_token_still_has_to_learn_is_not_rounded_away(margin):
    """1 - p of a token whose p is nearly 1: no further off than subtracting its float32 probability from 1."""
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 300), torch.arange(50)
    logits[targets, targets] += margin
    identity = torch.eye(300)  # so that hidden states are logits
    exact = logits.double().requires_grad_()
    naive_head(exact, identity.double(), targets, 1.0)[0].sum().backward()
    hidden = logits.clone().requires_grad_()
    ChunkedHead.apply(hidden, identity, targets, 1.0)[0].sum().backward()
    subtracted = (1 - logits.softmax(-1)[targets, targets] - exact.grad[targets, targets]).abs().max()
    off = (hidden.grad - exact.grad)[targets, targets].abs().max()
    assert off <= max(subtracted.item(), 6e-8)


def test_only_log_probs_carry_a_gradient():
    """An entropy bonus would otherwise be written down, and do nothing."""
    logp, *others = ChunkedHead.apply(*head_inputs(), TEMPERATURE)
    assert logp.requires_grad and not any(stat.requires_grad for stat in others)


class LargestTensor(TorchDispatchMode):
    """Remembers the most entries that any tensor made under it has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return out


def test_logits_of_all_tokens_never_exist_whole(monkeypatch):
    vocabulary, chunk = 2_000, 16
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", chunk * vocabulary)
    lm, rollouts = tiny_lm(vocab_size=vocabulary), tiny_rollouts(60, longest=12)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    batch, packed = pack(rollouts, range(60), CPU), PackedLM(lm)
    embeddings = lm.get_output_embeddings().weight.numel()
    allowed = max(embeddings, chunk * vocabulary)
    assert 3 * allowed < tokens * vocabulary
    with LargestTensor() as largest:
        packed(batch, TEMPERATURE).logp.sum().backward()
    assert embeddings <= largest.entries <= allowed
    with LargestTensor() as largest:  # that the watcher does watch
        lm.set_attn_implementation("eager")
        lm(batch.input_ids)
    assert largest.entries >= batch.input_ids.numel() * vocabulary


def test_bfloat16_compute_keeps_float32_statistics():
    lm, rollouts = tiny_lm("qwen3", tied=True), tiny_rollouts(6)
    batch = pack(rollouts, range(6), CPU)
    exact = PackedLM(lm)(batch, TEMPERATURE)
    rounded = PackedLM(lm, torch.bfloat16)(batch, TEMPERATURE)
    assert rounded.logp.dtype == torch.float32
    assert (exact.logp - rounded.logp).abs().max() < 0.3
    assert ((rounded.entropy >= 0) & (rounded.entropy <= torch.tensor(float(VOCABULARY)).log())).all()
    rounded.logp.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lm.parameters())


MEGABYTES_OF_NEW_SHAPES = """
import ctypes, pathlib, sys
import torch
import lm.scoring

def products(lengths):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for length in lengths:
            torch.randn(length, 256) @ weight
    ctypes.CDLL(None).malloc_trim(0)
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

torch.set_num_threads(1)
weight = torch.randn(256, 512)
before = products(range(1, 101))
print(products(range(101, 601)) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of pages")
def test_memory_grows_with_every_length_that_is_new():
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    command = [sys.executable, "-c", MEGABYTES_OF_NEW_SHAPES]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert float(said.stdout) < 40


def test_the_head_multiplies_four_times_and_not_more(monkeypatch):
    """Logits forward, logits again backward, and the gradients of hidden states and weights."""
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 257 * 8)
    hidden, targets = torch.randn(20, 32, requires_grad=True), torch.arange(20)
    weight = tiny_lm().get_output_embeddings().weight
    with torch.profiler.profile() as profiler:
        ChunkedHead.apply(hidden, weight, targets, 1.0)[0].sum().backward()
    products = sum(event.count for event in profiler.key_averages() if event.key in ("aten::mm", "aten::addmm_"))
    assert products == 4 * 3  # chunks of 8, 8 and 4 tokens


def test_the_gradient_of_the_head_reaches_float32_weights_unrounded(monkeypatch):
    """Summed over chunks in float32 and rounded afterwards, it would have lost what the sum was for."""
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 30 * 8)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8, dtype=torch.bfloat16), torch.randn(30, 8).requires_grad_()
    ChunkedHead.apply(hidden, weight, torch.arange(20), 1.0)[0].sum().backward()
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("training", [False, True])
def test_the_head_holds_the_logits_of_one_chunk_alone(monkeypatch, training):
    """The last chunk's probabilities beside the next one's logits and log-probs: half as much again for nothing."""
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 5000 * 100)
    hidden, weight, tracker = torch.randn(300, 8), torch.randn(5000, 8), MemTracker()
    hidden.requires_grad_(training)
    with tracker:
        logp, *_ = ChunkedHead.apply(hidden, weight, torch.arange(300), 1.0)
        if training:
            logp.sum().backward()
    assert tracker.get_tracker_snapshot("peak")[CPU]["Total"] < 2.5 * 4 * scoring.LOGITS_PER_CHUNK


def test_scoring_forms_no_gradients():
    batch = pack(tiny_rollouts(4), range(4), CPU)
    with torch.profiler.profile() as profiler, torch.no_grad():
        PackedLM(tiny_lm())(batch, 1.0)
    assert not any(event.key == "aten::addmm_" for event in profiler.key_averages())
