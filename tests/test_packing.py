"""lm/packing.py against its naive twin, one sequence at a time with whole logits: each test is named after the bug it
prevents."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CPU, EOS, gradients, largest_gap, naive_stats, tiny_lm, tiny_rollouts, twin_of

from lm import packing
from lm.packing import micro_batches, pack
from lm.record import Rollout
from lm.scoring import PackedLM

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
    assert batch.pad_index.flatten()[batch.unpad_index].tolist() == list(range(sum(p + r for p, r in lengths)))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 60))
def test_splitting_loses_no_rollout_and_keeps_the_limit(count, limit):
    rollouts = tiny_rollouts(count)
    batches = micro_batches(rollouts, limit, CPU)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(count))
    assert all(batch.input_ids.numel() <= limit or len(batch.rows) == 1 for batch in batches)
    assert sum(int(batch.mask.sum()) for batch in batches) == sum(len(r.response_ids) for r in rollouts)


def test_a_small_last_micro_batch_costs_as_many_launches_as_a_full_one():
    """And none is added to make them even."""
    rollouts = [Rollout([1], [2] * (19 + i % 3), [0.0] * (19 + i % 3), True) for i in range(41)]
    sizes = [batch.input_ids.numel() for batch in micro_batches(rollouts, 210, CPU)]
    assert len(sizes) == -(-sum(map(len, rollouts)) // 210) == 5
    assert max(sizes) - min(sizes) <= 2 * max(map(len, rollouts))


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
    stats = packed(batch, TEMPERATURE)
    (stats.logp * weight[:, : batch.mask.shape[1]]).sum().backward()
    for row, rollout in enumerate(rollouts):
        length = len(rollout.response_ids)
        expected = naive_stats(twin, rollout, TEMPERATURE)
        for stat, twin_stat in zip(stats, expected, strict=True):
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


# ---------------------------------------------------------------- attention


def reference_varlen(query, key, value, cu_seqlens, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What torch.nn.attention.varlen says it computes, one sequence at a time with a mask."""
    assert (
        cu_seqlens.dtype == torch.int32
        and (cu_seqlens is bounds_k)
        and longest == longest_k == int(cu_seqlens.diff().max())
    )
    outputs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left = window_size[0] if window_size[0] >= 0 else end
        seen = (distance >= -window_size[1]) & (distance <= left)
        outputs.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa))
    return torch.cat([output.transpose(0, 1) for output in outputs])


@pytest.mark.parametrize("family, settings", [("qwen3", {}), ("qwen2", {}), ("mistral", {"sliding_window": 3})])
def test_flash_attention_of_variable_length_gets_what_it_expects(monkeypatch, family, settings):
    """A GPU's path on a CPU, with a stand-in for the kernel: cu_seqlens, layout, causality and window."""
    batch, seen = pack(tiny_rollouts(5), range(5), CPU), {}
    for flash in (False, True):
        monkeypatch.setattr(packing, "runs_flash", lambda _, flash=flash: flash)
        monkeypatch.setattr(packing, "varlen_attn", reference_varlen)
        lm = tiny_lm(family, **settings)
        loss = PackedLM(lm)(batch, 1.0).logp.sum()
        loss.backward()
        seen[flash] = loss.item(), gradients(lm)
    assert seen[True][0] == pytest.approx(seen[False][0], rel=1e-5)
    assert largest_gap(seen[True][1], seen[False][1]) < 1e-5
