"""The memory of a training run before it starts, and the settings that make it fit.

P parameters in N shards (FSDP2, see model.shard); vLLM samples. Bytes on each GPU:

    kept throughout    master weights 4P/N; teacher or frozen reference 4P/N; vLLM's CUDA graphs, even while it sleeps
    kept after step 1  AdamW's moments 8P/N
    first check        the engine and an unsharded bfloat16 copy, 2P, before AdamW has its moments
    while sampling     the engine: a share of the GPU
    while training     gradients 4P/N; weights outside of layers, unsharded, on one GPU of layers too where they fit;
                       what autograd keeps of a micro-batch (where it is recomputed, the inputs of layers); the head or
                       the layer at work

Not in it: the CUDA context and NCCL's buffers (about 2 GB), and the allocator's fragmentation; USABLE leaves room. On a
CPU there is one shard, and the key-value cache of the model itself takes the engine's place.
"""

import os
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from config import Config, UserError
from lm import distributed
from lm.decoding import ROWS_PER_CALL
from lm.model import decoder_layers
from lm.scoring import ON_CPU, ON_GPU

USABLE = 0.92  # share of a GPU's or a machine's memory for what is planned here
CUDA_GRAPHS = 1e9  # assumed: vLLM logs what its capture took
ENGINE_BESIDES = 3e9  # what vLLM needs beside weights and cache
LEAST_SEQUENCES = 16  # of full length that the engine's cache must hold
MOST_OF_A_GPU = 0.85  # share of it that the engine gets at most

# What each choice adds to the seconds of a step, as a share (docs/PERFORMANCE.md): of the plans that fit, the cheapest.
RECOMPUTE = {"off": 0.0, "light": 0.01, "on": 0.12}  # light: of compiled layers only
MICRO_BATCH = {16384: 0.0, 8192: 0.02, 4096: 0.06}
OFFLOAD_TEACHER = 0.05
OFFLOAD_OPTIMIZER = 0.8
GATHER_EACH_TIME = 0.03  # instead of once a step, which one GPU can
SHORT_CACHE = 0.25  # where the engine's cache has room for none of the sequences that are wanted at once


class Hardware(NamedTuple):
    gpus: int  # 0: a CPU
    gpu_bytes: float  # of each
    host_bytes: float  # of the machine

    def __str__(self) -> str:
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)} of {self.gpu_bytes / 2**30:.0f} GiB"


class Demand(NamedTuple):
    copies: int  # of the policy: teacher, frozen reference
    sequences: int  # that are sampled at once, on all GPUs


class Plan(NamedTuple):
    activation_checkpointing: str
    tokens_per_micro_batch: int
    offload_teacher: bool
    offload_optimizer: bool
    engine_memory: float = 0.5
    compiled: bool = False
    gather_once: bool = False  # the policy's weights stay unsharded over a step

    def __str__(self) -> str:
        kept = {"on": "recomputed", "light": "products kept", "off": "activations kept"}[self.activation_checkpointing]
        away = "".join(f", {name} off-loaded" for name in ("teacher", "optimizer") if getattr(self, f"offload_{name}"))
        return f"engine {self.engine_memory:.2f}, {kept}, {self.tokens_per_micro_batch:,} tokens{away}"


def this_hardware() -> Hardware:
    host = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if not torch.cuda.is_available():
        return Hardware(0, 0.0, host)
    smallest = min(distributed.all_gather([torch.cuda.get_device_properties().total_memory]))
    return Hardware(distributed.world_size(), float(smallest), host)


def kept_of_a_token(lm: PreTrainedModel, itemsize: int = 2, compiled: bool = False, light: bool = False) -> int:
    """Count the bytes that autograd keeps of a token in each layer, computing with numbers of `itemsize` bytes.

    For each of two norms its input in float32, the normalised vector and the output; query, key, value and output of
    attention; four vectors of the MLP; and for norms of query and key (Qwen3) two each. A compiled layer keeps the
    results of matrix products and of attention, and unless `light` those of norms, rotation and gate too.
    """
    model = lm.config.get_text_config()
    hidden = model.hidden_size
    query, key = attention_widths(lm)
    width = getattr(model, "intermediate_size", None) or 4 * hidden  # GPT-2 does not name it
    if compiled:
        products = hidden + 2 * query + 2 * key + 2 * width
        return int(itemsize * (products if light else products + 3 * hidden + query + key + width))
    norms_heads = any("q_norm" in name for name, _ in lm.named_parameters())
    kept = 2 * (4 + 2 * itemsize) * hidden + itemsize * (2 * query + 2 * key + 4 * width)
    return int(kept + norms_heads * (4 + itemsize) * (query + key))


def attention_widths(lm: PreTrainedModel) -> tuple[int, int]:
    """Count the numbers that a layer makes of a token as its queries, and as its keys or its values."""
    model = lm.config.get_text_config()
    heads = model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // heads
    return heads * size, (getattr(model, "num_key_value_heads", None) or heads) * size


def cached_bytes_of_a_token(lm: PreTrainedModel, itemsize: int = 2) -> int:
    return 2 * itemsize * int(lm.config.get_text_config().num_hidden_layers) * attention_widths(lm)[1]


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_needed(
    lm: PreTrainedModel, config: Config, plan: Plan, demand: Demand, hardware: Hardware
) -> dict[str, float]:
    """Count the bytes on each GPU by kind, at most in each phase and at all, and all that is off-loaded to the CPU.

    Off-loading takes 16 bytes a parameter for the optimizer, and 4 for each copy.
    """
    model = lm.config.get_text_config()
    layers = decoder_layers(lm)
    on_gpu = hardware.gpus > 0
    itemsize = 2 if on_gpu else 4
    parameters = parameters_of(lm)
    shard = parameters / max(hardware.gpus, 1)
    layer = parameters_of(layers[0])
    head = model.vocab_size * model.hidden_size
    kept_of_layer = kept_of_a_token(lm, itemsize, plan.compiled, plan.activation_checkpointing == "light")
    own = 0.0 if plan.offload_optimizer else shard
    tokens = max(plan.tokens_per_micro_batch, config.max_sequence_tokens)
    recomputed = plan.activation_checkpointing == "on"
    # The head: logits and their gradient as they are computed, compiled no others, else float32 logits and
    # probabilities, and rounded logits on a GPU; its gradient in float32 and rounded. A layer: its weights and the
    # next one's, its gradients in bfloat16 and in float32, and its activations if they are computed again.
    of_a_logit = 2 * itemsize if plan.compiled else 8 + 2 * on_gpu
    head_at_work = of_a_logit * min(ON_GPU if on_gpu else ON_CPU, tokens * model.vocab_size) + 6 * head
    layer_at_work = (10 * layer + 2 * head) * on_gpu + tokens * kept_of_layer * recomputed
    tokens_held = min(demand.sequences, ROWS_PER_CALL) * config.max_sequence_tokens / 2
    cpu_cache = tokens_held * cached_bytes_of_a_token(lm, itemsize)
    need = {
        "master weights": 4 * own,
        "AdamW": 8 * own,
        "teacher, reference": 0.0 if plan.offload_teacher else 4 * demand.copies * shard,
        "CUDA graphs": CUDA_GRAPHS * on_gpu,
        "engine": plan.engine_memory * hardware.gpu_bytes if on_gpu else cpu_cache,
        "gradients": 4 * own,
        "unsharded weights": 2 * (parameters - layer * len(layers) * (not plan.gather_once)) * on_gpu,
        "activations": tokens * len(layers) * (itemsize * model.hidden_size if recomputed else kept_of_layer),
        "head or layer at work": max(head_at_work, layer_at_work),
    }
    kept = need["master weights"] + need["teacher, reference"] + need["CUDA graphs"]
    training = ("AdamW", "gradients", "unsharded weights", "activations", "head or layer at work")
    phases = {
        "at the first check": kept + need["engine"] + 2 * parameters * on_gpu,
        "while sampling": kept + need["engine"] + need["AdamW"],
        "while training": kept + sum(need[kind] for kind in training),
    }
    off_loaded = parameters * (16.0 * plan.offload_optimizer + 4 * demand.copies * plan.offload_teacher)
    return need | phases | {"at most": max(phases.values()), "off-loaded, of all GPUs": off_loaded}


def candidates(config: Config, hardware: Hardware) -> Iterator[tuple[Plan, float]]:
    """Yield every combination of choices with its cost; what is given by hand stays as it is."""
    given = config.memory
    compiled = (given.compile or ("on" if hardware.gpus else "off")) == "on"
    recompute = [how for how in RECOMPUTE if compiled or how != "light"]
    if given.activation_checkpointing:
        recompute = [given.activation_checkpointing]
    sizes = [given.tokens_per_micro_batch] if given.tokens_per_micro_batch else list(MICRO_BATCH)
    teacher = [True] if given.offload_teacher else [False, True]
    optimizer = [True] if given.offload_optimizer else [False, True]
    once = [True, False] if hardware.gpus == 1 else [False]
    for how, tokens, teacher_away, optimizer_away, gather in product(recompute, sizes, teacher, optimizer, once):
        cost = RECOMPUTE[how] + MICRO_BATCH.get(tokens, 0.0)
        cost += OFFLOAD_TEACHER * teacher_away + OFFLOAD_OPTIMIZER * optimizer_away
        cost += GATHER_EACH_TIME * (not gather)
        yield Plan(how, tokens, teacher_away, optimizer_away, 0.0, compiled, gather), cost


def least_engine(lm: PreTrainedModel, config: Config, demand: Demand, gpus: int) -> float:
    """Count the bytes that the engine cannot do without: its weights, and a cache for a few sequences."""
    sequences = min(LEAST_SEQUENCES, demand.sequences / gpus)
    return 2 * parameters_of(lm) + ENGINE_BESIDES + sequences * config.max_sequence_tokens * cached_bytes_of_a_token(lm)


def plans_that_fit(
    lm: PreTrainedModel, config: Config, demand: Demand, hardware: Hardware
) -> Iterator[tuple[float, Plan]]:
    """Yield each plan that fits with its cost; the engine gets what the trainer leaves, if it is not given by hand."""
    usable = USABLE * hardware.gpu_bytes
    least = least_engine(lm, config, demand, hardware.gpus)
    wanted = demand.sequences / hardware.gpus * config.max_sequence_tokens / 2 * cached_bytes_of_a_token(lm)
    for candidate, cost in candidates(config, hardware):
        without = bytes_needed(lm, config, candidate, demand, hardware)
        left = usable - max(without["at the first check"], without["while sampling"])
        share = config.memory.engine_memory or int(100 * min(left / hardware.gpu_bytes, MOST_OF_A_GPU)) / 100
        engine = share * hardware.gpu_bytes
        fits = least <= engine <= left and without["while training"] <= usable
        if fits and without["off-loaded, of all GPUs"] <= USABLE * hardware.host_bytes:
            cache = engine - 2 * parameters_of(lm) - ENGINE_BESIDES
            yield cost + SHORT_CACHE * max(0.0, 1 - cache / wanted), candidate._replace(engine_memory=share)


def fit(lm: PreTrainedModel, config: Config, demand: Demand, hardware: Hardware) -> Plan:
    """Choose the cheapest settings of memory that fit before any weight is loaded, and say which in one line.

    Raises:
        UserError: nothing fits.
    """
    given = config.memory
    first, _ = next(candidates(config, hardware))
    if given.activation_checkpointing == "light" and not first.compiled:
        raise UserError("--activation-checkpointing light is of compiled layers: add --compile on, or take on or off")
    if given.fit == "auto" and hardware.gpus:
        plans = list(plans_that_fit(lm, config, demand, hardware))
        if not plans:
            raise UserError(f"--model {config.model.name} {shortage(lm, config, demand, hardware)}")
        _, plan = min(plans, key=lambda costed: costed[0])
        full = bytes_needed(lm, config, plan, demand, hardware)["at most"]
        print(f"fits {hardware}: {plan}; at most {full / 2**30:.1f} GiB of each")
        return plan
    plan = first._replace(
        activation_checkpointing=given.activation_checkpointing or "on",
        engine_memory=given.engine_memory or 0.5,
        gather_once=False,  # it takes memory that nothing was planned for
    )
    full = bytes_needed(lm, config, plan, demand, hardware)["at most"]
    if given.fit == "auto" and full > USABLE * hardware.host_bytes:
        short = f"needs {full / 2**30:.0f} GiB, and this is a machine of {hardware.host_bytes / 2**30:.0f} GiB"
        raise UserError(f"--model {config.model.name} {short}: take a smaller model, or shorter responses")
    return plan


def shortage(lm: PreTrainedModel, config: Config, demand: Demand, hardware: Hardware) -> str:
    least = least_engine(lm, config, demand, hardware.gpus) / hardware.gpu_bytes
    leanest = [plan._replace(engine_memory=least) for plan, _ in candidates(config, hardware)]
    needs = [bytes_needed(lm, config, plan, demand, hardware) for plan in leanest]
    possible = [need for need in needs if need["off-loaded, of all GPUs"] <= USABLE * hardware.host_bytes] or needs
    full = min(need["at most"] for need in possible)
    billions = parameters_of(lm) / 1e9 * USABLE * hardware.gpu_bytes / full
    larger = (hardware._replace(gpus=n) for n in (2, 4, 8, 16, 32, 64) if n > hardware.gpus)
    enough = next((more for more in larger if any(plans_that_fit(lm, config, demand, more))), None)
    cure = f"take {enough}, or" if enough else "take"
    return f"needs {full / 2**30:.0f} GiB on each of {hardware}: {cure} a --model of about {billions:.1f}B parameters"
