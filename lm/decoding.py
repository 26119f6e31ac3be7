"""Sample with the trainer's own model: any device, any family of transformers.

Shapes: Q prompts, G rollouts a prompt, N = Q x G rows, P prompt tokens, T response tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from inspect import signature
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, TopPLogitsWarper

from lm import distributed
from lm.model import plain_attention, unsharded
from lm.record import Rollout
from lm.scoring import autocast

ROWS_PER_CALL = 256  # sampled at once: bounds the key-value cache

Sample = Callable[..., list[Rollout]]


class Capacity(NamedTuple):
    """The most that a sampler must be able to hold at once."""

    sequence_tokens: int  # of the longest prompt and response together
    sequences: int
    engine_memory: float = 0.5  # share of the memory for vLLM, see config.Memory
    engine_cache_gb: float | None = None  # likewise


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of `logits` [N, V]: where the cumulative distribution passes its uniform number [N].

    Returns:
        The tokens [N], at temperature 0 the likeliest ones, and their log-probs [N].
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if top_p < 1:
        logp = torch.log_softmax(TopPLogitsWarper(top_p)(None, logp), dim=-1)
    if temperature == 0:
        token = logp.argmax(dim=-1, keepdim=True)
    else:
        cumulative = logp.exp().cumsum(dim=-1)
        # right=True never stops on a token of probability 0, except past the end by rounding
        token = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
        token = token.clamp(max=logp.shape[-1] - 1)
    return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)


def request_seed(*key: str | int) -> int:
    """Derive a seed below 2^62 for one prompt's rollouts from (run seed, step, question id, view, role).

    Rollout g of the group adds g. It is a hash: no two requests of a run share a stream, whatever the ids look like.
    """
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest()) >> 2


def uniform_numbers(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Draw `count` numbers [count, N] for each row from its own stream, whatever else is in the batch."""
    streams = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(streams, dim=1).to(device)


class Decoding:
    """A batch of sequences, n for each prompt, that grows by a token a step, with the next token's logits [N, V]."""

    def __init__(self, lm: PreTrainedModel, prompts: Sequence[list[int]], n: int) -> None:
        self.lm = lm
        self.cache = DynamicCache(config=lm.config)
        self.cache_name = "cache" if "cache" in signature(lm.forward).parameters else "past_key_values"  # from 5.20 on
        # Padding on the left, so that all rows grow at the same end.
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        tokens = [torch.tensor(prompt) for prompt in prompts]
        self.mask = pad([torch.ones_like(each) for each in tokens]).to(lm.device)  # [Q, P]
        logits = self._next_logits(pad(tokens).to(lm.device), (self.mask.cumsum(1) - 1).clamp(min=0))
        self.cache.batch_repeat_interleave(n)
        self.mask = self.mask.repeat_interleave(n, dim=0)
        self.logits = logits.repeat_interleave(n, dim=0)

    def step(self, token: Tensor, kept: Tensor) -> None:
        """Append a token [N] to each sequence, and go on with those of `kept` [N] alone."""
        if not kept.all():
            self.cache.batch_select_indices(kept.nonzero().squeeze(1))
        self.mask = F.pad(self.mask[kept], (0, 1), value=1)
        self.logits = self._next_logits(token[kept, None], self.mask.sum(dim=1, keepdim=True) - 1)

    def _next_logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.lm(
            input_ids,
            attention_mask=self.mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        ).logits[:, -1]


class TransformersSampler:
    """A sampler that is the trainer's own model, or a copy where that is sharded.

    A prompt is read once for all its rollouts, and a finished rollout leaves the batch. (`generate` of transformers
    does neither, and draws all rows from one stream of random numbers: a rollout would depend on its neighbours.)
    """

    sync_seconds: float | None = None  # that the last load of weights took; here sampling needs none
    sleeping_bytes = 0  # that PyTorch counts as used while an engine sleeps, and that are free

    def __init__(self, eos_ids: Sequence[int], compute_dtype: torch.dtype = torch.float32) -> None:
        self.eos_ids = list(eos_ids)
        self.compute_dtype = compute_dtype

    def close(self) -> None:
        """Do nothing: there is no engine to end."""

    @contextmanager
    def loaded(self, lm: PreTrainedModel) -> Iterator[Sample]:
        """Yield the function that samples from the model's present weights."""
        lm = unsharded(lm, self.compute_dtype)

        def sample(prompts: Sequence[list[int]], seeds: Sequence[int], n: int, **how: Any) -> list[Rollout]:
            rollouts = [Rollout(prompt, [], [], finished=False) for prompt, _ in product(prompts, range(n))]
            own_seeds = [seed + g for seed, g in product(seeds, range(n))]
            per_call = max(1, ROWS_PER_CALL // n)
            for start in range(0, len(prompts), per_call):
                rows = slice(start * n, (start + per_call) * n)
                with torch.no_grad(), autocast(lm.device, self.compute_dtype):
                    decoding = Decoding(lm, prompts[start : start + per_call], n)
                    self._respond(decoding, rollouts[rows], own_seeds[rows], **how)
            return rollouts

        with plain_attention(lm):
            yield sample

    def _respond(
        self,
        decoding: Decoding,
        rollouts: Sequence[Rollout],
        seeds: Sequence[int],
        temperature: float,
        max_tokens: int,
        top_p: float = 1.0,
    ) -> None:
        """Fill in the responses, each drawn from the stream of its own seed."""
        device = decoding.logits.device
        uniforms = uniform_numbers(seeds, max_tokens, device)  # [T, N]
        active = torch.arange(len(rollouts), device=device)  # rows that still go on
        stop_ids = torch.tensor(self.eos_ids, device=device)
        for position in distributed.progress_bar(range(max_tokens), "sampling", "token"):
            token, logp = draw(decoding.logits, uniforms[position, active], temperature, top_p)
            for row, token_id, its_logp in zip(active.tolist(), token.tolist(), logp.tolist(), strict=True):
                rollouts[row].response_ids.append(token_id)
                rollouts[row].logp.append(its_logp)
                rollouts[row].finished = token_id in self.eos_ids
            goes_on = torch.isin(token, stop_ids, invert=True)
            active = active[goes_on]
            if len(active) == 0 or position + 1 == max_tokens:
                break
            decoding.step(token, goes_on)
