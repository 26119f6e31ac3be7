"""The trained model: load it, score rollouts with it, take one optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import embedded
import grpo
import ranks
from packing import MicroBatch, PackedLM, TokenLoss, TokenStats, pack
from rollout import Rollout, skeleton
from word_problems import STUDENTS

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


def load_pretrained(
    name: str, dtype: torch.dtype, weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of transformers and its tokenizer; without `weights` the model is on the meta device and costs nothing.

    Raises:
        ModelError: transformers cannot load it.
    """
    transformers.utils.logging.disable_progress_bar()
    if name in STUDENTS:
        ranks.on_first(partial(embedded.model_folder, name))  # makes it, where it does not exist
    path = embedded.model_folder(name) if name in STUDENTS else resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if weights:
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), tokenizer
        return skeleton(AutoConfig.from_pretrained(path), dtype), tokenizer
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"--model {name}: transformers cannot load {path} ({reason})") from error


def load(name: str, device: torch.device, offload: bool = False) -> tuple[PackedLM, PreTrainedTokenizerBase]:
    """The model to train, with float32 master weights (bfloat16 compute on a GPU), and its tokenizer.

    In a group of processes the first reads the weights, and each keeps its shards: on `device`, or with `offload` in
    the CPU's memory.
    """
    lm, tokenizer = load_pretrained(name, torch.float32, weights=ranks.is_first())
    policy = PackedLM(lm if ranks.is_first() else unfilled(lm), compute_dtype(device))
    ranks.on_first(partial(verify_head, policy, name))
    if not ranks.in_group():
        return policy.to(device), tokenizer
    weights = ranks.tensors_of(policy)
    shard(policy, init_device_mesh(device.type, (ranks.count(),)), offload)
    ranks.spread(weights, policy)
    return policy, tokenizer


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def unfilled(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same architecture, in float32 on the CPU, with whatever values: memory costs nothing before it is
    written to, so a model that is going to be sharded is never whole here."""
    twin = skeleton(lm.config)
    twin.to_empty(device="cpu").eval()
    twin.tie_weights()
    return twin


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


def check_length(lm: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences that are longer than the model knows positions; or than those up to which its positions do not
    depend on the length of a batch: it would read one sequence in two ways, sampled and packed."""
    known = getattr(lm.config, "max_position_embeddings", tokens)
    rope = getattr(lm.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        known = rope.get("original_max_position_embeddings") or known
    if tokens > known:
        raise ModelError(
            f"prompt and response of {tokens} tokens together: the model knows {known} positions; "
            "ask for shorter responses (--max-response-tokens, in evaluate.py --max-tokens) or drop long prompts"
        )


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


def shard(model: PackedLM, mesh: DeviceMesh, offload: bool = False) -> None:
    """Spread float32 weights over the mesh's ranks, in place, and with them their gradients and AdamW's state (FSDP2);
    with `offload` all of these stay in the CPU's memory, AdamW works there, and layers visit the GPU.

    Each decoder layer is put together when its turn comes, in the dtype of computing, and taken apart behind it: a
    weight that stayed whole after a pass would miss the next update. Gradients are added up in float32 and not
    averaged, because the loss is divided by the whole step's denominator.
    """
    precision = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for module in [*decoder_layers(model.lm), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision, offload_policy=place)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it adds


def decoder_layers(lm: PreTrainedModel) -> list[torch.nn.Module]:
    names = lm._no_split_modules or ()
    return [module for module in lm.modules() if type(module).__name__ in names]


def checkpoint_activations(model: PackedLM) -> None:
    """Keep of each decoder layer its input alone, and compute the rest again in the backward pass: a third more
    arithmetic for a fraction of the memory. No layer draws random numbers, so none need to be kept."""
    for layer in decoder_layers(model.lm):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def score(model: PackedLM, batches: Sequence[MicroBatch], temperature: float) -> list[TokenStats]:
    """Statistics of every response token under `model`, a TokenStats [B, T] for each micro-batch."""
    return [model(batch, temperature) for batch in batches]


def mean_per_rollout(
    batches: Sequence[MicroBatch], stats: Sequence[TokenStats], rollouts: int
) -> dict[str, list[float]]:
    """Each statistic's mean over the response tokens of each rollout, those of other ranks included."""
    names = TokenStats._fields[:-1]
    means = torch.zeros(len(names), rollouts, device=batches[0].mask.device)
    for batch, stat in zip(batches, stats, strict=True):
        tokens = batch.mask.sum(dim=1).clamp(min=1)
        means[:, batch.rows] += torch.stack(stat[:-1]).sum(dim=2) / tokens
    return dict(zip(names, ranks.total(means).tolist(), strict=True))


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


def token_loss(batch: MicroBatch, advantages: Tensor, reference_logp: Tensor | None, objective: Objective) -> TokenLoss:
    """The loss of response tokens as a function of their log-probs (Eqs. 4 and 5), each a row of one token here;
    advantages are [N], `reference_logp` is [B, T]."""
    rows, mask = batch.rows[:, None].expand_as(batch.mask)[batch.mask], batch.mask  # [R]
    weight = grpo.token_weights(mask, objective.aggregation, objective.denominators[batch.rows])[mask]
    sampler_logp = batch.sampler_logp[mask]
    anchor = None if reference_logp is None else reference_logp[mask]

    def loss(logp: Tensor, tokens: slice) -> Tensor:
        logp, importance = logp[:, None], None
        if objective.tis_cap:
            importance = grpo.truncated_importance_weight(logp, sampler_logp[tokens, None], objective.tis_cap)
        # One optimizer step per batch of rollouts: the old policy is the policy at hand, its log-probs need no pass.
        old_logp, every_token = logp.detach(), torch.ones_like(logp)
        value = grpo.policy_loss(logp, old_logp, advantages[rows[tokens]], every_token, objective.clip, importance)
        if anchor is not None:
            value = value + objective.kl_coef * grpo.k3(logp, anchor[tokens, None])
        return value.squeeze(1) * weight[tokens]

    return loss


def optimizer_step(
    policy: PackedLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    advantages: Tensor,
    reference: Sequence[TokenStats] | None,
    objective: Objective,
    learning_rate: float,
) -> dict[str, float]:
    """One step on the loss of all ranks' micro-batches (Eq. 6); advantages are [N], `reference` is None without a KL
    term.

    A gradient that is not finite leaves the policy and the optimizer as they were, and is counted.
    """
    per_token: list[dict[str, Tensor]] = []
    for i, batch in enumerate(batches):
        reference_logp = reference[i].logp if reference else None
        stats = policy(batch, objective.temperature, token_loss(batch, advantages, reference_logp, objective))
        stats.loss.backward()
        seen = {"entropy": stats.entropy, "mismatch": (stats.logp - batch.sampler_logp).abs()}
        seen |= {} if reference_logp is None else {"kl": grpo.k3(stats.logp, reference_logp)}
        per_token.append({name: value[batch.mask] for name, value in seen.items()})
        del stats  # its graph holds the head's gradient, which need not outlive this micro-batch
    grad_norm = ranks.full(torch.nn.utils.clip_grad_norm_(policy.parameters(), objective.max_grad_norm)).item()
    if finite := math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    measured = {name: torch.cat([seen[name] for seen in per_token]) for name in per_token[0]}
    mismatch = measured.pop("mismatch")
    metrics = {"grad_norm": grad_norm, "lr": learning_rate, "mismatch_mean": ranks.mean(mismatch)}
    metrics["mismatch_max"] = ranks.largest(mismatch.max().item() if len(mismatch) else 0.0)
    metrics |= {name: ranks.mean(values) for name, values in measured.items()}
    return metrics | {"skipped_steps": float(not finite)}
