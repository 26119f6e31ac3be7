"""From settings to a run that is ready for its first step: questions, models, optimizer, sampler."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from baselines import BASELINES
from config import EMBEDDED_MODELS, Config, Data, UserError, flag, read_options
from data import PromptedPair, prompt_pairs, steps_per_epoch
from grpo import build_optimizer
from lm import ranks
from lm.decoding import Sampler
from lm.engine import choose_engine, open_sampler
from lm.model import checkpoint_activations, frozen_copy, load_policy, stop_token_ids
from lm.prompts import read_chat_template
from lm.scoring import PackedLM
from rewards import VARIANTS, VIEWS, Variant, on_views
from sources.files import Columns
from sources.pairs import Benchmark, Pair, Report, load_benchmark, load_pairs, without_overlap
from store import checkpoint
from store.files import fingerprint


@dataclass
class Run:
    """Everything that a training step reads and changes."""

    config: Config
    folder: Path
    variant: Variant  # the row of the table, with what the command line changes in it
    questions: list[PromptedPair]
    fingerprint: str  # of the questions
    benchmark: Benchmark | None  # those of its questions whose prompts are short enough
    eval_prompts: list[list[int]]  # of these questions
    total_steps: int
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    policy: PackedLM
    teacher: PackedLM | None  # moves towards the policy; if the row asks for one
    initial: PackedLM | None  # the policy as it began, frozen; if the KL term is anchored to it
    optimizer: torch.optim.Optimizer
    sampler: Sampler


def prepare(config: Config, folder: Path, resumed: Path | None = None) -> tuple[Run, int]:
    """Check and load everything, cheap checks first; returns the run and its first step."""
    device, variant, engine = ranks.start(), chosen_variant(config), choose_engine(config.sampling.sampler)
    refuse_offloading(config)
    if config.model.name in EMBEDDED_MODELS:
        torch.set_num_threads(1)  # a second one gains little on matrices so small, and loses much on a busy machine
    pairs, report, benchmark = read_data(config)
    print(f"loading {config.model.name}", flush=True)
    policy, tokenizer = load_policy(
        str(config.model.name), device, config.model.compute_dtype, config.memory.offload_optimizer
    )
    questions = to_questions(config, variant, tokenizer, pairs, report)
    fewest = len(questions) // steps_per_epoch(len(questions), config.data.questions_per_step)
    if config.optimisation.mini_batches > fewest:
        raise UserError(
            f"--mini-batches {config.optimisation.mini_batches}, but some steps ask {fewest} questions: lower it"
        )
    eval_questions = to_questions(config, variant, tokenizer, benchmark.pairs) if benchmark else []
    if benchmark:
        print(f"evaluation: {len(eval_questions):,} of {len(benchmark.pairs):,} questions of {benchmark.name}")
        benchmark = replace(benchmark, pairs=[question.pair for question in eval_questions])
    longest_prompt = max(len(prompt) for each in questions + eval_questions for prompt in each.prompts.values())

    teacher = frozen_copy(policy, config.memory.offload_teacher) if variant.has_teacher else None
    initial = frozen_copy(policy, config.memory.offload_teacher) if variant.has_frozen_reference else None
    if config.memory.activation_checkpointing == "on":
        checkpoint_activations(policy)
    sampler = open_sampler(
        engine,
        policy.lm,
        ranks.on_first(partial(stop_token_ids, policy.lm, tokenizer)),
        policy.compute_dtype,
        max_sequence_tokens=longest_prompt + config.sampling.max_response_tokens,
        rows=len(variant.policy_views) * config.data.questions_per_step * config.votes,
        engine_memory=config.sampling.engine_memory,
    )
    run = Run(
        config=config,
        folder=folder,
        variant=variant,
        questions=questions,
        fingerprint=fingerprint([(each.pair.id, sorted(each.prompts.items()), each.pair.gold) for each in questions]),
        benchmark=benchmark,
        eval_prompts=[question.prompts["x"] for question in eval_questions],
        total_steps=total_steps(config, len(questions)),
        device=device,
        tokenizer=tokenizer,
        policy=policy,
        teacher=teacher,
        initial=initial,
        optimizer=build_optimizer(policy, (0.9, config.optimisation.beta2), config.optimisation.weight_decay),
        sampler=sampler,
    )
    return run, checkpoint.restore(resumed, to_save(run)) if resumed else 0


def read_data(config: Config) -> tuple[list[Pair], Report, Benchmark | None]:
    """Training questions, what was wrong with them, and the benchmark."""
    data, report = config.data, Report()
    columns = Columns(data.question_column, data.rephrased_column, data.answer_column)._asdict()
    if data.source == Data().source:
        print(f"data: {data.source} (the default for real models; --data names another)")
    pairs = load_pairs(data.source, **columns, keep_bad_rewrites=data.keep_bad_rewrites, report=report)

    def benchmark(name: str) -> Benchmark:
        return load_benchmark(name, data.data_dir, data.eval_question_column, data.eval_answer_column)

    if data.decontaminate:
        pairs = without_overlap(pairs, [benchmark(name) for name in data.decontaminate], report)
    return pairs, report, benchmark(data.eval_data) if data.eval_data else None


def to_questions(
    config: Config,
    variant: Variant,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    report: Report | None = None,
) -> list[PromptedPair]:
    """Pairs whose prompts are short enough: for training, with a `report` that is printed, in all views of the variant;
    for evaluation in the original wording."""
    template = read_chat_template(config.model.chat_template) if config.model.chat_template else None
    to_prompts = partial(
        prompt_pairs,
        pairs,
        tokenizer,
        config.data.max_prompt_tokens,
        chat_template=template,
        template_options=read_options(config.model.template_options),
    )
    if report is None:
        return to_prompts()
    views = tuple(dict.fromkeys(variant.policy_views + variant.teacher_views))
    needs_gold = any(voter == "gold" for voter, _ in variant.label_of.values())
    questions = to_prompts(views=views, needs_gold=needs_gold, report=report)
    print(report)
    return questions


def chosen_variant(config: Config) -> Variant:
    """The row of the table, with what the command line changes in it."""
    method = config.method
    rows = VARIANTS | BASELINES
    if str(method.variant) not in rows:  # a config.json can hold anything
        raise UserError(f"--variant {method.variant} is not known: choose from {', '.join(rows)}")
    variant = rows[method.variant]
    if method.views is not None and not variant.is_baseline:
        raise UserError(
            f"--views {method.views} is for baselines, and variant {method.variant} fixes its own: "
            "try --variant majority"
        )
    if method.views is not None:
        variant = on_views(variant, VIEWS[method.views])
    if method.kl_coef is not None:
        variant = replace(variant, kl_coef=method.kl_coef)
    return variant if method.kl_ref is None else replace(variant, kl_reference=method.kl_ref)


def refuse_offloading(config: Config) -> None:
    """Where a model is not sharded, on a CPU alone, it would do nothing; a run of a GPU may be resumed there."""
    for name in ("offload_optimizer", "offload_teacher"):
        if getattr(config.memory, name) and not ranks.in_group() and not config.run.resume:
            raise UserError(f"{flag(name)}: here all is in the CPU's memory, leave it out")


def total_steps(config: Config, questions: int) -> int:
    """K."""
    epochs = config.optimisation.epochs or 3
    return config.optimisation.steps or epochs * steps_per_epoch(questions, config.data.questions_per_step)


def to_save(run: Run) -> checkpoint.Training:
    return checkpoint.Training(
        run.policy, run.teacher, run.tokenizer, run.optimizer, asdict(run.config), run.fingerprint
    )
