"""packing.py against its naive twin, one sequence at a time with whole logits: each test is named after the bug it
prevents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, EOS, VOCABULARY, gradients, largest_gap, naive_stats, tiny_lm, tiny_rollouts, twin_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm import packing
from lm.packing import ChunkedHead, PackedLM, micro_batches, pack
from rollout import Rollout

TEMPERATURE = 0.7

# ---------------------------------------------------------------- the layout


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=6))
def test_every_response_token_is_predicted_by_the_token_before_it(lengths):
    rollouts = [Rollout(list(range(1, p + 1)), list(range(10, 10 + r)), [-0.5] * r, True) for p, r in lengths]
    batch = pack(rollouts, range(len(rollouts)), CPU)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.response_ids)
        assert batch.mask[row].tolist() == [t < length for t in range(batch.mask.shape[1])]
        assert batch.targets[row, :length].tolist() == rollout.response_ids
        predictors = batch.input_ids[0][batch.predictor_at[row, :length]].tolist()
        assert predictors == [rollout.prompt_ids[-1], *rollout.response_ids[:-1]]
    assert batch.position_ids[0].tolist() == [i for p, r in lengths for i in range(p + r)]
    assert batch.token_at.flatten()[batch.row_at].tolist() == list(range(sum(p + r for p, r in lengths)))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 60))
def test_splitting_loses_no_rollout_and_keeps_the_limit(count, limit):
    rollouts = tiny_rollouts(count)
    batches = micro_batches(rollouts, limit, CPU)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(count))
    assert all(batch.input_ids.numel() <= limit or len(batch.rows) == 1 for batch in batches)
    assert sum(int(batch.mask.sum()) for batch in batches) == sum(len(r.response_ids) for r in rollouts)


def test_the_stop_token_is_inside_the_mask_although_it_is_the_pad_token():
    rollouts = [Rollout([5, 6], [7, 8, 9, EOS], [0.0] * 4, True), Rollout([5], [EOS], [0.0], True)]
    batch = pack(rollouts, [0, 1], CPU)
    assert batch.mask.tolist() == [[True] * 4, [True, False, False, False]]


# ---------------------------------------------------------------- packed == unpacked


def test_packed_statistics_and_gradients_are_those_of_each_sequence_alone(any_lm):
    rollouts, twin = tiny_rollouts(7), twin_of(any_lm)
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    packed = PackedLM(any_lm)
    batch = pack(rollouts, range(7), CPU)
    weights = weight[:, : batch.mask.shape[1]][batch.mask]
    stats = packed(batch, TEMPERATURE, lambda logp, tokens: logp * weights[tokens])
    stats.loss.backward()
    for row, rollout in enumerate(rollouts):
        length = len(rollout.response_ids)
        expected = naive_stats(twin, rollout, TEMPERATURE)
        for stat, twin_stat in zip(stats[:3], expected, strict=True):
            assert torch.allclose(stat[row, :length].double(), twin_stat, atol=2e-5)
            assert not stat[row, length:].any()
        (expected[0] * weight[row, :length]).sum().backward()
    assert largest_gap(gradients(twin), {name: g.double() for name, g in gradients(any_lm).items()}) < 1e-5


def test_neighbours_in_a_micro_batch_do_not_see_each_other():
    packed, rollouts = PackedLM(tiny_lm("qwen3")), tiny_rollouts(4)
    before = packed(pack(rollouts, range(4), CPU), 1.0).logp[2]
    other = tiny_rollouts(4, seed=9)
    rollouts[0], rollouts[1], rollouts[3] = other[0], other[1], other[3]
    after = packed(pack(rollouts, range(4), CPU), 1.0).logp[2]
    length = len(rollouts[2].response_ids)
    assert torch.allclose(before[:length], after[:length], atol=1e-5)


@pytest.mark.parametrize("window", [1, 4, 100])
def test_a_sliding_window_shorter_than_the_sequence_is_not_ignored(window):
    lm, rollouts = tiny_lm("mistral", sliding_window=window), tiny_rollouts(3, longest=12)
    stats, twin = PackedLM(lm)(pack(rollouts, range(3), CPU), 1.0), twin_of(lm)
    for row, rollout in enumerate(rollouts):
        expected = naive_stats(twin, rollout, 1.0)[0]
        assert torch.allclose(stats.logp[row, : len(expected)].double(), expected, atol=2e-5)


# ---------------------------------------------------------------- the chunked head


def naive_head(hidden, weight, targets, temperature):
    z = hidden @ weight.T / temperature
    logp = z.log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1) - z.mean(-1)


def head_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=dtype).requires_grad_() for n in (11, 13))
    return hidden, weight, torch.randint(13, (11,), generator=generator)


def curved_loss(logp, tokens):
    """Of a slope that differs from token to token and depends on the log-prob, as the KL term's does."""
    return torch.linspace(-1, 2, 11, dtype=logp.dtype)[tokens] * logp.square()


@pytest.mark.parametrize("logits_per_chunk", [1, 13, 40, 2**25])  # 1, 1, 3 and all 11 tokens at a time
def test_the_chunked_head_is_the_naive_one_forward_and_backward(monkeypatch, logits_per_chunk):
    monkeypatch.setattr(packing, "LOGITS_PER_CHUNK", logits_per_chunk)
    hidden, weight, targets = head_inputs()
    expected = naive_head(hidden, weight, targets, TEMPERATURE)
    expected_loss = curved_loss(expected[0], slice(None)).sum()
    loss, stats = ChunkedHead.apply(hidden, weight, targets, TEMPERATURE, curved_loss)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for one, other in zip(stats, expected, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)
    naive = torch.autograd.grad(3 * expected_loss, (hidden, weight))
    for one, other in zip(torch.autograd.grad(3 * loss, (hidden, weight)), naive, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_the_gradient_of_the_chunked_head_by_finite_differences(monkeypatch):
    monkeypatch.setattr(packing, "LOGITS_PER_CHUNK", 40)
    hidden, weight, targets = head_inputs()

    def loss(hidden, weight):
        return ChunkedHead.apply(hidden, weight, targets, TEMPERATURE, curved_loss)[0]

    # the head works in float32: differences over 1e-3 carry an error of about 1e-3
    assert torch.autograd.gradcheck(loss, (hidden, weight), eps=1e-2, atol=2e-2, rtol=1e-2, nondet_tol=1e-6)


def test_only_the_loss_carries_a_gradient():
    loss, stats = ChunkedHead.apply(*head_inputs(), TEMPERATURE, curved_loss)
    assert loss.requires_grad and not any(stat.requires_grad for stat in stats)


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
    monkeypatch.setattr(packing, "LOGITS_PER_CHUNK", chunk * vocabulary)
    lm, rollouts = tiny_lm(vocab_size=vocabulary), tiny_rollouts(60, longest=12)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    batch, packed = pack(rollouts, range(60), CPU), PackedLM(lm)
    embeddings = lm.get_output_embeddings().weight.numel()
    allowed = max(embeddings, chunk * vocabulary)
    assert 3 * allowed < tokens * vocabulary
    with LargestTensor() as largest:
        packed(batch, TEMPERATURE, lambda logp, _: logp).loss.backward()
    assert embeddings <= largest.entries <= allowed
    with LargestTensor() as largest:  # that the watcher does watch
        lm.set_attn_implementation("eager")
        lm(batch.input_ids)
    assert largest.entries >= batch.input_ids.numel() * vocabulary


def test_bfloat16_compute_keeps_float32_statistics():
    lm, rollouts = tiny_lm("qwen3", tied=True), tiny_rollouts(6)
    batch = pack(rollouts, range(6), CPU)
    exact = PackedLM(lm)(batch, TEMPERATURE)
    rounded = PackedLM(lm, torch.bfloat16)(batch, TEMPERATURE, lambda logp, _: logp)
    assert rounded.logp.dtype == torch.float32
    assert (exact.logp - rounded.logp).abs().max() < 0.3
    assert ((rounded.entropy >= 0) & (rounded.entropy <= torch.tensor(float(VOCABULARY)).log())).all()
    rounded.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lm.parameters())
