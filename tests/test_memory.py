"""The memory plan against memory that is measured, and against the arithmetic of the paper's own run."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small
from tiny import CPU, tiny_lm
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AttentionInterface, PreTrainedModel

from config import Config, UserError, parse
from grpo import optimizer_step
from lm.model import checkpoint_activations, meta_model
from lm.packing import micro_batches
from lm.record import Rollout
from lm.scoring import PackedLM
from prepare import build_optimizer
from train import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import memory as script

from lm import memory
from lm.memory import Demand, Hardware, Plan

PROMPT, RESPONSE, ROWS = 20, 236, 8
NOT_HERE = ("teacher, reference", "CUDA graphs", "unsharded weights")  # in the step that is measured


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """With each setting in the group that has it."""
    for name, value in settings.items():
        (group,) = (group for group, fields in vars(config).items() if hasattr(fields, name))
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


def setting(**others: object) -> Config:
    return changed(Config(), {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE} | others)


HOST = 1e12
CPU_ALONE = Hardware(0, 0.0, HOST)
MAJORITY, II = Demand(copies=0, sequences=16), Demand(copies=1, sequences=1024)
PLAN = Plan("on", 16384, offload_teacher=False, offload_optimizer=False)
COMPILED = PLAN._replace(compiled=True)


def mid_lm(family: str) -> PreTrainedModel:
    return tiny_lm(
        family, tied=True, vocab_size=500, hidden_size=128, intermediate_size=384, num_hidden_layers=6, head_dim=32
    )


def measured_peak(family: str, checkpointing: bool) -> float:
    """Bytes of all tensors at the fullest moment of the second optimizer step, when AdamW has its moments."""
    policy, tracker = PackedLM(mid_lm(family)), MemTracker()
    if checkpointing:
        checkpoint_activations(policy)
    optimizer = build_optimizer(policy, (0.9, 0.99), 0.01)
    rollouts = [Rollout([5] * PROMPT, [7] * RESPONSE, [-1.0] * RESPONSE, True) for _ in range(ROWS)]
    for i, rollout in enumerate(rollouts):
        rollout.advantage = (-1.0) ** i
        rollout.denominator = float(ROWS * RESPONSE)
    tracker.track_external(policy, optimizer)
    with tracker:
        for step in range(2):
            batches = micro_batches(rollouts, ROWS * (PROMPT + RESPONSE), CPU)
            optimizer_step(policy, optimizer, batches, 1e-4, 0.0, Config())
            if step == 0:
                tracker.reset_mod_stats()
    return float(tracker.get_tracker_snapshot("peak")[CPU]["Total"])


@pytest.mark.parametrize("recompute", ["off", "on"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_plan_is_within_20_percent_of_what_a_step_allocates(family: str, recompute: str) -> None:
    plan = PLAN._replace(activation_checkpointing=recompute, tokens_per_micro_batch=ROWS * (PROMPT + RESPONSE))
    need = memory.bytes_needed(mid_lm(family), setting(), plan, MAJORITY, CPU_ALONE)
    alone = need["while training"] - sum(need[kind] for kind in NOT_HERE)
    assert alone == pytest.approx(measured_peak(family, recompute == "on"), rel=0.2)


@pytest.mark.slow
def test_recomputing_saves_most_of_the_activations() -> None:
    assert measured_peak("qwen3", True) < 0.5 * measured_peak("qwen3", False)


class FlashShape(torch.autograd.Function):
    """What flash attention keeps for its backward pass, without its arithmetic."""

    @staticmethod
    def forward(ctx, query, key, value):  # type: ignore[no-untyped-def]
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def flash_shape(
    _: object, query: Tensor, key: Tensor, value: Tensor, *__: object, **___: object
) -> tuple[Tensor, None]:
    return FlashShape.apply(query, key, value).transpose(1, 2), None


def kept_by_autograd(lm: PreTrainedModel, tokens: int = 64) -> float:
    """Bytes a token that a forward pass in bfloat16 on the meta device saves for its backward pass."""
    AttentionInterface.register("kept", flash_shape)
    bare = meta_model(lm.config, torch.bfloat16)
    bare.set_attn_implementation("kept")
    weights = {tensor.untyped_storage()._cdata for tensor in bare.parameters()}
    saved: dict[int, Tensor] = {}  # by storage; holding the tensors keeps their storages from being reused

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        embedded = bare.get_input_embeddings()(ids)
        output = bare.base_model(inputs_embeds=embedded, position_ids=ids, use_cache=False)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / tokens


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "olmo2", "phi3"])
def test_what_is_planned_of_a_token_is_within_20_percent_of_what_autograd_keeps(family: str) -> None:
    lm = tiny_lm(family, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8)
    assert 8 * memory.kept_of_a_token(lm) == pytest.approx(kept_by_autograd(lm), rel=0.2)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "gemma3_text"])
def test_other_families_that_train_can_be_planned_too(family: str) -> None:
    lm = tiny_lm(family, **({"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}))
    parameters = sum(parameter.numel() for parameter in lm.parameters())
    one = Hardware(1, 80e9, HOST)
    need = memory.bytes_needed(lm, setting(), PLAN, II, one)
    assert need["master weights"] == need["teacher, reference"] == 4 * parameters
    assert 0 < need["unsharded weights"] < 2 * parameters
    kept = memory.bytes_needed(lm, setting(), PLAN._replace(activation_checkpointing="off"), II, one)
    assert kept["activations"] > need["activations"] > 0


FOUR = Hardware(4, script.CARDS["80"], HOST)


@pytest.fixture(scope="module")
def paper_model() -> PreTrainedModel:
    return script.shape_of("Qwen3-8B-Base")


def test_the_papers_run_in_numbers_worked_out_by_hand(paper_model: PreTrainedModel) -> None:
    """8.19e9 parameters on 4 GPUs: 4 bytes of each for weights, gradients and teacher, 8 for AdamW."""
    assert sum(parameter.numel() for parameter in paper_model.parameters()) == 8_190_735_360
    need = memory.bytes_needed(paper_model, Config(), PLAN, II, FOUR)
    quarter = 8_190_735_360 / 4
    for kind, size in (("master weights", 4), ("gradients", 4), ("teacher, reference", 4), ("AdamW", 8)):
        assert need[kind] == size * quarter
    assert need["engine"] == 0.5 * script.CARDS["80"]
    assert need["unsharded weights"] == 2 * (2 * 151936 * 4096 + 4096)
    assert need["activations"] == 16384 * 36 * 4096 * 2


def test_cuda_graphs_and_the_first_checks_copy_are_not_forgotten(paper_model: PreTrainedModel) -> None:
    need = memory.bytes_needed(paper_model, Config(), PLAN, II, FOUR)
    shards = need["master weights"] + need["teacher, reference"]
    assert need["at the first check"] == shards + memory.CUDA_GRAPHS + need["engine"] + 2 * 8_190_735_360
    assert need["while sampling"] == shards + need["AdamW"] + memory.CUDA_GRAPHS + need["engine"]


@pytest.mark.slow
@pytest.mark.parametrize("name", script.SHAPES)
def test_every_cheaper_plan_is_over_the_limit_and_the_chosen_one_under_it(name: str) -> None:
    """Over cards, numbers of GPUs and variants; by a list of all plans that is made here once more."""
    lm = script.shape_of(name)
    for variant, card, n in product(("I", "II", "III"), script.CARDS, script.GPUS):
        config = parse(["--model", name, "--variant", variant])
        demand, hardware = script.demand_of(config), Hardware(n, script.CARDS[card], HOST)
        usable = memory.USABLE * hardware.gpu_bytes
        try:
            chosen = memory.fit(lm, config, demand, hardware)
        except UserError:
            chosen = None
        if chosen:
            assert memory.bytes_needed(lm, config, chosen, demand, hardware)["at most"] <= usable
        costs = {plan: cost for cost, plan in memory.plans_that_fit(lm, config, demand, hardware)}
        assert (chosen is None) == (not costs)
        least = memory.least_engine(lm, config, demand, n)
        for candidate, cost in memory.candidates(config, hardware):
            fitting = [plan for plan in costs if plan._replace(engine_memory=0.0) == candidate]
            if fitting:
                assert cost <= costs[fitting[0]] and costs[fitting[0]] >= costs[chosen]
            else:  # even with the smallest engine it is over the limit
                smallest = candidate._replace(engine_memory=least / hardware.gpu_bytes + 0.01)
                assert memory.bytes_needed(lm, config, smallest, demand, hardware)["at most"] > usable


def test_a_flag_given_by_hand_is_changed(paper_model: PreTrainedModel) -> None:
    by_hand = {"engine_memory": 0.4, "tokens_per_micro_batch": 5000, "activation_checkpointing": "on"}
    plan = memory.fit(paper_model, changed(Config(), by_hand), II, FOUR)
    assert (plan.engine_memory, plan.tokens_per_micro_batch, plan.activation_checkpointing) == (0.4, 5000, "on")
    off = memory.fit(paper_model, changed(Config(), {"fit": "off"}), II, FOUR)
    assert off == COMPILED, "the flags are left alone"
    alone = memory.fit(paper_model, changed(Config(), {"fit": "off"}), II, FOUR._replace(gpus=1))
    assert not alone.gather_once, "which takes memory that nothing was planned for"
    assert memory.fit(paper_model, changed(Config(), {"offload_teacher": True}), II, FOUR).offload_teacher


def test_what_fits_nowhere_says_what_is_short_and_what_would_do(paper_model: PreTrainedModel) -> None:
    with pytest.raises(
        UserError, match=r"on each of 1 GPU of 24 GiB: take \d+ GPUs of 24 GiB, or a --model of about \d"
    ):
        memory.fit(script.shape_of("Qwen2.5-3B"), Config(), II, Hardware(1, script.CARDS["24"], 20e9))
    with pytest.raises(UserError, match=r"needs 2\d\d GiB, and this is a machine of 16 GiB: take a smaller model"):
        memory.fit(paper_model, Config(), II, Hardware(0, 0.0, 16 * 2**30))


def test_off_loading_to_a_host_that_is_too_small_is_chosen(paper_model: PreTrainedModel) -> None:
    one = Hardware(1, script.CARDS["80"], HOST)
    plan = memory.fit(paper_model, Config(), II, one)
    need = memory.bytes_needed(paper_model, Config(), plan, II, one)
    assert plan.offload_optimizer and need["off-loaded, of all GPUs"] == 20 * 8_190_735_360
    with pytest.raises(UserError, match="take 2 GPUs"):
        memory.fit(paper_model, Config(), II, one._replace(host_bytes=100e9))


def test_a_wrong_flag_is_refused_like_by_train() -> None:
    command = [sys.executable, script.__file__, "--model", "embedded", "--rollouts", "1"]
    done = subprocess.run(command, cwd=Path(script.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --rollouts 1"), done.stderr


def test_a_run_that_goes_on_on_other_gpus_keeps_the_plan_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--compile", "off", "--activation-checkpointing", "off"]
    for steps, hardware, share in (("1", Hardware(1, 6e9, HOST), 0.75), ("2", Hardware(4, 80e9, HOST), 0.85)):
        monkeypatch.setattr("lm.memory.this_hardware", lambda hardware=hardware: hardware)
        resumed = ["--resume", "auto"] if steps == "2" else []
        folder = train(small(tmp_path / "run", *flags, "--steps", steps, *resumed))
        assert f"fits {hardware}: engine {share:.2f}" in capsys.readouterr().out
        assert json.loads((folder / "config.json").read_text())["plan"]["engine_memory"] == share
