"""Choose and open the engine that samples: the trainer's own model (decoding.py) or vLLM (vllm_engine.py).

    with sampler.loaded(lm) as sample:                        # the engine holds exactly this model's weights
        rollouts = sample(prompts, seeds, n=8, ...)           # n rollouts a prompt, those of a prompt contiguous

Sampling exists only inside `loaded`, so rollouts can never come from stale weights.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import UserError
from lm import distributed
from lm.decoding import Capacity, Sample, TransformersSampler
from lm.model import check_length, compute_dtype, limit_threads, load_pretrained, stop_token_ids
from lm.prompts import prompt_ids, read_chat_template
from lm.vllm_engine import VLLMSampler

Engine = Literal["vllm", "hf"]
Sampler = TransformersSampler | VLLMSampler


def choose_engine(name: Literal["auto", "vllm", "hf"]) -> Engine:
    """Decide what --sampler means on this machine, and say so in one line.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    has_gpu = torch.cuda.is_available()
    if name == "vllm" and not installed:
        raise UserError(
            "--sampler vllm: vLLM is not installed; install requirements.txt (GPU) or requirements-vllm-cpu.txt (CPU), "
            "or take --sampler hf"
        )
    reason = f"--sampler {name}"
    if name == "auto":
        name = "vllm" if installed and has_gpu else "hf"
        reason = f"vLLM {'' if installed else 'not '}installed, {'a' if has_gpu else 'no'} GPU"
    print(f"sampler: {'vLLM' if name == 'vllm' else 'transformers'} ({reason})")
    return name


def open_sampler(
    engine: Engine, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, capacity: Capacity
) -> Sampler:
    check_length(lm, capacity.sequence_tokens)
    stop_ids = distributed.run_on_rank0(partial(stop_token_ids, lm, tokenizer))
    if engine == "hf":
        return TransformersSampler(stop_ids, dtype)
    return VLLMSampler(lm, stop_ids, dtype, capacity)


class InferenceModel(NamedTuple):
    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str | None  # the text of a chat template that replaces the tokenizer's
    engine: Engine


def load_inference_model(
    model: str, engine: Literal["auto", "vllm", "hf"], chat_template: str | None
) -> InferenceModel:
    chosen = choose_engine(engine)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm, tokenizer = load_pretrained(model, compute_dtype("auto", device))
    lm.to(device)  # type: ignore[arg-type]
    limit_threads(lm)
    template = read_chat_template(chat_template)
    prompt_ids(tokenizer, "1+1?", template)  # a template that cannot be used fails here, with the cure
    return InferenceModel(lm, tokenizer, template, chosen)


@contextmanager
def sampling_from(model: InferenceModel, capacity: Capacity) -> Iterator[Sample]:
    sampler = open_sampler(model.engine, model.lm, model.tokenizer, model.lm.dtype, capacity)
    with closing(sampler), sampler.loaded(model.lm) as sample:
        yield sample
