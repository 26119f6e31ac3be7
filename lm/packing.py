"""Lay rollouts end to end, without padding: a micro-batch is one row, and attention never crosses its sequences.

Positions restart with each sequence.

Shapes: B sequences, S tokens of a micro-batch end to end, L longest sequence, T longest response.
"""

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lm import distributed
from lm.record import Rollout

# Up to 2.11, PyTorch lets query heads share a key head without being told to.
SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@dataclass
class MicroBatch:
    rows: Tensor  # [B] places of the sequences among the rollouts that were packed
    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [1, S]
    longest: int  # L; a number, so that compiled layers need not look at [B, L], where B = 1 is a case of its own
    pad_index: Tensor  # [B, L] index into S; 0 past a sequence's end
    unpad_index: Tensor  # [S] index into B*L, the inverse
    cu_seqlens: Tensor  # [B + 1] int32, where sequences begin and end in S
    predictor_at: Tensor  # [B, T] index into S of the token that predicts each response token
    targets: Tensor  # [B, T] the response tokens
    mask: Tensor  # [B, T] bool, by place and never by token id: the stop token is trained on, padding is not
    sampler_logp: Tensor  # [B, T]
    advantages: Tensor  # [B]
    denominators: Tensor  # [B]
    old_logp: Tensor | None = None  # [B, T] of the policy that has answered; None: the policy at hand is that one
    reference_logp: Tensor | None = None  # [B, T]; None without a KL term


def pack(rollouts: Sequence[Rollout], rows: Sequence[int], device: torch.device) -> MicroBatch:
    chosen = [rollouts[row] for row in rows]
    lengths = torch.tensor([len(rollout) for rollout in chosen])
    responses = torch.tensor([len(rollout.response_ids) for rollout in chosen])
    ends = lengths.cumsum(0)
    starts = ends - lengths
    in_sequence = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, L]
    positions = torch.arange(int(lengths.max())).expand_as(in_sequence)
    mask = torch.arange(int(responses.max())) < responses[:, None]  # [B, T]
    for row, rollout in enumerate(chosen):
        mask[row, rollout.untrained.start : rollout.untrained.stop] = False
    predictor_at = (ends - responses - 1)[:, None] + torch.arange(mask.shape[1])

    def padded(values: list[list[Any]]) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], batch_first=True)

    tensors = {
        "rows": torch.tensor(rows),
        "input_ids": torch.tensor(list(chain.from_iterable(r.prompt_ids + r.response_ids for r in chosen)))[None],
        "position_ids": positions[in_sequence][None],
        "pad_index": (starts[:, None] + positions).masked_fill(~in_sequence, 0),
        "unpad_index": in_sequence.flatten().nonzero().squeeze(1),
        "cu_seqlens": F.pad(ends, (1, 0)).int(),
        "predictor_at": predictor_at.masked_fill(~mask, 0),
        "targets": padded([r.response_ids for r in chosen]),
        "mask": mask,
        "sampler_logp": padded([r.logp for r in chosen]),
        "advantages": torch.tensor([r.advantage for r in chosen]),
        "denominators": torch.tensor([r.denominator for r in chosen]),
    }
    return MicroBatch(longest=int(lengths.max()), **{name: tensor.to(device) for name, tensor in tensors.items()})


def fill(rollouts: Sequence[Rollout], rows: Sequence[int], tokens: int) -> list[list[int]]:
    """Divide rows in their order into packs of at most `tokens` tokens; a longer rollout is a pack by itself."""
    packs: list[list[int]] = []
    used = tokens
    for row in rows:
        if used + len(rollouts[row]) > tokens:
            packs.append([])
            used = 0
        packs[-1].append(row)
        used += len(rollouts[row])
    return packs


def micro_batches(rollouts: Sequence[Rollout], tokens: int, device: torch.device) -> list[MicroBatch]:
    """Pack this rank's share of the rollouts into micro-batches of at most `tokens` tokens (a longer one gets its own).

    Neighbours in length go together: attention, the only part that pads on a CPU, then pads little. No more
    micro-batches than needed, and as even as that allows: a small last one would cost as many launches. They are
    the same whatever the number of ranks, and dealt out in turn, so that shares differ little in length. Every rank
    gets as many, because FSDP communicates within each pass. Where they do not suffice, a fully masked one passes
    through the model, and leaves no trace in loss, gradient or metrics.
    """
    rows = sorted(range(len(rollouts)), key=lambda row: len(rollouts[row]))
    count = len(fill(rollouts, rows, tokens))
    even = bisect_left(range(tokens), True, key=lambda limit: len(fill(rollouts, rows, limit)) <= count)
    packs = fill(rollouts, rows, even)
    batches = [pack(rollouts, rows, device) for rows in packs[distributed.rank() :: distributed.world_size()]]
    if len(batches) * distributed.world_size() < len(packs):
        idle = pack(rollouts, packs[0][:1], device)
        batches.append(replace(idle, mask=torch.zeros_like(idle.mask)))
    return batches


def runs_flash(query: Tensor) -> bool:
    fits = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and not fits:
        warnings.warn(f"attention in {query.dtype} runs padded and slowly on a GPU; compute in bfloat16", stacklevel=2)
    return query.is_cuda and fits


def as_autocast_would(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype, where it is on: a norm of queries and keys, as Qwen3 has, leaves them in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: MicroBatch,
    **options: Any,
) -> tuple[Tensor, None]:
    """Apply causal attention within each sequence of a micro-batch, for transformers' attention interface.

    query [1, heads, S, d]; key and value may have fewer heads. In half precision on a GPU this is flash attention of
    variable length; elsewhere sequences are laid out [B, L] for the attention alone: padding on the right needs no mask
    under causal attention, and its outputs are dropped. A layer with a sliding window sees that many tokens, the
    present one included.
    """
    scale = options.get("scaling")
    sliding_window = options.get("sliding_window")
    longest = packing.longest
    query, key, value = as_autocast_would(query, key, value)
    if runs_flash(query):
        q, k, v = (packed[0].transpose(0, 1) for packed in (query, key, value))  # [S, heads, d]
        window_size = (-1 if sliding_window is None else sliding_window - 1, 0)  # to the left, to the right
        ends = packing.cu_seqlens
        output = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=window_size, **SHARED_KEYS)
        return output[None], None  # type: ignore[call-overload]

    def rows(packed: Tensor) -> Tensor:
        return packed[0][:, packing.pad_index].transpose(0, 1)  # [B, heads, L, d]

    window = None
    if sliding_window is not None and sliding_window < longest:
        window = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
    output = F.scaled_dot_product_attention(
        rows(query), rows(key), rows(value), window, is_causal=window is None, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2).flatten(0, 1)[packing.unpad_index][None], None  # [1, S, heads, d]


AttentionInterface.register("packed", packed_attention)
