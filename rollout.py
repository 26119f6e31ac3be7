"""Who answers which questions, with which seeds; and what a training run consists of.

Every rollout has its own seed: it does not depend on what else is in the batch, and a run can be repeated or resumed.
The engine that samples is one of lm/engine.py; it holds the weights that the model has now.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from config import Config
from data import PromptedPair
from lm import distributed
from lm.decoding import request_seed
from lm.engine import Sampler
from lm.memory import Plan
from lm.scoring import PackedLM
from rewards import Group, Variant, View, Voter, read_answers, vote_of
from sources.pairs import Benchmark


@dataclass
class Run:
    """Everything that a training step reads and changes; prepare.py makes it."""

    config: Config
    folder: Path
    variant: Variant  # a row of the table of variants, with what the command line changes in it
    questions: list[PromptedPair]
    fingerprint: str  # of the questions
    benchmark: Benchmark | None  # its questions whose prompts are short enough
    eval_prompts: list[list[int]]  # of these questions
    total_steps: int
    plan: Plan  # of the memory
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    policy: PackedLM
    teacher: PackedLM | None  # moves towards the policy; None if the variant has none
    initial: PackedLM | None  # the policy as it began, frozen; None if no KL term refers to it
    optimizer: torch.optim.Optimizer
    sampler: Sampler


def generate_rollouts(
    run: Run, model: PackedLM, role: Voter, views: Sequence[View], questions: Sequence[PromptedPair], step: int
) -> list[Group]:
    """Sample V responses of `model` to every question in every view; return groups that have voted, on every rank."""
    if not views:
        return []
    config = run.config
    match = config.method.answer_match
    G = config.sampling.rollouts
    V = config.votes
    asked = list(product(views, enumerate(questions)))
    with run.sampler.loaded(model.lm) as sample:  # with the weights that the model has now
        rollouts = distributed.shard_prompts(sample)(
            prompts=[question.prompts[view] for view, (_, question) in asked],
            seeds=[request_seed(config.run.seed, step, question.pair.id, view, role) for view, (_, question) in asked],
            n=V,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_response_tokens,
        )
    read_answers(rollouts, run.tokenizer)
    voters = [rollouts[start : start + V] for start in range(0, len(rollouts), V)]
    # Rank 0 compares answers for all: a comparison may time out on one rank and not on another.
    votes = distributed.run_on_rank0(lambda: [vote_of(each, match) for each in voters])
    groups = []
    for (view, (place, question)), each, vote in zip(asked, voters, votes, strict=True):
        groups.append(Group(place, question.pair.id, view, each[:G], each[G:], vote, match))
    return groups
