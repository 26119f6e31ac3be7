"""Bugs of sampling with vLLM, shown on real vLLM in this process: stale or partial weights, reused prefixes, one seed
for all rollouts, log-probs of another distribution, a disturbed trainer.

CO_REWARDING_TEST_MODEL names a folder with a real model, for the tests that can use one.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FLAGS, ROOT, SMALL, assert_same_run, run_with
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import prepare
import train
from config import UserError, parse
from lm import engine, vllm_engine
from lm.decoding import Capacity
from lm.engine import choose_engine, open_sampler
from lm.model import resolve
from lm.packing import micro_batches
from lm.record import Rollout
from lm.scoring import PackedLM, score
from lm.vllm_engine import VLLMSampler

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
REAL_MODEL = os.environ.get("CO_REWARDING_TEST_MODEL")
LONG = 2 * vllm_engine.CPU_BLOCK + 10  # tokens of a prompt of which vLLM keeps the first two blocks for the next time

# An engine that is closed takes the process groups of all others with it: all live until the process ends.
ENGINES: list[VLLMSampler] = []


@dataclass
class Pair:
    """A model and an engine for it."""

    lm: PreTrainedModel
    sampler: VLLMSampler

    def sample(self, tokens: int = LONG, **changes: Any) -> list[Rollout]:
        """Rollouts on two prompts of random tokens, the same ones at every call."""
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(self.lm.config.vocab_size, (2, tokens), generator=generator).tolist()
        arguments = {"prompts": prompts, "seeds": [100, 200], "n": 4, "temperature": 1.0, "max_tokens": 6} | changes
        with self.sampler.loaded(self.lm) as sample:
            return sample(**arguments)

    def gaps(self, rollouts: list[Rollout], temperature: float = 1.0) -> torch.Tensor:
        """Differences between the sampler's log-probs and those that the trainer computes, of every response token."""
        batches = micro_batches(rollouts, 100_000, torch.device("cpu"))
        stats = score(PackedLM(self.lm, self.sampler.dtype), batches, temperature)
        gaps = [(own.logp - batch.sampler_logp).abs()[batch.mask] for own, batch in zip(stats, batches, strict=True)]
        return torch.cat(gaps)

    @torch.no_grad()
    def change_weights(self, seed: int) -> None:
        """Move every parameter by about a tenth of its size."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.lm.parameters():
            parameter += 0.1 * parameter.square().mean().sqrt() * torch.randn(parameter.shape, generator=generator)


def paired(lm: PreTrainedModel, dtype: torch.dtype = torch.float32, rows: int = 8) -> Pair:
    eos = lm.config.eos_token_id
    sampler = VLLMSampler(lm, [eos], dtype, Capacity(LONG + 20, rows))
    ENGINES.append(sampler)
    return Pair(lm, sampler)


def untied_model() -> PreTrainedModel:
    """A vocabulary that is no round number, a head of its own, biases in the attention."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = Qwen3Config(**sizes, **heads, tie_word_embeddings=False, initializer_range=0.1, eos_token_id=1)
    return Qwen3ForCausalLM(config)


def from_folder(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tied() -> Pair:
    return paired(from_folder(resolve("embedded")))


@pytest.fixture(scope="module")
def untied() -> Pair:
    return paired(untied_model())


@pytest.fixture(scope="module")
def real() -> Pair:
    if REAL_MODEL is None:
        pytest.skip("CO_REWARDING_TEST_MODEL names no folder of a model")
    return paired(from_folder(REAL_MODEL))


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """One of the pairs, with its weights as they were again afterwards."""
    chosen: Pair = request.getfixturevalue(request.param)
    before = {name: tensor.clone() for name, tensor in chosen.lm.state_dict().items()}
    yield chosen
    chosen.lm.load_state_dict(before)


each_model = pytest.mark.parametrize("pair", ["tied", "untied", "real"], indirect=True)
tied_model = pytest.mark.parametrize("pair", ["tied"], indirect=True)


@needs_vllm
@each_model
def test_stale_weights_or_prefixes(pair: Pair) -> None:
    for change in range(3):
        assert pair.gaps(pair.sample()).max() < 1e-4
        pair.change_weights(seed=change)
    assert pair.gaps(pair.sample()).max() < 1e-4


@needs_vllm
@each_model
@pytest.mark.parametrize("dropped", ["_load", "reset_prefix_cache"])
def test_the_test_above_cannot_fail(pair: Pair, dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.sample()
    pair.change_weights(seed=0)
    owner = pair.sampler if dropped == "_load" else pair.sampler.llm
    monkeypatch.setattr(owner, dropped, lambda *_: True)
    assert pair.gaps(pair.sample()).max() > 1e-2


@needs_vllm
def test_bfloat16_is_worse_than_its_own_rounding() -> None:
    pair = paired(from_folder(resolve("embedded")), torch.bfloat16)
    for change in range(3):
        gaps = pair.gaps(pair.sample(n=16))
        assert gaps.mean() < 0.03 and gaps.max() < 0.3
        pair.change_weights(seed=change)


@needs_vllm
@tied_model
def test_the_first_load_is_believed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.sample()
    pair.change_weights(seed=0)
    monkeypatch.setattr(pair.sampler, "_load", lambda lm: None)
    monkeypatch.setattr(pair.sampler, "_checked", False)
    with pytest.raises(UserError, match="family 'qwen3' are .* nats off"):
        pair.sample()


@needs_vllm
@tied_model
@pytest.mark.parametrize("weight", ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_partial_load_passes_in_silence(pair: Pair, weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = {name: tensor for name, tensor in pair.lm.state_dict().items() if name != weight}
    monkeypatch.setattr(pair.lm, "state_dict", lambda: partial)
    with pytest.raises(UserError, match=f"weight {weight}: the model's is missing"):
        pair.sample()


@needs_vllm
def test_weights_that_vllm_refuses_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = paired(untied_model())
    more = pair.lm.state_dict() | {"model.layers.0.self_attn.surprise.weight": torch.zeros(1)}
    monkeypatch.setattr(pair.lm, "state_dict", lambda: more)
    with pytest.raises(UserError, match="did not take the weight model.layers.0.self_attn.surprise.weight"):
        pair.sample()
    monkeypatch.undo()
    assert pair.gaps(pair.sample()).max() < 1e-4


@needs_vllm
@each_model
def test_rollouts_of_a_group_are_copies_or_do_not_repeat(pair: Pair) -> None:
    rollouts = pair.sample()
    responses = [tuple(rollout.response_ids) for rollout in rollouts]
    assert len(set(responses[:4])) > 1 and len(set(responses[4:])) > 1
    assert pair.sample() == rollouts
    alone = pair.sample(prompts=[rollouts[4].prompt_ids], seeds=[200])
    assert [rollout.response_ids for rollout in alone] == [rollout.response_ids for rollout in rollouts[4:]]
    # Rollout g of a group is the one of seed + g.
    third = pair.sample(prompts=[rollouts[4].prompt_ids], seeds=[202], n=1)
    assert third[0].response_ids == rollouts[6].response_ids
    assert [rollout.prompt_ids for rollout in rollouts[::4]] == [rollouts[0].prompt_ids, rollouts[4].prompt_ids]


@needs_vllm
@each_model
@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (0.0, 1.0), (0.7, 0.8)])
def test_log_probs_of_another_distribution(pair: Pair, temperature: float, top_p: float) -> None:
    for rollout in pair.sample(tokens=40, temperature=temperature, n=2, top_p=top_p):
        tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        pair.lm.set_attn_implementation("sdpa")
        logits = pair.lm(tokens).logits[0, len(rollout.prompt_ids) - 1 : -1].detach().double()
        scaled = (logits / (temperature or 1.0)).exp()
        for row in scaled if top_p < 1 else []:
            share = row.sort(descending=True).values.cumsum(0) / row.sum()
            row[row < row.sort(descending=True).values[int((share < top_p).sum())]] = 0
        by_hand = (scaled / scaled.sum(-1, keepdim=True)).log()
        chosen = torch.tensor(rollout.response_ids)
        assert torch.allclose(by_hand[range(len(chosen)), chosen].float(), torch.tensor(rollout.logp), atol=1e-4)
        if temperature == 0:
            assert chosen.tolist() == logits.argmax(-1).tolist()


@needs_vllm
@pytest.mark.parametrize("pair", ["untied"], indirect=True)
def test_cut_and_finished_rollouts_are_confused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [rollout.response_ids for rollout in pair.sample(max_tokens=16, n=8)]
    stop = long[0][2]  # a second stop token, as chat models have
    monkeypatch.setattr(pair.sampler, "eos_ids", [pair.lm.config.eos_token_id, stop])
    rollouts = pair.sample(max_tokens=16, n=8)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout, uncut in zip(rollouts, long, strict=True):
        ends = [i for i, token in enumerate(uncut) if token in pair.sampler.eos_ids]
        assert rollout.finished == bool(ends)
        assert rollout.response_ids == (uncut[: ends[0] + 1] if ends else uncut)
        assert len(rollout.logp) == len(rollout.response_ids)


@needs_vllm
def test_more_prompts_than_fit_into_one_pass_crash() -> None:
    pair = paired(untied_model(), rows=64)
    one_pass = pair.sampler.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = torch.randint(101, (64, LONG), generator=torch.Generator().manual_seed(2)).tolist()
    assert LONG < one_pass < 64 * LONG and one_pass % LONG
    rollouts = pair.sample(prompts=prompts, seeds=range(64), n=1, max_tokens=2)
    assert [rollout.prompt_ids for rollout in rollouts] == prompts
    assert pair.gaps(rollouts).max() < 1e-4


@needs_vllm
@tied_model
def test_a_prompt_is_read_again_for_every_rollout_of_its_group(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Any] = []
    generate = pair.sampler.llm.generate

    def recorded(*arguments: Any, **settings: Any) -> list[Any]:
        outputs[:] = generate(*arguments, **settings)
        return outputs

    monkeypatch.setattr(pair.sampler.llm, "generate", recorded)
    pair.sample(tokens=60)
    assert [output.num_cached_tokens for output in outputs] == [0, 32, 32, 32] * 2


@needs_vllm
@tied_model
def test_sampling_from_an_engine_that_holds_nothing(pair: Pair) -> None:
    with pair.sampler.loaded(pair.lm) as sample:
        with pytest.raises(UserError, match="sampler is in use"), pair.sampler.loaded(pair.lm):
            pass
        assert sample([[5]], [0], n=1, temperature=1.0, max_tokens=1)
    with pytest.raises(UserError, match="outside"):
        sample([[5]], [0], n=1, temperature=1.0, max_tokens=1)


def state_of_the_host() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "environment": dict(os.environ),
    }


@needs_vllm
def test_the_trainer_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    lm = untied_model()
    before = state_of_the_host()
    pair = paired(lm)
    assert state_of_the_host() == before
    pair.sample()
    assert state_of_the_host() == before
    assert lm.training and lm.config._attn_implementation == "sdpa"
    lm(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


@needs_vllm
def test_a_run_does_not_use_vllm_or_does_not_time_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(*arguments: Any, **options: Any) -> Any:
        ENGINES.append(open_sampler(*arguments, **options))
        return ENGINES[-1]

    monkeypatch.setattr(engine, "open_sampler", keep)
    seen = {}
    for sampler in ("vllm", "hf"):
        flags = f"--variant III --sampler {sampler} --steps 2 --questions-per-step 2 --rollouts 2 --eval-every 0"
        run, _ = prepare.prepare(parse(flags.split()), tmp_path)
        seen[sampler], _ = train.train_step(run, 0)
    assert seen["vllm"]["mismatch_max"] < 1e-4 and seen["hf"]["mismatch_max"] < 1e-4
    assert 0 < seen["vllm"]["seconds_sync"] < 60 and "seconds_sync" not in seen["hf"]
    assert seen["vllm"]["seconds_rollout"] > 0 and seen["vllm"]["seconds_teacher"] > 0


@needs_vllm
@tied_model
def test_longer_sequences_than_the_model_knows(pair: Pair) -> None:
    with pytest.raises(UserError, match="10000 tokens together: the model knows 512 positions"):
        open_sampler("vllm", pair.lm, byte_tokenizer(), torch.float32, Capacity(10_000, 8))


def test_a_sampler_is_chosen_in_silence_or_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto") == "hf"
    with pytest.raises(UserError, match=r"not installed; install requirements.txt \(GPU\) or requirements-vllm-cpu"):
        choose_engine("vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine("auto") == "vllm"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine("auto") == "hf"
    assert capsys.readouterr().out.splitlines() == [
        f"sampler: {sampler}"
        for sampler in (
            "transformers (vLLM not installed, no GPU)",
            "vLLM (vLLM installed, a GPU)",
            "transformers (vLLM installed, no GPU)",
        )
    ]


@needs_vllm
def test_two_sharded_processes_with_an_engine_each_do_what_one_does(tmp_path):
    """Weights put together from shards, one tensor at a time, and an engine that ends before the process group does."""
    alone = [sys.executable, "train.py", *SMALL, *FLAGS, "--out", str(tmp_path / "alone"), "--sampler", "vllm"]
    subprocess.run(alone, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert_same_run(run_with(2, tmp_path / "two", "--sampler", "vllm"), tmp_path / "alone")
