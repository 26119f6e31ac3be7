"""A CPU kernel for PyTorch's variable-length attention, so that what a GPU traces and compiles runs here, exactly.

It leans on private names of PyTorch: where they are missing, `available` is False.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import varlen

from lm import packing

forward_operator = getattr(varlen, "_varlen_attn", None)
backward_operator = getattr(varlen, "_varlen_attn_backward", None)
available = hasattr(forward_operator, "register_kernel") and hasattr(backward_operator, "register_kernel")


def of_each_sequence(cu_seqlens: Tensor, *packed: Tensor) -> list[list[Tensor]]:
    """Cut packed [S, heads, d] into float32 [heads, n, d] of each sequence, with as many key heads as query heads."""
    bounds, most = cu_seqlens.tolist(), max(tensor.shape[1] for tensor in packed)
    repeated = [tensor.float().repeat_interleave(most // tensor.shape[1], dim=1).transpose(0, 1) for tensor in packed]
    return [[tensor[:, a:b] for tensor in repeated] for a, b in pairwise(bounds)]


def scores(query: Tensor, key: Tensor, scale: float | None, window: list[int] | None) -> Tensor:
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    seen = distance >= 0
    if window and window[0] >= 0:
        seen &= distance <= window[0]
    z = query @ key.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)
    return z.masked_fill(~seen, -torch.inf)


def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *_):  # type: ignore[no-untyped-def]
    outputs, normalisers = [], []
    for query, key, value in of_each_sequence(cu_q, q, k, v):
        z = scores(query, key, scale, window_size)
        outputs.append((z.softmax(-1) @ value).transpose(0, 1))
        normalisers.append(z.logsumexp(-1))
    return torch.cat(outputs).to(q.dtype), torch.cat(normalisers, dim=1), torch.zeros(2, dtype=torch.uint64)


def backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, state, scale=None, window_size=None
):
    grads: list[list[Tensor]] = [[], [], []]
    shared = q.shape[1] // k.shape[1]
    start = 0
    for d_out, query, key, value, output in of_each_sequence(cu_q, grad, q, k, v, out):
        length = query.shape[1]
        p = (scores(query, key, scale, window_size) - lse[:, start : start + length, None]).exp()
        d_p = d_out @ value.transpose(1, 2)
        d_z = p * (d_p - (d_out * output).sum(-1, keepdim=True)) * (scale or query.shape[-1] ** -0.5)
        ours = d_z @ key, d_z.transpose(1, 2) @ query, p.transpose(1, 2) @ d_out
        for part, gradient, heads in zip(grads, ours, (1, shared, shared), strict=True):
            part.append(gradient.unflatten(0, (-1, heads)).sum(1).transpose(0, 1))
        start += length
    return tuple(torch.cat(part).to(q.dtype) for part in grads)


def install() -> None:
    """Register the kernel, and let the packed attention take the path of a GPU in bfloat16: in a process of its own."""
    forward_operator.register_kernel("cpu")(forward)
    backward_operator.register_kernel("cpu")(backward)
    packing.runs_flash = lambda query: query.dtype == torch.bfloat16
