"""The memory of a training run, before it is used. Takes the flags of train.py, loads no weights and no questions:

    python benchmarks/memory.py --variant II --model Qwen3-8B-Base --data math

P parameters in N shards (FSDP2, see lm.model.shard), vLLM samples. Bytes on each GPU:

    kept throughout    master weights 4P/N; teacher or frozen reference 4P/N; vLLM's CUDA graphs, even while it sleeps
    kept after step 1  AdamW's moments 8P/N
    first check        the engine and a whole bfloat16 copy, 2P, before AdamW has its moments
    while sampling     the engine: a share of the GPU
    while training     gradients 4P/N; weights outside of layers, whole; what autograd keeps of a micro-batch (where
                       it is recomputed, the inputs of layers); the head or the layer at work

Not in it: the CUDA context and NCCL's buffers (about 2 GB), and the allocator's fragmentation; USABLE leaves room.
"""

import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, exit_on_user_error, parse
from lm.model import decoder_layers, load_pretrained
from lm.scoring import ON_GPU as LOGITS_ON_GPU
from prepare import choose_variant
from rewards import Variant

GPU_BYTES, USABLE = 80e9, 0.92  # of it, for what is planned here
GPUS = (1, 2, 4, 8)
CUDA_GRAPHS = 1e9  # assumed: vLLM logs what its capture took
CURE = (
    "where it does not fit, try in this order: a lower --engine-memory, --activation-checkpointing on, "
    "fewer --tokens-per-micro-batch, --offload-teacher, --offload-optimizer, more GPUs (docs/PERFORMANCE.md)"
)


def kept_of_a_token(lm: PreTrainedModel, itemsize: int = 2) -> int:
    """Bytes that autograd keeps of a token in each layer, computing with numbers of `itemsize` bytes.

    For each of two norms its input in float32, the normalised vector and the output; query, key, value and output of
    attention; four vectors of the MLP; and for norms of query and key (Qwen3) two each.
    """
    model = lm.config.get_text_config()
    hidden, heads = model.hidden_size, model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or hidden // heads
    query, key = heads * head_dim, (getattr(model, "num_key_value_heads", None) or heads) * head_dim
    width = getattr(model, "intermediate_size", None) or 4 * hidden  # GPT-2 does not name it
    norms_heads = any("q_norm" in name for name, _ in lm.named_parameters())
    kept = 2 * (4 + 2 * itemsize) * hidden + itemsize * (2 * query + 2 * key + 4 * width)
    return int(kept + norms_heads * (4 + itemsize) * (query + key))


def bytes_needed(
    lm: PreTrainedModel, config: Config, variant: Variant, gpus: int, itemsize: int = 2
) -> dict[str, float]:
    """On each of `gpus` GPUs, by kind, and at most in each phase; what is off-loaded to the CPU counts 0."""
    model, layers = lm.config.get_text_config(), decoder_layers(lm)
    parameters = sum(p.numel() for p in lm.parameters())
    layer = sum(p.numel() for each in layers for p in each.parameters()) / len(layers)
    head, kept_of_layer = model.vocab_size * model.hidden_size, kept_of_a_token(lm, itemsize)
    own = 0.0 if config.memory.offload_optimizer else parameters / gpus
    copies = (variant.has_teacher + variant.has_frozen_reference) * (not config.memory.offload_teacher)
    tokens = max(config.optimisation.tokens_per_micro_batch, config.max_sequence_tokens)
    recomputed = config.memory.activation_checkpointing == "on"
    # The head: float32 logits and probabilities, and its gradient in float32 and rounded. A layer: its weights and the
    # next one's, its gradients in bfloat16 and in float32, and its activations if they are computed again.
    head_at_work = 8 * min(LOGITS_ON_GPU, tokens * model.vocab_size) + 6 * head
    layer_at_work = 10 * layer + 2 * head + tokens * kept_of_layer * recomputed
    need = {
        "master weights": 4 * own,
        "AdamW": 8 * own,
        "teacher, reference": 4 * copies * parameters / gpus,
        "CUDA graphs": CUDA_GRAPHS,
        "engine": config.sampling.engine_memory * GPU_BYTES,
        "gradients": 4 * own,
        "weights outside of layers": 2 * (parameters - layer * len(layers)),
        "activations": tokens * len(layers) * (itemsize * model.hidden_size if recomputed else kept_of_layer),
        "head or layer at work": max(head_at_work, layer_at_work),
    }
    kept = need["master weights"] + need["teacher, reference"] + need["CUDA graphs"]
    training = ("AdamW", "gradients", "weights outside of layers", "activations", "head or layer at work")
    return need | {
        "at the first check": kept + need["engine"] + 2 * parameters,
        "while sampling": kept + need["engine"] + need["AdamW"],
        "while training": kept + sum(need[kind] for kind in training),
    }


def fits(need: dict[str, float]) -> bool:
    return max(need["at the first check"], need["while sampling"], need["while training"]) <= USABLE * GPU_BYTES


def as_text(lm: PreTrainedModel, config: Config, variant: Variant) -> str:
    """The table, and what to try where the run does not fit."""
    needs = [bytes_needed(lm, config, variant, n) for n in GPUS]
    lines = [f"{'GB on each GPU of 80 GB':<28}" + "".join(f"{f'{n} GPU' + 's' * (n > 1):>9}" for n in GPUS)]
    lines += [f"{kind:<28}" + "".join(f"{need[kind] / 1e9:>9.1f}" for need in needs) for kind in needs[0]]
    lines.append(f"{'fits':<28}" + "".join(f"{'yes' if fits(need) else 'no':>9}" for need in needs))
    return "\n".join(lines if all(map(fits, needs)) else [*lines, CURE])


def main() -> None:
    with exit_on_user_error():
        config = parse()
        variant = choose_variant(config)
        lm, _ = load_pretrained(str(config.model.name), torch.float32, weights=False)
    print(as_text(lm, config, variant))


if __name__ == "__main__":
    main()
