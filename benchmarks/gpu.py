"""What one GPU makes of the trainer: Qwen3's shapes with random weights, nothing downloaded, tables in Markdown.

    python benchmarks/gpu.py training                          # 0.6B, 1.7B, 4B; responses of 1,000 and 3,000 tokens
    python benchmarks/gpu.py training --models 0.6B --response-tokens 16000 --spread 0       # prime-rl's setting
    python benchmarks/gpu.py head                              # the head beside its three bare matrix products
    python benchmarks/gpu.py loop --model 1.7B --steps 20      # variant II end to end, then resumed

With `--models tiny` (`--model tiny`, `--hidden 64 --vocabulary 500 --tokens 300`) all of it runs on a CPU in seconds.
TRL, where it is installed, gets the same rollouts in micro-batches of as many tokens. MFU counts 6 operations for each
weight of the body and token, the same for the head and each response token, and 6 x length^2 x heads x head_dim for
each layer's causal attention of a sequence, forward and backward.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import metrics
from embedded import start_model
from embedded.word_problems import word_problems
from grpo import build_optimizer, group_advantages, optimizer_step
from lm import packing
from lm.model import Objective, checkpoint_activations, frozen_copy
from lm.packing import Rollout, micro_batches
from lm.scoring import ChunkedHead, PackedLM, score

# hidden, intermediate, layers, query heads, key heads, head_dim, vocabulary, tied: as published
SHAPES = {
    "tiny": (64, 160, 2, 4, 2, 16, 700, True),
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151_936, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, 151_936, True),
    "4B": (2560, 9728, 36, 32, 8, 128, 151_936, True),
    "8B": (4096, 12288, 36, 32, 8, 128, 151_936, False),
}
BF16_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362}  # dense
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
GROUP = 8
PRIME_RL = "prime-rl's trainer, published: Qwen3-0.6B, 16k tokens, one H100: 11,900 tokens/s, MFU 11.1 %"


def config_of(name: str) -> Qwen3Config:
    hidden, intermediate, layers, heads, key_heads, head_dim, vocabulary, tied = SHAPES[name]
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with DEVICE:
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    return lm


def random_rollouts(tokens: int, prompt: int, response: int, spread: float, vocabulary: int) -> list[Rollout]:
    """Whole groups with about `tokens` tokens; lengths are spread evenly over response x (1 - spread .. 1 + spread)."""
    count = max(1, round(tokens / (prompt + response) / GROUP)) * GROUP
    lengths = [max(1, round(response * (1 + spread * (2 * i / (count - 1) - 1)))) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    ids = [torch.randint(vocabulary, (prompt + lengths[i],)).tolist() for i in order]
    return [Rollout(row[:prompt], row[prompt:], [-1.0] * (len(row) - prompt), finished=True) for row in ids]


def operations(lm: PreTrainedModel, rollouts: Sequence[Rollout]) -> float:
    """Floating-point operations of a forward and backward pass, as the head of this file counts them."""
    body = sum(module.weight.numel() for module in lm.base_model.modules() if isinstance(module, nn.Linear))
    head, attention = lm.get_output_embeddings().weight.numel(), lm.config.num_attention_heads * lm.config.head_dim
    lengths = [len(rollout) for rollout in rollouts]
    products = body * sum(lengths) + head * sum(len(rollout.response_ids) for rollout in rollouts)
    squares = attention * lm.config.num_hidden_layers * sum(length**2 for length in lengths)
    return float(6 * (products + squares))


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """Median, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return median(taken[1:])


def fresh_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{device}, torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}\n")
    print("\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]))


# ---------------------------------------------------------------- the training phase


def train_ours(
    name: str, rollouts: list[Rollout], tokens: int, repeats: int, checkpointing: bool
) -> tuple[float, float, float, float]:
    """Seconds of the reference pass and of the training phase, peak memory in GB, operations of the latter."""
    policy = PackedLM(random_model(name), DTYPE)
    reference = frozen_copy(policy)
    if checkpointing:
        checkpoint_activations(policy)
    optimizer = build_optimizer(policy, (0.9, 0.999), 0.01)
    advantages = group_advantages(torch.arange(len(rollouts)) % 3, GROUP).to(DEVICE)
    response_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    denominators = torch.full((len(rollouts),), float(response_tokens), device=DEVICE)
    objective = Objective(1.0, 0.2, 0.001, 2.0, "token", denominators, 1.0)
    batches = micro_batches(rollouts, tokens, DEVICE)
    anchor = score(reference, batches, 1.0)
    fresh_peak()
    scoring = seconds_of(lambda: score(reference, batches, 1.0), repeats)
    training = seconds_of(
        lambda: optimizer_step(policy, optimizer, batches, advantages, anchor, objective, 1e-6), repeats
    )
    return scoring, training, metrics.peak_memory_gb(), operations(policy.lm, rollouts)


def train_trl(name: str, rollouts: list[Rollout], tokens: int, repeats: int) -> tuple[float, float]:
    """Seconds of TRL's training phase on the same rollouts (forward, backward, optimizer), and peak memory in GB; its
    reference model is there, the reference's log-probs are given."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    longest = max(map(len, rollouts))
    rows = max(1, tokens // longest)
    lm = random_model(name)
    with TemporaryDirectory() as folder:
        lm.save_pretrained(folder)  # for its reference model
        lm.config._name_or_path = folder
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=GROUP,
            num_generations=GROUP,
            beta=0.001,
            bf16=DEVICE.type == "cuda",
            use_cpu=DEVICE.type == "cpu",
            gradient_checkpointing=False,
            report_to="none",
        )
        trainer = GRPOTrainer(
            model=lm,
            reward_funcs=no_reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["?"] * GROUP}),
            processing_class=start_model.train_tokenizer(),
        )
    optimizer = trainer.create_optimizer()
    inputs = [trl_inputs(rollouts[start : start + rows]) for start in range(0, len(rollouts), rows)]
    trainer.current_gradient_accumulation_steps = len(inputs)

    def step() -> None:
        for batch in inputs:
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model, batch).backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    fresh_peak()
    return seconds_of(step, repeats), metrics.peak_memory_gb()


def no_reward(completions: list[str], **_: Any) -> list[float | None]:
    return [0.0] * len(completions)


def trl_inputs(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Padded, prompts on the left and responses on the right."""

    def padded(sequences: list[list[int]], side: str) -> Tensor:
        tensors = [torch.tensor(sequence) for sequence in sequences]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side).to(DEVICE)

    prompts = padded([rollout.prompt_ids for rollout in rollouts], "left")
    responses = padded([rollout.response_ids for rollout in rollouts], "right")
    mask = padded([[1] * len(rollout.response_ids) for rollout in rollouts], "right")
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": responses,
        "completion_mask": mask,
        "advantages": torch.linspace(-1, 1, len(rollouts), device=DEVICE),
        "ref_per_token_logps": torch.zeros_like(responses, dtype=torch.float32),
        "num_items_in_batch": mask.sum(),
    }


def training(
    models: tuple[str, ...] = ("0.6B", "1.7B", "4B"),
    response_tokens: tuple[int, ...] = (1000, 3000),
    prompt_tokens: int = 150,
    spread: float = 0.75,
    tokens: int = 131_072,
    tokens_per_micro_batch: int = 16_384,
    repeats: int = 3,
    peak_tflops: float | None = None,
    activation_checkpointing: bool = False,
    trl: bool = True,
) -> None:
    """Reference pass and training phase of a step of about `tokens` tokens; peak_tflops: the device's, in bfloat16."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    peak = peak_tflops or next((tflops for name, tflops in BF16_TFLOPS.items() if name in device), None)
    rows = []
    for name, response in ((name, response) for name in models for response in response_tokens):
        rollouts = random_rollouts(tokens, prompt_tokens, response, spread, SHAPES[name][6])
        total = sum(map(len, rollouts))
        row = [name, f"{response:,}", f"{total:,}"]
        try:
            scoring, trained, memory, work = train_ours(
                name, rollouts, tokens_per_micro_batch, repeats, activation_checkpointing
            )
            mfu = f"{work / trained / peak / 1e12:.1%}" if peak else "-"
            row += [f"{total / trained:,.0f}", mfu, f"{total / scoring:,.0f}", f"{memory:.1f}"]
            if trl and find_spec("trl"):
                theirs, their_memory = train_trl(name, rollouts, tokens_per_micro_batch, repeats)
                row += [f"{total / theirs:,.0f}", f"{theirs / trained:.2f}", f"{their_memory:.1f}"]
        except torch.OutOfMemoryError:
            row += ["out of memory"]
        rows.append(row + ["-"] * (10 - len(row)))
    head = ["model", "mean response", "tokens", "training, tokens/s", "MFU", "reference, tokens/s", "peak, GB"]
    print_table([*head, "TRL, tokens/s", "TRL / ours, time", "TRL, peak, GB"], rows)
    print(f"\n{PRIME_RL}")


# ---------------------------------------------------------------- the head


def head(
    tokens: int = 28_000, hidden: int = 2048, vocabulary: int = 151_936, repeats: int = 5, compiled: bool = True
) -> None:
    """Forward and backward of the chunked head beside its three matrix products; `compiled`: also with torch.compile.

    The extra memory is what is held at the peak besides inputs and gradients."""
    states = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=DEVICE) * hidden**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)

    def ours() -> None:
        ChunkedHead.apply(states, weight, targets, 1.0, lambda logp, _: -logp / tokens)[0].backward()

    def bare() -> None:
        lean, logits = weight.detach().to(DTYPE), None
        for chunk in packing.token_chunks(tokens, vocabulary):
            logits = states.detach()[chunk] @ lean.T
            logits @ lean
            logits.T @ states.detach()[chunk]

    floor = seconds_of(bare, repeats)
    rows = [["three matrix products", f"{floor * 1e3:,.0f}", "1.00", "-"]]
    for name in ("chunked head", *(["chunked head, torch.compile"] if compiled else [])):
        if "compile" in name:
            packing.token_statistics = torch.compile(packing.token_statistics, dynamic=True)
        ours()  # the gradients are there from now on
        fresh_peak()
        before = metrics.peak_memory_gb()
        seconds = seconds_of(ours, repeats)
        extra = f"{metrics.peak_memory_gb() - before:.2f}" if DEVICE.type == "cuda" else "-"
        rows.append([name, f"{seconds * 1e3:,.0f}", f"{seconds / floor:.2f}", extra])
    print_table([f"{tokens:,} tokens, V {vocabulary:,}, H {hidden:,}", "ms", "ratio", "extra memory, GB"], rows)


# ---------------------------------------------------------------- end to end


def loop(
    model: str = "1.7B",
    steps: int = 20,
    questions: int = 16,
    response_tokens: int = 1000,
    folder: Path | None = None,
) -> None:
    """Variant II from prompts to checkpoint with the sampler at hand, then again from the checkpoint in the middle."""
    with TemporaryDirectory() as temporary:
        place, half = folder or Path(temporary), steps // 2
        random_model(model).save_pretrained(place / "model")
        start_model.train_tokenizer().save_pretrained(place / "model")
        problems = islice(word_problems("train"), questions * steps)
        lines = [json.dumps({"question": problem["question"]}) + "\n" for problem in problems]
        (place / "questions.jsonl").write_text("".join(lines))
        flags = {"variant": "II", "model": place / "model", "data": place / "questions.jsonl", "out": place / "run"}
        flags |= {"questions-per-step": questions, "max-response-tokens": response_tokens, "steps": steps}
        command = [sys.executable, str(ROOT / "train.py"), "--save-every", str(half)]
        command += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        subprocess.run(command, check=True)
        history = metrics.read_metrics(place / "run")
        checkpoint = place / "run" / "checkpoints" / f"step-{half:06}"
        subprocess.run([*command, "--resume", str(checkpoint)], check=True)
        resumed = metrics.read_metrics(place / "run")[half:]
    shown = [key for key in history[0] if key.startswith("seconds_")]
    shown += ["tokens_per_second", "peak_memory_gb", "mismatch_mean", "mismatch_max", "grad_norm"]
    rows = []
    for key in shown:
        columns = [[step[key] for step in part] for part in (history[:1], history[1:], history[-1:], resumed)]
        rows.append([key, *(f"{fmean(values):.3g}" for values in columns)])
    print_table([f"{model}, {steps} steps", "first", "mean of the others", "last", f"from step {half} resumed"], rows)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"training": training, "head": head, "loop": loop}, description=__doc__)
