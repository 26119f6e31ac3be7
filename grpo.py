"""GRPO, the objective of Co-rewarding (arXiv 2508.00410, Eqs. 3-5), as pure functions of tensors.

    A      = (r - mean(r)) / (std(r) + 1e-6)                      within a group of G rollouts     (Eq. 3)
    L_t    = -w_t min(c_t A, clip(c_t, 1-eps, 1+eps) A) + beta k3_t,   c_t = pi(y_t) / pi_old(y_t)  (Eq. 4)
    k3_t   = exp(d_t) - d_t - 1,   d_t = log pi_ref(y_t) - log pi(y_t)                              (Eq. 5)
    loss   = sum over views of the mean of L_t over the view's response tokens                      (Eq. 6)

Where this differs from the paper: the mean in Eq. 4 runs over all response tokens of a view's whole step ("token");
"sequence" is the equation as printed. Eq. 5 is printed with its first ratio upside down, which can be negative; this is
k3, as in the authors' code, which also caps it at 10 (`--kl-cap`). w_t is 1 except for the correction of the sampler's
rounding, see `truncated_importance_weight`.

Shapes: N rollouts of a step = groups x G, B sequences of a micro-batch, T response tokens (padded).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from config import Config, Method, Optimisation
from lm import ranks
from lm.packing import MicroBatch, Rollout
from lm.scoring import PackedLM, TokenStats

Aggregation = Literal["token", "sequence", "dr-grpo"]


def group_advantages(rewards: Tensor, group_size: int, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantage [N] of each rollout within its group of `group_size` (Eq. 3); groups are contiguous.

    The standard deviation is the unbiased one (n-1), as in the authors' code. A group whose rewards are all equal
    teaches nothing: its advantages are exactly 0, whatever rounding leaves of its mean.
    """
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards are not whole groups of {group_size}")
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std and group_size > 1:
        centred = centred / (groups.std(dim=1, keepdim=True) + eps)
    all_equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return centred.masked_fill(all_equal, 0.0).flatten()


def k3(logp: Tensor, ref_logp: Tensor, cap: float = 0.0) -> Tensor:
    """Estimate of KL(policy || reference) per sampled token (Eq. 5), never negative; shape of its input.

    With a `cap` it is at most that, and a token beyond it has no gradient: the authors' 10 leaves d in [-11.0, 2.61].
    """
    d = ref_logp - logp
    if not cap:
        return torch.expm1(d) - d
    d = d.clamp(max=2 * cap)  # or exp overflows, and its gradient times 0 is no number
    return (torch.expm1(d) - d).clamp(max=cap)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    weights: Tensor | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """Clipped surrogate per token [B, T], to be minimised (Eq. 4 without its KL term); 0 where `mask` is 0.

    advantages is [B], everything else [B, T]. `weights` (detached) multiplies each token's term. `clip_high` bounds the
    ratio above 1 where it differs from the bound below (DAPO, arXiv 2503.14476).
    """
    ratio = torch.exp(logp - old_logp)
    gain = advantages[:, None] * ratio
    clipped_gain = advantages[:, None] * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.minimum(gain, clipped_gain)
    if weights is not None:
        loss = loss * weights
    return loss.masked_fill(mask == 0, 0.0)


def truncated_importance_weight(logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """min(pi(y_t) / pi_sampler(y_t), cap), detached, shape of its input: the sampler computes in other kernels, often
    in a lower precision, so its rollouts come from a slightly different distribution than the one being trained."""
    return torch.exp(logp.detach() - sampler_logp).clamp(max=cap)


def mini_batches(questions: int, group_size: int, views: int, count: int) -> list[list[range]]:
    """Which rollouts [N] each of `count` optimizer steps is on: the same questions in all views, a range in each."""
    size, cuts = questions * group_size, [group_size * (questions * m // count) for m in range(count + 1)]
    return [[range(v * size + cuts[m], v * size + cuts[m + 1]) for v in range(views)] for m in range(count)]


def denominators(how: Aggregation, rollouts: Sequence[Rollout], parts: Sequence[range], max_tokens: int) -> Tensor:
    """What `aggregate` divides each rollout by [N]: a count of its whole part, a view's share in an optimizer step. It
    is known before the first backward pass, so that the gradient does not depend on how a step is cut into
    micro-batches or spread over processes. The views' means are added (Eq. 6)."""
    counts = torch.zeros(len(rollouts))
    for part in parts:
        tokens = sum(len(rollouts[row].response_ids) for row in part)
        of_part = {"token": max(tokens, 1), "sequence": len(part), "dr-grpo": len(part) * max_tokens}[how]
        counts[part.start : part.stop] = of_part
    return counts


def aggregate(per_token: Tensor, mask: Tensor, how: Aggregation, denominator: float | Tensor) -> Tensor:
    """Scalar share of these sequences [B, T] in the step's loss.

    "token": every response token of the step weighs the same; "sequence": every rollout does (Eq. 4 as printed);
    "dr-grpo": a constant, rollouts x the longest response allowed (arXiv 2503.20783). `denominator` is one number, or
    one for each sequence [B] where they belong to different views, see `denominators`.
    """
    sums = per_token.masked_fill(mask == 0, 0.0).sum(dim=1)  # [B]
    length = mask.sum(dim=1).clamp(min=1) if how == "sequence" else 1
    return (sums / (length * denominator)).sum()


def learning_rate(step: int, total_steps: int, settings: Optimisation) -> float:
    """Rate of step 0 .. total_steps-1: linear over the first `warmup` (a share of all steps), then cosine towards 0.

    The first step already has peak / warm-up steps; starting from 0, as the authors' code does, wastes it.
    """
    warmup_steps = round(settings.warmup * total_steps)
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    if settings.lr_schedule == "constant":
        return settings.lr
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(policy: PackedLM, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the float32 master weights; the learning rate is set at every step."""
    return torch.optim.AdamW(policy.parameters(), lr=0.0, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=True)


def loss_of(
    logp: Tensor,
    old_logp: Tensor,
    anchor_logp: Tensor | None,
    batch: MicroBatch,
    advantages: Tensor,
    kl_coef: float,
    method: Method,
) -> Tensor:
    """Eq. 4 per token [B, T]; advantages are the step's [N], `anchor_logp` [B, T] is None without a KL term."""
    weights = truncated_importance_weight(old_logp, batch.sampler_logp, method.tis_cap) if method.tis_cap else None
    loss = policy_loss(logp, old_logp, advantages[batch.rows], batch.mask, method.clip, weights, method.clip_high)
    return loss if anchor_logp is None else loss + kl_coef * k3(logp, anchor_logp, method.kl_cap)


def optimizer_step(
    policy: PackedLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    advantages: Tensor,
    anchors: Sequence[TokenStats] | None,
    denominator: Tensor,
    kl_coef: float,
    rate: float,
    config: Config,
    old: Sequence[TokenStats] | None = None,
) -> dict[str, float]:
    """One step on the loss of all ranks' micro-batches (Eqs. 4-6). `advantages` and `denominator` are the step's [N],
    `anchors` the reference's log-probs of each micro-batch, None without a KL term; `old` those of the policy that has
    answered, None where that is the policy at hand.

    A gradient that is not finite leaves the policy and the optimizer as they were, and is counted.
    """
    seen: list[dict[str, Tensor]] = []
    for i, batch in enumerate(ranks.bar(batches, "updating", "micro-batch")):
        anchor_logp = anchors[i].logp if anchors else None
        stats = policy(batch, config.sampling.temperature)
        old_logp = old[i].logp if old else stats.logp.detach()
        loss = loss_of(stats.logp, old_logp, anchor_logp, batch, advantages, kl_coef, config.method)  # [B, T]
        aggregate(loss, batch.mask, config.method.loss_agg, denominator[batch.rows]).backward()
        seen.append(token_metrics(stats, old_logp, anchor_logp, batch))
        del stats, loss  # or their graph would outlive the next forward pass
    grad_norm = ranks.full(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimisation.max_grad_norm))
    if finite := math.isfinite(grad_norm.item()):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics = {name: ranks.mean(torch.cat([each[name] for each in seen])) for name in seen[0]}
    mismatch = torch.cat([each["mismatch_mean"] for each in seen])
    metrics["mismatch_max"] = ranks.largest(mismatch.max().item() if len(mismatch) else 0.0)
    return metrics | {"grad_norm": grad_norm.item(), "lr": rate, "skipped_steps": float(not finite)}


def token_metrics(
    stats: TokenStats, old_logp: Tensor, anchor_logp: Tensor | None, batch: MicroBatch
) -> dict[str, Tensor]:
    """What is logged of the micro-batch's response tokens, without padding and gradient."""
    metrics = {"entropy": stats.entropy, "mismatch_mean": (old_logp - batch.sampler_logp).abs()}
    if anchor_logp is not None:
        metrics["kl"] = k3(stats.logp.detach(), anchor_logp)
    return {name: values[batch.mask] for name, values in metrics.items()}
