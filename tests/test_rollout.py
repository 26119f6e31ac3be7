"""rollout.py: each test is named after the bug it prevents."""

from collections import Counter

import pytest
import torch
from tiny import CPU, EOS, VOCABULARY, byte_tokenizer, naive_stats, stopping_lm, tiny_lm, twin_of
from transformers import GenerationConfig, PreTrainedModel

import metrics
from lm.decoding import TransformersSampler, draw, request_seed, uniform_numbers
from lm.model import stop_token_ids
from lm.packing import micro_batches
from lm.record import Rollout
from lm.scoring import PackedLM, score
from rewards import Group, read_answers, vote_of

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
SEEDS = [request_seed(0, 0, i, "x", "policy") for i in range(len(PROMPTS))]


def sample(lm: PreTrainedModel, prompts=PROMPTS, seeds=SEEDS, n=3, temperature=1.0, max_tokens=10, eos=(EOS,)):
    with TransformersSampler(eos).loaded(lm) as draw:
        return draw(prompts, seeds, n=n, temperature=temperature, max_tokens=max_tokens)


def ids(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.response_ids for rollout in rollouts]


# ---------------------------------------------------------------- seeds


def test_a_rollout_does_not_depend_on_its_neighbours():
    lm = stopping_lm()
    together = sample(lm)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = sample(lm, [prompt], [seed])
        assert ids(alone) == ids(together[3 * i : 3 * i + 3])
        gaps = [
            abs(a - b)
            for one, other in zip(alone, together[3 * i :], strict=False)
            for a, b in zip(one.logp, other.logp, strict=True)
        ]
        assert max(gaps) < 1e-5


def test_left_padding_does_not_change_what_a_short_prompt_gets():
    short, long = [8], [20] * 40
    assert ids(sample(tiny_lm("gpt2"), [short, long], SEEDS[:2])[:3]) == ids(
        sample(tiny_lm("gpt2"), [short], SEEDS[:1])
    )


def test_the_answers_to_one_question_differ_and_equal_questions_do_not_share_them():
    rollouts = sample(tiny_lm(), [PROMPTS[0]] * 2, SEEDS[:2], n=8)
    assert len({tuple(response) for response in ids(rollouts)}) == 16


def test_the_same_seeds_give_the_same_rollouts_and_others_do_not():
    lm = tiny_lm()
    first = sample(lm)
    torch.manual_seed(123)  # the global stream is not used
    assert sample(lm) == first
    assert ids(sample(lm, seeds=[seed + 99 for seed in SEEDS])) != ids(first)


def test_rollouts_of_a_step_of_another_view_and_of_the_teacher_have_other_seeds():
    keys = [
        (s, k, q, v, w)
        for s in (0, 1)
        for k in (0, 1)
        for q in ("1", "11")
        for v in ("x", "x'")
        for w in ("policy", "teacher")
    ]
    seeds = [request_seed(*key) for key in keys]
    assert len({seed // 1000 for seed in seeds}) == len(keys)  # far enough apart for the g that is added
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert request_seed(0, 0, "1", "x", "policy") == seeds[0]


def test_sampling_leaves_the_global_random_stream_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    sample(tiny_lm())
    assert torch.equal(torch.rand(1), expected)


# ---------------------------------------------------------------- the distribution


def test_sampled_frequencies_are_those_of_the_softmax():
    """A chi-square test at temperature 0.7 on nine tokens, one of them impossible."""
    z = torch.tensor([1.0, -1.0, 0.5, 2.0, -float("inf"), 0.0, -0.5, 1.5, -2.0])
    draws = 20_000
    tokens, logp = draw(z.expand(draws, -1), uniform_numbers(range(draws), 1, CPU)[0], 0.7)
    expected = draws * (z / 0.7).softmax(-1)
    counts = torch.bincount(tokens, minlength=9)
    assert counts[4] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001; the seeds are fixed
    assert torch.allclose(logp, (z / 0.7).log_softmax(-1)[tokens])


def test_successive_tokens_are_drawn_independently():
    """A chi-square test on pairs: one uniform number used twice would only ever draw the same token again."""
    draws, z = 20_000, torch.tensor([0.5, -0.5, 0.0, 1.0])
    first, second = (draw(z.expand(draws, -1), u, 1.0)[0] for u in uniform_numbers(range(draws), 2, CPU))
    expected = draws * z.softmax(-1)[:, None] * z.softmax(-1)
    counts = torch.bincount(4 * first + second, minlength=16).view(4, 4)
    assert ((counts - expected) ** 2 / expected).sum().item() < 37.7  # 15 degrees of freedom, p = 0.001


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_scored_distribution_is_the_sampled_one(any_lm, temperature):
    """The trainer's log-probs are the sampler's, and both are those of a naive softmax: at T != 1 a peer's were not."""
    rollouts, twin = sample(any_lm, temperature=temperature), twin_of(any_lm)
    batches = micro_batches(rollouts, 40, CPU)
    for batch, stats in zip(batches, score(PackedLM(any_lm), batches, temperature), strict=True):
        assert (stats.logp - batch.sampler_logp).abs().max() < 1e-4
    for rollout in rollouts:
        assert rollout.logp == pytest.approx(naive_stats(twin, rollout, temperature)[0].tolist(), abs=1e-4)


HOSTILE = GenerationConfig(
    do_sample=True, top_k=2, top_p=0.3, min_p=0.4, temperature=0.1, repetition_penalty=9.0, no_repeat_ngram_size=1,
    suppress_tokens=[3, 4, 5], bad_words_ids=[[6]], max_length=4, eos_token_id=[99, 100], num_beams=2, min_new_tokens=3,
    forced_eos_token_id=7,
)  # fmt: skip


def test_a_models_own_generation_config_does_not_bend_the_distribution():
    lm = stopping_lm()
    plain = sample(lm)
    lm.generation_config = HOSTILE
    assert sample(lm) == plain


def test_greedy_takes_the_likeliest_token_whatever_the_seed():
    lm = tiny_lm()
    (rollout,) = sample(lm, [PROMPTS[0]], [1], n=1, temperature=0.0)
    assert sample(lm, [PROMPTS[0]], [2], n=1, temperature=0.0) == [rollout]
    twin, sequence = twin_of(lm), list(PROMPTS[0])
    for token in rollout.response_ids:
        assert token == twin(torch.tensor([sequence])).logits[0, -1].argmax().item()
        sequence.append(token)
    assert rollout.logp == pytest.approx(naive_stats(twin, rollout, 1.0)[0].tolist(), abs=1e-4)


# ---------------------------------------------------------------- stops and truncation


def test_a_response_ends_with_its_stop_token_also_where_that_is_the_pad_token():
    rollouts = sample(stopping_lm(), n=8)
    finished = [rollout for rollout in rollouts if rollout.finished]
    assert {rollout.response_ids[-1] for rollout in finished} == {EOS}
    assert all(EOS not in rollout.response_ids[:-1] for rollout in rollouts)
    assert len({len(rollout.response_ids) for rollout in finished}) > 3
    assert all(len(rollout.logp) == len(rollout.response_ids) for rollout in rollouts)


def test_truncation_is_marked_and_counted():
    rollouts = sample(stopping_lm(), n=8, max_tokens=4)
    cut = [rollout for rollout in rollouts if rollout.response_ids[-1] != EOS]
    assert 0 < len(cut) < len(rollouts)
    assert all(len(rollout.response_ids) == 4 for rollout in cut)
    assert all(rollout.finished == (rollout not in cut) for rollout in rollouts)
    read_answers(rollouts, byte_tokenizer())
    group = Group(0, "0", "x", rollouts, [], vote_of(rollouts, "exact"), "exact")
    assert metrics.STATISTICS["truncated"]([group]) == len(cut) / len(rollouts)


def test_a_stop_token_as_the_last_token_allowed_is_no_truncation():
    (rollout,) = sample(stopping_lm(logit=60.0), [[5]], [1], n=1, max_tokens=1)
    assert rollout.response_ids == [EOS] and rollout.finished


def test_every_stop_token_stops():
    """A chat model's generation config names stop tokens that its tokenizer does not know."""
    everything = tuple(range(0, VOCABULARY, 4))
    rollouts = sample(tiny_lm(), n=8, eos=everything)
    ends = Counter(rollout.response_ids[-1] for rollout in rollouts if rollout.finished)
    assert len(ends) > 3 and set(ends) <= set(everything)
    assert not any(set(rollout.response_ids[:-1]) & set(everything) for rollout in rollouts)


def test_stop_tokens_are_gathered_from_all_who_name_them(tokenizer):
    lm = tiny_lm()
    lm.config.eos_token_id, lm.generation_config.eos_token_id = 7, [9, EOS]
    assert stop_token_ids(lm, tokenizer) == [EOS, 7, 9]
    lm.config.eos_token_id, lm.generation_config = None, None
    assert stop_token_ids(lm, tokenizer) == [EOS]


# ---------------------------------------------------------------- the model is handed back as it was


def test_the_model_is_handed_back_as_it_was_also_after_an_exception():
    lm = tiny_lm()
    PackedLM(lm)
    lm.train()
    lm.generation_config = generation = GenerationConfig(top_k=3)
    with TransformersSampler([EOS]).loaded(lm):
        assert not lm.training  # dropout would sample from another distribution than the one scored
    for _ in range(2):
        assert lm.training and lm.generation_config is generation
        assert lm.config._attn_implementation == "packed"
        with pytest.raises(KeyboardInterrupt), TransformersSampler([EOS]).loaded(lm):
            raise KeyboardInterrupt


def test_rollouts_are_those_of_the_models_present_weights():
    lm = tiny_lm()
    before = sample(lm)
    with torch.no_grad():
        lm.get_output_embeddings().weight.neg_()
    assert ids(sample(lm)) != ids(before)
    assert ids(sample(lm)) == ids(sample(lm))


def test_many_rows_are_sampled_in_several_calls_with_the_same_result(monkeypatch):
    lm = stopping_lm()
    whole = sample(lm)
    monkeypatch.setattr("lm.decoding.ROWS_PER_CALL", 5)
    assert ids(sample(lm)) == ids(whole)


def test_a_sampler_that_drops_finished_rows_says_what_a_single_row_says():
    """Compaction mixed up with the order of rows would give one rollout another's tokens."""
    lm = stopping_lm()
    prompts, seeds = [[5, 6, 7], [8], [9, 10]], [100, 200, 300]
    with TransformersSampler([EOS]).loaded(lm) as sample:
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
