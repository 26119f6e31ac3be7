"""Find, load, check, shard and copy a causal language model of transformers.

On several GPUs every rank holds a shard of each weight (FSDP2), and a GPU by itself is a group of one; on a CPU alone
nothing is sharded. The first rank alone reads weights, and no rank ever holds another whole model.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from config import EMBEDDED_MODELS, UserError
from lm import distributed
from lm.packing import pack
from lm.record import Rollout
from lm.scoring import PASSES, PackedLM, autocast

HUB_OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama", "SmolLM": "HuggingFaceTB"}  # by how a bare model name begins
DESCRIPTION = ["*.json", "*.jinja", "*.model", "*.txt"]  # the files of a hub's model that are no weights
SMALL = 20e6  # parameters, below which one thread is enough


def newest_policy(model: str) -> str:
    """Return the policy that a run's or a checkpoint's folder holds, and any other name of a model as it is.

    A link is followed now: `latest` moves on.
    """
    for inside in ("checkpoints/latest/policy", "policy", ""):
        if model not in EMBEDDED_MODELS and (path := Path(model, inside)).is_dir():
            return str(path.resolve())
    return model


def resolve(name: str) -> str:
    """Return the local folder or hub name of a model; a bare name of a known family gets its owner."""
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
    """Load a model and its tokenizer; without `weights` the model is on the meta device and takes no memory.

    Raises:
        UserError: Transformers cannot load it.
    """
    transformers.utils.logging.disable_progress_bar()
    path = resolve(name)
    try:
        # Where the hub cannot be reached, transformers asks it for a minute, and this not at all.
        described = path if Path(path).is_dir() else snapshot_download(path, allow_patterns=DESCRIPTION)
        tokenizer = AutoTokenizer.from_pretrained(described, trust_remote_code=False)
        if weights:
            lm = read_weights(path, dtype)
        else:
            lm = meta_model(AutoConfig.from_pretrained(described, trust_remote_code=False), dtype)
    except Exception as error:  # a file of any kind may be damaged in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        complaint = f"--model {name}: transformers cannot load {path} ({reason})"
        raise UserError(f"{complaint}; give the path of a whole copy") from error
    rows = lm.config.get_text_config().vocab_size
    spoken = f"{tokenizer.chat_template} {tokenizer.eos_token}"
    for token, i in tokenizer.get_vocab().items():  # an added one that nobody says may lie beyond: Gemma 3 has one
        if i >= rows and (i < tokenizer.vocab_size or token in spoken):
            raise UserError(f"--model {name}: {token!r} is token {i:,} of a tokenizer, the embedding has {rows:,} rows")
    return lm, tokenizer


def read_weights(path: str | Path, dtype: torch.dtype, safetensors: bool | None = None) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=safetensors, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(loaded[1]["missing_keys"]):
        named = ", ".join(missing[:3])
        raise ValueError(f"its files lack the weights {named} ({len(missing)} in all): give a whole copy of it")
    return loaded[0]


def load_policy(
    name: str, device: torch.device, dtype: str = "auto", offload: bool = False, gather_once: bool = False
) -> PackedLM:
    """Load the model to train, with float32 master weights and `dtype` to compute in.

    In a group of processes rank 0 reads the weights, and each rank keeps its shards: on `device`, or with `offload` in
    the CPU's memory.
    """
    lm, _ = load_pretrained(name, torch.float32, weights=distributed.is_rank0())
    policy = PackedLM(lm if distributed.is_rank0() else empty_like(lm), compute_dtype(dtype, device))
    distributed.run_on_rank0(partial(verify_head, policy, name))
    if not distributed.in_group():
        return policy.to(device)
    weights = distributed.named_tensors(policy)
    shard(policy, init_device_mesh(device.type, (distributed.world_size(),)), offload, gather_once)
    distributed.fill_from_rank0(weights.__getitem__, distributed.named_tensors(policy))
    return policy


def limit_threads(lm: PreTrainedModel) -> None:
    """Compute small models in one thread: others gain little there, and lose much on a busy machine."""
    if lm.num_parameters() < SMALL:
        torch.set_num_threads(1)
        print(f"one thread: {lm.num_parameters() / 1e6:.1f}M parameters, of under {SMALL / 1e6:.0f}M more gain nothing")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def empty_like(lm: PreTrainedModel, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """Allocate a model of the same architecture, with whatever values.

    On a CPU memory costs nothing before it is written to, so a model that is going to be sharded is never whole there.
    """
    twin = meta_model(lm.config, dtype)
    twin.to_empty(device=device).eval()
    twin.tie_weights()
    return twin


@torch.no_grad()
def verify_head(policy: PackedLM, name: str) -> None:
    """Refuse a family whose packed log-probs differ from its own: it would be trained wrongly in silence.

    Such a family changes its logits after the head, counts positions in another way or mixes neighbouring sequences.
    The comparison is in float32, with transformers' eager attention, which leaves nothing of a family out.
    """
    lm = policy.lm
    family = lm.config.model_type
    tokens = list(range(2, 10))
    rollout = Rollout(prompt_ids=tokens[:3], response_ids=tokens[3:], logp=[0.0] * 5, finished=False)
    try:
        packed_logp = PackedLM(lm)(pack([rollout, rollout], [0, 1], lm.device), temperature=1.0).logp[1]
        gap = (packed_logp.cpu() - own_logp(lm, rollout, torch.float32, "eager")).abs().max()
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
def own_logp(lm: PreTrainedModel, rollout: Rollout, dtype: torch.dtype, attention: str = "sdpa") -> Tensor:
    """Compute the log-probs [T] of a response under the model itself, by transformers."""
    lm = unsharded(lm, dtype)
    tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids], device=lm.device)
    with plain_attention(lm, attention), autocast(lm.device, dtype):
        logits = lm(tokens, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
    response = tokens[0, len(rollout.prompt_ids) :, None]
    return logits.log_softmax(-1).gather(-1, response).squeeze(-1).cpu()


@contextmanager
def plain_attention(lm: PreTrainedModel, kind: str = "sdpa") -> Iterator[None]:
    """Switch to evaluation mode and ordinary attention, not compiled: the packed one has no key-value cache."""
    training = lm.training
    attention = lm.config._attn_implementation
    lm.eval().set_attn_implementation(kind)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        lm.train(training).set_attn_implementation(attention)


def meta_model(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


@torch.no_grad()
def unsharded(lm: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model itself, or if FSDP has sharded it, a whole copy in `dtype`. All ranks must call it."""
    mesh = distributed.mesh_of(lm)
    if mesh is None:
        return lm
    whole = empty_like(lm, dtype, mesh.device_type)
    sources = distributed.named_tensors(lm)
    for name, tensor in distributed.named_tensors(whole).items():
        tensor.copy_(distributed.full_tensor(sources[name].to(tensor.dtype)))
    return whole


def check_length(lm: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences that are longer than the model knows positions.

    Some positions depend on the length of a batch beyond a bound: there a model would read one sequence in two ways,
    sampled and packed. Then that bound counts.
    """
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
    """Return every id that ends a response; chat models name some in their generation config alone."""
    named = [tokenizer.eos_token_id, lm.config.eos_token_id, getattr(lm.generation_config, "eos_token_id", None)]
    lists = [entry if isinstance(entry, list) else [entry] for entry in named]
    ids = {entry for entry in chain.from_iterable(lists) if isinstance(entry, int)}
    if not ids:
        raise UserError("neither the tokenizer nor the model names an end-of-sequence token: set tokenizer.eos_token")
    return sorted(ids)


def shard(model: PackedLM, mesh: DeviceMesh, offload: bool = False, gather_once: bool = False) -> None:
    """Shard float32 weights over the mesh's ranks, in place, and with them gradients and AdamW's state (FSDP2).

    With `offload` all of these stay in the CPU's memory, AdamW works there, and layers visit the GPU.

    Each decoder layer is put together when its turn comes, in the dtype of computing, and taken apart behind it, or
    with `gather_once` by `distributed.reshard`: a weight that stayed whole would miss the next update. Gradients are
    added up in float32 and not averaged, because the loss is divided by the whole step's denominator.
    """
    precision = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for module in [*decoder_layers(model.lm), model]:
        sharded = fully_shard(
            module, mesh=mesh, reshard_after_forward=not gather_once, mp_policy=precision, offload_policy=place
        )
        sharded.set_reshard_after_backward(not gather_once, recurse=False)
        if mesh.size() > 1:  # alone there is nothing to divide by, and FSDP would copy every gradient once more
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it adds


def decoder_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """Find the decoder layers by their classes' bases: FSDP makes classes of its own (FSDPQwen3DecoderLayer)."""
    names = set(lm._no_split_modules or ())
    return [module for module in lm.modules() if names & {base.__name__ for base in type(module).__mro__}]


def compile_models(models: Iterable[PackedLM], light: bool = False) -> None:
    """Compile, at the first pass, decoder layers inside FSDP's hooks and the head's passes over logits.

    One graph with a gradient and one without serve all layers and lengths; of 140 element-wise kernels 20 remain.
    """
    print("compiling the model's layers during the first step, about a minute (--compile off leaves it out)")
    # 0.6 of the activations are those of matrix products and attention alone, in all of Qwen3's shapes.
    torch._functorch.config.activation_memory_budget = 0.6 if light else 1.0
    for model in models:
        model.passes = tuple(torch.compile(function, dynamic=True) for function in PASSES)
        for layer in decoder_layers(model.lm):
            layer.forward = torch.compile(layer.forward, dynamic=True)


def checkpoint_activations(model: PackedLM) -> None:
    """Keep only the input of each decoder layer, and compute the rest again in the backward pass.

    It takes a third more arithmetic, for a fraction of the memory. No layer draws random numbers, so none are kept.
    """
    for layer in decoder_layers(model.lm):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def frozen_copy(policy: PackedLM, offload: bool = False) -> PackedLM:
    """Copy the policy in float32, never to be trained: the teacher, or the initial policy as a reference.

    A sharded policy is copied shard by shard, on the same device or with `offload` in the CPU's (pinned) memory.
    """
    mesh = distributed.mesh_of(policy)
    if mesh is None:
        return copy.deepcopy(policy).float().requires_grad_(False).eval()
    twin = PackedLM(empty_like(policy.lm), policy.compute_dtype).requires_grad_(False)
    shard(twin, mesh, offload)
    sources = distributed.named_tensors(policy)
    for name, tensor in distributed.named_tensors(twin).items():
        distributed.local_shard(tensor).copy_(distributed.local_shard(sources[name]))
    return twin
