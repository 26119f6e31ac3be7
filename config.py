"""Every setting of a training run, one line each; defaults are the paper's (arXiv 2508.00410, Table 5).

Without --model the embedded task runs, with EMBEDDED_DEFAULTS: a model of 0.2M parameters wants other ones.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, arg

EMBEDDED_MODELS = ("embedded", "embedded-misreading", "embedded-spellings")
SYSTEM_PROMPT = "Let's think step by step and output the final answer within \\boxed{}."  # the authors'


OTHER_RANK = os.environ.get("RANK", "0") != "0"  # of torchrun, and not its first


class UserError(ValueError):
    """An error in what the user gave: one sentence with the culprit and the cure."""


class LastingStream:
    """Write to stdout or stderr as long as that works: a dead pipe or a full disk behind it ends no run."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(*self.LOST):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(*self.LOST):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    # The second: a signal's handler writes while its own process does. The third: there is no stream.
    LOST = (OSError, RuntimeError, AttributeError)


@contextmanager
def exit_on_user_error(when_stopped: str = "stopped") -> Iterator[None]:
    """Print bad input and errors of the file system as one line and exit with code 2; exit with 130 on Ctrl-C.

    Whatever becomes of stdout and stderr from now on, the work goes on.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the pipe of a child would take its place, and hang
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)
    try:
        yield
    except KeyboardInterrupt as stop:
        leave(str(stop) or when_stopped, 130)
    except UserError as error:
        leave(f"error: {error}", 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        leave(f"error: {place}{error.strerror or error}; put that right, then go on", 2)


def wait_for_rank0() -> None:
    if OTHER_RANK:
        time.sleep(5)  # torchrun ends all ranks when rank 0 has ended


def parse_flags(kind: Any, **how: Any) -> Any:
    """Read the settings of a command with tyro; rank 0 alone answers --help and wrong flags, which all ranks see."""
    try:
        return tyro.cli(kind, console_outputs=not OTHER_RANK, **how)
    except SystemExit:
        wait_for_rank0()
        raise


def leave(sentence: str, code: int) -> NoReturn:
    """Print a last sentence and exit; ranks other than 0 are heard only if rank 0 does not end with them."""
    wait_for_rank0()
    print(sentence, file=sys.stderr)
    raise SystemExit(code) from None


@dataclass(frozen=True)
class Method:
    # who labels what: I, II, III, gt, majority, self-certainty, entropy (rewards.py), or a row of baselines.py
    variant: str = "II"
    # move a baseline to these wordings, each labelled by itself
    views: Literal["original", "rephrased", "both"] | None = None
    kl_coef: float | None = None  # weight of the KL term (None: the variant's)
    kl_ref: Literal["init", "ema"] | None = None  # its reference: initial policy or EMA teacher (None: the variant's)
    # a token's KL is at most this, and has no gradient beyond; 0: no bound (the equation), 10: the authors' code
    kl_cap: float = 0.0
    ema_start: float = 0.99  # weight that the teacher keeps of itself at the first step
    ema_end: float = 0.9999  # the same at the last step; 1 and 1 freeze the teacher
    ema_schedule: Literal["cosine", "constant"] = "cosine"  # from one to the other; constant: always ema-start
    # equality in votes and pseudo-label rewards: of strings, or mathematical
    answer_match: Literal["exact", "math"] = "exact"
    clip: float = 0.2  # bound of the probability ratio around 1; acts with --mini-batches
    clip_high: float | None = None  # another bound above 1 (None: the same)
    # what weighs the same in the loss: tokens of the step, rollouts, or tokens under a constant length
    loss_agg: Literal["token", "sequence", "dr-grpo"] = "token"
    mask_answer: bool = False  # leave the tokens of the last box out of surrogate and KL term
    tis_cap: float = 2.0  # cap of the importance weight between sampler and trainer; 0: no weight


@dataclass(frozen=True)
class Data:
    # file or folder of questions, or a published set: math, dapo, open-rs, amc
    source: Annotated[str, arg(name="data")] = "math"
    question_column: str = "question"  # in a file of one's own
    rephrased_column: str = "rephrased"  # another wording with the same answer: for variants I and III
    answer_column: str = "answer"  # gold answers: for metrics, and for the reward of variant gt alone
    keep_bad_rewrites: bool = False  # keep placeholder and unchanged rephrasings, as the authors did
    questions_per_step: int = 128  # questions (variants I and III: pairs of wordings) of a step
    max_prompt_tokens: int = 512  # a question longer than this in a needed wording is dropped
    # benchmark to evaluate on: math500, gsm8k, ... (sources/pairs.py), or questions with answers as for data
    eval_data: str | None = None
    eval_question_column: str = "question"  # in a file of one's own
    eval_answer_column: str = "answer"  # likewise
    data_dir: str = "data"  # folder to search for the files of named benchmarks, before the Hugging Face hub
    eval_every: int = 10  # steps between evaluations; 0: only before and after
    eval_samples: int = 1  # sampled answers a question in an evaluation, besides the greedy one


@dataclass(frozen=True)
class Model:
    # hub name (Qwen3-8B-Base or Qwen/Qwen3-8B-Base), local folder, or a run; None: embedded, a toy of its own task
    name: Annotated[str | None, arg(name="model")] = None
    chat_template: str | None = None  # Jinja file, for a tokenizer without a chat template
    template_options: str = "{}"  # JSON that the chat template gets, such as {"enable_thinking": false}
    # of all computing with the model; its weights are trained in float32. auto: bfloat16 on a GPU, float32 on a CPU,
    # where bfloat16 pays if the CPU multiplies in it (AMX)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class Sampling:
    # hf: the trainer's own model; auto: vllm if it is installed and there is a GPU, else hf
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    rollouts: int = 8  # G: sampled answers to each wording of a question
    votes: int | None = None  # V: answers that vote, the first G of which are trained on (None: G)
    max_response_tokens: int = 3072  # longer answers are cut
    temperature: float = 1.0  # of policy and teacher rollouts


@dataclass(frozen=True)
class Optimisation:
    steps: int | None = None  # K, the number of optimizer steps
    epochs: int | None = None  # passes over the questions, instead of a number of steps (neither given: 3)
    lr: float = 3e-6  # peak learning rate of AdamW
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.01  # of AdamW
    beta2: float = 0.999  # of AdamW
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to this
    mini_batches: int = 1  # M: optimizer steps on the rollouts of a step, each on its share of the questions


@dataclass(frozen=True)
class Memory:
    # auto: on GPUs, choose what is not given below so that the run fits, as fast as it can (lm/memory.py)
    fit: Literal["auto", "off"] = "auto"
    # share of a GPU's memory for vLLM while it samples (training has it in between); of a CPU's, at most (None: 0.5)
    engine_memory: float | None = None
    # fixed size of vLLM's key-value cache, where several runs share a GPU (None: vLLM measures what is free)
    engine_cache_gb: float | None = None
    # tokens of one forward and backward pass: costs memory, changes no result (None: 16,384)
    tokens_per_micro_batch: int | None = None
    # what the backward pass computes again instead of keeping it. on: all of a layer, a third more arithmetic; light:
    # all but matrix products and attention, nearly for nothing, of compiled layers only; off: nothing (None: on)
    activation_checkpointing: Literal["on", "light", "off"] | None = None
    # compile layers and head: a third less time on a GPU, a minute at the first step (None: on GPUs, off on a CPU)
    compile: Literal["on", "off"] | None = None
    # keep master weights, gradients and AdamW's state in the CPU's memory, and work on them there
    offload_optimizer: bool = False
    offload_teacher: bool = False  # keep the teacher, or the frozen reference, in the CPU's memory


@dataclass(frozen=True)
class RunSettings:
    out: str | None = None  # folder to write (None: a new one under runs/)
    # a run or a checkpoint, whose settings hold where no flag is given; auto: the newest of out, or a new run
    resume: str | None = None
    config: str | None = None  # file of settings, such as another run's config.json: they hold where no flag is given
    save_every: int = 20  # steps between checkpoints; 0: only at the end
    # what a checkpoint holds. policy: a third or less on the disk, to be evaluated; no run goes on from it
    save: Literal["all", "policy"] = "all"
    keep: int = 2  # checkpoints to keep, the newest; 0: all
    keep_every: int = 0  # steps between checkpoints that are kept besides, such as 50; 0: none
    seed: int = 0  # of everything random
    # sample the first step's questions, say whether label-free RL can work with this model on them, and end
    preflight: bool = False
    stop_on_collapse: Literal["on", "off"] = "off"  # save and end where the alarm for collapse speaks
    tensorboard: bool = False  # also log to TensorBoard, in the run's folder
    wandb: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works)


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
    def votes(self) -> int:
        """Return V, the number of answers of policy or teacher to one wording of a question."""
        return self.sampling.votes or self.sampling.rollouts

    @property
    def max_sequence_tokens(self) -> int:
        """Return the most tokens of a prompt and its response together."""
        return self.data.max_prompt_tokens + self.sampling.max_response_tokens


EMBEDDED_DEFAULTS = Config(
    data=Data(
        source="embedded",
        eval_data="embedded:held-out",
        questions_per_step=16,
        max_prompt_tokens=64,
        eval_samples=4,
    ),
    sampling=Sampling(max_response_tokens=32),
    memory=Memory(activation_checkpointing="off", tokens_per_micro_batch=2048),
    run=RunSettings(save_every=0),
    optimisation=Optimisation(steps=100, lr=5e-4, lr_schedule="constant", beta2=0.99),
)


# The lowest and the highest value of each number, and what is wrong with others.
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("questions_per_step", "max_prompt_tokens", "max_response_tokens"), (1, 10**9, "")),
    **dict.fromkeys(("eval_samples", "tokens_per_micro_batch", "steps", "epochs", "mini_batches"), (1, 10**9, "")),
    **dict.fromkeys(("questions_per_batch", "limit"), (1, 10**9, "")),  # of evaluate.py, as is k
    **dict.fromkeys(("save_every", "keep", "keep_every", "eval_every"), (0, 10**9, "0 switches it off")),
    **dict.fromkeys(("kl_coef", "kl_cap", "clip", "clip_high", "tis_cap", "weight_decay"), (0, 10**3, "")),
    **dict.fromkeys(("ema_start", "ema_end"), (0, 1, "it is the share that the teacher keeps of itself")),
    **dict.fromkeys(("rollouts", "votes"), (2, 10**6, "an advantage compares rollouts of one group")),
    "k": (0, 10**6, ""),
    "temperature": (0.01, 100, "learning and voting need samples that differ"),
    "lr": (0, 1, ""),
    "warmup": (0, 1, "it is a share of the steps"),
    "beta2": (0, 1 - 1e-9, ""),
    "max_grad_norm": (1e-9, math.inf, ""),
    "engine_memory": (0.01, 0.99, "it is a share of the memory"),
    "engine_cache_gb": (0.1, 10**4, ""),
}


def parse(arguments: list[str] | None = None) -> Config:
    """Read the settings from the command line; an unknown or mistyped flag ends the program with a hint.

    Defaults are those of the embedded task or of real models; where --config or --resume names a run, its settings.

    Raises:
        UserError: Settings that can only fail, or mislead, later.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--resume", "--model"):  # they decide the defaults of all others
        early.add_argument(flag)
    known, others = early.parse_known_args(arguments)
    if known.config:
        default = load_config(Path(known.config))
    elif known.resume and known.resume != "auto":
        in_checkpoint = Path(known.resume, "trainer.json")
        default = load_config(in_checkpoint if in_checkpoint.is_file() else Path(known.resume, "config.json"))
    else:
        default = EMBEDDED_DEFAULTS if known.model in (None, *EMBEDDED_MODELS) else Config()
    model = default.model if known.model is None else replace(default.model, name=known.model)
    default = replace(
        default, model=model, run=replace(default.run, out=None, resume=known.resume, config=known.config)
    )
    about = (
        "Co-rewarding: reinforcement learning for reasoning, without labels. Defaults are those of the embedded task; "
        "with --model NAME those of real models, with --config FILE those of another run's config.json."
    )
    flags = (tyro.conf.FlagCreatePairsOff,)
    config = parse_flags(Config, args=others, default=default, description=about, config=flags)
    return validate(config, default)


def load_config(file: Path) -> Config:
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
        groups = groups.get("settings", groups)
        for group, default in vars(Config()).items():
            kinds = get_type_hints(type(default))
            for name, value in groups[group].items():
                if name in kinds and not is_of_kind(value, kinds[name]):
                    raise ValueError(f"{flag_name(name)} cannot be {value!r}")
        return Config(**{group: type(default)(**groups[group]) for group, default in vars(Config()).items()})
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: give the folder of a run or a checkpoint, or its config.json"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise UserError(f"{file} holds no settings of a run of this version ({problem})") from problem


def is_of_kind(value: object, kind: Any) -> bool:
    """Tell whether a value from a file has a setting's type, or is one of its choices, as on the command line."""
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        return value in choices
    if choices:  # X | None
        return any(is_of_kind(value, choice) for choice in choices)
    return type(value) is kind or (type(value) is int and kind is float)


def validate(config: Config, default: Config) -> Config:
    """Return the settings; refuse, before anything is loaded, those that could only fail or mislead later."""
    optimisation = config.optimisation
    for group in vars(config).values():
        check_ranges(vars(group))
    if optimisation.epochs is not None:
        if optimisation.steps not in (None, default.optimisation.steps):
            raise UserError("--steps and --epochs say the same thing twice: give one of them")
        config = replace(config, optimisation=replace(optimisation, steps=None))
    if config.votes < config.sampling.rollouts:
        raise UserError(f"--votes {config.votes} are fewer than --rollouts {config.sampling.rollouts}, which all vote")
    if config.model.name is None:
        if config.data.source != EMBEDDED_DEFAULTS.data.source:
            raise UserError(f"--data {config.data.source} without --model: name one, or --model embedded")
        config = replace(config, model=replace(config.model, name="embedded"))
    if config.run.out and not config.run.out.isprintable():
        raise UserError(f"--out {config.run.out!r} has characters that cannot be printed: name another folder")
    for package in ("tensorboard", "wandb"):
        if getattr(config.run, package) and find_spec(package) is None:
            raise UserError(f"--{package}: pip install {package}, it is not installed")
    return config


def check_ranges(settings: Mapping[str, Any]) -> None:
    """Refuse numbers outside of RANGES, which also holds those of other commands."""
    for name, value in settings.items():
        lowest, highest, why = RANGES.get(name, (-math.inf, math.inf, ""))
        if name in RANGES and value is not None and not lowest <= value <= highest:
            range_of = f"must be at least {lowest}" if highest >= 10**6 else f"must be from {lowest} to {highest}"
            raise UserError(f"{flag_name(name)} {value} {range_of}{': ' if why else ''}{why}")


def by_flag(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    for group in groups.values():
        flags |= {flag_name(name): value for name, value in group.items()}
    return flags


def parse_template_options(template_options: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        if isinstance(options := json.loads(template_options), dict):
            return options
    raise UserError(f"--template-options {template_options} is no JSON object")


def flag_name(name: str) -> str:
    return "--" + {"source": "data", "name": "model"}.get(name, name).replace("_", "-")
