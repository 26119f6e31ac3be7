"""A laptop's two choices: float32 beside bfloat16, and vLLM's blocks of 32 tokens beside its own of 128.

    python benchmarks/cpu.py                       # the embedded model
    python benchmarks/cpu.py --model FOLDER        # also a hub name; --no-vllm without vLLM

Training is a forward and a backward pass of one micro-batch, scoring its forward pass alone. All responses have full
length, and share their question's prompt in groups as in training. Prints tables in Markdown.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from transformers import PreTrainedModel

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from sampling import load, seconds
from step_vs_trl import markdown

from lm import vllm_engine
from lm.decoding import Capacity, TransformersSampler
from lm.engine import Sampler
from lm.packing import MicroBatch, pack
from lm.record import Rollout
from lm.scoring import PackedLM
from lm.vllm_engine import VLLMSampler

DTYPES = (torch.float32, torch.bfloat16)
BLOCKS = (128, vllm_engine.CPU_BLOCK)  # vLLM's own, and ours
HEAD = ("tokens a second", "float32", "bfloat16", "ratio")

Work = Callable[[], object]
Rates = dict[str, tuple[float, float]]  # of each work, in both dtypes


def train_once(lm: PreTrainedModel, batch: MicroBatch, dtype: torch.dtype) -> None:
    PackedLM(lm, dtype)(batch, 1.0).logp.sum().backward()
    lm.zero_grad()


@torch.no_grad()
def score_once(lm: PreTrainedModel, batch: MicroBatch, dtype: torch.dtype) -> None:
    PackedLM(lm, dtype)(batch, 1.0)


def rates(works: dict[str, tuple[Work, Work]], tokens: int, repeats: int) -> Rates:
    """Tokens a second; all works take turns."""
    taken = iter(seconds([work for both in works.values() for work in both], lambda: None, repeats))
    return {name: (tokens / next(taken), tokens / next(taken)) for name in works}


def passes(lm: PreTrainedModel, batch: MicroBatch, repeats: int) -> Rates:
    """One micro-batch; its tokens are those of prompts too."""
    works: dict[str, tuple[Work, Work]] = {
        "training": (partial(train_once, lm, batch, DTYPES[0]), partial(train_once, lm, batch, DTYPES[1])),
        "scoring": (partial(score_once, lm, batch, DTYPES[0]), partial(score_once, lm, batch, DTYPES[1])),
    }
    return rates(works, batch.input_ids.numel(), repeats)


def samplings(lm: PreTrainedModel, request: dict[str, Any], repeats: int, vllm: bool) -> Rates:
    """Transformers, and vLLM in its own blocks and in ours; its tokens are those of responses."""
    rows, longest = request["n"] * len(request["prompts"]), len(request["prompts"][0]) + request["max_tokens"]
    samplers: dict[str, list[Sampler]] = {"sampling, transformers": [TransformersSampler([], d) for d in DTYPES]}
    for block in BLOCKS if vllm else ():
        with patch.object(vllm_engine, "CPU_BLOCK", block):
            engines: list[Sampler] = [
                VLLMSampler(lm, [], d, Capacity(longest, rows, engine_memory=0.2)) for d in DTYPES
            ]
        samplers[f"sampling, vLLM in blocks of {block}"] = engines
    with ExitStack() as stack:
        works: dict[str, tuple[Work, Work]] = {}
        for name, (one, other) in samplers.items():
            first, second = (stack.enter_context(sampler.loaded(lm)) for sampler in (one, other))
            works[name] = (partial(first, **request), partial(second, **request))
        return rates(works, rows * request["max_tokens"], repeats)


def main(
    model: str = "embedded",
    questions: int = 8,
    rollouts: int = 8,
    prompt_tokens: int = 62,
    response_tokens: int = 22,
    trained: int = 24,  # rollouts of the micro-batch
    repeats: int = 3,
    vllm: bool = True,
) -> None:
    torch.manual_seed(0)
    lm = load(model, torch.device("cpu"))
    prompts = torch.randint(lm.config.vocab_size, (questions, prompt_tokens)).tolist()
    seeds = [rollouts * i for i in range(questions)]
    request = {"prompts": prompts, "seeds": seeds, "n": rollouts, "temperature": 1.0, "max_tokens": response_tokens}
    answers = torch.randint(lm.config.vocab_size, (trained, response_tokens)).tolist()
    owned = [Rollout(prompts[i % questions], ids, [0.0] * len(ids), False) for i, ids in enumerate(answers)]
    measured = passes(lm, pack(owned, range(trained), torch.device("cpu")), repeats)
    measured |= samplings(lm, request, repeats, vllm)
    rows = [[name, f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.2f}"] for name, (a, b) in measured.items()]
    if vllm:
        (a, b), (c, d) = list(measured.values())[-2:]
        rows.append([f"{BLOCKS[1]} / {BLOCKS[0]}", f"{c / a:.2f}", f"{d / b:.2f}", ""])
    asked = f"{questions} x {rollouts} responses of {response_tokens} tokens to {prompt_tokens}"
    print(f"{model}, {asked}, micro-batch of {trained}; {torch.get_num_threads()} thread(s), median of {repeats}\n")
    print(markdown(HEAD, rows))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
