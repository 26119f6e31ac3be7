"""Who answers what, by which engine, with which seeds.

    with sampler.holding(lm) as sample:                       # the engine holds exactly this model's weights
        rollouts = sample(prompts, seeds, n=8, ...)           # G rollouts a prompt, groups contiguous

Sampling exists only inside `holding`, so rollouts can never come from stale weights. Every rollout has a seed of its
own, so what is sampled does not depend on what else is in the batch, and a run can be repeated or resumed. The engine
is the trainer's own model (lm/decoding.py) or vLLM (lm/vllm_engine.py).
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import Config, UserError
from data import PromptedPair
from lm import ranks
from lm.decoding import Sample, Sampler, TransformersSampler
from lm.model import check_length, load_pretrained, stop_token_ids
from lm.packing import Rollout
from lm.prompts import prompt_ids, read_chat_template
from lm.scoring import PackedLM
from lm.vllm_engine import VLLMSampler
from rewards import Response, View, Voter

Engine = Literal["vllm", "hf"]
FrozenModel = tuple[Sample, PreTrainedTokenizerBase, str | None]  # with the text of the chat template it is given


def ask(
    sampler: Sampler,
    model: PackedLM,
    who: Voter,
    views: Sequence[View],
    questions: Sequence[PromptedPair],
    step: int,
    config: Config,
) -> dict[tuple[Voter, View], list[Rollout]]:
    """G rollouts of `model` on every view of every question, in one call of the sampler: Q * G a view, by question."""
    if not views:
        return {}
    asked = [(view, question) for view in views for question in questions]
    with sampler.holding(model.lm) as sample:  # with the weights that the model has now
        rollouts = ranks.shared_out(sample)(
            prompts=[question.prompts[view] for view, question in asked],
            seeds=[request_seed(config.run.seed, step, question.pair.id, view, who) for view, question in asked],
            n=config.sampling.rollouts,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_response_tokens,
        )
    per_view = len(questions) * config.sampling.rollouts
    return {(who, view): rollouts[i * per_view : (i + 1) * per_view] for i, view in enumerate(views)}


def request_seed(*key: str | int) -> int:
    """A seed below 2^62 for one prompt's rollouts, from (run seed, step, question id, view, who); rollout g of the
    group adds g. A hash, so that no two requests of a run share a stream whatever the ids look like."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def decode(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[Response]:
    texts = tokenizer.batch_decode([rollout.response_ids for rollout in rollouts], skip_special_tokens=True)
    return [Response(text, len(each.response_ids), each.finished) for text, each in zip(texts, rollouts, strict=True)]


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
    on_gpu, chosen = torch.cuda.is_available(), choose_engine(engine)
    lm, tokenizer = load_pretrained(model, torch.bfloat16 if on_gpu else torch.float32)
    lm.to("cuda" if on_gpu else "cpu")  # type: ignore[arg-type]
    template = read_chat_template(chat_template) if chat_template else None
    prompt_ids(tokenizer, "1+1?", template)  # a template that cannot be used fails here, with the cure
    tokens = longest_prompt(tokenizer, template) + max_response_tokens
    eos_ids = stop_token_ids(lm, tokenizer)
    sampler = open_sampler(chosen, lm, eos_ids, lm.dtype, max_sequence_tokens=tokens, rows=rows)
    with closing(sampler), sampler.holding(lm) as sample:
        yield sample, tokenizer, template
