"""A training step of this project beside the same step of TRL's GRPOTrainer, and beside its matrix products alone.

    pip install -r requirements-bench.txt
    python benchmarks/step_vs_trl.py                                          # the embedded model
    python benchmarks/step_vs_trl.py --model FOLDER --questions 2 --rollouts 4 --response-tokens 32

Same model, questions, group size, forced response lengths, majority reward, KL reference, clip, optimizer, precision
and number of threads. Each side lives in a process of its own, so that its peak memory is its own; the parent lets them
take one step in turn, and prints medians of the steps after the warm-up. Lengths are forced by a logits processor:
row i of a step stops after a number of tokens spread evenly between `shortest` x response-tokens and response-tokens.

"floor": the matrix products with the weights alone (no attention, no normalisation, no softmax, no optimizer), measured
between the steps: three for each weight and trained token, one for each reference token, and for generation one for
each prompt once and each sampled token, all rows of a step at a time.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PHASES = ("generation", "reward", "reference", "training", "whole")


@dataclass(frozen=True)
class Settings:
    model: str = "embedded"
    """the embedded model, or a folder in Hugging Face format"""
    questions: int = 16
    """of a step"""
    rollouts: int = 8
    """G, answers to each question"""
    response_tokens: int = 32
    """of the longest response"""
    shortest: float = 0.25
    """the shortest response, as a share of the longest; 1: all of one length, nothing to pad"""
    steps: int = 10
    """measured, after the warm-up"""
    warmup: int = 2
    """steps"""
    threads: int = 1
    """of PyTorch, on each side"""
    tokens_per_micro_batch: int | None = None
    """ours (None: train.py's default)"""
    trl_micro_batch: int | None = None
    """sequences of one forward-backward pass of TRL (None: TRL's default, 8)"""
    trl_checkpointing: bool = False
    """gradient checkpointing in TRL, its default: less memory, a forward pass more; ours never does it"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the work of one thread, which busy neighbours stretch less than the time on the wall"""
    kl_coef: float = 0.005
    """0 leaves out the reference pass on both sides"""

    def lengths(self) -> list[int]:
        """Of the responses of a step, [N]: the same at every step, in an order that no question can profit from."""
        rows = self.questions * self.rollouts
        shortest = self.shortest * self.response_tokens
        lengths = [round(shortest + (self.response_tokens - shortest) * i / max(rows - 1, 1)) for i in range(rows)]
        random.Random(0).shuffle(lengths)
        return [max(length, 1) for length in lengths]


def memory_gb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process; Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"no {field} in /proc/self/status")


def forget_peak() -> float:
    """Start measuring the peak afresh; returns the memory held now, in GB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_gb("VmRSS")


def clock() -> float:
    """Seconds: of the wall, or with STEP_VS_TRL_CLOCK=cpu of this process's work, which neighbours do not stretch."""
    return time.process_time() if os.environ.get("STEP_VS_TRL_CLOCK") == "cpu" else time.perf_counter()


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begin = clock()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + clock() - begin


def timed_method(owner: Any, name: str, seconds: dict[str, float], phase: str) -> None:
    method = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with timed(seconds, phase):
            return method(*args, **kwargs)

    setattr(owner, name, wrapper)


def force_length(scores: Any, eos_ids: Sequence[int], lengths: Any, position: int) -> Any:
    """scores [N, V] that allow a stop token exactly when a row has reached its length [N]."""
    stop = (lengths <= position + 1)[:, None]
    forced = scores.masked_fill(stop, -float("inf"))
    forced[:, eos_ids] = -float("inf")
    forced[:, eos_ids[:1]] = forced[:, eos_ids[:1]].masked_fill(stop, 0.0)
    return forced


# ---------------------------------------------------------------- ours


def write_questions(settings: Settings, folder: Path) -> None:
    """As many as all steps ask, so that every step of ours has the same number."""
    from word_problems import word_problems

    rows = list(islice(word_problems("train"), settings.questions * (settings.warmup + settings.steps)))
    (folder / "questions.jsonl").write_text("".join(json.dumps({"question": row["question"]}) + "\n" for row in rows))


def our_config(settings: Settings, folder: Path) -> Any:
    from config import EMBEDDED, Config, Data, Model

    config = EMBEDDED if settings.model == "embedded" else Config(model=Model(settings.model))
    optimisation = replace(config.optimisation, steps=10_000, epochs=None)
    if settings.tokens_per_micro_batch:
        optimisation = replace(optimisation, tokens_per_micro_batch=settings.tokens_per_micro_batch)
    return replace(
        config,
        method=replace(config.method, variant="majority", kl_coef=settings.kl_coef),
        data=Data(source=str(folder / "questions.jsonl"), questions_per_step=settings.questions),
        sampling=replace(config.sampling, rollouts=settings.rollouts, max_response_tokens=settings.response_tokens),
        optimisation=optimisation,
        run=replace(config.run, out=str(folder / "ours")),
    )


def force_our_lengths(settings: Settings, eos_ids: Sequence[int]) -> Any:
    """Forbid and force stop tokens where rows are drawn; returns the lengths [N]."""
    import torch

    import rollout

    lengths, draw, position, active = torch.tensor(settings.lengths()), rollout.draw, 0, torch.empty(0)

    def forced(logits: Any, uniforms: Any, *how: float) -> Any:
        nonlocal position, active
        if position == 0 or not len(active):  # a new step begins
            position, active = 0, lengths
        token, logp = draw(force_length(logits, eos_ids, active, position), uniforms, *how)
        position += 1
        active = active[active > position]  # rows that have stopped leave the batch
        return token, logp

    rollout.draw = forced
    return lengths


def our_side(settings: Settings, folder: Path, link: Connection) -> None:
    import torch

    import train

    torch.set_num_threads(settings.threads)
    run, _ = train.prepare(our_config(settings, folder))
    torch.set_num_threads(settings.threads)
    lengths = force_our_lengths(settings, run.sampler.eos_ids)
    train.metrics.time = SimpleNamespace(perf_counter=clock)  # type: ignore[attr-defined]
    names = {"rollout": "generation", "reward": "reward", "reference": "reference", "update": "training"}
    link.send({"loaded_gb": forget_peak()})
    for step in range(settings.warmup + settings.steps):
        link.recv()
        seconds: dict[str, float] = {}
        with timed(seconds, "whole"):
            seen, _ = train.train_step(run, step)
        seconds |= {phase: seen.get(f"seconds_{name}", 0.0) for name, phase in names.items()}
        sampled = round(seen["response_tokens"] * len(lengths))
        link.send({"seconds": seconds, "sampled": sampled, "peak_gb": memory_gb("VmHWM"), "loss": seen["grad_norm"]})
        link.recv()
        chosen = train.questions_of_step(len(run.questions), settings.questions, 0, step)
        prompts = [len(run.questions[i].prompts["x"]) for i in chosen]
        link.send({"seconds": floor(run.policy.lm, settings, prompts)})


def floor(lm: Any, settings: Settings, prompts: list[int]) -> dict[str, float]:
    """Seconds of the matrix products of one step with the weights, by phase."""
    import torch

    head = lm.get_output_embeddings()
    body = [m.weight for m in lm.base_model.modules() if isinstance(m, torch.nn.Linear)]
    lengths = settings.lengths()
    tokens = sum(prompt * settings.rollouts for prompt in prompts) + sum(lengths)

    def products(weights: Sequence[Any], tokens: int, backward: bool) -> float:
        total = 0.0
        shapes = [tuple(weight.shape) for weight in weights]
        for shape in set(shapes):
            out, into = shape
            weight = next(weight for weight in weights if tuple(weight.shape) == shape).detach()
            x = torch.ones(tokens, into)
            grad = torch.ones(tokens, out) if backward else None
            begin = clock()
            x @ weight.T
            if grad is not None:
                grad @ weight
                grad.T @ x
            total += (clock() - begin) * shapes.count(shape)
        return total

    def many(weights: Sequence[Any], tokens: int, backward: bool, at_once: int = 2048) -> float:
        """`tokens` in equal parts that a cache and a memory can hold: one part measured, times their number."""
        parts = max(1, round(tokens / at_once))
        return products(weights, tokens // parts, backward) * parts

    steps = range(max(lengths))
    active = [sum(length > step for length in lengths) for step in steps]
    with torch.no_grad():
        seconds = {
            "training": many(body, tokens, True) + many([head.weight], sum(lengths), True, 512),
            "reference": many(body, tokens, False) + many([head.weight], sum(lengths), False, 512),
        }
        decode = [products([*body, head.weight], rows, False) for rows in active[:: max(1, len(active) // 4)]]
        seconds["generation"] = many(body, sum(prompts), False) + sum(decode) / len(decode) * len(active)
    if not settings.kl_coef:
        seconds["reference"] = 0.0
    return seconds | {"whole": sum(seconds.values())}


# ---------------------------------------------------------------- TRL


def trl_dataset(settings: Settings, folder: Path) -> Any:
    """Our questions in the order of our steps."""
    from datasets import Dataset

    from data import SYSTEM_PROMPT, load_pairs, questions_of_step

    pairs = load_pairs(str(folder / "questions.jsonl"))
    steps = range(settings.warmup + settings.steps)
    order = [i for step in steps for i in questions_of_step(len(pairs), settings.questions, 0, step)]
    messages = [
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": pairs[i].question}] for i in order
    ]
    return Dataset.from_dict({"prompt": messages})


def trl_reward(settings: Settings) -> Callable[..., list[float]]:
    from rewards import extract_boxed, majority_vote

    def agreement(completions: list[Any], **_: Any) -> list[float]:
        boxed = [extract_boxed(completion[0]["content"]) for completion in completions]
        groups = [boxed[i : i + settings.rollouts] for i in range(0, len(boxed), settings.rollouts)]
        labels = [majority_vote(group).label for group in groups for _ in group]
        return [float(label is not None and answer == label) for label, answer in zip(labels, boxed, strict=True)]

    return agreement


def trl_trainer(settings: Settings, folder: Path) -> Any:
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    import embedded

    path = embedded.model_folder() if settings.model == "embedded" else settings.model
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    rows = settings.questions * settings.rollouts
    micro_batch = settings.trl_micro_batch or 8
    if rows % micro_batch:
        raise SystemExit(f"--trl-micro-batch {micro_batch} does not divide the {rows} rollouts of a step")
    ours = our_config(settings, folder)
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=settings.rollouts,
        max_completion_length=settings.response_tokens,
        beta=settings.kl_coef,
        temperature=1.0,
        learning_rate=ours.optimisation.lr,
        lr_scheduler_type="constant",
        weight_decay=ours.optimisation.weight_decay,
        max_grad_norm=ours.optimisation.max_grad_norm,
        max_steps=settings.warmup + settings.steps,
        gradient_checkpointing=settings.trl_checkpointing,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        model_init_kwargs={"dtype": "float32"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=path,
        reward_funcs=trl_reward(settings),
        args=arguments,
        train_dataset=trl_dataset(settings, folder),
        processing_class=tokenizer,
    )


def trl_side(settings: Settings, folder: Path, link: Connection) -> None:
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback

    torch.set_num_threads(settings.threads)
    trainer = trl_trainer(settings, folder)
    torch.set_num_threads(settings.threads)
    lengths, seconds, sampled = torch.tensor(settings.lengths()), dict[str, float](), 0

    class ForcedLengths(LogitsProcessor):
        position = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.position += 1
            return force_length(scores, trainer.eos_token_ids, lengths, self.position - 1)

    generate = trainer.model.generate
    trainer.model.generate = lambda **given: generate(**given, logits_processor=LogitsProcessorList([ForcedLengths()]))
    answered = trainer._generate_single_turn

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal sampled
        output = answered(*args, **kwargs)
        sampled = sum(len(ids) for ids in output[0])
        return output

    trainer._generate_single_turn = counted
    timed_method(trainer, "_generate", seconds, "generation")
    timed_method(trainer, "_calculate_rewards", seconds, "reward")
    timed_method(trainer, "_prepare_inputs", seconds, "prepare")  # all but training
    score = trainer._get_per_token_logps_and_entropies

    def score_reference(model: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return score(model, *args, **kwargs)
        with timed(seconds, "reference"):
            return score(model, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = score_reference

    class InTurn(TrainerCallback):
        begin = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            link.recv()
            seconds.clear()
            self.begin = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["whole"] = clock() - self.begin
            seconds["training"] = seconds["whole"] - seconds["prepare"]
            link.send({"seconds": dict(seconds), "sampled": sampled, "peak_gb": memory_gb("VmHWM")})

    trainer.add_callback(InTurn())
    link.send({"loaded_gb": forget_peak()})
    trainer.train()


# ---------------------------------------------------------------- both


Side = Callable[[Settings, Path, Connection], None]


def start(side: Side, settings: Settings, folder: Path) -> tuple[Any, Connection, float]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=side, args=(settings, folder, there), daemon=True)
    process.start()
    there.close()
    return process, here, here.recv()["loaded_gb"]


def ask(link: Connection) -> dict[str, Any]:
    link.send("step")
    answer: dict[str, Any] = link.recv()
    return answer


def table(seconds: dict[str, dict[str, float]], tokens: int, peak: dict[str, float], loaded: dict[str, float]) -> str:
    """Markdown; seconds[side][phase] are medians."""
    lines = ["| phase | ours, s | TRL, s | TRL / ours | ours, tokens/s | TRL, tokens/s | floor, s | ours / floor |"]
    lines.append("|---" * 8 + "|")
    for phase in PHASES:
        ours, trl = seconds["ours"][phase], seconds.get("trl", {}).get(phase)
        base = seconds["floor"].get(phase)
        cells = [phase, f"{ours:.3f}", "-" if trl is None else f"{trl:.3f}", f"{trl / ours:.2f}" if trl else "-"]
        cells += [f"{tokens / ours:.0f}" if ours else "-", f"{tokens / trl:.0f}" if trl else "-"]
        cells += [f"{base:.3f}" if base else "-", f"{ours / base:.2f}" if base else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| peak memory (resident) | ours, GB | TRL, GB | ours / TRL |", "|---|---|---|---|"]
    steps_add = {side: peak[side] - loaded[side] for side in peak}
    for name, value in (("of the process", peak), ("once loaded", loaded), ("added by the steps", steps_add)):
        trl_gb = value.get("trl")
        lines.append(
            f"| {name} | {value['ours']:.3f} | {trl_gb or 0:.3f} | {value['ours'] / trl_gb if trl_gb else 0:.2f} |"
        )
    return "\n".join(lines)


def main(settings: tyro.conf.OmitArgPrefixes[Settings], alone: bool = False) -> None:
    """`alone`: ours and the floor, without TRL."""
    os.environ |= {"OMP_NUM_THREADS": str(settings.threads), "STEP_VS_TRL_CLOCK": settings.clock}
    sides: dict[str, Side] = {"ours": our_side}
    if not alone:
        from importlib.util import find_spec

        if not find_spec("trl"):
            raise SystemExit("error: TRL is not installed: pip install -r requirements-bench.txt, or give --alone")
        sides["trl"] = trl_side
    with TemporaryDirectory() as folder:
        write_questions(settings, Path(folder))
        measure(settings, sides, Path(folder))


def measure(settings: Settings, sides: dict[str, Side], folder: Path) -> None:
    """Let the sides take their steps in turn; print medians."""
    started = {name: start(side, settings, folder) for name, side in sides.items()}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in [*sides, "floor"]}
    peak: dict[str, float] = {}
    for step in range(settings.warmup + settings.steps):
        answers = {name: ask(link) for name, (_, link, _) in started.items()}
        answers["floor"] = ask(started["ours"][1])
        for name, answer in answers.items():
            peak |= {name: answer["peak_gb"]} if "peak_gb" in answer and name not in measured["floor"] else {}
            if step >= settings.warmup:
                measured[name].append(answer["seconds"])
        if len({answer["sampled"] for answer in answers.values() if "sampled" in answer}) > 1:
            raise SystemExit(f"error: the sides sampled different numbers of tokens: {answers}")
    medians = {
        name: {phase: median(step.get(phase, 0.0) for step in steps) for phase in PHASES}
        for name, steps in measured.items()
    }
    print(f"settings: {asdict(settings)}")
    print(table(medians, sum(settings.lengths()), peak, {name: gb for name, (_, _, gb) in started.items()}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
