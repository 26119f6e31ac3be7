"""Sampling: prompts in, rollouts out, as token ids; one small interface, and behind it transformers' `generate` (here)
or vLLM (vllm_sampler.py).

    with sampler.holding(lm) as sample:                       # the engine holds exactly this model's weights
        rollouts = sample(prompts, seeds, n=8, ...)           # G rollouts a prompt, groups contiguous

Sampling exists only inside `holding`, so rollouts can never come from stale weights. Every rollout has a seed of its
own, so what is sampled does not depend on what else is in the batch, and a run can be repeated or resumed.

Shapes: Q prompts, G rollouts a prompt, N = Q x G rows, P prompt tokens, T response tokens, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

ROWS_PER_CALL = 256  # of `generate`: bounds its key-value cache


@dataclass(frozen=True)
class Rollout:
    """One sampled response; `response_ids` ends with the stop token if `finished`, else it was cut at max_tokens."""

    prompt_ids: list[int]
    response_ids: list[int]
    logp: list[float]  # the sampler's own log-prob of each response token, under the distribution it was drawn from
    finished: bool


Sample = Callable[..., list[Rollout]]


class Sampler(Protocol):
    sync_seconds: float | None  # that the last load of weights took; None where sampling needs none

    def holding(self, lm: PreTrainedModel) -> AbstractContextManager[Sample]:
        """Load the model's present weights, yield the function that samples from them, free the engine's memory."""
        ...


def request_seed(*key: str | int) -> int:
    """A seed below 2^62 for one prompt's rollouts, from (run seed, step, question id, view, who); rollout g of the
    group adds g. A hash, so that no two requests of a run share a stream whatever the ids look like."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """The distribution [N, V] cut to its likeliest tokens, as many as it takes to hold top_p together, renormalised."""
    sorted_logp, tokens = logp.sort(dim=-1, descending=True)
    before = sorted_logp.exp().cumsum(dim=-1) - sorted_logp.exp()  # held by likelier tokens
    cut = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, tokens, before >= top_p)
    return torch.log_softmax(logp.masked_fill(cut, -torch.inf), dim=-1)


class SeededSampling(LogitsProcessor):
    """Draws each row's next token with that row's own uniform numbers, and keeps the log-prob of what it drew.

    `generate` samples all rows from one global stream, which makes a rollout depend on its neighbours. This processor
    draws by inverting the cumulative distribution and leaves `generate` a score for the drawn token only.
    """

    def __init__(
        self, seeds: Sequence[int], temperature: float, max_tokens: int, device: torch.device, top_p: float = 1.0
    ) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.logp: list[Tensor] = []  # T tensors [N]
        draws = [torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.uniforms = torch.stack(draws, dim=1).to(device)  # [T, N]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)  # [N, V]
        if self.top_p < 1:
            logp = nucleus(logp, self.top_p)
        if self.temperature == 0:
            token = logp.argmax(dim=-1, keepdim=True)
        else:
            cumulative = logp.exp().cumsum(dim=-1)
            threshold = self.uniforms[len(self.logp)][:, None] * cumulative[:, -1:]
            # right=True never stops on a token of probability 0, except past the end by rounding
            token = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logp.shape[-1] - 1)
        self.logp.append(logp.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


@contextmanager
def plain_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and ordinary attention: the trainer's packed one has no key-value cache."""
    training, attention = lm.training, lm.config._attn_implementation
    lm.eval().set_attn_implementation("sdpa")
    try:
        yield
    finally:
        lm.train(training).set_attn_implementation(attention)


class TransformersSampler:
    """transformers' `generate` on the trainer's own model: no second copy, any device, any family."""

    sync_seconds: float | None = None

    def __init__(self, eos_ids: Sequence[int], compute_dtype: torch.dtype = torch.float32) -> None:
        self.eos_ids = list(eos_ids)
        self.compute_dtype = compute_dtype

    @contextmanager
    def holding(self, lm: PreTrainedModel) -> Iterator[Sample]:
        generation = lm.generation_config
        # `generate` fills what a request leaves open from the model's own config: a top_k, a repetition penalty.
        lm.generation_config = GenerationConfig()

        def sample(
            prompts: Sequence[list[int]],
            seeds: Sequence[int],
            n: int,
            temperature: float,
            max_tokens: int,
            top_p: float = 1.0,
        ) -> list[Rollout]:
            rows = [(prompt, seed + g) for prompt, seed in zip(prompts, seeds, strict=True) for g in range(n)]
            calls = [rows[start : start + ROWS_PER_CALL] for start in range(0, len(rows), ROWS_PER_CALL)]
            settings = temperature, max_tokens, top_p
            with torch.autocast(lm.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
                return [rollout for call in calls for rollout in self._generate(lm, call, *settings)]

        with plain_attention(lm):
            try:
                yield sample
            finally:
                lm.generation_config = generation

    @torch.no_grad()
    def _generate(
        self, lm: PreTrainedModel, rows: list[tuple[list[int], int]], temperature: float, max_tokens: int, top_p: float
    ) -> list[Rollout]:
        prompts = [torch.tensor(prompt) for prompt, _ in rows]
        input_ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left").to(lm.device)
        attention_mask = nn.utils.rnn.pad_sequence(
            [torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left"
        ).to(lm.device)
        sampling = SeededSampling([seed for _, seed in rows], temperature, max_tokens, lm.device, top_p)
        generation = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens, eos_token_id=self.eos_ids, pad_token_id=self.eos_ids[0]
        )
        output = lm.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=generation,
            logits_processor=LogitsProcessorList([sampling]),
        )
        responses = output[:, input_ids.shape[1] :].tolist()
        logps = torch.stack(sampling.logp, dim=1).tolist()
        return [self._cut(prompt, ids, logp) for (prompt, _), ids, logp in zip(rows, responses, logps, strict=True)]

    def _cut(self, prompt: list[int], ids: list[int], logp: list[float]) -> Rollout:
        """What follows the first stop token is padding, whatever its id: the pad token may be a stop token."""
        stops = [position for position, token in enumerate(ids) if token in self.eos_ids]
        length = stops[0] + 1 if stops else len(ids)
        return Rollout(prompt, ids[:length], logp[:length], finished=bool(stops))
