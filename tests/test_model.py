"""lm/model.py: each test is named after the bug it prevents."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from tiny import CPU, EOS, naive_stats, tiny_lm

from config import UserError
from lm.decoding import TransformersSampler
from lm.model import check_length, frozen_copy, load_policy, resolve, verify_head
from lm.packing import pack
from lm.record import Rollout
from lm.scoring import PackedLM, score

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
        load_policy(str(tmp_path), CPU)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_without_dropout_in_float32(tmp_path, tokenizer, tied):
    lm = tiny_lm("gpt2", tied, n_embd=32, n_layer=2, n_head=4)
    lm.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), CPU)
    assert not any(module.training for module in policy.lm.modules())  # gpt2 drops a tenth when it trains
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    is_tied = policy.lm.get_output_embeddings().weight is policy.lm.get_input_embeddings().weight
    assert is_tied == tied


@pytest.mark.parametrize(("chosen", "computed"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_that_are_trained_are_rounded_with_what_is_computed(tmp_path, tokenizer, chosen, computed):
    tiny_lm("gpt2", True, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), CPU, chosen)
    assert policy.compute_dtype == frozen_copy(policy).compute_dtype == computed
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


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
    "stablelm": {},  # does not pass on what packed attention needs
    "mamba": {"state_size": 4},  # has no attention that could be cut between sequences
}


if version("transformers") < "5.20":  # later ones were not looked into
    REFUSED["falcon"] = {"alibi": True}  # adds a bias to its attention


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_that_is_accepted_is_sampled_and_scored_alike(family):
    """Sampler, packed scoring and the family's own attention agree, past its sliding window."""
    lm = tiny_lm(family, **RIGHT[family])
    policy = PackedLM(lm)
    verify_head(policy, family)
    with TransformersSampler([EOS]).loaded(lm) as sample:
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
