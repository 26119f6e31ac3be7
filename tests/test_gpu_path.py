"""What every GPU user runs, as far as a CPU can show it: FSDP over a group of one process, bfloat16 compute, vLLM's GPU
engine where a stub will do. Each test is named after the bug it prevents."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config import UserError
from lm import distributed, vllm_engine
from lm.decoding import Capacity
from lm.packing import as_autocast_would, runs_flash
from lm.vllm_engine import VLLMSampler

ROOT = Path(__file__).resolve().parents[1]

IN_A_GROUP_OF_ONE = """
import json, sys
from functools import partial

import torch
from tiny import gradients, tiny_lm, tiny_rollouts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cosine_similarity

from config import Config
from grpo import optimizer_step
from lm import packing, distributed
from lm.decoding import TransformersSampler
from lm.model import checkpoint_activations, decoder_layers, shard
from lm.packing import micro_batches, pack
from lm.scoring import PackedLM, score
from prepare import build_optimizer

distributed.start()
found = {}
attention, dtypes = packing.packed_attention, []
rollouts = tiny_rollouts(6)
batch = pack(rollouts, range(6), torch.device("cpu"))


def watched(module, query, key, value, *args, **kwargs):
    dtypes.append([str(query.dtype), str(key.dtype), str(value.dtype)])
    return attention(module, query, key, value, *args, **kwargs)


packing.AttentionInterface.register("packed", watched)


def gradient_of(dtype, recompute):
    policy = PackedLM(tiny_lm("qwen3", tied=True), dtype)
    shard(policy, init_device_mesh("cpu", (1,)))
    layers = decoder_layers(policy.lm)
    if recompute:
        checkpoint_activations(policy)
    dtypes.clear()
    policy(batch, 1.0).logp.sum().backward()
    flat = torch.cat([distributed.full_tensor(p.grad).flatten() for p in policy.parameters()])
    return flat, len(layers), [list(each) for each in dtypes]


def after_two_steps(gather_once, recompute):
    policy = PackedLM(tiny_lm("qwen3", tied=True), torch.bfloat16)
    shard(policy, init_device_mesh("cpu", (1,)), gather_once=gather_once)
    if recompute:
        checkpoint_activations(policy)
    gathers = []
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                group.unshard = partial(counted, group, group.unshard, gathers)
    optimizer = build_optimizer(policy, (0.9, 0.999), 0.0)
    for i, rollout in enumerate(rollouts):
        rollout.advantage = 1.0 - i % 2
        rollout.denominator = 6.0
    for _ in range(2):
        batches = [pack(rollouts, rows, torch.device("cpu")) for rows in ((0, 1), (2, 3), (4, 5))]
        score(policy, batches, 1.0)  # gathers, as for the log-probs of the policy that has answered
        optimizer_step(policy, optimizer, batches, 1e-2, 0.0, Config())
    weights = [distributed.full_tensor(p.detach()) for p in policy.parameters()]
    return torch.cat([weight.flatten() for weight in weights]), len(gathers)


def counted(group, unshard, gathers, *arguments):
    if group.is_sharded:
        gathers.append(group)
    return unshard(*arguments)


each_time, many = after_two_steps(False, False)
once, few = after_two_steps(True, False)
recomputed, _ = after_two_steps(True, True)
exact, layers, kept = gradient_of(torch.float32, False)
again, _, twice = gradient_of(torch.float32, True)
rounded, _, seen = gradient_of(torch.bfloat16, True)
print(json.dumps({
    "layers": layers, "kept": len(kept), "recomputed": len(twice), "equal": torch.equal(exact, again), "dtypes": seen,
    "once": torch.equal(each_time, once) and torch.equal(once, recomputed), "gathers": [many, few],
    "cosine": cosine_similarity(exact, rounded, dim=0).item(), "type": type(rounded).__name__,
}))
"""


def in_a_group_of_one(script: str, *arguments: str) -> dict:
    """A process that torchrun might have started; the last line that it prints is JSON."""
    here = Path(__file__).parent
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def group_of_one() -> dict:
    return in_a_group_of_one(IN_A_GROUP_OF_ONE)


def test_recomputation_finds_the_layers_that_fsdp_has_renamed(group_of_one):
    """FSDPQwen3DecoderLayer is no Qwen3DecoderLayer by name: nothing was recomputed on any GPU."""
    assert group_of_one["layers"] == 2
    assert (group_of_one["kept"], group_of_one["recomputed"]) == (2, 4)  # attention once a layer, or twice
    assert group_of_one["equal"]


def test_queries_keys_and_values_are_bfloat16_in_every_layer(group_of_one):
    """One of them in float32, as Qwen3's norms leave it, and flash attention is missed in silence."""
    assert group_of_one["dtypes"] == [["torch.bfloat16"] * 3] * 4


def test_gradients_in_bfloat16_point_where_those_in_float32_do(group_of_one):
    assert group_of_one["cosine"] > 0.99


def test_weights_gathered_once_a_step_are_those_before_the_update(group_of_one):
    assert group_of_one["once"], "the same weights to the bit after two steps"
    many, few = group_of_one["gathers"]
    assert few == 2 * 3 and many > 6 * few, "two steps of three FSDP modules"


LEARNS_IN_BFLOAT16 = """
import json, sys
import train
from config import parse
from store.jsonl import read_rows

flags = ["--compute-dtype", "bfloat16", "--steps", "60", "--eval-every", "0", "--out", sys.argv[1]]
folder = train.train(parse(flags))
rows = read_rows(folder / "metrics.jsonl")
print(json.dumps({
    "accuracy": [row["eval_accuracy"] for row in rows if "eval_accuracy" in row],
    "mismatch_mean": max(row["mismatch_mean"] for row in rows if "reward" in row),
    "mismatch_max": max(row["mismatch_max"] for row in rows if "reward" in row),
}))
"""


@pytest.mark.slow
def test_co_rewarding_II_learns_in_bfloat16_under_fsdp(tmp_path):
    """Float32 on one process is what all other tests train in, and nobody with a GPU."""
    seen = in_a_group_of_one(LEARNS_IN_BFLOAT16, str(tmp_path / "run"))
    assert seen["accuracy"][0] < 0.6 and seen["accuracy"][-1] > 0.75
    assert seen["mismatch_mean"] < 0.05 and 1e-4 < seen["mismatch_max"] < 2


def test_queries_and_keys_that_a_norm_left_in_float32_are_cast_as_autocast_would():
    float32, bfloat16 = torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)
    assert [t.dtype for t in as_autocast_would(float32, bfloat16)] == [torch.float32, torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in as_autocast_would(float32, bfloat16)} == {torch.bfloat16}


def test_attention_that_falls_back_to_the_slow_path_on_a_gpu_is_told():
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with pytest.warns(UserWarning, match="runs padded and slowly on a GPU"):
        assert not runs_flash(on_gpu)
    with warnings.catch_warnings(action="error"):
        assert runs_flash(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))
        assert not runs_flash(torch.zeros(1))


# ---------------------------------------------------------------- vLLM's engine on a GPU, stubbed


class Engine:
    """vLLM's LLM, as far as sleeping and waking go."""

    def __init__(self, error: str | None = None) -> None:
        self.error, self.tags = error, []

    def wake_up(self, tags: list[str]) -> None:
        self.tags += tags
        if self.error and tags == ["kv_cache"]:
            raise RuntimeError(self.error)


def engine_on_a_gpu(monkeypatch: pytest.MonkeyPatch, error: str) -> VLLMSampler:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 10**9, 80 * 10**9))
    sampler = VLLMSampler.__new__(VLLMSampler)
    sampler.llm, sampler.on_gpu, sampler.capacity = Engine(error), True, Capacity(32, 4, 0.5)
    return sampler


def test_an_engine_that_cannot_wake_up_says_which_flag_helps(monkeypatch):
    sampler = engine_on_a_gpu(monkeypatch, "CUDA Error: out of memory at cumem_allocator.cpp:62")
    sampler._wake("weights")
    with pytest.raises(UserError, match=r"2.0 of 80.0 GB are free.*--engine-memory under 0.5.*docs/PERFORMANCE.md"):
        sampler._wake("kv_cache")


def test_another_error_of_an_engine_stays_what_it_is(monkeypatch):
    with pytest.raises(RuntimeError, match="something else"):
        engine_on_a_gpu(monkeypatch, "something else")._wake("kv_cache")


def test_an_engine_asks_the_machine_and_not_the_weights(monkeypatch):
    """Off-loaded weights are on the CPU of a machine whose engine is on its GPU."""
    from tiny import EOS, tiny_lm

    seen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(vllm_engine, "preserve_host_state", lambda on_gpu: warnings.catch_warnings())
    monkeypatch.setattr(VLLMSampler, "_sleep", lambda self: None)
    monkeypatch.setattr(vllm_engine, "start_engine", lambda lm, settings: seen.update(settings))
    VLLMSampler(tiny_lm(), [EOS], torch.bfloat16, Capacity(32, 4, engine_memory=0.4))
    assert seen["enable_sleep_mode"] and seen["gpu_memory_utilization"] == 0.4 and "enforce_eager" not in seen
    assert seen["max_num_seqs"] == 4 and "kv_cache_memory_bytes" not in seen
    VLLMSampler(tiny_lm(), [EOS], torch.bfloat16, Capacity(32, 4, engine_cache_gb=8))
    assert seen["kv_cache_memory_bytes"] == 8e9 and seen["gpu_memory_utilization"] == 0.01  # neighbours hold the rest
    assert seen["max_model_len"] == 256, "of one length, and compiled once for all of them"


def test_an_engine_of_the_same_architecture_has_the_same_path(tmp_path, monkeypatch):
    """vLLM keys what it compiles by the path: with a random one every start compiles anew, and the cache grows."""
    from tiny import tiny_lm

    paths = []
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=lambda model, **_: paths.append(model) or Path(model, "config.json"))
    )
    for vocabulary in (100, 100, 101):
        config = json.loads(vllm_engine.start_engine(tiny_lm(vocab_size=vocabulary), {}).read_text())
        assert config["vocab_size"] == vocabulary and config["architectures"] == ["LlamaForCausalLM"]
    assert paths[0] == paths[1] != paths[2]


def test_ranks_still_know_who_is_first_when_an_engine_has_closed_the_group(monkeypatch):
    """Every rank would draw the curves into one file at once."""
    monkeypatch.setenv("RANK", "1")
    assert not torch.distributed.is_initialized() and not distributed.is_rank0()
    monkeypatch.delenv("RANK")
    assert distributed.is_rank0()
