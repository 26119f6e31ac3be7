"""From settings to a run that is ready for its first step: questions, models, optimizer, sampler."""

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch

from baselines import choose_variant
from config import Config, Data, UserError, flag_name
from data import PromptedPair, steps_per_epoch, tokenize_pairs
from lm import distributed, engine, memory, model, prompts
from lm.decoding import Capacity
from lm.scoring import PackedLM
from rewards import Variant
from rollout import Run
from sources.files import Columns
from sources.pairs import Benchmark, Pair, Report, load_benchmark, load_pairs
from store import checkpoint, jsonl


def prepare(config: Config, folder: Path, resumed: Path | None = None) -> tuple[Run, int]:
    """Check and load everything, cheap checks first; return the run and its first step."""
    device = distributed.start()
    variant = choose_variant(config.method)
    chosen_engine = engine.choose_engine(config.sampling.sampler)
    check_sense(config)
    pairs, report, benchmark = read_data(config)
    name = str(config.model.name)
    shape, tokenizer = model.load_pretrained(name, torch.float32, weights=False)
    template = prompts.read_chat_template(config.model.chat_template)
    encode = prompts.prompt_encoder(tokenizer, template, config.model.template_options)
    questions = build_prompts(config, variant, encode, pairs, report)
    eval_questions: list[PromptedPair] = []
    if benchmark:
        eval_questions = tokenize_pairs(benchmark.pairs, encode, config.data.max_prompt_tokens)
        print(f"evaluation: {len(eval_questions):,} of {len(benchmark.pairs):,} questions of {benchmark.name}")
        benchmark = replace(benchmark, pairs=[question.pair for question in eval_questions])
    model.limit_threads(shape)
    sequences = len(variant.policy_views) * config.data.questions_per_step * config.votes
    demand = memory.Demand(variant.has_teacher + variant.has_frozen_reference, sequences)
    plan = memory.fit(shape, config, demand, memory.this_hardware())

    print(f"loading {name}", flush=True)
    policy = model.load_policy(name, device, config.model.compute_dtype, plan.offload_optimizer, plan.gather_once)
    teacher = model.frozen_copy(policy, plan.offload_teacher) if variant.has_teacher else None
    initial = model.frozen_copy(policy, plan.offload_teacher) if variant.has_frozen_reference else None
    if plan.compiled:
        model.compile_models(filter(None, (policy, teacher, initial)), plan.activation_checkpointing == "light")
    if plan.activation_checkpointing == "on":
        model.checkpoint_activations(policy)
    prompt_lists = chain.from_iterable(question.prompts.values() for question in questions + eval_questions)
    longest = max(map(len, prompt_lists)) + config.sampling.max_response_tokens
    capacity = Capacity(longest, sequences, plan.engine_memory, config.memory.engine_cache_gb)
    run = Run(
        config=config,
        folder=folder,
        variant=variant,
        questions=questions,
        fingerprint=jsonl.fingerprint([(q.pair.id, sorted(q.prompts.items()), q.pair.gold) for q in questions]),
        benchmark=benchmark,
        eval_prompts=[question.prompts["x"] for question in eval_questions],
        total_steps=total_steps(config, len(questions)),
        plan=plan,
        device=device,
        tokenizer=tokenizer,
        policy=policy,
        teacher=teacher,
        initial=initial,
        optimizer=build_optimizer(policy, (0.9, config.optimisation.beta2), config.optimisation.weight_decay),
        sampler=engine.open_sampler(chosen_engine, policy.lm, tokenizer, policy.compute_dtype, capacity),
    )
    return run, checkpoint.restore(resumed, train_state(run)) if resumed else 0


def read_data(config: Config) -> tuple[list[Pair], Report, Benchmark | None]:
    """Read the training questions, what was wrong with them, and the benchmark."""
    data = config.data
    report = Report()
    if data.source == Data().source:
        print(f"data: {data.source} (the default for real models; --data names another)")
    columns = Columns(data.question_column, data.rephrased_column, data.answer_column)._asdict()
    pairs = load_pairs(data.source, **columns, keep_bad_rewrites=data.keep_bad_rewrites, report=report)
    if data.eval_data is None:
        return pairs, report, None
    of_eval = (data.eval_question_column, data.eval_answer_column)
    return pairs, report, load_benchmark(data.eval_data, data.data_dir, *of_eval)


def build_prompts(
    config: Config, variant: Variant, encode: Callable[[str], list[int]], pairs: list[Pair], report: Report
) -> list[PromptedPair]:
    """Make the prompts of the pairs in all views of the variant, and print what became of the set's rows.

    Raises:
        UserError: no pair can be used, or fewer questions in a step than mini-batches.
    """
    views = tuple(dict.fromkeys(variant.policy_views + variant.teacher_views))
    needs_gold = any(voter == "gold" for voter, _ in variant.label_of.values())
    questions = tokenize_pairs(pairs, encode, config.data.max_prompt_tokens, views, needs_gold, report)
    print(report)
    fewest = len(questions) // steps_per_epoch(len(questions), config.data.questions_per_step)
    if config.optimisation.mini_batches > fewest:
        raise UserError(
            f"--mini-batches {config.optimisation.mini_batches}, but some steps ask {fewest} questions: lower it"
        )
    return questions


def check_sense(config: Config) -> None:
    """Refuse off-loading without a GPU, unless a run of a GPU is resumed; warn of a schedule that runs backwards."""
    method = config.method
    if method.ema_schedule == "cosine" and method.ema_start > method.ema_end:
        print(f"warning: the teacher follows ever faster: --ema-start {method.ema_start} is over --ema-end")
    for name in ("offload_optimizer", "offload_teacher"):
        if getattr(config.memory, name) and not distributed.in_group() and not config.run.resume:
            raise UserError(f"{flag_name(name)} has no effect on a CPU: leave it out")


def total_steps(config: Config, questions: int) -> int:
    epochs = config.optimisation.epochs or 3
    return config.optimisation.steps or epochs * steps_per_epoch(questions, config.data.questions_per_step)


def build_optimizer(policy: PackedLM, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(policy.parameters(), lr=0.0, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=True)


def train_state(run: Run) -> checkpoint.Training:
    return checkpoint.Training(
        run.policy, run.teacher, run.tokenizer, run.optimizer, asdict(run.config), run.fingerprint
    )
