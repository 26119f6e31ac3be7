"""Every setting of a training run, one line each; defaults are the paper's (arXiv 2508.00410, Table 5).

Without --model the embedded task runs, on defaults of its own (EMBEDDED): a model of 0.2M parameters wants other ones.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, arg

EMBEDDED_MODELS = ("embedded", "embedded-misreading", "embedded-spellings")
SYSTEM_PROMPT = "Let's think step by step and output the final answer within \\boxed{}."  # the authors'


class UserError(ValueError):
    """Bad input, in one sentence: the culprit and the cure."""


@contextmanager
def told_in_a_sentence(when_stopped: str = "stopped") -> Iterator[None]:
    """What every command does with what a person has caused: bad input and a full disk end it with exit code 2, Ctrl-C
    with 130, each in one line."""
    try:
        yield
    except UserError as error:
        sentence, code = f"error: {error}", 2
    except KeyboardInterrupt:
        sentence, code = when_stopped, 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sentence, code = f"error: the disk is full ({error.filename or 'while writing'}): make room, then go on", 2
    else:
        return
    print(sentence, file=sys.stderr)
    raise SystemExit(code)


@dataclass(frozen=True)
class Method:
    variant: str = "II"
    """who labels what: I, II, III, gt, majority, self-certainty, entropy (the rows of rewards.VARIANTS)"""
    views: Literal["original", "rephrased", "both"] | None = None
    """move a baseline to these wordings, each labelled by itself"""
    kl_coef: float | None = None
    """weight of the KL term (None: the variant's)"""
    kl_ref: Literal["init", "ema"] | None = None
    """its reference: initial policy or EMA teacher (None: the variant's)"""
    ema_start: float = 0.99
    """weight that the teacher keeps of itself at the first step"""
    ema_end: float = 0.9999
    """the same at the last step; 1 and 1 freeze the teacher"""
    ema_schedule: Literal["cosine", "constant"] = "cosine"
    """from one to the other; constant: always ema-start"""
    answer_match: Literal["exact", "math"] = "exact"
    """equality in votes and pseudo-label rewards: of strings, or mathematical"""
    clip: float = 0.2
    """bound of the probability ratio around 1"""
    loss_agg: Literal["token", "sequence", "dr-grpo"] = "token"
    """what weighs the same in the loss: tokens of the step, rollouts, or tokens under a constant length"""
    tis_cap: float = 2.0
    """cap of the importance weight between sampler and trainer; 0: no weight"""


@dataclass(frozen=True)
class Data:
    source: Annotated[str | None, arg(name="data")] = None
    """file or folder of questions, or a published set: math, dapo, open-rs, amc"""
    question_column: str = "question"
    """in a file of one's own"""
    rephrased_column: str = "rephrased"
    """another wording with the same answer: for variants I and III"""
    answer_column: str = "answer"
    """gold answers: for metrics, and for the reward of variant gt alone"""
    keep_bad_rewrites: bool = False
    """keep placeholder and unchanged rephrasings, as the authors did"""
    questions_per_step: int = 128
    """questions (variants I and III: pairs of wordings) of a step"""
    max_prompt_tokens: int = 512
    """a question longer than this in a needed wording is dropped"""
    decontaminate: tuple[str, ...] = ()
    """benchmarks whose questions, or near copies of them, are dropped from the training data"""
    eval_data: str | None = None
    """benchmark to evaluate on: math500, gsm8k, ... (sources/benchmarks.py), or questions with answers as for data"""
    eval_every: int = 10
    """steps between evaluations; 0: only before and after"""
    eval_samples: int = 1
    """sampled answers a question in an evaluation, besides the greedy one"""


@dataclass(frozen=True)
class Model:
    name: Annotated[str, arg(name="model")] = "embedded"
    """hub name (Qwen3-8B-Base or Qwen/Qwen3-8B-Base), local folder, or the embedded model"""
    chat_template: str | None = None
    """Jinja file, for a tokenizer without a chat template"""


@dataclass(frozen=True)
class Sampling:
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """hf: the trainer's own model; auto: vllm if it is installed and there is a GPU, else hf"""
    engine_memory: float = 0.5
    """share of a GPU's memory for vLLM while it samples (training has it in between); of a CPU's, at most"""
    tensor_parallel: int = 1
    """processes that share one vLLM engine, for models too large for one GPU"""
    rollouts: int = 8
    """G: sampled answers to each wording of a question"""
    max_response_tokens: int = 3072
    """longer answers are cut"""
    temperature: float = 1.0
    """of policy and teacher rollouts"""


@dataclass(frozen=True)
class Optimisation:
    steps: int | None = None
    """K, the number of optimizer steps"""
    epochs: int | None = None
    """passes over the questions, instead of a number of steps (neither given: 3)"""
    lr: float = 3e-6
    """peak learning rate of AdamW"""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up"""
    warmup: float = 0.1
    """share of the steps in which the learning rate rises"""
    weight_decay: float = 0.01
    """of AdamW"""
    beta2: float = 0.999
    """of AdamW"""
    max_grad_norm: float = 1.0
    """a longer gradient is scaled down to this"""
    tokens_per_micro_batch: int = 16384
    """tokens of one forward and backward pass: costs memory, changes no result"""


@dataclass(frozen=True)
class Memory:
    activation_checkpointing: Literal["on", "off"] = "on"
    """compute activations again in the backward pass instead of keeping them: a third more arithmetic, and it fits"""
    offload_optimizer: bool = False
    """keep master weights, gradients and AdamW's state in the CPU's memory, and work on them there"""
    offload_teacher: bool = False
    """keep the teacher, or the frozen reference, in the CPU's memory"""


@dataclass(frozen=True)
class RunSettings:
    out: str | None = None
    """folder to write (None: a new one under runs/)"""
    resume: str | None = None
    """auto (the newest of out, or a new run if there is none), or a folder runs/NAME/checkpoints/step-N"""
    save_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    keep: int = 2
    """checkpoints to keep, the newest; 0: all"""
    keep_every: int = 0
    """steps between checkpoints that are kept besides, such as 50; 0: none"""
    seed: int = 0
    """of everything random"""
    tensorboard: bool = False
    """also log to TensorBoard, in the run's folder"""
    wandb: bool = False
    """also log to Weights & Biases (WANDB_MODE=offline works)"""
    profile: bool = False
    """write a PyTorch trace of the second step to trace.json, for chrome://tracing or ui.perfetto.dev"""


@dataclass(frozen=True)
class Config:
    method: OmitArgPrefixes[Method] = field(default_factory=Method)
    data: OmitArgPrefixes[Data] = field(default_factory=Data)
    model: OmitArgPrefixes[Model] = field(default_factory=Model)
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    optimisation: OmitArgPrefixes[Optimisation] = field(default_factory=Optimisation)
    memory: OmitArgPrefixes[Memory] = field(default_factory=Memory)
    run: OmitArgPrefixes[RunSettings] = field(default_factory=RunSettings)

    @property
    def max_sequence_tokens(self) -> int:
        """Of a prompt and its response together."""
        return self.data.max_prompt_tokens + self.sampling.max_response_tokens


EMBEDDED = Config(
    data=Data(
        source="embedded",
        eval_data="embedded:held-out",
        questions_per_step=16,
        max_prompt_tokens=64,
        eval_samples=4,
    ),
    sampling=Sampling(max_response_tokens=32),
    memory=Memory(activation_checkpointing="off"),
    optimisation=Optimisation(steps=100, lr=5e-4, lr_schedule="constant", beta2=0.99, tokens_per_micro_batch=2048),
)


def parse(arguments: list[str] | None = None) -> Config:
    """Settings from the command line; an unknown or mistyped flag ends the program with a hint."""

    def read(default: Config) -> Config:
        return tyro.cli(
            Config,
            args=arguments,
            default=default,
            description="Co-rewarding: reinforcement learning for reasoning, without labels.",
            config=(tyro.conf.FlagCreatePairsOff,),
        )

    config = read(EMBEDDED)
    if config.model.name not in EMBEDDED_MODELS:
        config = read(Config())
    validate(config)
    return config


def validate(config: Config) -> None:
    """Refuse, before anything is loaded, what could only fail or mislead later."""
    method, data, sampling, optimisation = config.method, config.data, config.sampling, config.optimisation
    needed = {
        "data": (data.source is not None, "is missing: a file of questions, a folder, or math, dapo, open-rs, amc"),
        "questions_per_step": (data.questions_per_step >= 1, "must be at least 1"),
        "eval_samples": (data.eval_samples >= 1, "must be at least 1"),
        "rollouts": (sampling.rollouts >= 2, "must be at least 2: an advantage compares rollouts of one group"),
        "max_response_tokens": (sampling.max_response_tokens >= 1, "must be at least 1"),
        "temperature": (sampling.temperature > 0, "must be over 0: learning needs rollouts that differ"),
        "engine_memory": (0 < sampling.engine_memory < 1, "is a share of the memory: between 0 and 1"),
        "tensor_parallel": (sampling.tensor_parallel >= 1, "must be at least 1"),
        "steps": (optimisation.steps is None or optimisation.steps >= 1, "must be at least 1"),
        "epochs": (optimisation.epochs is None or optimisation.epochs >= 1, "must be at least 1"),
        "lr": (optimisation.lr >= 0, "must not be negative"),
        "warmup": (0 <= optimisation.warmup <= 1, "is a share of the steps: between 0 and 1"),
        "tokens_per_micro_batch": (optimisation.tokens_per_micro_batch >= 1, "must be at least 1"),
        "keep": (config.run.keep >= 0, "must not be negative"),
        "ema_start": (0 <= method.ema_start <= 1, "is a weight between 0 and 1"),
        "ema_end": (0 <= method.ema_end <= 1, "is a weight between 0 and 1"),
        "chat_template": (
            config.model.chat_template is None or Path(config.model.chat_template).is_file(),
            "is not a file",
        ),
    }
    values = {name: value for group in vars(config).values() for name, value in vars(group).items()}
    values |= {"data": data.source}
    for name, (holds, reason) in needed.items():
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {'' if values[name] is None else values[name]} {reason}")
