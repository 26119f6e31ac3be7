"""The memory of a training run, before it is used. Takes the flags of train.py and loads no weights:

    python -m tools.plan --variant II --model Qwen3-8B-Base --data math

P parameters in N shards (FSDP2, see lm.model.shard). Bytes on each GPU:

    kept throughout    master weights 4P/N; teacher or frozen reference 4P/N; vLLM's CUDA graphs, even while it sleeps
    kept after step 1  AdamW's moments 8P/N
    first check        the engine and a whole bfloat16 copy, 2P, before AdamW has its moments (vLLM alone)
    while sampling     the engine: a share of the GPU (vLLM), or a whole bfloat16 copy and its cache (hf)
    while training     gradients 4P/N; weights outside of layers, whole; what autograd keeps of a micro-batch (where
                       it is recomputed, the inputs of layers); the head or the layer at work

Not in it: the CUDA context and NCCL's buffers (about 2 GB), and the allocator's fragmentation; USABLE leaves room.
"""

import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from config import Config, parse, told_in_a_sentence
from lm.decoding import ROWS_PER_CALL
from lm.model import decoder_layers, load_pretrained
from lm.scoring import ON_GPU as LOGITS_ON_GPU
from prepare import chosen_variant, read_data, to_questions, total_steps
from rewards import Variant

GPU_BYTES = 80e9
USABLE = 0.92  # of a GPU, for what is planned here
GPUS = (1, 2, 4, 8)
CUDA_GRAPHS = 1e9  # assumed: vLLM logs what its capture took


@dataclass(frozen=True)
class Shape:
    """Of a model, all that its memory depends on."""

    parameters: int
    outside: int  # of them, those of no decoder layer: embeddings, head, last norm
    layers: int
    head: int  # elements of its matrix
    vocabulary: int
    kept_of_a_token: float  # bytes that autograd keeps of a token, over all layers
    inputs_of_a_token: float  # bytes of what enters the layers alone
    cached_of_a_token: float  # bytes of its keys and values in bfloat16


def shape_of(lm: PreTrainedModel, itemsize: int = 2) -> Shape:
    """Of a model that may be on the meta device, computing with numbers of `itemsize` bytes.

    A layer keeps, of a token: for each of two norms its input in float32, the normalised vector and the output; query,
    key, value and output of attention; four vectors of the MLP; and for norms of query and key (Qwen3) two each.
    """
    config, layers = lm.config.get_text_config(), decoder_layers(lm)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    norms_heads = any("q_norm" in name for name, _ in lm.named_parameters())
    width = getattr(config, "intermediate_size", None) or 4 * hidden  # GPT-2 does not name it
    kept = 2 * (4 + 2 * itemsize) * hidden + itemsize * (2 * query + 2 * key + 4 * width)
    kept += norms_heads * (4 + itemsize) * (query + key)
    parameters = sum(p.numel() for p in lm.parameters())
    return Shape(
        parameters=parameters,
        outside=parameters - sum(p.numel() for layer in layers for p in layer.parameters()),
        layers=len(layers),
        head=config.vocab_size * hidden,
        vocabulary=config.vocab_size,
        kept_of_a_token=float(len(layers) * kept),
        inputs_of_a_token=float(len(layers) * itemsize * hidden),
        cached_of_a_token=float(len(layers) * 2 * 2 * key),
    )


def bytes_needed(of: Shape, config: Config, variant: Variant, gpus: int) -> dict[str, float]:
    """On each of `gpus` GPUs, by kind, and at most in each phase; what is off-loaded to the CPU counts 0."""
    shard, layer = of.parameters / gpus, (of.parameters - of.outside) / of.layers
    own = 0.0 if config.memory.offload_optimizer else shard
    copies = (variant.has_teacher + variant.has_frozen_reference) * (not config.memory.offload_teacher)
    vllm, sequence = config.sampling.sampler != "hf", config.max_sequence_tokens
    rollouts = len(variant.policy_views) * config.data.questions_per_step * config.sampling.rollouts
    cached = min(ROWS_PER_CALL, rollouts / gpus) * sequence * of.cached_of_a_token
    tokens = min(max(config.optimisation.tokens_per_micro_batch, sequence), rollouts * sequence)
    recomputed = config.memory.activation_checkpointing == "on"
    # The head: float32 logits and probabilities, and its gradient in float32 and rounded. A layer: its weights and the
    # next one's, its gradients in bfloat16 and in float32, and its activations if they are computed again.
    head_at_work = 8 * min(LOGITS_ON_GPU, tokens * of.vocabulary) + 6 * of.head
    layer_at_work = 10 * layer + 2 * of.head + tokens * of.kept_of_a_token / of.layers * recomputed
    need = {
        "master weights": 4 * own,
        "AdamW": 8 * own,
        "teacher, reference": 4 * shard * copies,
        "CUDA graphs": CUDA_GRAPHS * vllm,
        "engine": config.sampling.engine_memory * GPU_BYTES if vllm else 2 * of.parameters + cached,
        "first check's copy": 2.0 * of.parameters * vllm,
        "gradients": 4 * own,
        "weights outside of layers": 2.0 * of.outside,
        "activations": tokens * (of.inputs_of_a_token if recomputed else of.kept_of_a_token),
        "head or layer at work": max(head_at_work, layer_at_work),
    }
    kept = need["master weights"] + need["teacher, reference"] + need["CUDA graphs"]
    training = ("AdamW", "gradients", "weights outside of layers", "activations", "head or layer at work")
    return need | {
        "at the first check": kept + need["engine"] + need["first check's copy"],
        "while sampling": kept + need["engine"] + need["AdamW"],
        "while training": kept + sum(need[kind] for kind in training),
    }


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """With each setting in the group that has it."""
    for name, value in settings.items():
        (group,) = (group for group, fields in vars(config).items() if hasattr(fields, name))
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


def fits(need: dict[str, float]) -> bool:
    return max(need["at the first check"], need["while sampling"], need["while training"]) <= USABLE * GPU_BYTES


def flags_that_fit(of: Shape, config: Config, variant: Variant, gpus: int) -> list[str] | None:
    """The mildest changes with which the run fits, None if there are none: first a smaller engine, if its weights and
    4 GB of cache fit in, then smaller micro-batches, then what costs time at every step."""
    recomputed = config.memory.activation_checkpointing == "on"
    again: dict[str, Any] = {} if recomputed else {"activation_checkpointing": "on"}
    fewer, teacher = again | {"tokens_per_micro_batch": config.max_sequence_tokens}, again | {"offload_teacher": True}
    everything = fewer | teacher | {"offload_optimizer": True}
    optimizer = teacher | {"offload_optimizer": True}
    for settings in ({}, again, fewer, teacher, optimizer, everything):
        flags = [f"--{name.replace('_', '-')}" + ("" if v is True else f" {v}") for name, v in settings.items()]
        after = changed(config, settings)
        need = bytes_needed(of, after, variant, gpus)
        if fits(need):
            return flags
        others = max(need["at the first check"], need["while sampling"]) - need["engine"]
        share = math.floor(100 * (USABLE - others / GPU_BYTES)) / 100
        smallest = (2 * of.parameters / config.sampling.tensor_parallel + 4e9) / GPU_BYTES
        smaller = changed(after, {"engine_memory": share})
        if config.sampling.sampler != "hf" and share >= smallest and fits(bytes_needed(of, smaller, variant, gpus)):
            return [f"--engine-memory {share}", *flags]
    return None


def as_text(of: Shape, config: Config, variant: Variant, questions: int, prompt_tokens: float, total_steps: int) -> str:
    """The whole plan; `prompt_tokens` is the mean of a prompt."""
    config = changed(config, {"questions_per_step": min(config.data.questions_per_step, questions)})
    in_a_view, longest = config.data.questions_per_step * config.sampling.rollouts, config.sampling.max_response_tokens
    rollouts, of_teacher = (in_a_view * len(views) for views in (variant.policy_views, variant.teacher_views))
    trained = rollouts * (prompt_tokens + longest)
    lines = [
        f"variant {config.method.variant}, model {config.model.name}: {of.parameters / 1e9:.3f} billion parameters",
        f"K = {total_steps:,} steps: {config.data.questions_per_step} of {questions:,} questions a step, prompts of "
        f"{prompt_tokens:.0f} tokens on average",
        f"a step samples {rollouts:,} rollouts of the policy and {of_teacher:,} of the teacher, up to "
        f"{(rollouts + of_teacher) * longest / 1e6:.2f} million tokens, and trains on up to {trained / 1e6:.2f} "
        f"million; the run on up to {total_steps * trained / 1e9:.3f} billion",
        "",
        f"{'GB on each GPU of 80 GB':<28}" + "".join(f"{f'{n} GPU' + 's' * (n > 1):>9}" for n in GPUS),
    ]
    needs = [bytes_needed(of, config, variant, n) for n in GPUS]
    lines += [f"{kind:<28}" + "".join(f"{need[kind] / 1e9:>9.1f}" for need in needs) for kind in needs[0]]
    lines.append(f"{'fits':<28}" + "".join(f"{'yes' if fits(need) else 'no':>9}" for need in needs))
    for n in (n for n, need in zip(GPUS, needs, strict=True) if not fits(need)):
        flags = flags_that_fit(of, config, variant, n)
        cure = " ".join(flags) if flags else "no flags make it fit; take more GPUs or a smaller model"
        lines.append(f"on {n} GPU{'s' * (n > 1)}: {cure}")
    return "\n".join(lines)


def main() -> None:
    """What the run would need, from the data, the tokenizer and the architecture alone."""
    with told_in_a_sentence():
        config = parse()
        variant = chosen_variant(config)
        pairs, report, _ = read_data(config)
        lm, tokenizer = load_pretrained(config.model.name, torch.float32, weights=False)
        questions = to_questions(config, variant, tokenizer, pairs, report)
    prompt_tokens = fmean(len(prompt) for question in questions for prompt in question.prompts.values())
    steps = total_steps(config, len(questions))
    print("\n" + as_text(shape_of(lm), config, variant, len(questions), prompt_tokens, steps))


if __name__ == "__main__":
    main()
