"""The memory of a training run, before it is used: `python train.py ... --plan` prints it and loads no weights.

What is exact is counted: the parameters of the architecture, and the bytes that autograd keeps of a token, by running
the real forward pass on the meta device, where tensors have shapes and no memory. The rest is arithmetic over what
FSDP2 keeps where (policy.shard). P parameters in N shards:

    kept throughout    master weights 4P/N, AdamW's moments 8P/N, teacher or frozen reference 4P/N each
    while sampling     the engine: a share of the GPU (vLLM), or a whole bfloat16 copy and its cache (hf)
    while training     gradients 4P/N; weights outside of layers, whole; the gradient of the head, formed with the loss;
                       what autograd keeps of a micro-batch; work space, of the head or of the layer at work

A GPU needs what is kept and the larger of the other two. Not in it: the CUDA context and NCCL's buffers (about 2 GB),
and the allocator's fragmentation; USABLE leaves room for them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from config import Config
from lm import ranks
from lm.model import compute_dtype, decoder_layers
from lm.packing import LOGITS_PER_CHUNK
from rewards import Variant, View
from rollout import ROWS_PER_CALL, skeleton

GPU_BYTES = 80e9
USABLE = 0.92  # of a GPU, for what is planned here
GPUS = (1, 2, 4, 8)


class FlashShape(torch.autograd.Function):
    """What flash attention keeps for its backward pass, without its arithmetic: query, key, value, output [1, heads,
    S, d] and the log of the normaliser [1, heads, S]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def planned_attention(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
    return FlashShape.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("planned", planned_attention)


@dataclass(frozen=True)
class Architecture:
    """Of a model, all that its memory depends on."""

    parameters: int
    outside: int  # of them, those of no decoder layer: embeddings, head, last norm
    layers: int
    hidden: int
    vocabulary: int
    kept_of_a_token: float  # bytes that autograd keeps of a token, over all layers
    inputs_of_a_token: float  # bytes of what enters the layers alone
    cached_of_a_token: float  # bytes of its keys and values in bfloat16


def architecture(lm: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> Architecture:
    """Of a model of any device, computing in `dtype`; its weights are not read."""
    bare = skeleton(lm.config, dtype)
    config, layers = bare.config.get_text_config(), decoder_layers(bare)
    parameters = sum(p.numel() for p in bare.parameters())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        parameters=parameters,
        outside=parameters - sum(p.numel() for layer in layers for p in layer.parameters()),
        layers=len(layers),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        kept_of_a_token=kept_by_autograd(bare),
        inputs_of_a_token=float(dtype.itemsize * config.hidden_size * len(layers)),
        cached_of_a_token=4.0 * len(layers) * heads * head_dim,
    )


def kept_by_autograd(bare: PreTrainedModel, tokens: int = 64) -> float:
    """Bytes a token that a forward pass on the meta device saves for its backward pass, weights not counted."""
    bare.set_attn_implementation("planned")
    weights = {tensor.untyped_storage()._cdata for tensor in bare.parameters()}
    saved: dict[int, Tensor] = {}  # by storage; holding the tensors keeps their storages from being reused

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        embedded = bare.get_input_embeddings()(ids)
        output = bare.base_model(inputs_embeds=embedded, position_ids=ids, use_cache=False)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / tokens


@dataclass(frozen=True)
class Footprint:
    """Bytes of one GPU by kind; the first four are kept throughout, see the head of this file."""

    master_weights: float
    adamw: float
    teacher: float
    reference: float
    engine: float
    gradients: float
    gathered_weights: float
    head_gradient: float
    activations: float
    work_space: float

    @property
    def while_sampling(self) -> float:
        return self._kept + self.engine

    @property
    def while_training(self) -> float:
        passing = self.gathered_weights + self.head_gradient + self.activations + self.work_space
        return self._kept + self.gradients + passing

    @property
    def _kept(self) -> float:
        return self.master_weights + self.adamw + self.teacher + self.reference

    @property
    def peak(self) -> float:
        return max(self.while_sampling, self.while_training)


def footprint(
    of: Architecture,
    config: Config,
    variant: Variant,
    gpus: int,
    checkpointing: bool,
    gpu_bytes: float = GPU_BYTES,
) -> Footprint:
    """Bytes on each of `gpus` GPUs; what is off-loaded to the CPU counts 0."""
    shard, layer = of.parameters / gpus, (of.parameters - of.outside) / of.layers
    policy_shard = 0.0 if config.memory.offload_optimizer else shard
    frozen_shard = 0.0 if config.memory.offload_teacher else shard
    sequence = config.max_sequence_tokens
    rollouts = rollouts_of_a_step(config, variant.policy_views)
    at_once = min(ROWS_PER_CALL, rollouts / gpus)
    copy_and_cache = 2 * of.parameters + at_once * sequence * of.cached_of_a_token
    tokens = min(max(config.optimisation.tokens_per_micro_batch, sequence), rollouts * sequence)
    # Log-probs and probabilities of a chunk; a layer's activations, computed again, its weights and the next one's in
    # bfloat16, its gradients in bfloat16 and for adding up in float32.
    head_at_work = 8.0 * min(LOGITS_PER_CHUNK, tokens * of.vocabulary)
    layer_at_work = 10.0 * layer + (tokens * of.kept_of_a_token / of.layers if checkpointing else 0.0)
    return Footprint(
        master_weights=4 * policy_shard,
        adamw=8 * policy_shard,
        teacher=4 * frozen_shard * variant.has_teacher,
        reference=4 * frozen_shard * variant.has_frozen_reference,
        engine=copy_and_cache if config.sampling.sampler == "hf" else config.sampling.engine_memory * gpu_bytes,
        gradients=4 * policy_shard,
        gathered_weights=2.0 * of.outside,
        head_gradient=6.0 * of.vocabulary * of.hidden,  # float32 and bfloat16
        activations=tokens * (of.inputs_of_a_token if checkpointing else of.kept_of_a_token),
        work_space=max(head_at_work, layer_at_work),
    )


def rollouts_of_a_step(config: Config, views: Sequence[View]) -> int:
    """Of the policy or of the teacher, on its views: each samples in a call of its own."""
    return len(views) * config.data.questions_per_step * config.sampling.rollouts


def recomputes(of: Architecture, config: Config, variant: Variant, gpus: int, gpu_bytes: float = GPU_BYTES) -> bool:
    """What --activation-checkpointing means; auto: where a micro-batch would not fit without."""
    setting = config.memory.activation_checkpointing
    without = footprint(of, config, variant, gpus, False, gpu_bytes)
    return setting == "on" or (setting == "auto" and without.while_training > USABLE * gpu_bytes)


def flags_that_fit(of: Architecture, config: Config, variant: Variant, gpus: int) -> list[str] | None:
    """The mildest changes of the settings with which the run fits into GPUs of 80 GB, None if there are none: first a
    smaller engine, then smaller micro-batches, then what costs time at every step."""
    sequence = config.max_sequence_tokens
    changes: list[dict[str, dict[str, Any]]] = [
        {},
        {"optimisation": {"tokens_per_micro_batch": sequence}},
        {"memory": {"offload_teacher": True}},
        {"memory": {"offload_teacher": True, "offload_optimizer": True}},
        {
            "memory": {"offload_teacher": True, "offload_optimizer": True},
            "optimisation": {"tokens_per_micro_batch": sequence},
        },
    ]
    for change in changes:
        changed = replace(config, **{g: replace(getattr(config, g), **new) for g, new in change.items()})
        checkpointing = recomputes(of, changed, variant, gpus)
        need = footprint(of, changed, variant, gpus, checkpointing)
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for new in change.values()
            for name, value in new.items()
        ]
        if need.while_training > USABLE * GPU_BYTES:
            continue
        if need.while_sampling <= USABLE * GPU_BYTES:
            return flags
        left = USABLE - (need.while_sampling - need.engine) / GPU_BYTES  # for the engine, a share
        smallest = (2 * of.parameters / config.sampling.tensor_parallel + 4e9) / GPU_BYTES
        if config.sampling.sampler != "hf" and left >= smallest:
            return [f"--engine-memory {math.floor(100 * left) / 100}", *flags]
    return None


def describe(
    of: Architecture, config: Config, variant: Variant, questions: int, prompt_tokens: float, total_steps: int
) -> str:
    """The whole plan as text; `prompt_tokens` is the mean of a prompt."""
    at_once = min(config.data.questions_per_step, questions)
    config = replace(config, data=replace(config.data, questions_per_step=at_once))
    rollouts, longest = rollouts_of_a_step(config, variant.policy_views), config.sampling.max_response_tokens
    of_teacher = rollouts_of_a_step(config, variant.teacher_views)
    trained = rollouts * (prompt_tokens + longest)
    sampled = (rollouts + of_teacher) * longest
    lines = [
        f"variant {config.method.variant}, model {config.model.name}: {of.parameters / 1e9:.3f} billion parameters",
        f"K = {total_steps:,} steps: {config.data.questions_per_step} of {questions:,} questions a step, prompts of "
        f"{prompt_tokens:.0f} tokens on average",
        f"a step samples {rollouts:,} rollouts of the policy and {of_teacher:,} of the teacher, up to "
        f"{sampled / 1e6:.2f} million tokens, and trains on up to {trained / 1e6:.2f} million; the run on up to "
        f"{total_steps * trained / 1e9:.3f} billion",
        "",
    ]
    checkpointing = [recomputes(of, config, variant, n) for n in GPUS]
    needs = [footprint(of, config, variant, n, on) for n, on in zip(GPUS, checkpointing, strict=True)]
    rows = {kind.replace("_", " "): [f"{asdict(need)[kind] / 1e9:.1f}" for need in needs] for kind in asdict(needs[0])}
    rows["peak while sampling"] = [f"{need.while_sampling / 1e9:.1f}" for need in needs]
    rows["peak while training"] = [f"{need.while_training / 1e9:.1f}" for need in needs]
    rows["activations are recomputed"] = ["yes" if on else "no" for on in checkpointing]
    rows["fits"] = ["yes" if need.peak <= USABLE * GPU_BYTES else "no" for need in needs]
    lines += [f"{'GB on each GPU of 80 GB':<28}" + "".join(f"{f'{n} GPU' + 's' * (n > 1):>9}" for n in GPUS)]
    lines += [f"{name:<28}" + "".join(f"{value:>9}" for value in values) for name, values in rows.items()]
    for n, need in zip(GPUS, needs, strict=True):
        if need.peak > USABLE * GPU_BYTES:
            flags = flags_that_fit(of, config, variant, n)
            cure = " ".join(flags) if flags else "no flags make it fit; take more GPUs or a smaller model"
            lines.append(f"on {n} GPU{'s' * (n > 1)}: {cure}")
    return "\n".join(lines)


def wants_checkpointing(lm: PreTrainedModel, config: Config, variant: Variant, device: torch.device) -> bool:
    """Whether this run, on these devices, has to compute activations again; the model is counted for `auto` alone."""
    if config.memory.activation_checkpointing != "auto":
        return config.memory.activation_checkpointing == "on"
    of = architecture(lm, compute_dtype(device))
    return recomputes(of, config, variant, ranks.count(), memory_of(device))
