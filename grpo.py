"""GRPO, the objective of Co-rewarding (arXiv 2508.00410, Eqs. 3-6).

    A      = (r - mean(r)) / (std(r) + 1e-6)                      within a group of G rollouts     (Eq. 3)
    L_t    = -w_t min(c_t A, clip(c_t, 1-eps, 1+eps) A) + beta k3_t,   c_t = pi(y_t) / pi_old(y_t)  (Eq. 4)
    k3_t   = exp(d_t) - d_t - 1,   d_t = log pi_ref(y_t) - log pi(y_t)                              (Eq. 5)
    loss   = sum over views of the mean of L_t over the view's response tokens                      (Eqs. 4, 6)

Where this differs from the paper: the mean runs over all response tokens of a view in the mini-batch ("token");
"sequence" is the equation as printed. Eq. 5 is printed with its first ratio upside down, which can be negative; this is
k3, as in the authors' code, which also caps it at 10 (`--kl-cap`). w_t is 1 except for the correction of the sampler's
rounding, see `truncated_importance_weight`.

Shapes: N rollouts of a step = groups x G, B sequences of a micro-batch, T response tokens (padded).
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import Config, Method, Optimisation
from lm import distributed
from lm.packing import MicroBatch
from lm.record import Rollout
from lm.scoring import PackedLM, TokenStats
from rewards import Group, rollouts_of

Aggregation = Literal["token", "sequence", "dr-grpo"]


def group_advantages(rewards: Tensor, group_size: int, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Compute the advantage [N] of each rollout within its group (Eq. 3) from rewards [N], groups contiguous.

    The standard deviation is the unbiased one (n-1), as in the authors' code. A group whose rewards are all equal
    has advantages of exactly 0, whatever rounding leaves of its mean.
    """
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards are not whole groups of {group_size}")
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std and group_size > 1:
        centred = centred / (groups.std(dim=1, keepdim=True) + eps)
    all_equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return centred.masked_fill(all_equal, 0.0).flatten()


def assign_advantages(groups: Sequence[Group], rewards: Sequence[Sequence[float]], fixed: bool = False) -> None:
    """Give each rollout its reward, of G for each group, and its advantage: in its group, or if `fixed` the reward."""
    flat = list(chain.from_iterable(rewards))
    advantages = flat if fixed else group_advantages(torch.tensor(flat), group_size=len(rewards[0])).tolist()
    for rollout, reward, advantage in zip(rollouts_of(groups), flat, advantages, strict=True):
        rollout.reward = reward
        rollout.advantage = advantage


def k3(logp: Tensor, ref_logp: Tensor, cap: float = 0.0) -> Tensor:
    """Estimate KL(policy || reference) for each sampled token (Eq. 5): never negative, in the shape of its input.

    With a `cap` it is at most that, and a token beyond has no gradient: the authors' 10 leaves d in [-11.0, 2.61].
    """
    d = ref_logp - logp
    if not cap:
        return torch.expm1(d) - d
    d = d.clamp(max=2 * cap)  # or exp overflows, and its gradient times 0 is not a number
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
    """Compute the clipped surrogate of each token [B, T], to be minimised (Eq. 4 without its KL term).

    Advantages are [B], all else [B, T]; it is 0 where `mask` is. `weights`, detached, multiply each term.
    `clip_high` bounds the ratio above 1 where that differs from the bound below (DAPO, arXiv 2503.14476).
    """
    ratio = torch.exp(logp - old_logp)
    gain = advantages[:, None] * ratio
    clipped_gain = advantages[:, None] * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.minimum(gain, clipped_gain)
    if weights is not None:
        loss = loss * weights
    return loss.masked_fill(mask == 0, 0.0)


def truncated_importance_weight(old_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """Compute min(pi_old(y_t) / pi_sampler(y_t), cap), detached, in the shape of its input.

    The sampler computes in other kernels, often in a lower precision: its rollouts come from a slightly different
    distribution than the one that is trained.
    """
    return torch.exp(old_logp.detach() - sampler_logp).clamp(max=cap)


def token_loss(logp: Tensor, old_logp: Tensor, batch: MicroBatch, kl_coef: float, method: Method) -> Tensor:
    """Compute Eq. 4 for each token [B, T]; a batch without log-probs of a reference has no KL term."""
    weights = None
    if method.tis_cap:
        weights = truncated_importance_weight(old_logp, batch.sampler_logp, method.tis_cap)
    loss = policy_loss(logp, old_logp, batch.advantages, batch.mask, method.clip, weights, method.clip_high)
    if batch.reference_logp is not None:
        loss = loss + kl_coef * k3(logp, batch.reference_logp, method.kl_cap)
    return loss


def split_mini_batches(groups: Sequence[Group], count: int) -> Iterator[list[Group]]:
    """Split the groups into `count` mini-batches by question: the views of a question stay together."""
    questions = max(group.place for group in groups) + 1
    for m in range(count):
        part = range(questions * m // count, questions * (m + 1) // count)
        yield [group for group in groups if group.place in part]


def mask_answers(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> None:
    r"""Leave the tokens of each response's last `\boxed{...}` without a loss (--mask-answer); without a box, none."""
    for rollout in rollouts:
        if rollout.answer is not None:
            box = f"\\boxed{{{rollout.answer}}}"
            start = rollout.text.rindex(box)
            rollout.untrained = tokens_of(rollout.response_ids, range(start, start + len(box)), tokenizer)


def tokens_of(ids: list[int], characters: range, tokenizer: PreTrainedTokenizerBase) -> range:
    """Find the tokens that any of these characters of their text is part of, whatever the tokenizer has merged."""

    def characters_before(token: int) -> int:
        return len(tokenizer.decode(ids[:token], skip_special_tokens=True))

    places = range(len(ids) + 1)
    first = bisect_right(places, characters.start, key=characters_before) - 1
    return range(first, bisect_left(places, characters.stop, key=characters_before))


def assign_denominators(groups: Sequence[Group], how: Aggregation, max_tokens: int) -> None:
    """Give each rollout the number that `aggregate` divides its loss by: a count over its view in the mini-batch.

    The number is known before the first backward pass, so the gradient does not depend on micro-batches or processes.
    Each view has its own, so that the views' means add up (Eq. 6).
    """
    for view in {group.view for group in groups}:
        rollouts = rollouts_of(group for group in groups if group.view == view)
        if how == "token":
            count = max(sum(len(rollout.response_ids) - len(rollout.untrained) for rollout in rollouts), 1)
        elif how == "sequence":
            count = len(rollouts)
        else:
            count = len(rollouts) * max_tokens
        for rollout in rollouts:
            rollout.denominator = float(count)


def select_with_gradient(rollouts: list[Rollout]) -> list[Rollout]:
    """Select the rollouts that have a gradient where there is no KL term: their advantage is not 0.

    If none has, the first stays: AdamW must see a gradient of 0, not none.
    """
    return [rollout for rollout in rollouts if rollout.advantage] or rollouts[:1]


def aggregate(per_token: Tensor, mask: Tensor, how: Aggregation, denominator: float | Tensor) -> Tensor:
    """Add up the losses of a micro-batch's tokens to its share of the mini-batch's loss, a scalar.

    "token": every response token of a view in the mini-batch weighs the same; "sequence": every rollout does (Eq. 4 as
    printed); "dr-grpo": a constant, rollouts x the longest response allowed (arXiv 2503.20783), while advantages keep
    their division by the deviation. `per_token` and `mask` are [B, T], `denominator` is one number or [B].
    """
    sums = per_token.masked_fill(mask == 0, 0.0).sum(dim=1)  # [B]
    length = mask.sum(dim=1).clamp(min=1) if how == "sequence" else 1
    return (sums / (length * denominator)).sum()


def learning_rate(step: int, total_steps: int, settings: Optimisation) -> float:
    """Compute the rate of step 0 .. total_steps-1: it rises over the first `warmup` (a share), then falls as a cosine.

    The first step already has peak / warm-up steps; starting from 0, as the authors' code does, wastes it.
    """
    warmup_steps = round(settings.warmup * total_steps)
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    if settings.lr_schedule == "constant":
        return settings.lr
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_step(
    policy: PackedLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    rate: float,
    kl_coef: float,
    config: Config,
) -> dict[str, float]:
    """Take one optimizer step on the loss of a mini-batch, whose micro-batches are spread over the ranks (Eqs. 4-6).

    A gradient that is not finite leaves policy and optimizer as they were, and is counted in `skipped_steps`. The
    metrics returned are means over the tokens in `batches`, the gradient's norm and the learning rate.
    """
    per_batch: list[dict[str, Tensor]] = []
    for batch in distributed.progress_bar(batches, "updating", "micro-batch"):
        stats = policy(batch, config.sampling.temperature)
        old_logp = stats.logp.detach() if batch.old_logp is None else batch.old_logp
        loss = token_loss(stats.logp, old_logp, batch, kl_coef, config.method)  # [B, T]
        aggregate(loss, batch.mask, config.method.loss_agg, batch.denominators).backward()
        per_batch.append(token_metrics(stats, old_logp, batch))
        del stats, loss  # or their graph would outlive the next forward pass
    distributed.reshard(policy)  # weights that stayed whole would miss the update
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimisation.max_grad_norm)
    grad_norm = distributed.full_tensor(norm).item()
    is_finite = math.isfinite(grad_norm)
    if is_finite:
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = {name: torch.cat([each[name] for each in per_batch]) for name in per_batch[0]}
    metrics = {name: distributed.all_reduce_mean(values) for name, values in tokens.items()}
    mismatch = tokens["mismatch_mean"]
    metrics["mismatch_max"] = distributed.all_reduce_max(mismatch.max().item() if len(mismatch) else 0.0)
    return metrics | {"grad_norm": grad_norm, "lr": rate, "skipped_steps": float(not is_finite)}


def token_metrics(stats: TokenStats, old_logp: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
    """Return what is logged of a micro-batch, for each of its response tokens, without gradient."""
    metrics = {"entropy": stats.entropy, "mismatch_mean": (old_logp - batch.sampler_logp).abs()}
    if batch.reference_logp is not None:
        metrics["kl"] = k3(stats.logp.detach(), batch.reference_logp)  # without --kl-cap's bound
    return {name: values[batch.mask] for name, values in metrics.items()}
