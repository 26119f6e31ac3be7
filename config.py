"""Every setting of a training run: one line each, with the paper's value as the default (arXiv 2508.00410, Table 5).

Without --model the embedded task runs, on values of its own (EMBEDDED): a model of 0.2M parameters wants other steps.
"""

import argparse
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from rewards import VARIANTS


class ConfigError(ValueError):
    """Settings that do not go together, with the cure in one sentence."""


def flag(group: str, default: Any, text: str) -> Any:
    return field(default=default, metadata={"group": group, "help": text})


method_, data_, model_ = partial(flag, "method"), partial(flag, "data"), partial(flag, "model")
sampling_, optimisation_, run_ = partial(flag, "sampling"), partial(flag, "optimisation"), partial(flag, "run")


@dataclass(frozen=True)
class Config:
    # fmt: off
    variant: str = method_("II", f"who labels what, a row of rewards.VARIANTS: {', '.join(VARIANTS)}")
    views: Literal["original", "rephrased", "both"] | None = method_(None, "move a baseline to these wordings, each labelled by itself")
    kl_coef: float | None = method_(None, "weight of the KL term (default: the variant's)")
    kl_ref: Literal["init", "ema"] | None = method_(None, "its reference: initial policy or EMA teacher (default: the variant's)")
    ema_start: float = method_(0.99, "weight that the teacher keeps of itself at the first step; 1 freezes it")
    ema_end: float = method_(0.9999, "and at the last")
    ema_schedule: Literal["cosine", "constant"] = method_("cosine", "from one to the other; constant: always --ema-start")
    answer_match: Literal["exact", "math"] = method_("exact", "equality in votes and pseudo-label rewards: strings or mathematics")
    clip: float = method_(0.2, "of the probability ratio")
    loss_agg: Literal["token", "sequence", "dr-grpo"] = method_("token", "what weighs the same in the loss: tokens or rollouts")
    tis_cap: float = method_(2.0, "cap of the importance weight between trainer and sampler; 0: none")

    data: str | None = data_(None, "file or folder of questions, or a published set: math, dapo, open-rs, amc")
    question: str = data_("question", "column of the question in a file of one's own")
    rephrased: str = data_("rephrased", "column of its rephrasing")
    answer: str = data_("answer", "column of the gold answer: for metrics, and for the reward of --variant gt")
    keep_bad_rewrites: bool = data_(False, "keep placeholder and unchanged rephrasings, as the authors did")
    questions_per_step: int = data_(128, "questions (variants I and III: pairs) a step")
    max_prompt_tokens: int = data_(512, "a question longer than this, in a needed wording, is dropped")
    eval_data: str | None = data_(None, "questions with gold answers to evaluate on; same forms as --data")
    eval_every: int = data_(10, "steps between evaluations; 0: none")
    eval_samples: int = data_(1, "sampled answers per question of an evaluation; one greedy answer comes on top")

    model: str = model_("embedded", "hub name (Qwen3-8B-Base, Qwen/Qwen3-8B-Base), local folder, or the embedded model")
    chat_template: str | None = model_(None, "Jinja file, for a tokenizer without a chat template")

    rollouts: int = sampling_(8, "G: sampled answers per question and view")
    max_response_tokens: int = sampling_(3072, "longer answers are cut")
    temperature: float = sampling_(1.0, "of policy and teacher rollouts")
    sampler: Literal["auto", "vllm", "hf"] = sampling_("auto", "hf: transformers' generate")

    steps: int | None = optimisation_(None, "K, optimizer steps (default: --epochs)")
    epochs: int = optimisation_(3, "passes over the questions, if --steps is not given")
    lr: float = optimisation_(3e-6, "peak learning rate")
    lr_schedule: Literal["cosine", "constant"] = optimisation_("cosine", "after the warm-up")
    warmup: float = optimisation_(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = optimisation_(0.01, "of AdamW")
    beta2: float = optimisation_(0.999, "of AdamW")
    max_grad_norm: float = optimisation_(1.0, "the gradient is scaled down to this norm")
    tokens_per_micro_batch: int = optimisation_(16384, "tokens of one forward and backward pass; memory only, not results")

    out: str | None = run_(None, "folder of the run (default: a new one under runs/)")
    resume: str | None = run_(None, "auto, or a folder runs/NAME/checkpoints/step-N: continue from there")
    save_every: int = run_(0, "steps between checkpoints; 0: only at the end")
    seed: int = run_(0, "of everything random")
    tensorboard: bool = run_(False, "also log to TensorBoard files in the run's folder")
    wandb: bool = run_(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    # fmt: on


EMBEDDED: dict[str, Any] = {
    "data": "embedded",
    "eval_data": "embedded:held-out",
    "questions_per_step": 16,
    "max_prompt_tokens": 64,
    "max_response_tokens": 32,
    "steps": 100,
    "lr": 5e-4,
    "lr_schedule": "constant",
    "beta2": 0.99,
    "eval_samples": 4,
}


def add_flag(group: argparse._ArgumentGroup, setting: "Field[Any]") -> None:
    """--some-name for some_name: a switch for a bool, choices for a Literal, None only as a default."""
    options = [option for option in get_args(setting.type) or [setting.type] if option is not NoneType]
    kind = options[0]
    help_text = setting.metadata["help"] + ("" if setting.default in (None, False) else " (default: %(default)s)")
    name = "--" + setting.name.replace("_", "-")
    if kind is bool:
        group.add_argument(name, action="store_true", help=help_text)
    elif isinstance(kind, type):
        group.add_argument(name, type=kind, default=setting.default, metavar=kind.__name__.upper(), help=help_text)
    else:
        choices = options if isinstance(kind, str) else get_args(kind)
        group.add_argument(name, choices=choices, default=setting.default, help=help_text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Co-rewarding: reinforcement learning for reasoning without labels.",
        epilog="With the embedded model (no --model) the defaults are "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in EMBEDDED.items()),
        allow_abbrev=False,
    )
    titles = dict.fromkeys(setting.metadata["group"] for setting in fields(Config))
    groups = {title: parser.add_argument_group(title) for title in titles}
    for setting in fields(Config):
        add_flag(groups[setting.metadata["group"]], setting)
    return parser


def parse(arguments: list[str] | None = None) -> Config:
    parser = build_parser()
    if parser.parse_args(arguments).model == "embedded":
        parser.set_defaults(**EMBEDDED)
    config = Config(**vars(parser.parse_args(arguments)))
    validate(config)
    return config


def validate(config: Config) -> None:
    """Refuse, before anything is loaded, what could only fail or mislead later."""
    if config.variant not in VARIANTS:
        raise ConfigError(f"--variant {config.variant}: unknown; choose from {', '.join(VARIANTS)}")
    if config.views and config.variant in ("I", "II", "III"):
        raise ConfigError(f"--views is for baselines: variant {config.variant} fixes its own; try --variant majority")
    if config.data is None:
        raise ConfigError(
            "--data is missing: name a file of questions, a published folder, or math, dapo, open-rs, amc"
        )
    for name in (
        "questions_per_step",
        "rollouts",
        "max_prompt_tokens",
        "max_response_tokens",
        "tokens_per_micro_batch",
    ):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: give at least 1")
    if config.rollouts < 2:
        raise ConfigError("--rollouts 1: an advantage compares rollouts of one group; give at least 2")
    if not (config.temperature > 0):
        raise ConfigError(f"--temperature {config.temperature}: training needs diverse rollouts; give more than 0")
    if config.steps is not None and config.steps < 1 or config.epochs < 1:
        raise ConfigError("--steps and --epochs must be at least 1")
    for name in ("ema_start", "ema_end"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: a weight between 0 and 1")
    for name in ("chat_template",):
        if (path := getattr(config, name)) and not Path(path).is_file():
            raise ConfigError(f"--{name.replace('_', '-')} {path}: no such file")
