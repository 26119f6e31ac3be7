"""What one GPU makes of the program, in the order that teaches most: Qwen3's shapes with random weights, no download.

    python benchmarks/gpu.py                                   # every part, fifteen minutes; figures in gpu.json
    python benchmarks/gpu.py --parts head profile training long sampling          # what is predicted, nine minutes
    python benchmarks/gpu.py --models tiny --response-tokens 20 --tokens 800      # all of it on a CPU, in seconds

    sanity      three steps of II with the sampler at hand: log-probs against the trainer's, sleeping and waking, memory
    head        the chunked head, eager and compiled, by chunk, beside its four bare products; attention without padding
                beside padded attention
    profile     one micro-batch, eager and compiled: the share in which the GPU is busy, and the longest kernels
    training    a training phase and a reference pass by plan: tokens/s, MFU, memory; TRL on the same rollouts, if
                installed
    long        the same with responses of 16,000 tokens, compiled and light: beside prime-rl's 11.9k
    sampling    an engine with 128 and with 1,024 sequences
    learning    II on the embedded task, in bfloat16: does it learn as it does on a CPU in float32?
    resume      train.py as a command, then again from the checkpoint in the middle: what differs

Each part is a process of its own and ends in one line of figures; one that fails does not end the others. Predictions
stand beside the figures that they are of. MFU counts operations as metrics.py does: what is computed again to save
memory does not count.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import metrics
from config import Config, parse
from embedded.word_problems import word_problems
from grpo import group_advantages, optimizer_step
from lm import distributed, scoring
from lm.decoding import Capacity
from lm.engine import open_sampler
from lm.model import checkpoint_activations, compile_models, frozen_copy, resolve, shard
from lm.packing import MicroBatch, micro_batches, packed_attention
from lm.record import Rollout
from lm.scoring import PASSES, ChunkedHead, PackedLM, score
from prepare import build_optimizer, prepare
from store.jsonl import read_rows, write_atomic
from train import train_step

# hidden, intermediate, layers, query heads, key heads, head_dim, vocabulary, tied: as published
SHAPES = {
    "tiny": (64, 160, 2, 4, 2, 32, 700, True),
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151_936, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, 151_936, True),
    "4B": (2560, 9728, 36, 32, 8, 128, 151_936, True),
    "8B": (4096, 12288, 36, 32, 8, 128, 151_936, False),
}
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
GROUP = 8
PLANS = {"eager": (False, "off"), "recomputed": (False, "on"), "compiled": (True, "off"), "light": (True, "light")}
Figures = dict[str, Any]
# Of one H200, before any of it was compiled there: a model of kernels and bytes, within 6 % of docs/gpu.json.
PREDICTED: dict[str, Figures] = {
    "head": {"0.6B, compiled, 2^28": "36 ms", "0.6B, eager, 2^28": "84 ms", "1.7B, compiled, 2^28": "60 ms"},
    "profile": {"0.6B, compiled": "busy over 0.95", "1.7B, compiled": "busy over 0.95"},
    "training": {
        "0.6B, eager": "35,000 tokens/s",
        "0.6B, compiled": "65,000 tokens/s, MFU 0.26",
        "1.7B, eager": "23,000 tokens/s",
        "1.7B, compiled": "37,000 tokens/s, MFU 0.40",
        "1.7B, light": "36,500 tokens/s, 30 GB less than eager",
    },
    "long": {"0.6B, light": "30,000 tokens/s"},
    "sampling": {"0.6B, 128": "26,000 tokens/s", "0.6B, 1024": "45,000 to 55,000 tokens/s"},
}


@dataclass(frozen=True)
class Settings:
    parts: tuple[str, ...] = ("sanity", "head", "profile", "training", "long", "sampling", "learning", "resume")
    models: tuple[str, ...] = ("0.6B", "1.7B")  # shapes; the first alone for `sanity`, `long`, `sampling`, `resume`
    # mean length of responses (those of `training` are spread over a quarter to seven quarters of it)
    response_tokens: int = 1000
    tokens: int = 65_536  # of a step of `training`
    tokens_per_micro_batch: int = 16_384
    plans: tuple[str, ...] = ("eager", "compiled", "light")  # of `training`; recomputed: eager, all of a layer again
    sequences: tuple[int, ...] = (128, 1024)  # of `sampling`
    steps: int = 60  # of `learning`
    repeats: int = 3
    peak_tflops: float | None = None  # of the device in bfloat16 (None: known for some)
    engine_memory: float = 0.5  # share of the GPU for vLLM: less where other programs use it too
    seconds: int = 300  # after which a part is ended
    out: Path = Path("gpu.json")


def main(settings: Settings) -> None:
    """Each part in a process of its own, which prints its figures as one line of JSON."""
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    result: Figures = {"device": device, "torch": torch.__version__, "settings": asdict(settings) | {"out": ""}}
    print(f"{device}, torch {torch.__version__}, {DTYPE}", flush=True)
    for part in settings.parts:
        begin = time.perf_counter()
        flags = ["--models", *settings.models, "--plans", *settings.plans, "--parts", part]
        flags += ["--sequences", *map(str, settings.sequences)]
        for name in ("response_tokens", "tokens", "tokens_per_micro_batch", "steps", "repeats", "engine_memory"):
            flags += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
        command = [sys.executable, __file__, *flags, "--out", "-"]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=settings.seconds)
            lines = done.stdout.decode(errors="replace").splitlines()
            figures = json.loads(lines[-1]) if done.returncode == 0 else {"failed": f"exit code {done.returncode}"}
            foretold = {key: told for key, told in PREDICTED.get(part, {}).items() if key in figures}
            figures |= {"predicted": foretold} if foretold else {}
        except (subprocess.TimeoutExpired, ValueError, IndexError) as problem:
            figures = {"failed": str(problem)}
        result[part] = figures | {"seconds": round(time.perf_counter() - begin, 1)}
        print(f"{part}: {json.dumps(result[part])}", flush=True)
        write_atomic(settings.out, json.dumps(result, indent=1) + "\n")


# ---------------------------------------------------------------- shapes and rollouts


def random_model(name: str) -> PreTrainedModel:
    hidden, intermediate, layers, heads, key_heads, head_dim, vocabulary, tied = SHAPES[name]
    config = Qwen3Config(
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
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU else "cpu"):
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return lm


def random_rollouts(tokens: int, prompt: int, response: int, vocabulary: int) -> list[Rollout]:
    """Whole groups with about `tokens` tokens; responses are spread evenly over 0.25 to 1.75 times `response`."""
    count = max(1, round(tokens / (prompt + response) / GROUP)) * GROUP
    lengths = [max(1, round(response * (0.25 + 1.5 * i / (count - 1)))) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    ids = [torch.randint(vocabulary, (prompt + lengths[i],)).tolist() for i in order]
    return [Rollout(row[:prompt], row[prompt:], [-1.0] * (len(row) - prompt), finished=True) for row in ids]


def run_flags(place: Path, settings: Settings, steps: int) -> list[str]:
    """Of a run on a random model of the first shape, saved in `place` with questions."""
    random_model(settings.models[0]).save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(resolve("embedded")).save_pretrained(place / "model")
    lines = [json.dumps({"question": problem["question"]}) + "\n" for problem in word_problems("train")[: 16 * steps]]
    (place / "questions.jsonl").write_text("".join(lines))
    flags = {"model": place / "model", "data": place / "questions.jsonl", "out": place / "run", "steps": steps}
    flags |= {"questions-per-step": 16, "max-response-tokens": settings.response_tokens}
    flags |= {"engine-memory": settings.engine_memory}
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """Median, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize() if ON_GPU else None
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize() if ON_GPU else None
        taken.append(time.perf_counter() - begin)
    return median(taken[1:])


def fresh_peak() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def used_gb() -> float:
    """Of the whole device, as its driver sees it."""
    free, total = torch.cuda.mem_get_info() if ON_GPU else (0, 0)
    return round((total - free) / 1e9, 2)


# ---------------------------------------------------------------- the parts


def sanity(settings: Settings) -> Figures:
    """Policy and teacher by turns hold the engine: six loads, six awakenings."""
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        run, _ = prepare(parse(["--variant", "II", *run_flags(Path(folder), settings, 3)]), Path(folder))
        figures: Figures = {
            "sampler": type(run.sampler).__name__,
            "start_seconds": round(time.perf_counter() - begin, 1),
        }
        figures |= {"used_gb": [used_gb()], "steps": []}
        for step in range(3):
            fresh_peak()
            seen, _ = train_step(run, step)
            shown = {key: round(value, 4) for key, value in seen.items() if key.startswith(("seconds", "mismatch"))}
            shown |= {key: seen[key] for key in ("tokens_per_second", "grad_norm", "response_tokens")}
            figures["steps"].append(shown | {"peak_gb": round(metrics.peak_memory_gb(run.sampler.sleeping_bytes), 2)})
            figures["used_gb"].append(used_gb())
        run.sampler.close()
    return figures


def learning(settings: Settings) -> Figures:
    """Sampled held-out accuracy before and after, and the gap between sampler and trainer."""
    with TemporaryDirectory() as folder:
        flags = ["--steps", str(settings.steps), "--eval-every", "0", "--out", f"{folder}/run"]
        flags += ["--engine-memory", str(settings.engine_memory)]
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        history = read_rows(Path(folder, "run", "metrics.jsonl"))
    accuracy = [round(row["eval_accuracy"], 3) for row in history if "eval_accuracy" in row]
    steps = [row for row in history if "reward" in row]
    means = {key: fmean(row[key] for row in steps) for key in ("mismatch_mean", "mismatch_max", "label_accuracy")}
    seconds = fmean(sum(v for k, v in row.items() if k.startswith("seconds")) for row in steps[1:])
    return {"accuracy": accuracy, "step_seconds": round(seconds, 3)} | means


def training(settings: Settings) -> Figures:
    figures: Figures = {}
    for name in settings.models:
        rollouts = random_rollouts(settings.tokens, 150, settings.response_tokens, SHAPES[name][6])
        works = {plan: partial(train_ours, name, rollouts, settings, plan) for plan in settings.plans}
        if find_spec("trl"):
            works["TRL"] = partial(train_trl, name, rollouts, settings)
        for plan, work in works.items():
            try:
                figures[f"{name}, {plan}"] = work()
            except torch.OutOfMemoryError:
                figures[f"{name}, {plan}"] = "out of memory"
            print(f"{name}, {plan}: {figures[f'{name}, {plan}']}", file=sys.stderr, flush=True)
    return figures


def long(settings: Settings) -> Figures:
    name = settings.models[0]
    rollouts = random_rollouts(settings.tokens, 150, 16_000 if ON_GPU else 100, SHAPES[name][6])
    return {f"{name}, light": train_ours(name, rollouts, settings, "light")}


def policy_of(name: str, plan: str) -> tuple[PackedLM, PackedLM]:
    """Make a policy and its frozen reference as `prepare` does: sharded over a group of one on a GPU."""
    device = distributed.start()
    policy = PackedLM(random_model(name), DTYPE)
    if torch.distributed.is_initialized():
        shard(policy, init_device_mesh(device.type, (distributed.world_size(),)))
    reference = frozen_copy(policy)
    compiled, recompute = PLANS[plan]
    if compiled:
        torch.compiler.reset()  # what another plan has compiled keeps other activations
        compile_models([policy, reference], recompute == "light")
    if recompute == "on":
        checkpoint_activations(policy)
    return policy, reference


def train_ours(name: str, rollouts: list[Rollout], settings: Settings, plan: str) -> Figures:
    """Train as `train_step` does, on whole steps."""
    policy, reference = policy_of(name, plan)
    device = distributed.start()
    work = metrics.operations(policy.lm, rollouts)
    optimizer, config = build_optimizer(policy, (0.9, 0.999), 0.01), Config()
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    advantages = group_advantages(torch.arange(len(rollouts)) % 3, GROUP).tolist()
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        rollout.advantage, rollout.denominator = advantage, float(tokens)
    batches = micro_batches(rollouts, settings.tokens_per_micro_batch, device)
    for batch, stats in zip(batches, score(reference, batches, 1.0), strict=True):
        batch.reference_logp = stats.logp
    fresh_peak()
    scoring_seconds = seconds_of(lambda: score(reference, batches, 1.0), settings.repeats)
    seconds = seconds_of(
        lambda: optimizer_step(policy, optimizer, batches, 1e-6, 0.001, config),
        settings.repeats,
    )
    tokens = sum(map(len, rollouts))
    card = torch.cuda.get_device_name() if ON_GPU else ""
    known = next((tflops for kind, tflops in metrics.BF16_TFLOPS.items() if kind in card), None)
    peak = settings.peak_tflops or known
    return {
        "tokens_per_second": round(tokens / seconds),
        "mfu": round(work / seconds / peak / 1e12, 3) if peak else None,
        "reference_tokens_per_second": round(tokens / scoring_seconds),
        "peak_gb": round(metrics.peak_memory_gb(), 1),
    }


def train_trl(name: str, rollouts: list[Rollout], settings: Settings) -> Figures:
    """TRL's training phase on the same rollouts (forward, backward, optimizer), with gradient checkpointing as TRL has
    it by default; the reference's log-probs are given."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    rows = max(1, settings.tokens_per_micro_batch // max(map(len, rollouts)))
    lm = random_model(name)
    with TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=GROUP,
            num_generations=GROUP,
            beta=0.0,  # no reference model of its own
            bf16=ON_GPU,
            use_cpu=not ON_GPU,
            report_to="none",
        )
        trainer = GRPOTrainer(
            model=lm,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["?"] * GROUP}),
            processing_class=AutoTokenizer.from_pretrained(resolve("embedded")),
        )
    trainer.beta = 0.001
    optimizer = trainer.create_optimizer()
    inputs = [trl_inputs(rollouts[start : start + rows]) for start in range(0, len(rollouts), rows)]
    trainer.current_gradient_accumulation_steps = len(inputs)
    trainer.model.train()

    def step() -> None:
        for batch in inputs:
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model, batch).backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    fresh_peak()
    seconds = seconds_of(step, settings.repeats)
    tokens = sum(map(len, rollouts))
    return {"tokens_per_second": round(tokens / seconds), "peak_gb": round(metrics.peak_memory_gb(), 1)}


def trl_inputs(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Padded, prompts on the left and responses on the right."""

    def padded(sequences: list[list[int]], side: str) -> Tensor:
        tensors = [torch.tensor(sequence) for sequence in sequences]
        padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)
        return padded.to("cuda" if ON_GPU else "cpu")

    prompts = padded([rollout.prompt_ids for rollout in rollouts], "left")
    responses = padded([rollout.response_ids for rollout in rollouts], "right")
    mask = padded([[1] * len(rollout.response_ids) for rollout in rollouts], "right")
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": responses,
        "completion_mask": mask,
        "advantages": torch.linspace(-1, 1, len(rollouts), device=prompts.device),
        "ref_per_token_logps": torch.zeros_like(responses, dtype=torch.float32),
        "num_items_in_batch": mask.sum(),
    }


def head(settings: Settings) -> Figures:
    """Forward and backward, milliseconds."""
    figures: Figures = {}
    tokens = min(settings.tokens_per_micro_batch, settings.tokens)
    for name in settings.models:
        figures |= head_of(name, tokens, settings.repeats)
    return figures | {"tokens": tokens} | attention(settings.models[0], tokens, settings)


def head_of(name: str, tokens: int, repeats: int) -> Figures:
    hidden, vocabulary = SHAPES[name][0], SHAPES[name][6]
    device = torch.device("cuda" if ON_GPU else "cpu")
    states = torch.randn(tokens, hidden, device=device, dtype=DTYPE).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=device) * hidden**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def bare() -> None:
        lean = weight.detach().to(DTYPE)
        for chunk in scoring.token_chunks(tokens, vocabulary):
            part = states.detach()[chunk]
            logits = part @ lean.T
            part @ lean.T
            logits @ lean
            logits.T @ part

    figures = {f"{name}, four products": 1e3 * seconds_of(bare, repeats)}
    compiled = tuple(torch.compile(function, dynamic=True) for function in PASSES)
    chunk = scoring.LOGITS_PER_CHUNK
    for (how, passes), power in product((("eager", PASSES), ("compiled", compiled)), (26, 28, 30) if ON_GPU else (14,)):
        scoring.LOGITS_PER_CHUNK = 2**power

        def both(passes: Any = passes) -> None:
            ChunkedHead.apply(states, weight, targets, 1.0, passes)[0].sum().backward()

        figures[f"{name}, {how}, 2^{power}"] = 1e3 * seconds_of(both, repeats)
    scoring.LOGITS_PER_CHUNK = chunk
    return {key: round(value, 2) for key, value in figures.items()}


def attention(name: str, tokens: int, settings: Settings) -> Figures:
    _, _, _, heads, key_heads, head_dim, _, _ = SHAPES[name]
    device = torch.device("cuda" if ON_GPU else "cpu")
    (batch, *_) = micro_batches(random_rollouts(tokens, 150, settings.response_tokens, 500), tokens, device)
    shape = batch.input_ids.shape[1]
    q, k, v = (
        torch.randn(1, n, shape, head_dim, device=device, dtype=DTYPE).requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    packed = seconds_of(lambda: attend(packed_attention, q, k, v, batch).sum().backward(), settings.repeats)
    padded = seconds_of(lambda: attend(padded_attention, q, k, v, batch).sum().backward(), settings.repeats)
    return {"attention_ms": round(1e3 * packed, 2), "padded_attention_ms": round(1e3 * padded, 2)}


def attend(attention: Callable[..., tuple[Tensor, None]], q: Tensor, k: Tensor, v: Tensor, batch: MicroBatch) -> Tensor:
    return attention(nn.Identity(), q, k, v, None, packing=batch)[0]


def padded_attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, __: None, packing: MicroBatch
) -> tuple[Tensor, None]:
    """What a trainer that pads computes: [B, heads, L, d]."""
    q, k, v = (packed[0][:, packing.pad_index].transpose(0, 1) for packed in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), None


def profile(settings: Settings) -> Figures:
    """Profile a micro-batch, forward and backward; the longest kernels go to standard error."""
    figures: Figures = {}
    tokens = min(settings.tokens, settings.tokens_per_micro_batch)
    for name, plan in product(settings.models, ("eager", "compiled")):
        policy, _ = policy_of(name, plan)
        rollouts = random_rollouts(tokens, 150, settings.response_tokens, SHAPES[name][6])
        batch = micro_batches(rollouts, 2 * tokens, distributed.start())[0]

        def work(policy: PackedLM = policy, batch: MicroBatch = batch) -> None:
            policy(batch, 1.0).logp.sum().backward()
            policy.zero_grad()
            torch.cuda.synchronize() if ON_GPU else None

        begin = time.perf_counter()
        work()
        first = time.perf_counter() - begin
        wall = seconds_of(work, settings.repeats)
        with torch.profiler.profile() as profiler:
            work()
        rows = profiler.key_averages()
        on_device = [row for row in rows if row.self_device_time_total]
        busy = sum(row.self_device_time_total for row in on_device) / 1e6
        figures[f"{name}, {plan}"] = {
            "first_s": round(first, 1),
            "ms": round(1e3 * wall, 1),
            "tokens": batch.input_ids.numel(),
            "busy": round(busy / wall, 3),
            "kernels": sum(row.count for row in on_device),
        }
        order = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
        print(rows.table(sort_by=order, row_limit=16, max_name_column_width=60), file=sys.stderr, flush=True)
    return figures


def sampling(settings: Settings) -> Figures:
    """Sample responses of one length, in groups of 4, by the number of sequences at once."""
    name = settings.models[0]
    length = 600 if ON_GPU else 8
    figures: Figures = {}
    lm = random_model(name)
    lm = lm.bfloat16() if ON_GPU else lm
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded"))
    begin = time.perf_counter()
    capacity = Capacity(length + 16, max(settings.sequences), settings.engine_memory)
    sampler = open_sampler("vllm" if ON_GPU else "hf", lm, tokenizer, DTYPE, capacity)
    figures["start_s"] = round(time.perf_counter() - begin, 1)
    for sequences in settings.sequences if ON_GPU else (8, 16):
        with sampler.loaded(lm) as sample:
            begin = time.perf_counter()
            seeds = list(range(0, sequences, 4))
            said = sample([list(range(5, 15))] * len(seeds), seeds, n=4, temperature=1.0, max_tokens=length)
            seconds = time.perf_counter() - begin
        tokens = sum(len(rollout.response_ids) for rollout in said)
        figures[f"{name}, {sequences}"] = {
            "tokens_per_second": round(tokens / seconds),
            "ms_a_token": round(1e3 * seconds / length, 2),
        }
    sampler.close()
    return figures


def resume(settings: Settings) -> Figures:
    """Largest relative difference of a metric between a run of four steps and one that was resumed after two. A random
    model boxes nothing: its entropy is rewarded, and the teacher is the anchor alone. With responses of 1,000 tokens
    and compiled layers the two runs took over 300 s on an H200, of which two starts and four checkpoints most."""
    method = ["--variant", "entropy", "--kl-ref", "ema", "--lr", "1e-4", "--compile", "off"]
    with TemporaryDirectory() as folder:
        place = Path(folder)
        command = [sys.executable, str(ROOT / "train.py"), *method]
        short = replace(settings, response_tokens=min(settings.response_tokens, 100))
        command += [*run_flags(place, short, 4), "--save-every", "2"]
        subprocess.run([*command, "--keep", "0"], check=True, stdout=subprocess.DEVNULL)
        whole = read_rows(place / "run" / "metrics.jsonl")
        checkpoint = place / "run" / "checkpoints" / "step-000002"
        (place / "run").rename(place / "whole")
        (place / "run" / "checkpoints").mkdir(parents=True)
        (place / "whole" / "checkpoints" / checkpoint.name).rename(checkpoint)
        write_atomic(place / "run" / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in whole[:2]))
        subprocess.run([*command, "--resume", "auto"], check=True, stdout=subprocess.DEVNULL)
        again = read_rows(place / "run" / "metrics.jsonl")
    keys = ("reward", "entropy", "kl", "grad_norm", "response_tokens")
    gaps = {
        key: max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-9) for a, b in zip(whole, again, strict=True))
        for key in keys
    }
    last = {key: round(value, 2) for key, value in whole[-1].items() if key.startswith("seconds")}
    return {"largest_gap": gaps, "last_step": last, "tokens_per_second": round(whole[-1]["tokens_per_second"])}


PARTS = {"sanity": sanity, "head": head, "profile": profile, "training": training, "long": long, "sampling": sampling}
PARTS |= {"learning": learning, "resume": resume}

if __name__ == "__main__":
    given = tyro.cli(Settings, description=__doc__)
    if str(given.out) == "-":
        print("\n" + json.dumps(PARTS[given.parts[0]](given)))
    else:
        main(given)
