"""A training step of this project beside the same step of TRL's GRPOTrainer.

    pip install -r requirements-bench.txt
    python benchmarks/step_vs_trl.py                                          # the embedded model
    python benchmarks/step_vs_trl.py --model FOLDER --data FILE --questions 2 --rollouts 4 --response-tokens 64

Same model, questions, group size, forced response lengths, majority reward, KL reference, clip, optimizer, precision
and number of threads. Each side lives in a process of its own, so that its peak memory is its own; they take their
steps in turn, and medians of the steps after the warm-up are printed. Row i of a step stops after a number of tokens
that both sides are forced to, spread evenly between `shortest` x response-tokens and response-tokens.
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
from importlib.util import find_spec
from itertools import islice
from math import nan
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Everything heavy is imported within its side: what the libraries hold is measured too.

KL_COEF = 0.005
PHASES = ("generation", "reference", "training", "whole")
HEAD = ("phase", "ours, s", "TRL, s", "TRL / ours", "ours, tokens/s", "TRL, tokens/s")
MEMORY_HEAD = ("resident memory, GB", "ours", "TRL", "ours / TRL")


@dataclass(frozen=True)
class Settings:
    model: str = "embedded"  # the embedded model, or a folder in Hugging Face format
    data: Path | None = None  # a .jsonl of questions, enough for all steps (None: the embedded task's)
    questions: int = 16  # of a step
    rollouts: int = 8  # G, answers to each question
    response_tokens: int = 32  # of the longest response
    shortest: float = 0.25  # the shortest response, as a share of the longest; 1: all of one length, nothing to pad
    steps: int = 10  # measured, after the warm-up
    warmup: int = 2  # steps
    threads: int = 1  # of PyTorch, on each side
    tokens_per_micro_batch: int | None = None  # ours (None: train.py's default)
    trl_micro_batch: int = 8  # sequences of one forward-backward pass of TRL (8: its default)
    # gradient checkpointing in TRL, its default: less memory, a forward pass more; ours does without
    trl_checkpointing: bool = False
    # cpu: the work of one thread, which busy neighbours stretch less than the time on the wall
    clock: Literal["wall", "cpu"] = "wall"
    alone: bool = False  # leave TRL out

    def lengths(self) -> list[int]:
        """Of the responses of a step, [N]: the same at every step, in an order that no question can profit from."""
        rows = self.questions * self.rollouts
        shortest = self.shortest * self.response_tokens
        lengths = [round(shortest + (self.response_tokens - shortest) * i / max(rows - 1, 1)) for i in range(rows)]
        random.Random(0).shuffle(lengths)
        return [max(length, 1) for length in lengths]


def memory_gb(field: Literal["VmRSS", "VmHWM"]) -> float:
    """What this process holds now, or its peak; Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / 1e9


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def clock() -> float:
    """Seconds of the wall, or with STEP_VS_TRL_CLOCK=cpu of this process's work, which neighbours stretch less."""
    return time.process_time() if os.environ.get("STEP_VS_TRL_CLOCK") == "cpu" else time.perf_counter()


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begin = clock()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + clock() - begin


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Call around(method, ...) in place of method(...)."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(method, *args, **kwargs))


def force_length(scores: Any, eos_ids: Sequence[int], lengths: Any, position: int) -> Any:
    """scores [N, V] that allow a stop token exactly when a row has reached its length [N]."""
    stop = (lengths <= position + 1)[:, None]
    forced = scores.masked_fill(stop, -float("inf"))
    forced[:, eos_ids] = -float("inf")
    forced[:, eos_ids[:1]] = forced[:, eos_ids[:1]].masked_fill(stop, 0.0)
    return forced


def model_folder(settings: Settings) -> str:
    from lm.model import resolve

    return resolve(settings.model)


def write_questions(settings: Settings, folder: Path) -> None:
    """As many as all steps ask, so that every step has the same number."""
    from embedded.word_problems import word_problems
    from store.jsonl import read_rows

    asked = settings.questions * (settings.warmup + settings.steps)
    rows = list(islice(read_rows(settings.data) if settings.data else word_problems("train"), asked))
    if len(rows) < asked:
        raise SystemExit(f"error: {settings.data} holds {len(rows)} questions, the steps ask {asked}: fewer --steps")
    (folder / "questions.jsonl").write_text("".join(json.dumps({"question": row["question"]}) + "\n" for row in rows))


# ---------------------------------------------------------------- ours


def our_config(settings: Settings, folder: Path) -> Any:
    from config import EMBEDDED_DEFAULTS, Config, Data, Model

    config = EMBEDDED_DEFAULTS if settings.model == "embedded" else replace(Config(), memory=EMBEDDED_DEFAULTS.memory)
    tokens = settings.tokens_per_micro_batch or config.memory.tokens_per_micro_batch
    return replace(
        config,
        memory=replace(config.memory, tokens_per_micro_batch=tokens),
        model=Model(model_folder(settings)),
        method=replace(config.method, variant="majority", kl_coef=KL_COEF),
        data=Data(source=str(folder / "questions.jsonl"), questions_per_step=settings.questions),
        sampling=replace(
            config.sampling, sampler="hf", rollouts=settings.rollouts, max_response_tokens=settings.response_tokens
        ),
        optimisation=replace(config.optimisation, steps=10_000, epochs=None),
        run=replace(config.run, out=str(folder / "ours")),
    )


def our_side(settings: Settings, folder: Path, link: Connection) -> None:
    import torch

    import metrics
    import prepare
    import train
    from lm import decoding
    from lm.model import stop_token_ids

    link.send(memory_gb("VmRSS"))
    run, _ = prepare.prepare(our_config(settings, folder), folder / "ours")
    torch.set_num_threads(settings.threads)
    lengths = torch.tensor(settings.lengths())
    eos_ids = stop_token_ids(run.policy.lm, run.tokenizer)
    position, active = 0, lengths

    def forced(draw: Callable[..., Any], logits: Any, *how: Any) -> Any:
        nonlocal position, active
        drawn = draw(force_length(logits, eos_ids, active, position), *how)
        position += 1
        active = active[active > position]  # rows that have stopped leave the batch
        return drawn

    wrap(decoding, "draw", forced)
    setattr(metrics, "time", SimpleNamespace(perf_counter=clock))  # noqa: B010, mypy takes a module for a constant
    names = {"rollout": "generation", "reference": "reference", "update": "training"}
    forget_peak()
    for step in range(settings.warmup + settings.steps):
        link.recv()
        position, active, seconds = 0, lengths, dict[str, float]()
        with timed(seconds, "whole"):
            seen, _ = train.train_step(run, step)
        seconds |= {phase: seen.get(f"seconds_{name}", 0.0) for name, phase in names.items()}
        sampled = round(seen["response_tokens"] * len(lengths))
        link.send({"seconds": seconds, "sampled": sampled, "peak_gb": memory_gb("VmHWM")})


# ---------------------------------------------------------------- TRL


def trl_dataset(settings: Settings, folder: Path) -> Any:
    """Our questions in the order of our steps."""
    from datasets import Dataset

    from config import SYSTEM_PROMPT
    from data import load_pairs, questions_of_step

    pairs, steps = load_pairs(str(folder / "questions.jsonl")), range(settings.warmup + settings.steps)
    order = [pair for step in steps for pair in questions_of_step(pairs, settings.questions, 0, step)]
    system = {"role": "system", "content": SYSTEM_PROMPT}
    return Dataset.from_dict({"prompt": [[system, {"role": "user", "content": pair.question}] for pair in order]})


def trl_reward(settings: Settings) -> Callable[..., list[float | None]]:
    from rewards import extract_boxed, majority_vote

    def agreement(completions: list[Any], **_: Any) -> list[float | None]:
        boxed = [extract_boxed(completion[0]["content"]) for completion in completions]
        groups = [boxed[i : i + settings.rollouts] for i in range(0, len(boxed), settings.rollouts)]
        labels = [majority_vote(group).label for group in groups for _ in group]
        return [float(label is not None and answer == label) for label, answer in zip(labels, boxed, strict=True)]

    return agreement


def trl_trainer(settings: Settings, folder: Path) -> Any:
    from transformers import AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    path = model_folder(settings)
    optimisation = our_config(settings, folder).optimisation
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=settings.trl_micro_batch,
        gradient_accumulation_steps=settings.questions * settings.rollouts // settings.trl_micro_batch,
        num_generations=settings.rollouts,
        max_completion_length=settings.response_tokens,
        beta=KL_COEF,
        temperature=1.0,
        learning_rate=optimisation.lr,
        lr_scheduler_type="constant",
        weight_decay=optimisation.weight_decay,
        max_grad_norm=optimisation.max_grad_norm,
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
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
    )


def trl_side(settings: Settings, folder: Path, link: Connection) -> None:
    import torch
    from transformers import LogitsProcessorList, TrainerCallback
    from trl.trainer import grpo_trainer  # noqa: F401, for its memory

    link.send(memory_gb("VmRSS"))
    trainer = trl_trainer(settings, folder)
    torch.set_num_threads(settings.threads)
    lengths, seconds, begin = torch.tensor(settings.lengths()), dict[str, float](), 0.0

    def generate(method: Callable[..., Any], **given: Any) -> Any:
        prompt = given["input_ids"].shape[1]

        def force(input_ids: Any, scores: Any) -> Any:
            return force_length(scores, trainer.eos_token_ids, lengths, input_ids.shape[1] - prompt)

        return method(**given, logits_processor=LogitsProcessorList([force]))

    def phase(name: str, select_with_gradient: str | None = None) -> Callable[..., Any]:
        def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with timed(seconds, select_with_gradient if select_with_gradient and torch.is_grad_enabled() else name):
                return method(*args, **kwargs)

        return around

    wrap(trainer.model, "generate", generate)
    wrap(trainer, "_generate", phase("generation"))
    wrap(trainer, "_get_per_token_logps_and_entropies", phase("reference", select_with_gradient="forward pass"))
    wrap(trainer, "_prepare_inputs", phase("all but training"))

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal begin
            link.recv()
            seconds.clear()
            begin = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["whole"] = clock() - begin
            seconds["training"] = seconds["whole"] - seconds["all but training"]
            sampled = round(trainer._metrics["train"]["completions/mean_length"][-1] * len(lengths))
            link.send({"seconds": dict(seconds), "sampled": sampled, "peak_gb": memory_gb("VmHWM")})

    trainer.add_callback(InTurn())
    forget_peak()
    trainer.train()


# ---------------------------------------------------------------- both

SIDES: dict[str, Callable[[Settings, Path, Connection], None]] = {"ours": our_side, "TRL": trl_side}


def take_turns(settings: Settings, folder: Path) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """GB that the libraries of each side hold, and what it answered after each step."""
    links, context = {}, multiprocessing.get_context("spawn")
    for name, side in SIDES.items():
        if name == "TRL" and settings.alone:
            continue
        links[name], there = context.Pipe()
        context.Process(target=side, args=(settings, folder, there), daemon=True).start()
        there.close()  # so that a side which dies is noticed
    libraries = {name: link.recv() for name, link in links.items()}
    answers: dict[str, list[Any]] = {name: [] for name in links}
    for _ in range(settings.warmup + settings.steps):
        for name, link in links.items():
            link.send("step")
            answers[name].append(link.recv())
    return libraries, answers


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def time_table(settings: Settings, answers: dict[str, list[Any]]) -> str:
    """Medians; tokens are sampled ones."""
    tokens, rows = sum(settings.lengths()), []
    for phase in PHASES:
        ours, trl = (
            median([answer["seconds"].get(phase, 0.0) for answer in answers.get(name, [])[settings.warmup :]] or [0.0])
            for name in SIDES
        )
        cells = [(ours, 1, ".3f"), (trl, 1, ".3f"), (trl, ours, ".2f"), (tokens, ours, ",.0f"), (tokens, trl, ",.0f")]
        rows.append([phase, *(f"{a / b:{shown}}" if a and b else "-" for a, b, shown in cells)])
    return markdown(HEAD, rows)


def memory_table(libraries: dict[str, float], answers: dict[str, list[Any]]) -> str:
    peak = {name: each[-1]["peak_gb"] for name, each in answers.items()}
    parts = {
        "peak of the process": peak,
        "of it, the libraries": libraries,
        "of it, model and steps": {name: gb - libraries[name] for name, gb in peak.items()},
    }
    shares = [(part, gb["ours"], gb.get("TRL", nan)) for part, gb in parts.items()]
    return markdown(MEMORY_HEAD, [[part, f"{a:.3f}", f"{b:.3f}", f"{a / b:.2f}"] for part, a, b in shares])


def main(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    if not settings.alone and not find_spec("trl"):
        raise SystemExit("error: TRL is not installed: pip install -r requirements-bench.txt, or give --alone")
    if settings.questions * settings.rollouts % settings.trl_micro_batch and not settings.alone:
        raise SystemExit(f"error: --trl-micro-batch {settings.trl_micro_batch} does not divide a step's rollouts")
    os.environ |= {"OMP_NUM_THREADS": str(settings.threads), "STEP_VS_TRL_CLOCK": settings.clock}
    with TemporaryDirectory() as folder:
        write_questions(settings, Path(folder))
        libraries, answers = take_turns(settings, Path(folder))
    sampled = {answer["sampled"] for name in ("ours", "TRL") for answer in answers.get(name, [])}
    if sampled != {sum(settings.lengths())}:
        raise SystemExit(f"error: {sampled} tokens were sampled in a step, not {sum(settings.lengths())}")
    print(f"{asdict(settings)}\n\n{time_table(settings, answers)}\n\n{memory_table(libraries, answers)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
