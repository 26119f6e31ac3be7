"""Tokens a second of our vLLM sampler, of bare vLLM and of our decoding; what a load of weights costs.

    python benchmarks/sampling.py                                            # the embedded model, any machine
    python benchmarks/sampling.py --model FOLDER --questions 4 --rollouts 4 --repeats 3
    python benchmarks/sampling.py --model random-0.6B --questions 64 --response-tokens 1024      # a GPU
    python benchmarks/sampling.py --model random-1.7B --questions 64 --response-tokens 1024 --no-hf

`random-*` are models of Qwen3's shapes (gpu.SHAPES) with random weights: speed and memory do not depend on the weights,
and nothing is downloaded. Bare vLLM is `LLM.generate` on the same engine and prompts, without seeds and log-probs. All
responses have full length. Prints a table in Markdown.
"""

import sys
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from statistics import median

import torch
import tyro
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import random_model

import metrics
from lm.decoding import Capacity, TransformersSampler
from lm.model import resolve
from lm.packing import micro_batches
from lm.record import Rollout
from lm.scoring import PackedLM, score
from lm.vllm_engine import VLLMSampler


def load(name: str, device: torch.device) -> PreTrainedModel:
    if name.startswith("random-"):
        return random_model(name.removeprefix("random-"))
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).to(device)


def seconds(works: list[Callable[[], object]], before: Callable[[], object], repeats: int) -> list[float]:
    """Median of `repeats` for each of `works`, taken in turns so that a busy machine is unfair to none; the first round
    does not count (kernels of a new shape are slow the first time)."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            before()
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
    return [median(taken[1:]) for taken in times]


def used_gb() -> float:
    """Memory in use on the GPU, by anyone, or this process's peak without one."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9
    return metrics.peak_memory_gb()


def mismatch(lm: PreTrainedModel, dtype: torch.dtype, rollouts: list[Rollout]) -> tuple[float, float]:
    """Mean and maximum of |sampler's log-prob - trainer's| in nats."""
    batches = micro_batches(rollouts, 16_384, lm.device)
    stats = score(PackedLM(lm, dtype), batches, temperature=1.0)
    gaps = [(own.logp - batch.sampler_logp).abs()[batch.mask] for own, batch in zip(stats, batches, strict=True)]
    return torch.cat(gaps).mean().item(), torch.cat(gaps).max().item()


@torch.no_grad()
def loads(sampler: VLLMSampler, lm: PreTrainedModel, steps: int) -> dict[str, str]:
    """Change the weights and load them, `steps` times."""
    times, asleep, awake = [], [], []
    for _ in range(steps):
        for parameter in lm.parameters():
            parameter *= 1.0001
        with sampler.loaded(lm) as sample:
            sample([[1, 2, 3]], [0], n=1, temperature=1.0, max_tokens=1)
            awake.append(used_gb())
        times.append(sampler.sync_seconds)
        asleep.append(used_gb())
    rows = {"seconds of a load of weights": f"{median(times):.3f}"}
    if torch.cuda.is_available():
        rows["GB in use while the engine is awake / asleep"] = f"{awake[-1]:.2f} / {asleep[-1]:.2f}"
    return rows | {f"GB more after {steps} loads than after 2": f"{asleep[-1] - asleep[1]:.3f}"}


def main(
    model: str = "embedded",
    questions: int = 16,
    rollouts: int = 8,
    prompt_tokens: int = 40,
    response_tokens: int = 64,
    repeats: int = 5,
    loads_of_weights: int = 50,
    engine_memory: float = 0.5,
    hf: bool = True,
) -> None:
    from vllm import SamplingParams

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = load(model, device)
    never = [lm.config.vocab_size - 1]  # a stop token that is as good as never sampled
    rows = questions * rollouts
    longest = prompt_tokens + response_tokens
    sampler = VLLMSampler(lm, never, dtype, Capacity(longest, rows, engine_memory))
    prompts = torch.randint(lm.config.vocab_size, (questions, prompt_tokens)).tolist()
    request = {
        "prompts": prompts,
        "seeds": [rollouts * i for i in range(questions)],
        "n": rollouts,
        "temperature": 1.0,
        "max_tokens": response_tokens,
    }
    bare = SamplingParams(n=rollouts, temperature=1.0, max_tokens=response_tokens, ignore_eos=True, detokenize=False)
    as_dicts = [{"prompt_token_ids": prompt} for prompt in prompts]
    with sampler.loaded(lm) as sample:
        forget = sampler.llm.reset_prefix_cache
        works = [lambda: sample(**request), lambda: sampler.llm.generate(as_dicts, bare, use_tqdm=False)]
        ours, theirs = seconds(works, forget, repeats)
        gaps = mismatch(lm, dtype, sample(**request))
    table = {
        "tokens a second: our vLLM sampler": f"{rows * response_tokens / ours:,.0f}",
        "tokens a second: bare LLM.generate": f"{rows * response_tokens / theirs:,.0f}",
        "ratio": f"{theirs / ours:.3f}",
    }
    if hf:
        with TransformersSampler(never, dtype).loaded(lm) as generate:
            (slow,) = seconds([lambda: generate(**request)], lambda: None, max(1, repeats // 2))
        table["tokens a second: our decoding with transformers"] = f"{rows * response_tokens / slow:,.0f}"
    table["log-prob mismatch with the trainer, mean / maximum"] = f"{gaps[0]:.2g} / {gaps[1]:.2g} nats"
    table |= loads(sampler, lm, loads_of_weights)
    asked = f"{questions} x {rollouts} responses of {response_tokens} tokens to {prompt_tokens}"
    show(table, f"{model}, {asked}, {dtype}", f"median of {repeats}")


def show(table: dict[str, str], measured: str, how: str) -> None:
    on_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    vllm = packages_distributions()["vllm"][0]
    print(f"{measured}, {where}")
    print(f"{vllm} {version(vllm)}, torch {torch.__version__}; {how}\n\n| | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in table.items()))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
