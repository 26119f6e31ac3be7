"""Which engine samples: the trainer's own model (decoding.py) or vLLM (vllm_engine.py).

    with sampler.holding(lm) as sample:                       # the engine holds exactly this model's weights
        rollouts = sample(prompts, seeds, n=8, ...)           # G rollouts a prompt, groups contiguous

Sampling exists only inside `holding`, so rollouts can never come from stale weights.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import UserError
from lm.decoding import Sample, Sampler, TransformersSampler
from lm.model import check_length, compute_dtype, load_pretrained, stop_token_ids
from lm.prompts import prompt_ids, read_chat_template
from lm.vllm_engine import VLLMSampler

Engine = Literal["vllm", "hf"]


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


class Frozen(NamedTuple):
    """A model that is only sampled from, in bfloat16 on a GPU; how it is asked, and by which engine."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str | None  # the text of the chat template that it is given
    engine: Engine


def load_frozen(model: str, engine: Literal["auto", "vllm", "hf"], chat_template: str | None) -> Frozen:
    """What --model, --sampler and --chat-template name; says in one line which engine it is."""
    chosen, device = choose_engine(engine), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm, tokenizer = load_pretrained(model, compute_dtype("auto", device))
    lm.to(device)  # type: ignore[arg-type]
    template = read_chat_template(chat_template) if chat_template else None
    prompt_ids(tokenizer, "1+1?", template)  # a template that cannot be used fails here, with the cure
    return Frozen(lm, tokenizer, template, chosen)


@contextmanager
def sampling_from(model: Frozen, max_sequence_tokens: int, rows: int) -> Iterator[Sample]:
    """As `open_sampler`."""
    lm, eos_ids = model.lm, stop_token_ids(model.lm, model.tokenizer)
    sampler = open_sampler(model.engine, lm, eos_ids, lm.dtype, max_sequence_tokens=max_sequence_tokens, rows=rows)
    with closing(sampler), sampler.holding(lm) as sample:
        yield sample
