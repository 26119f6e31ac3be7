"""The teacher of Co-rewarding-II and III: a slowly moving average of the policy (arXiv 2508.00410, Eq. 11).

    teacher <- w_k teacher + (1 - w_k) policy,    w_k from 0.99 to 0.9999 along a cosine over the run's own K steps

Its majority answers label the policy's rollouts, and its log-probs anchor the KL term. It starts as the frozen copy of
the policy (lm/model.py) that anchors the other variants.

Where this differs from the paper: Eq. 11 as printed ends at exactly 1 and the authors' code at 0.99999; the endpoints
here are those of the paper's Table 5. The average is kept in float32: in bfloat16 most updates round away.
"""

import math
from typing import Literal

import torch
from torch import nn

from lm.distributed import local_shard


def ema_weight(
    step: int,
    total_steps: int,
    start: float = 0.99,
    end: float = 0.9999,
    schedule: Literal["cosine", "constant"] = "cosine",
) -> float:
    """Compute the weight w_k that the teacher keeps of itself at step k = 0 .. K (Eq. 11, Table 5's endpoints)."""
    if schedule == "constant":
        return start
    return end - (end - start) / 2 * (1 + math.cos(math.pi * step / total_steps))


@torch.no_grad()
def update(teacher: nn.Module, policy: nn.Module, weight: float) -> None:
    """Move the teacher: teacher <- weight * teacher + (1 - weight) * policy, in place, exact for weight 0 and 1.

    `parameters()` yields a tied weight once, so it is averaged once. Buffers are copied. Under FSDP every rank averages
    its own shards, wherever they are, and nothing is communicated.
    """
    for mine, theirs in zip(teacher.parameters(), policy.parameters(), strict=True):
        shard = local_shard(mine)
        shard.lerp_(local_shard(theirs).to(shard), 1 - weight)
    for buffer, source in zip(teacher.buffers(), policy.buffers(), strict=True):
        buffer.copy_(source)
