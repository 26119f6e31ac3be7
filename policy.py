"""The trained model: load it, score rollouts with it, take one optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import embedded
import grpo
from packing import MicroBatch, PackedLM, TokenStats, pack
from rollout import Rollout

HUB_OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama", "SmolLM": "HuggingFaceTB"}  # by how a bare model name begins


class ModelError(ValueError):
    """A model that cannot be used, with the cure in one sentence."""


def resolve(name: str) -> str:
    """A local folder or a hub name; a bare name of a known family gets its owner: Qwen3-8B-Base, Qwen/Qwen3-8B-Base."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(f"--model {name}: the folder has no config.json; give one written by save_pretrained")
        return name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    owner = next((owner for family, owner in HUB_OWNERS.items() if name.startswith(family)), None)
    if "/" in name or owner is None:
        raise ModelError(f"--model {name}: neither a folder nor a hub name; write it as OWNER/NAME or give a path")
    return f"{owner}/{name}"


def load_pretrained(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    transformers.utils.logging.disable_progress_bar()
    path = embedded.model_folder() if name == "embedded" else resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"--model {name}: transformers cannot load {path} ({reason})") from error
    return lm, tokenizer


def load(name: str, device: torch.device) -> tuple[PackedLM, PreTrainedTokenizerBase]:
    """Model with float32 master weights (bfloat16 compute on a GPU), and its tokenizer."""
    lm, tokenizer = load_pretrained(name, torch.float32)
    lm.to(device)  # type: ignore[arg-type]
    policy = PackedLM(lm, torch.bfloat16 if device.type == "cuda" else torch.float32)
    verify_head(policy, name)
    return policy, tokenizer


def verify_head(policy: PackedLM, name: str) -> None:
    """Refuse a family that scales or caps its logits after the head, counts positions in another way or mixes
    neighbouring sequences: it would otherwise be trained wrongly in silence."""
    family = policy.lm.config.model_type
    try:
        gap = packing_gap(policy.lm)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"--model {name}: the family '{family}' does not run without padding ({str(error).splitlines()[0]}); "
            "use a model of another family"
        ) from error
    if not gap < 1e-3:
        raise ModelError(
            f"--model {name}: packed log-probs of the family '{family}' are {gap:.2g} nats off its own; it changes "
            "its logits, positions or attention in a way that packing.py does not know"
        )


@torch.no_grad()
def packing_gap(lm: PreTrainedModel) -> float:
    """Largest difference in nats between packed log-probs and those of the model by itself, of a few tokens and in
    float32: transformers' eager attention is the one that leaves nothing of a family out."""
    tokens = list(range(2, 10))
    rollout = Rollout(prompt_ids=tokens[:3], response_ids=tokens[3:], logp=[0.0] * 5, finished=False)
    batch = pack([rollout, rollout], [0, 1], lm.device)
    packed_logp = PackedLM(lm)(batch, temperature=1.0).logp[1]
    lm.set_attn_implementation("eager")
    logits = lm(torch.tensor([tokens], device=lm.device), use_cache=False).logits[0, 2:-1].float()
    lm.set_attn_implementation("packed")
    own_logp = logits.log_softmax(-1).gather(-1, batch.targets[1][:, None]).squeeze(-1)
    return float((packed_logp - own_logp).abs().max())


def stop_token_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: chat models name more in their generation config than their tokenizer does."""
    named = [tokenizer.eos_token_id, lm.config.eos_token_id]
    if lm.generation_config is not None:
        named.append(lm.generation_config.eos_token_id)
    ids = {i for entry in named if entry is not None for i in (entry if isinstance(entry, list) else [entry])}
    if not ids:
        raise ModelError("neither the tokenizer nor the model names an end-of-sequence token: set tokenizer.eos_token")
    return sorted(ids)


def build_optimizer(policy: PackedLM, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the float32 master weights; the learning rate is set at every step."""
    return torch.optim.AdamW(policy.parameters(), lr=0.0, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=True)


@torch.no_grad()
def score(model: PackedLM, batches: Sequence[MicroBatch], temperature: float) -> list[TokenStats]:
    """Statistics of every response token under `model`, a TokenStats [B, T] for each micro-batch."""
    return [model(batch, temperature) for batch in batches]


def mean_per_rollout(batches: Sequence[MicroBatch], stats: Sequence[TokenStats]) -> TokenStats:
    """Each statistic's mean over the response tokens of each rollout, [N]."""
    rows = torch.cat([batch.rows for batch in batches])
    means = [
        [stat.sum(dim=1) / batch.mask.sum(dim=1) for batch, stat in zip(batches, column, strict=True)]
        for column in zip(*stats, strict=True)
    ]
    return TokenStats(*(torch.cat(mean)[rows.argsort()] for mean in means))


@dataclass(frozen=True)
class Objective:
    """What Eq. 4 needs besides log-probs."""

    temperature: float
    clip: float
    kl_coef: float
    tis_cap: float  # 0: no truncated importance weight
    aggregation: grpo.Aggregation
    denominators: Tensor  # [N] of each rollout's view, see grpo.step_denominator
    max_grad_norm: float


def optimizer_step(
    policy: PackedLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    advantages: Tensor,
    reference: Sequence[TokenStats] | None,
    objective: Objective,
    learning_rate: float,
) -> dict[str, float]:
    """One step on the loss of all micro-batches (Eq. 6); advantages are [N], `reference` is None without a KL term.

    A gradient that is not finite leaves the policy and the optimizer as they were, and is counted.
    """
    per_token: list[dict[str, Tensor]] = []
    for i, batch in enumerate(batches):
        stats = policy(batch, objective.temperature)
        weights = None
        if objective.tis_cap:
            weights = grpo.truncated_importance_weight(stats.logp, batch.sampler_logp, objective.tis_cap)
        # One optimizer step per batch of rollouts: the old policy is the policy at hand, its log-probs need no pass.
        old_logp = stats.logp.detach()
        loss = grpo.policy_loss(stats.logp, old_logp, advantages[batch.rows], batch.mask, objective.clip, weights)
        kl = grpo.k3(stats.logp, reference[i].logp) if reference else torch.zeros_like(loss)
        grpo.aggregate(
            loss + objective.kl_coef * kl, batch.mask, objective.aggregation, objective.denominators[batch.rows]
        ).backward()
        mismatch = (old_logp - batch.sampler_logp).abs()
        per_token.append(
            {
                name: value.detach()[batch.mask]
                for name, value in {"entropy": stats.entropy, "kl": kl, "mismatch": mismatch}.items()
            }
        )
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), objective.max_grad_norm).item()
    if finite := math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    entropy, kl, mismatch = (torch.cat([t[name] for t in per_token]) for name in ("entropy", "kl", "mismatch"))
    metrics = {"entropy": entropy.mean().item(), "grad_norm": grad_norm, "lr": learning_rate}
    metrics |= {"mismatch_mean": mismatch.mean().item(), "mismatch_max": mismatch.max().item()}
    metrics |= {"kl": kl.mean().item()} if reference else {}
    return metrics | {"skipped_steps": float(not finite)}
