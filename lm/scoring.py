"""Compute log-probs of responses without all logits in memory: ordinary autograd, whatever the objective.

The head works on response positions only, a chunk of tokens at a time, forward and backward. A tensor
[tokens, vocabulary] never exists whole.

Shapes: B sequences, S tokens of a micro-batch end to end, T longest response, R response tokens, H hidden,
V vocabulary.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm import distributed
from lm.packing import MicroBatch, micro_batches
from lm.record import Rollout

# Logits at once. In float32 1 GiB on a GPU, a fifth faster there than 256 MiB; on a CPU 32 MiB, where larger ones leave
# the cache and smaller ones add up too often.
ON_GPU = 2**28
ON_CPU = 2**23
LOGITS_PER_CHUNK = ON_GPU if torch.cuda.is_available() else ON_CPU
# oneDNN, which multiplies in bfloat16 on a CPU, keeps what it compiles for each of the last 1,024 shapes, and PyTorch
# too: micro-batches that are never of one length would cost some GB. Both read this when they first multiply.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")


class TokenStats(NamedTuple):
    """Statistics of each response token [B, T], 0 where the mask is, at the sampling temperature.

    Log-probs alone carry a gradient.
    """

    logp: Tensor
    entropy: Tensor  # nats
    self_certainty: Tensor  # logsumexp(z) - mean(z)


def token_chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return float32 logits at the temperature, in place if they are float32."""
    logits = logits.float()
    return logits if temperature == 1 else logits.div_(temperature)


def token_statistics(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute TokenStats [3, n] from logits [n, V], overwritten if they are float32, and target [n, 1].

    The second result [2, n] is what makes probabilities of logits, exp(z - highest) / total. All is spelled out,
    because `log_softmax` takes three times as long on a CPU.
    """
    z = scaled(logits, temperature)
    highest = z.amax(dim=-1, keepdim=True)
    z = z.sub_(highest)  # so that exp cannot overflow
    exp_z = z.exp()
    total = exp_z.sum(dim=-1)
    logp = z.gather(-1, target).squeeze(-1) - total.log()
    entropy = total.log() - exp_z.mul_(z).sum(dim=-1) / total
    self_certainty = total.log() - z.mean(dim=-1)
    return torch.stack([logp, entropy, self_certainty]), torch.stack([highest.squeeze(-1), total])


def minus_probabilities(logits: Tensor, highest: Tensor, total: Tensor, slope: Tensor, temperature: float) -> Tensor:
    """Compute -slope * p [n, V] in the dtype of the logits [n, V], which are overwritten if they are float32."""
    # highest and total apart: z minus their sum would round what a likely token still has to learn
    exp_z = scaled(logits, temperature).sub_(highest[:, None]).exp_()
    return exp_z.mul_((-slope / total)[:, None]).to(logits.dtype)


# The head's passes over logits. Each is one kernel if it is compiled, else every operation moves all logits once more.
PASSES: tuple[Callable[..., Any], ...] = (token_statistics, minus_probabilities)


class ChunkedHead(torch.autograd.Function):
    """Function (hidden [R, H], weight [V, H], targets [R], temperature) -> TokenStats, each [R].

    Log-probs alone carry a gradient, d log p(y) / d z = (onehot(y) - softmax(z)) / temperature. Logits are computed
    again in the backward pass: a fourth matrix product instead of three is the price of never keeping them. Sums over
    the vocabulary and over tokens are float32; the weight may be more precise than `hidden`, whose dtype the products
    have, and then gets its gradient unrounded.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, passes: Any = PASSES
    ) -> tuple[Tensor, ...]:
        lean = weight.to(hidden.dtype)
        statistics = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        normalisers = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        for chunk in token_chunks(len(hidden), len(weight)):
            logits = hidden[chunk] @ lean.T
            statistics[:, chunk], normalisers[:, chunk] = passes[0](logits, targets[chunk, None], temperature)
            del logits  # before the next chunk's come
        logp, *others = statistics
        ctx.save_for_backward(hidden, weight, targets, normalisers, logp)
        ctx.temperature = temperature
        ctx.passes = passes
        ctx.mark_non_differentiable(*others)
        return logp.clone(), *others

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, (highest, total), logp = ctx.saved_tensors
        lean = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        slope = grad_logp / ctx.temperature
        of_target = (-slope * torch.expm1(logp)).to(hidden.dtype)  # slope * (1 - p), exact where p is nearly 1
        for chunk in token_chunks(len(hidden), len(weight)):
            logits = hidden[chunk] @ lean.T
            grad_logits = ctx.passes[1](logits, highest[chunk], total[chunk], slope[chunk], ctx.temperature)
            grad_logits.scatter_(-1, targets[chunk, None], of_target[chunk, None])
            grad_hidden[chunk] = grad_logits @ lean
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
            else:
                grad_weight += grad_logits.T @ hidden[chunk]
            del logits, grad_logits  # before the next chunk's logits come
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class PackedLM(nn.Module):
    """A causal language model of transformers that returns statistics of packed responses instead of logits."""

    def __init__(self, lm: PreTrainedModel, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        lm.set_attn_implementation("packed")
        self.lm = lm
        self.compute_dtype = compute_dtype
        self.passes = PASSES

    def forward(self, batch: MicroBatch, temperature: float) -> TokenStats:
        with autocast(batch.input_ids.device, self.compute_dtype):  # the weights may be elsewhere, see model.shard
            hidden = self.lm.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, packing=batch
            ).last_hidden_state[0]  # [S, H]
        hidden = hidden[batch.predictor_at[batch.mask]].to(self.compute_dtype)  # [R, H]
        weight = self.lm.get_output_embeddings().weight
        statistics = ChunkedHead.apply(hidden, weight, batch.targets[batch.mask], temperature, self.passes)
        zeros = torch.zeros_like(batch.sampler_logp)
        return TokenStats._make(zeros.masked_scatter(batch.mask, statistic) for statistic in statistics)


@torch.no_grad()
def score(model: PackedLM, batches: Sequence[MicroBatch], temperature: float) -> list[TokenStats]:
    """Compute the statistics of every response token under `model`, a TokenStats [B, T] for each micro-batch."""
    return [model(batch, temperature) for batch in distributed.progress_bar(batches, "scoring", "micro-batch")]


def assign_token_stats(
    model: PackedLM, rollouts: Sequence[Rollout], tokens: int, device: torch.device, temperature: float
) -> None:
    """Give each rollout the means of the statistics over its response tokens, by one forward pass over all."""
    batches = micro_batches(rollouts, tokens, device)
    means = torch.zeros(len(rollouts), len(TokenStats._fields), device=device)
    for batch, stats in zip(batches, score(model, batches, temperature), strict=True):
        length = batch.mask.sum(dim=1).clamp(min=1)
        means[batch.rows] += (torch.stack(stats).sum(dim=2) / length).T
    for rollout, values in zip(rollouts, distributed.all_reduce_sum(means).tolist(), strict=True):
        rollout.token_stats = dict(zip(TokenStats._fields, values, strict=True))
