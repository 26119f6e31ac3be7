"""The memory plan against memory that is measured, and against the arithmetic of the paper's own run."""

from dataclasses import replace

import pytest
import torch
from test_policy import RIGHT
from tiny import CPU, tiny_lm
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from config import Config
from grpo import build_optimizer, optimizer_step
from lm.model import Objective, checkpoint_activations
from lm.packing import Rollout, micro_batches
from lm.scoring import PackedLM
from rewards import VARIANTS
from tools import plan

PROMPT, RESPONSE, ROWS = 20, 236, 8


def setting(**memory: object) -> Config:
    config = Config()
    return replace(
        config,
        data=replace(config.data, max_prompt_tokens=PROMPT),
        sampling=replace(config.sampling, max_response_tokens=RESPONSE, sampler="hf"),
        optimisation=replace(config.optimisation, tokens_per_micro_batch=ROWS * (PROMPT + RESPONSE)),
        memory=replace(config.memory, **memory),  # type: ignore[arg-type]
    )


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
    objective = Objective(1.0, 0.2, 0.0, 2.0, "token", torch.full((ROWS,), float(ROWS * RESPONSE)), 1.0)
    rollouts = [Rollout([5] * PROMPT, [7] * RESPONSE, [-1.0] * RESPONSE, True)] * ROWS
    tracker.track_external(policy, optimizer)
    with tracker:
        for step in range(2):
            batches = micro_batches(rollouts, ROWS * (PROMPT + RESPONSE), CPU)
            optimizer_step(policy, optimizer, batches, torch.tensor([1.0, -1.0] * (ROWS // 2)), None, objective, 1e-4)
            if step == 0:
                tracker.reset_mod_stats()
    return float(tracker.get_tracker_snapshot("peak")[CPU]["Total"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_plan_is_within_15_percent_of_what_a_step_allocates(family, checkpointing):
    of = plan.architecture(mid_lm(family), torch.float32)
    planned = plan.footprint(of, setting(), VARIANTS["majority"], 1, checkpointing)
    alone = planned.while_training - planned.reference - planned.gathered_weights  # no FSDP here, and no KL term
    assert alone == pytest.approx(measured_peak(family, checkpointing), rel=0.15)


def test_recomputing_saves_most_of_the_activations():
    assert measured_peak("qwen3", True) < 0.5 * measured_peak("qwen3", False)


@pytest.mark.parametrize("family", RIGHT)
def test_every_family_that_trains_can_be_planned_and_the_plan_leaves_it_as_it_was(family):
    lm = tiny_lm(family, **RIGHT[family])
    lm.set_attn_implementation("packed")
    of = plan.architecture(lm)
    assert of.parameters == sum(parameter.numel() for parameter in lm.parameters())
    assert of.layers == 2 and of.kept_of_a_token > of.inputs_of_a_token > 0
    assert lm.config._attn_implementation == "packed", "a plan that changes the model's attention ruins its training"


@pytest.fixture(scope="module")
def paper_model() -> plan.Architecture:
    """Qwen3-8B's published shape, without weights."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return plan.architecture(Qwen3ForCausalLM(config))


def test_the_papers_run_in_numbers_worked_out_by_hand(paper_model):
    """8.19e9 parameters on 4 GPUs: 4 bytes of each for weights, gradients and teacher, 8 for AdamW."""
    assert paper_model.parameters == 8_190_735_360
    need = plan.footprint(paper_model, Config(), VARIANTS["II"], 4, checkpointing=True)
    quarter = 8_190_735_360 / 4
    assert (need.master_weights, need.gradients, need.teacher, need.adamw) == (*[4 * quarter] * 3, 8 * quarter)
    assert need.reference == 0 and need.engine == 0.5 * 80e9
    assert need.gathered_weights == 2 * (2 * 151936 * 4096 + 4096)
    assert need.activations == 16384 * 36 * 4096 * 2
    assert paper_model.cached_of_a_token == 36 * 2 * 8 * 128 * 2


def test_auto_recomputes_only_where_a_step_would_not_fit(paper_model):
    variant = VARIANTS["II"]
    small_batch = replace(Config(), optimisation=replace(Config().optimisation, tokens_per_micro_batch=3584))
    assert plan.recomputes(paper_model, Config(), variant, 8)
    assert not plan.recomputes(paper_model, small_batch, variant, 8)
    for setting_of, expected in (("on", True), ("off", False)):
        config = replace(Config(), memory=replace(Config().memory, activation_checkpointing=setting_of))
        assert plan.recomputes(paper_model, config, variant, 8) == expected


def test_a_step_smaller_than_a_micro_batch_is_planned_by_its_own_size(paper_model):
    """SmolLM2 on a CPU had its activations computed again for 16,384 tokens, in steps of 5,120 at most."""
    config = replace(Config(), data=replace(Config().data, questions_per_step=2, max_prompt_tokens=512))
    config = replace(config, sampling=replace(config.sampling, rollouts=4, max_response_tokens=128))
    need = plan.footprint(paper_model, config, VARIANTS["majority"], 8, checkpointing=False)
    assert need.activations == 2 * 4 * (512 + 128) * paper_model.kept_of_a_token


@pytest.mark.parametrize("gpus", plan.GPUS)
def test_the_flags_that_the_plan_names_make_the_run_fit(paper_model, gpus):
    flags = plan.flags_that_fit(paper_model, Config(), VARIANTS["II"], gpus)
    assert flags is not None
    config = Config()
    for name, *value in (flag.removeprefix("--").replace("-", "_").split() for flag in flags):
        (group,) = (group for group, fields in vars(config).items() if hasattr(fields, name))
        setting_of = float(value[0]) if value else True
        config = replace(config, **{group: replace(getattr(config, group), **{name: setting_of})})
    checkpointing = plan.recomputes(paper_model, config, VARIANTS["II"], gpus)
    need = plan.footprint(paper_model, config, VARIANTS["II"], gpus, checkpointing)
    assert need.peak <= plan.USABLE * plan.GPU_BYTES
    assert (gpus >= 4) == (flags == []), "the paper's run fits into four GPUs as it is"
