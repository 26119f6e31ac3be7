"""What a token costs when a step grows: tokens, vocabulary, group size and response length, each doubled by itself.

    python benchmarks/growth.py                      # a small random Qwen3, one thread, about two minutes
    python benchmarks/growth.py --doublings 1 --questions 2 --repeats 1 --hidden 32

Times are those of the reference pass and of the training phase (optimizer included) for each token of prompts and
responses; memory is what they add to the process at their peak, for each token of a micro-batch (of the step, where it
is smaller). Every row is a process of its own, so that none inherits another's memory. Linux.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo import group_advantages
from packing import PackedLM, micro_batches
from policy import Objective, build_optimizer, optimizer_step, score
from rollout import Rollout
from teacher import frozen_copy

DEVICE = torch.device("cpu")
PROMPT = 32  # tokens


@dataclass(frozen=True)
class Size:
    questions: int = 8
    """of a step"""
    rollouts: int = 4
    """G"""
    response_tokens: int = 64
    """mean; lengths are spread evenly between half and one and a half of it"""
    vocabulary: int = 4096
    """tokens"""
    tokens_per_micro_batch: int = 2048
    """of one forward and backward pass"""
    hidden: int = 128
    """of a model with 4 layers"""


def rollouts_of(size: Size) -> list[Rollout]:
    """Ids and lengths without a random number, groups contiguous."""
    rows, rollouts = size.questions * size.rollouts, []
    for row in range(rows):
        length = round(size.response_tokens * (0.5 + (row * 7 % rows) / rows))
        ids = [(row * 31 + position * 17) % size.vocabulary for position in range(PROMPT + length)]
        rollouts.append(Rollout(ids[:PROMPT], ids[PROMPT:], [-1.0] * length, finished=True))
    return rollouts


def new_policy(size: Size) -> PackedLM:
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size.hidden // 4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return PackedLM(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def peak_bytes() -> int:
    """Of this process; `ru_maxrss` would not do, it cannot be started afresh."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return median(taken)


def measure(size: Size, repeats: int) -> tuple[int, float, float, float]:
    """Tokens of the step; microseconds a token of reference pass and training phase; kB a token of a micro-batch."""
    torch.set_num_threads(1)
    policy, rollouts = new_policy(size), rollouts_of(size)
    reference, optimizer = frozen_copy(policy), build_optimizer(policy, (0.9, 0.999), 0.01)
    tokens = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
    batches = micro_batches(rollouts, size.tokens_per_micro_batch, DEVICE)
    advantages = group_advantages(torch.arange(len(rollouts)) % 3, size.rollouts)
    objective = Objective(1.0, 0.2, 0.001, 2.0, "token", torch.full((len(rollouts),), float(tokens)), 1.0)

    def train(batches: list[Any]) -> None:
        optimizer_step(policy, optimizer, batches, advantages, score(reference, batches, 1.0), objective, 1e-4)

    train(micro_batches(rollouts, 1, DEVICE, rows=[0]))  # gradients and moments are there from now on
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    train(batches)
    added = (peak_bytes() - before) / max(batch.input_ids.numel() for batch in batches)
    scoring = cpu_seconds(lambda: score(reference, batches, 1.0), repeats)
    both = cpu_seconds(lambda: train(batches), repeats)
    return tokens, scoring / tokens * 1e6, (both - scoring) / tokens * 1e6, added / 1e3


def main(size: tyro.conf.OmitArgPrefixes[Size] = Size(), doublings: int = 3, repeats: int = 5) -> None:
    grown = [("as it is", size)]
    for name in ("questions", "rollouts", "response_tokens", "vocabulary"):
        for power in range(1, doublings + 1):
            value = getattr(size, name) * 2**power
            grown.append((f"{name} {value:,}", replace(size, **{name: value})))
    print(f"{size}\n\n| | tokens | reference, us/token | training, us/token | added memory, kB/token |")
    print("| --- " * 5 + "|")
    for label, each in grown:
        with multiprocessing.get_context("fork").Pool(1) as process:
            tokens, *figures = process.apply(measure, (each, repeats))
        print(f"| {label} | {tokens:,} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
