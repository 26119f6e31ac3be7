"""Log-probs of responses without padding and without logits in memory.

A micro-batch is one row: its sequences lie end to end, positions restart with each, attention never crosses them. The
head works on response positions only, a chunk of tokens at a time, forward and backward, so that a tensor
[tokens, vocabulary] never exists whole.

Shapes: B sequences, S tokens of a micro-batch end to end, L longest sequence, T longest response, R response tokens,
H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from rollout import Rollout

# In float32 256 MiB on a GPU; on a CPU 32 MiB, where larger ones leave the cache and smaller ones add up too often.
LOGITS_PER_CHUNK = 2**26 if torch.cuda.is_available() else 2**23

# Up to 2.11, PyTorch lets query heads share a key head without being told to.
SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass; `rows` are their positions among the step's rollouts."""

    rows: Tensor  # [B]
    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [1, S]
    token_at: Tensor  # [B, L] index into S; 0 past a sequence's end
    row_at: Tensor  # [S] index into B*L, the inverse
    bounds: Tensor  # [B + 1] int32, where sequences begin and end in S
    predictor_at: Tensor  # [B, T] index into S of the token that predicts each response token
    targets: Tensor  # [B, T] the response tokens
    mask: Tensor  # [B, T] bool, by length and never by token id: the stop token is trained on, padding is not
    sampler_logp: Tensor  # [B, T]


class TokenStats(NamedTuple):
    """Per response token [B, T], 0 where the mask is; of the distribution at the sampling temperature."""

    logp: Tensor
    entropy: Tensor  # nats
    self_certainty: Tensor  # logsumexp(z) - mean(z)
    loss: Tensor  # the sum of a `TokenLoss` over all of them, with gradient; 0 where none was asked for


def pack(rollouts: Sequence[Rollout], rows: Sequence[int], device: torch.device) -> MicroBatch:
    """The rollouts at `rows`, end to end."""
    chosen = [rollouts[row] for row in rows]
    lengths = torch.tensor([len(rollout) for rollout in chosen])
    responses = torch.tensor([len(rollout.response_ids) for rollout in chosen])
    starts, ends = lengths.cumsum(0) - lengths, lengths.cumsum(0)
    in_sequence = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, L]
    positions = torch.arange(int(lengths.max())).expand_as(in_sequence)
    mask = torch.arange(int(responses.max())) < responses[:, None]  # [B, T]
    predictor_at = (ends - responses - 1)[:, None] + torch.arange(mask.shape[1])

    def padded(values: list[list[Any]]) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], batch_first=True)

    batch = MicroBatch(
        rows=torch.tensor(rows),
        input_ids=torch.tensor([token for r in chosen for token in r.prompt_ids + r.response_ids])[None],
        position_ids=positions[in_sequence][None],
        token_at=(starts[:, None] + positions).masked_fill(~in_sequence, 0),
        row_at=in_sequence.flatten().nonzero().squeeze(1),
        bounds=F.pad(ends, (1, 0)).int(),
        predictor_at=predictor_at.masked_fill(~mask, 0),
        targets=padded([r.response_ids for r in chosen]),
        mask=mask,
        sampler_logp=padded([r.logp for r in chosen]),
    )
    return MicroBatch(*(tensor.to(device) for tensor in vars(batch).values()))


def micro_batches(
    rollouts: Sequence[Rollout],
    tokens: int,
    device: torch.device,
    rows: Iterable[int] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> list[MicroBatch]:
    """This rank's share of the rollouts at `rows` (None: all), in micro-batches of at most `tokens` tokens (a longer
    one gets its own).

    Neighbours in length go together: attention, the only part that pads on a CPU, then pads little. The micro-batches
    are the same whatever the number of ranks, and dealt out in turn, so that shares differ little in length. Every rank
    gets as many, a muted one where they do not suffice: FSDP communicates within each forward and backward pass.
    """
    groups: list[list[int]] = []
    used = tokens
    for row in sorted(range(len(rollouts)) if rows is None else rows, key=lambda row: len(rollouts[row])):
        if used + len(rollouts[row]) > tokens:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += len(rollouts[row])
    batches = [pack(rollouts, rows, device) for rows in groups[rank::ranks]]
    if len(batches) * ranks < len(groups):
        batches.append(muted(pack(rollouts, groups[0][:1], device)))
    return batches


def muted(batch: MicroBatch) -> MicroBatch:
    """The same with no response token: it passes through the model and leaves no trace in loss, gradient or metrics."""
    return replace(batch, mask=torch.zeros_like(batch.mask))


def runs_flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: MicroBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a micro-batch, for transformers' attention interface.

    query [1, heads, S, d]; key and value may have fewer heads. In half precision on a GPU this is flash attention of
    variable length; elsewhere sequences are laid out [B, L] for the attention alone: padding on the right needs no mask
    under causal attention, and its outputs are dropped. A layer with a sliding window sees that many tokens, the
    present one included.
    """
    longest = packing.token_at.shape[1]
    if runs_flash(query):
        q, k, v = (packed[0].transpose(0, 1) for packed in (query, key, value))  # [S, heads, d]
        window_size = (-1 if sliding_window is None else sliding_window - 1, 0)  # to the left, to the right
        ends = packing.bounds
        output = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window_size, **SHARED_KEYS
        )
        return output[None], None  # type: ignore[call-overload]

    def rows(packed: Tensor) -> Tensor:
        return packed[0][:, packing.token_at].transpose(0, 1)  # [B, heads, L, d]

    window = None
    if sliding_window is not None and sliding_window < longest:
        window = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
    output = F.scaled_dot_product_attention(
        rows(query), rows(key), rows(value), window, is_causal=window is None, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).flatten(0, 1)[packing.row_at][None], None  # [1, S, heads, d]


AttentionInterface.register("packed", packed_attention)


def token_chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


# Log-probs of some of the R response tokens, and which ones -> the loss of each, already weighted: they are only added.
TokenLoss = Callable[[Tensor, slice], Tensor]


def token_statistics(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The statistics of TokenStats [3, n] and probabilities [n, V] of hidden [n, H] and target [n, 1]."""
    log_p = (hidden @ weight.T).float().div_(temperature).log_softmax(dim=-1)
    probabilities = log_p.exp()
    logp = log_p.gather(-1, target).squeeze(-1)
    self_certainty = -log_p.mean(dim=-1)  # = logsumexp(z) - mean(z)
    entropy = -log_p.mul_(probabilities).sum(dim=-1)
    return torch.stack([logp, entropy, self_certainty]), probabilities


class ChunkedHead(torch.autograd.Function):
    """(hidden [R, H], weight [V, H], targets [R], temperature, token_loss) -> loss, and per token the statistics of
    TokenStats [3, R]. The loss is the sum of `token_loss` and carries the gradient; without one it is 0.

    A loss that is a sum over tokens has its gradient at hand as soon as a token's logits are,

        d loss / d z = (d loss / d log p(y)) (onehot(y) - softmax(z)) / temperature,

    so the gradients of hidden and weight are formed in the forward pass: three matrix products in all, and no logits
    computed twice. Sums over the vocabulary and over tokens are float32; the weight may be more precise than `hidden`,
    whose dtype the products have, and then gets its gradient unrounded.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, token_loss: TokenLoss | None
    ) -> tuple[Tensor, Tensor]:
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        statistics = hidden.new_empty(len(TokenStats._fields) - 1, len(hidden), dtype=torch.float32)
        if token_loss is not None:
            grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
            ctx.gradients = grad_hidden, grad_weight
        for chunk in token_chunks(len(hidden), len(weight)):
            probabilities = grad_logits = None  # the last chunk's go before this one's come
            target = targets[chunk, None]
            statistics[:, chunk], probabilities = token_statistics(hidden[chunk], weight, target, temperature)
            if token_loss is None:
                continue
            value, slope = value_and_slope(token_loss, statistics[0, chunk], chunk)  # [chunk]
            loss += value.sum()
            scale = slope[:, None] / temperature
            grad_logits = probabilities.mul_(-scale).scatter_add_(-1, target, scale).to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
            else:
                grad_weight += grad_logits.T @ hidden[chunk]
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = (gradient.mul_(grad_loss) for gradient in ctx.gradients)
        return grad_hidden, grad_weight.to(ctx.weight_dtype), None, None, None


def value_and_slope(token_loss: TokenLoss, logp: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
    """The losses of tokens [n] and their derivatives by the log-probs."""
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        value = token_loss(logp, tokens)
        (slope,) = torch.autograd.grad(value.sum(), logp)
    return value.detach(), slope


class PackedLM(nn.Module):
    """A causal language model of transformers that returns statistics of packed responses instead of logits."""

    def __init__(self, lm: PreTrainedModel, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        lm.set_attn_implementation("packed")
        self.lm = lm
        self.compute_dtype = compute_dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        return torch.autocast(device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def forward(self, batch: MicroBatch, temperature: float, token_loss: TokenLoss | None = None) -> TokenStats:
        with self.autocast(batch.input_ids.device):  # the weights may be elsewhere, see policy.shard
            hidden = self.lm.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, packing=batch
            ).last_hidden_state[0]  # [S, H]
        hidden = hidden[batch.predictor_at[batch.mask]].to(self.compute_dtype)  # [R, H]
        weight = self.lm.get_output_embeddings().weight
        loss, statistics = ChunkedHead.apply(hidden, weight, batch.targets[batch.mask], temperature, token_loss)
        zeros = torch.zeros_like(batch.sampler_logp)
        return TokenStats._make([*(zeros.masked_scatter(batch.mask, statistic) for statistic in statistics), loss])
