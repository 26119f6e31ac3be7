"""What a token costs when a step grows: tokens, vocabulary, group size and response length, each doubled by itself.

    python benchmarks/growth.py                      # a small random Qwen3, one thread, about two minutes
    python benchmarks/growth.py --doublings 1 --questions 2 --repeats 1 --hidden 32

Times are those of the reference pass and of the training phase (optimizer included) for each token of prompts and
responses; memory is that of all tensors which the training phase allocates, at its fullest moment, as PyTorch's trace
counts it: whole, and for each token of the largest micro-batch. Every row is a process of its own.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo import build_optimizer, group_advantages, optimizer_step
from lm.model import Objective, frozen_copy
from lm.packing import Rollout, micro_batches
from lm.scoring import PackedLM, score

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


def peak_bytes(work: Callable[[], Any]) -> int:
    """Of what `work` allocates, the kernels' own buffers included; an allocator's reserves are not in it."""
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(profile_memory=True) as profiler:
            work()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return median(taken)


def measure(size: Size, repeats: int) -> tuple[int, int, float, float, float, float]:
    """Tokens and micro-batches of the step; microseconds a token of reference pass and training phase; memory at the
    peak of the latter in MB, and in kB a token of the largest micro-batch."""
    torch.set_num_threads(1)
    policy, rollouts = new_policy(size), rollouts_of(size)
    reference, optimizer = frozen_copy(policy), build_optimizer(policy, (0.9, 0.999), 0.01)
    tokens = sum(map(len, rollouts))
    batches = micro_batches(rollouts, size.tokens_per_micro_batch, DEVICE)
    advantages = group_advantages(torch.arange(len(rollouts)) % 3, size.rollouts)
    objective = Objective(1.0, 0.2, 0.001, 2.0, "token", torch.full((len(rollouts),), float(tokens)), 1.0)
    anchor = score(reference, batches, 1.0)

    def train() -> None:
        optimizer_step(policy, optimizer, batches, advantages, anchor, objective, 1e-4)

    train()  # AdamW's moments are there from now on
    scoring, training = cpu_seconds(lambda: score(reference, batches, 1.0), repeats), cpu_seconds(train, repeats)
    peak = peak_bytes(train)
    largest = max(batch.input_ids.numel() for batch in batches)
    return tokens, len(batches), scoring / tokens * 1e6, training / tokens * 1e6, peak / 1e6, peak / largest / 1e3


def main(size: tyro.conf.OmitArgPrefixes[Size] = Size(), doublings: int = 3, repeats: int = 5) -> None:
    grown = [("as it is", size)]
    for name in ("questions", "rollouts", "response_tokens", "vocabulary"):
        for power in range(1, doublings + 1):
            value = getattr(size, name) * 2**power
            grown.append((f"{name} {value:,}", replace(size, **{name: value})))
    head = ("", "tokens", "micro-batches", "reference, us/token", "training, us/token", "peak, MB", "peak, kB/token")
    print(f"{size}\n\n| {' | '.join(head)} |\n" + "| --- " * len(head) + "|")
    for label, each in grown:
        with multiprocessing.get_context("fork").Pool(1) as process:
            tokens, batches, *figures = process.apply(measure, (each, repeats))
        cells = [label, f"{tokens:,}", str(batches), *(f"{figure:.1f}" for figure in figures)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
