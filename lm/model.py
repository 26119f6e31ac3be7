"""A causal language model of transformers: find it, load it, check it, shard it, copy it.

On several GPUs every rank holds a shard of each weight (FSDP2), and a GPU by itself is a group of one; on a CPU alone
nothing is sharded. The first rank alone reads weights, and no rank ever holds another whole model.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from config import EMBEDDED_MODELS, UserError
from lm import distributed
from lm.packing import pack
from lm.record import Rollout
from lm.scoring import PackedLM, autocast

HUB_OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama", "SmolLM": "HuggingFaceTB"}  # by how a bare model name begins


def newest_policy(model: str) -> str:
    """A run's or a checkpoint's folder means its policy, and a link what it points to now: `latest` moves on. Other
    names of models stay as they are."""
    for inside in ("checkpoints/latest/policy", "policy", ""):
        if model not in EMBEDDED_MODELS and (path := Path(model, inside)).is_dir():
            return str(path.resolve())
    return model


def resolve(name: str) -> str:
    """A local folder or a hub name; a bare name of a known family gets its owner: Qwen3-8B-Base, Qwen/Qwen3-8B-Base."""
    if name in EMBEDDED_MODELS:
        return str(Path(__file__).resolve().parents[1] / "embedded" / "models" / name)
    name = newest_policy(name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"--model {name}: the folder has no config.json; give one written by save_pretrained")
        return name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    owner = next((owner for family, owner in HUB_OWNERS.items() if name.startswith(family)), None)
    if "/" in name or owner is None:
        raise UserError(f"--model {name}: neither a folder nor a hub name; write it as OWNER/NAME or give a path")
    return f"{owner}/{name}"


def load_pretrained(
    name: str, dtype: torch.dtype, weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of transformers and its tokenizer; without `weights` the model is on the meta device and costs nothing.

    Raises:
        UserError: transformers cannot load it.
    """
    transformers.utils.logging.disable_progress_bar()
    path = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if weights:
            lm: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        else:
            lm = meta_model(AutoConfig.from_pretrained(path, trust_remote_code=False), dtype)
    except Exception as error:  # a file of any kind may be damaged in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {name}: transformers cannot load {path} ({reason})") from error
    rows, spoken = lm.config.get_text_config().vocab_size, f"{tokenizer.chat_template} {tokenizer.eos_token}"
    for token, i in tokenizer.get_vocab().items():  # an added one that nobody says may lie beyond: Gemma 3 has one
        if i >= rows and (i < tokenizer.vocab_size or token in spoken):
            raise UserError(f"--model {name}: {token!r} is token {i:,} of a tokenizer, the embedding has {rows:,} rows")
    return lm, tokenizer


def load_policy(
    name: str, device: torch.device, dtype: str = "auto", offload: bool = False
) -> tuple[PackedLM, PreTrainedTokenizerBase]:
    """The model to train, with float32 master weights and `dtype` to compute in, and its tokenizer.

    In a group of processes the first reads the weights, and each keeps its shards: on `device`, or with `offload` in
    the CPU's memory.
    """
    lm, tokenizer = load_pretrained(name, torch.float32, weights=distributed.is_rank0())
    policy = PackedLM(lm if distributed.is_rank0() else empty_like(lm), compute_dtype(dtype, device))
    distributed.run_on_rank0(partial(verify_head, policy, name))
    if not distributed.in_group():
        return policy.to(device), tokenizer
    weights = distributed.named_tensors(policy)
    shard(policy, init_device_mesh(device.type, (distributed.world_size(),)), offload)
    distributed.fill_from_rank0(weights.__getitem__, distributed.named_tensors(policy))
    return policy, tokenizer


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of --compute-dtype."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, auto if name == "auto" else name)
    return dtype


def empty_like(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same architecture, in float32 on the CPU, with whatever values: memory costs nothing before it is
    written to, so a model that is going to be sharded is never whole here."""
    twin = meta_model(lm.config)
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
        raise UserError(
            f"--model {name}: the family '{family}' does not run without padding ({str(error).splitlines()[0]}); "
            "use a model of another family"
        ) from error
    if not gap < 1e-3:
        raise UserError(
            f"--model {name}: packed log-probs of the family '{family}' are {gap:.2g} nats off its own; it changes "
            "its logits, positions or attention as lm/packing.py does not know: use a model of another family"
        )


@torch.no_grad()
def packing_gap(lm: PreTrainedModel) -> float:
    """Largest difference in nats between packed log-probs and those of the model by itself, of a few tokens and in
    float32: transformers' eager attention is the one that leaves nothing of a family out."""
    tokens = list(range(2, 10))
    rollout = Rollout(prompt_ids=tokens[:3], response_ids=tokens[3:], logp=[0.0] * 5, finished=False)
    batch = pack([rollout, rollout], [0, 1], lm.device)
    packed_logp = PackedLM(lm)(batch, temperature=1.0).logp[1]
    return float((packed_logp.cpu() - own_logp(lm, rollout, torch.float32, "eager")).abs().max())


@torch.no_grad()
def own_logp(lm: PreTrainedModel, rollout: Rollout, dtype: torch.dtype, attention: str = "sdpa") -> Tensor:
    """Log-probs [T] of a response under the model itself, by transformers."""
    lm = unsharded(lm, dtype)
    tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids], device=lm.device)
    with plain_attention(lm, attention), autocast(lm.device, dtype):
        logits = lm(tokens, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
    response = tokens[0, len(rollout.prompt_ids) :, None]
    logp: Tensor = logits.log_softmax(-1).gather(-1, response).squeeze(-1).cpu()
    return logp


@contextmanager
def plain_attention(lm: PreTrainedModel, kind: str = "sdpa") -> Iterator[None]:
    """Evaluation mode and ordinary attention: the trainer's packed one has no key-value cache."""
    training, attention = lm.training, lm.config._attn_implementation
    lm.eval().set_attn_implementation(kind)
    try:
        yield
    finally:
        lm.train(training).set_attn_implementation(attention)


def meta_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model on the meta device, where tensors have names and shapes and take no memory."""
    with torch.device("meta"):
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return lm


@torch.no_grad()
def unsharded(lm: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself; where FSDP has sharded it, an ordinary copy in `dtype`, which every rank must ask for."""
    if distributed.mesh_of(lm) is None:
        return lm
    ordinary: PreTrainedModel = meta_model(lm.config).eval()
    ordinary.load_state_dict(
        {name: distributed.full_tensor(t.to(dtype)) for name, t in lm.state_dict().items()}, assign=True
    )
    for name, buffer in lm.named_buffers():  # some are in no state dict: the frequencies of rotary positions
        owner, _, attribute = name.rpartition(".")
        setattr(ordinary.get_submodule(owner), attribute, buffer.to(ordinary.device))
    return ordinary


def check_length(lm: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences that are longer than the model knows positions; or than those up to which its positions do not
    depend on the length of a batch: it would read one sequence in two ways, sampled and packed."""
    known = getattr(lm.config, "max_position_embeddings", tokens)
    rope = getattr(lm.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        known = rope.get("original_max_position_embeddings") or known
    if tokens > known:
        raise UserError(
            f"prompt and response of {tokens} tokens together: the model knows {known} positions; "
            "ask for shorter responses (--max-response-tokens) or drop long prompts"
        )


def stop_token_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: chat models name more in their generation config than their tokenizer does."""
    named = [tokenizer.eos_token_id, lm.config.eos_token_id]
    if lm.generation_config is not None:
        named.append(lm.generation_config.eos_token_id)
    ids = {i for entry in named if entry is not None for i in (entry if isinstance(entry, list) else [entry])}
    if not ids:
        raise UserError("neither the tokenizer nor the model names an end-of-sequence token: set tokenizer.eos_token")
    return sorted(ids)


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


def decoder_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """By the names of their classes' bases: FSDP has made classes of its own by then (FSDPQwen3DecoderLayer)."""
    names = set(lm._no_split_modules or ())
    return [module for module in lm.modules() if names & {base.__name__ for base in type(module).__mro__}]


def checkpoint_activations(model: PackedLM) -> None:
    """Keep of each decoder layer its input alone, and compute the rest again in the backward pass: a third more
    arithmetic for a fraction of the memory. No layer draws random numbers, so none need to be kept."""
    for layer in decoder_layers(model.lm):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def frozen_copy(policy: PackedLM, offload: bool = False) -> PackedLM:
    """An equal model in float32 that is never trained: the teacher, or the initial policy as a reference. Of a sharded
    policy shard by shard, on the same device or with `offload` in the CPU's (pinned) memory."""
    mesh = distributed.mesh_of(policy)
    if mesh is None:
        return copy.deepcopy(policy).float().requires_grad_(False).eval()
    twin = PackedLM(empty_like(policy.lm), policy.compute_dtype).requires_grad_(False)
    shard(twin, mesh, offload)
    for mine, theirs in zip(
        distributed.named_tensors(twin).values(), distributed.named_tensors(policy).values(), strict=True
    ):
        distributed.local_shard(mine).copy_(distributed.local_shard(theirs))
    return twin
