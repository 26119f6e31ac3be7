"""Miniature models, tokenizers, rollouts and runs for the tests, and the naive twin of packed scoring."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from config import Config
from data import Pair, PromptedPair
from lm.decoding import Sample, TransformersSampler
from lm.engine import Sampler
from lm.memory import Plan
from lm.model import frozen_copy, load_pretrained
from lm.record import Rollout
from lm.scoring import PackedLM
from prepare import build_optimizer
from rewards import VARIANTS, Group, Match, Variant, View, majority_vote
from rollout import Run

EOS = 0  # of `byte_tokenizer` and of every tiny model; also the pad token, as in many real models
VOCABULARY = 257  # one token per byte, and EOS
CPU = torch.device("cpu")


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={"<eos>": EOS} | {letter: i for i, letter in enumerate(letters, 1)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def untrained() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An embedded model before its first lesson: it babbles."""
    lm, tokenizer = load_pretrained("embedded", torch.float32, weights=False)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(lm.config), tokenizer


def tiny_lm(family: str = "llama", tied: bool = False, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Random weights, biases and norms included, large enough that next-token distributions are far from uniform."""
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    config = AutoConfig.for_model(family, **settings | overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return lm


@torch.no_grad()
def stopping_lm(logit: float = 6.0) -> PreTrainedModel:
    """An untied model that likes to stop: the stop token's logit is about this, so that responses differ in length."""
    lm = tiny_lm()
    hidden = lm.base_model(torch.arange(VOCABULARY)[None]).last_hidden_state[0].mean(0)
    lm.get_output_embeddings().weight[EOS] = hidden * logit / hidden.square().sum()
    return lm


def tiny_rollouts(count: int, seed: int = 0, longest: int = 12, vocabulary: int = VOCABULARY) -> list[Rollout]:
    """Of all lengths from 1 token up; half of them end with the stop token, which is also the pad token."""
    rng = random.Random(seed)
    rollouts = []
    for i in range(count):
        prompt = [rng.randrange(1, vocabulary) for _ in range(rng.randrange(1, 6))]
        response = [rng.randrange(1, vocabulary) for _ in range(rng.randrange(1, longest + 1))]
        if finished := i % 2 == 0:
            response[-1] = EOS
        rollouts.append(Rollout(prompt, response, [0.0] * len(response), finished))
    return rollouts


def rollout_of(answer: str | None, tokens: int = 1, finished: bool = True, **known: Any) -> Rollout:
    """A rollout that has been read: its answer, and what else is known of it."""
    text = "no box" if answer is None else f"\\boxed{{{answer}}}"
    rollout = Rollout([1], [2] * tokens, [0.0] * tokens, finished, text=text, answer=answer)
    return replace(rollout, **known)


def group_of(answers: Sequence[str | None], view: View = "x", place: int = 0, match: Match = "exact") -> Group:
    """A group that has voted, of the `place`-th question of a step."""
    rollouts = [rollout_of(answer) for answer in answers]
    return Group(place, str(place), view, rollouts, [], majority_vote(answers, match), match)


def naive_stats(lm: PreTrainedModel, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log-prob, entropy and self-certainty [T] of one sequence alone, from whole logits: the twin of PackedLM."""
    sequence = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    z = lm(sequence, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1] / temperature
    p = z.softmax(-1)
    logp = p.gather(-1, torch.tensor(rollout.response_ids)[:, None]).squeeze(-1).log()
    return logp, -(p * p.log()).sum(-1), z.logsumexp(-1) - z.mean(-1)


def twin_of(lm: PreTrainedModel) -> PreTrainedModel:
    """The same weights in float64 with transformers' reference attention."""
    twin = copy.deepcopy(lm).double()
    twin.set_attn_implementation("eager")
    return twin


def gradients(lm: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in lm.named_parameters() if parameter.grad is not None}


def largest_gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference between two sets of gradients, as a share of the largest entry of the first."""
    assert first.keys() == second.keys()
    scale = max(gradient.abs().max().item() for gradient in first.values())
    return max((first[name] - second[name]).abs().max().item() for name in first) / scale


class ScriptedSampler:
    """Says what `script(holder, prompt text, g)` tells it to; `holder` is the model whose turn it is."""

    sync_seconds = None
    sleeping_bytes = 0

    def __init__(self, script: Callable[[PreTrainedModel, str, int], str]) -> None:
        self.script = script

    def close(self) -> None:
        pass

    @contextmanager
    def loaded(self, lm: PreTrainedModel) -> Iterator[Sample]:
        tokenizer = byte_tokenizer()

        def sample(prompts: Sequence[list[int]], seeds: Sequence[int], n: int, **_: object) -> list[Rollout]:
            texts = [(prompt, self.script(lm, tokenizer.decode(prompt), g)) for prompt in prompts for g in range(n)]
            responses = [(prompt, [*tokenizer(text).input_ids, EOS]) for prompt, text in texts]
            return [Rollout(prompt, ids, [-1.0] * len(ids), finished=True) for prompt, ids in responses]

        yield sample


def question(pair: Pair) -> PromptedPair:
    tokenizer = byte_tokenizer()
    return PromptedPair(pair, {"x": tokenizer(pair.question).input_ids, "x'": tokenizer(str(pair.rephrased)).input_ids})


def config_with(**settings: Any) -> Config:
    """Settings go to the group of config.py that has them."""
    config = Config()
    for name, value in settings.items():
        (group,) = (group for group, fields in vars(config).items() if hasattr(fields, name))
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


def tiny_run(variant: str | Variant, pairs: Sequence[Pair], sampler: Sampler | None = None, **settings: Any) -> Run:
    """A training run on a tiny model, ready for `train_step`."""
    defaults = dict(questions_per_step=len(pairs), rollouts=4, max_response_tokens=16, lr=1e-3, steps=10, tis_cap=0.0)
    config = config_with(**(defaults | settings))
    row = VARIANTS[variant] if isinstance(variant, str) else variant
    policy = PackedLM(tiny_lm("qwen3", tied=True))
    teacher = frozen_copy(policy) if row.teacher_views else None
    return Run(
        config=config,
        folder=Path("nowhere"),
        variant=row,
        questions=[question(pair) for pair in pairs],
        fingerprint="",
        eval_prompts=[],
        benchmark=None,
        total_steps=10,
        plan=Plan("off", 16384, offload_teacher=False, offload_optimizer=False),
        device=CPU,
        tokenizer=byte_tokenizer(),
        policy=policy,
        teacher=teacher,
        initial=frozen_copy(policy),
        optimizer=build_optimizer(policy, (0.9, 0.999), 0.0),
        sampler=sampler or TransformersSampler([EOS]),
    )
