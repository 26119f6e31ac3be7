"""Co-rewarding (arXiv 2508.00410): reinforcement learning for reasoning without labels.

    python train.py                                             # variant II on the embedded task, a laptop, minutes
    python train.py --variant I --model Qwen3-8B-Base --data math

One step of every variant, each a row of `rewards.VARIANTS`:

    1. the policy answers every question G times, in the row's views
    2. the teacher, if there is one, moves towards that policy and answers too       (Eq. 11)
    3. majority votes become pseudo-labels, each for the view that the row says       (Eqs. 6-10)
    4. rewards compare answers with pseudo-labels, advantages compare rewards         (Eq. 3)
    5. one optimizer step on the clipped surrogate plus KL to the reference           (Eqs. 4-6)

What differs from the paper's equations and from the authors' code is said at the head of grpo.py, rewards.py and
teacher.py. Shapes: Q questions a step, G rollouts a question and view, N rollouts of the policy in a step.
"""

import json
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import checkpoint
import metrics
import plot
from config import Config, ConfigError, parse
from data import (
    DataError,
    PromptedPair,
    Report,
    load_pairs,
    prompt_pairs,
    questions_of_step,
    steps_per_epoch,
)
from evaluate import accuracies, decode
from grpo import group_advantages, learning_rate, step_denominator
from packing import PackedLM, micro_batches
from policy import (
    ModelError,
    Objective,
    build_optimizer,
    load,
    mean_per_rollout,
    optimizer_step,
    score,
    stop_token_ids,
)
from rewards import VARIANTS, Variant, View, Voter, build_groups, on_views, pseudo_labels, read_answers
from rollout import Rollout, Sampler, TransformersSampler, request_seed
from teacher import ema_weight, frozen_copy, update


@dataclass
class Run:
    """Everything that a training step reads and changes."""

    config: Config
    folder: Path
    variant: Variant  # the row of the table, with what the command line changes in it
    questions: list[PromptedPair]
    eval_questions: list[PromptedPair]
    total_steps: int
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    policy: PackedLM
    teacher: PackedLM | None  # moves towards the policy
    reference: PackedLM | None  # anchors the KL term: the teacher, or a frozen copy of the initial policy
    optimizer: torch.optim.Optimizer
    sampler: Sampler


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One step of the algorithm; returns its metrics and a sample of its rollouts to read."""
    config, variant, clock = run.config, run.variant, metrics.Clock()
    chosen = questions_of_step(len(run.questions), config.questions_per_step, config.seed, step)
    questions = [run.questions[i] for i in chosen]
    golds = [question.pair.gold for question in questions]

    # 1. The policy answers.
    with clock("rollout"):
        rollouts = sample_views(run, run.policy, "policy", variant.policy_views, questions, step)

    # 2. The teacher moves towards the policy that has just answered, then answers itself.
    with clock("teacher"):
        if run.teacher is not None:
            w = ema_weight(step, run.total_steps, config.ema_start, config.ema_end, config.ema_schedule)
            update(run.teacher, run.policy, w)
            rollouts |= sample_views(run, run.teacher, "teacher", variant.teacher_views, questions, step)

    # 3. Majority votes become pseudo-labels.
    with clock("reward"):
        answers = {
            key: read_answers(decode(said, run.tokenizer), config.rollouts, config.answer_match)
            for key, said in rollouts.items()
        }
        labels = pseudo_labels(variant, answers, golds)

    # 4. Rewards and advantages of the policy's rollouts, N = views x Q x G.
    trained = [rollout for view in variant.policy_views for rollout in rollouts["policy", view]]
    batches = micro_batches(trained, config.tokens_per_micro_batch, run.device)
    with clock("reward"):
        read_logits = {}
        if variant.reward_reads_logits:
            own = mean_per_rollout(batches, score(run.policy, batches, config.temperature))
            read_logits = {"entropy": own.entropy.tolist(), "self_certainty": own.self_certainty.tolist()}
        groups = build_groups(variant, answers, labels, config.answer_match, **read_logits)
        rewards = variant.reward(groups)
        advantages = group_advantages(torch.tensor(rewards).flatten(), config.rollouts).to(run.device)

    # 5. One optimizer step.
    with clock("reference"):
        reference = score(run.reference, batches, config.temperature) if run.reference is not None else None
    with clock("update"):
        lr = learning_rate(step, run.total_steps, config.lr, config.warmup, config.lr_schedule)
        updated = optimizer_step(
            run.policy, run.optimizer, batches, advantages, reference, objective(run, rollouts), lr
        )

    seen = metrics.step_metrics(variant, rollouts, answers, labels, golds, rewards) | updated | clock.seconds
    if run.teacher is not None:
        seen["ema_weight"] = w
    sampled_tokens = sum(len(rollout.response_ids) for said in rollouts.values() for rollout in said)
    seen["tokens_per_second"] = sampled_tokens / sum(clock.seconds.values())
    return seen, metrics.readable_sample(step, variant, questions[0].pair, groups, rewards)


def sample_views(
    run: Run, model: PackedLM, who: Voter, views: tuple[View, ...], questions: list[PromptedPair], step: int
) -> dict[tuple[Voter, View], list[Rollout]]:
    """G rollouts of `model` on every view of every question, in one call of the sampler: Q * G a view."""
    if not views:
        return {}
    config = run.config
    asked = [(view, question) for view in views for question in questions]
    with run.sampler.holding(model) as sample:
        rollouts = sample(
            prompts=[question.prompts[view] for view, question in asked],
            seeds=[request_seed(config.seed, step, question.pair.id, view, who) for view, question in asked],
            n=config.rollouts,
            temperature=config.temperature,
            max_tokens=config.max_response_tokens,
        )
    per_view = len(questions) * config.rollouts
    return {(who, view): rollouts[i * per_view : (i + 1) * per_view] for i, view in enumerate(views)}


def objective(run: Run, rollouts: dict[tuple[Voter, View], list[Rollout]]) -> Objective:
    """The loss of this step; each view is averaged by itself, and the views are added (Eq. 6)."""
    config, denominators = run.config, []
    for view in run.variant.policy_views:
        said = rollouts["policy", view]
        tokens = sum(len(rollout.response_ids) for rollout in said)
        denominator = step_denominator(config.loss_agg, len(said), tokens, config.max_response_tokens)
        denominators += [float(denominator)] * len(said)
    return Objective(
        temperature=config.temperature,
        clip=config.clip,
        kl_coef=run.variant.kl_coef,
        tis_cap=config.tis_cap,
        aggregation=config.loss_agg,
        denominators=torch.tensor(denominators, device=run.device),
        max_grad_norm=config.max_grad_norm,
    )


def evaluate(run: Run) -> dict[str, float]:
    """Sampled and greedy accuracy of the policy on the evaluation questions."""
    config, clock = run.config, metrics.Clock()
    with clock("evaluation"), run.sampler.holding(run.policy) as sample:
        accuracy = accuracies(
            sample,
            run.tokenizer,
            prompts=[question.prompts["x"] for question in run.eval_questions],
            golds=[str(question.pair.gold) for question in run.eval_questions],
            samples=config.eval_samples,
            temperature=config.temperature,
            max_tokens=config.max_response_tokens,
            seed=config.seed,
        )
    return accuracy | clock.seconds


def train(config: Config) -> Path:
    """Prepare, loop, save; returns the run's folder. Stops early, resumably, on SIGINT and SIGTERM."""
    run, first_step = prepare(config)
    log = metrics.RunLog(run.folder, asdict(config), first_step)
    stop_requested = catch_signals()
    bar = tqdm(range(first_step, run.total_steps), initial=first_step, total=run.total_steps, desc="training")
    for step in bar:
        evaluated = evaluate(run) if is_due(step, config.eval_every) and run.eval_questions else {}
        seen, sample = train_step(run, step)
        log.write({"step": step} | evaluated | seen | {"peak_memory_gb": metrics.peak_memory_gb()}, sample)
        bar.set_postfix(log.headline())
        for warning in log.new_collapse_signs():
            bar.write(f"collapse? step {step}: {warning}", file=sys.stderr)
        done = step + 1
        if done == run.total_steps or is_due(done, config.save_every) or stop_requested:
            saved = save_checkpoint(run, done)
        if stop_requested:
            bar.close()
            print(f"stopped after step {step}; go on with --resume {saved}", file=sys.stderr)
            raise SystemExit(128 + stop_requested[0])
    if run.eval_questions:
        log.write({"step": run.total_steps} | evaluate(run), [])
    return run.folder


def prepare(config: Config) -> tuple[Run, int]:
    """Check and load everything, cheap checks first; returns the run and its first step."""
    variant = chosen_variant(config)
    resumed = checkpoint.find(config.resume, config.out) if config.resume else None
    folder = resumed.parents[1] if resumed else new_folder(config)
    report = Report()
    columns = {"question": config.question, "rephrased": config.rephrased, "answer": config.answer}
    pairs = load_pairs(str(config.data), **columns, keep_bad_rewrites=config.keep_bad_rewrites, report=report)
    eval_pairs = load_pairs(config.eval_data, **columns) if config.eval_data else []

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, tokenizer = load(config.model, device)
    prompts = {
        "tokenizer": tokenizer,
        "max_prompt_tokens": config.max_prompt_tokens,
        "chat_template": config.chat_template,
    }
    views = tuple(dict.fromkeys(variant.policy_views + variant.teacher_views))
    needs_gold = any(voter == "gold" for voter, _ in variant.label_of.values())
    questions = prompt_pairs(pairs, **prompts, views=views, needs_gold=needs_gold, report=report)
    print(report)

    has_teacher = bool(variant.teacher_views) or (variant.kl_reference == "ema" and variant.kl_coef > 0)
    teacher = frozen_copy(policy) if has_teacher else None
    reference = teacher if variant.kl_reference == "ema" else frozen_copy(policy)
    run = Run(
        config=config,
        folder=folder,
        variant=variant,
        questions=questions,
        eval_questions=prompt_pairs(eval_pairs, **prompts, needs_gold=True) if eval_pairs else [],
        total_steps=config.steps or config.epochs * steps_per_epoch(len(questions), config.questions_per_step),
        device=device,
        tokenizer=tokenizer,
        policy=policy,
        teacher=teacher,
        reference=reference if variant.kl_coef > 0 else None,
        optimizer=build_optimizer(policy, (0.9, config.beta2), config.weight_decay),
        sampler=TransformersSampler(stop_token_ids(policy.lm, tokenizer)),
    )
    first_step = checkpoint.load(resumed, policy, teacher, run.optimizer, asdict(config)) if resumed else 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    return run, first_step


def chosen_variant(config: Config) -> Variant:
    """The row of the table, with what the command line changes in it."""
    variant = VARIANTS[config.variant]
    if config.views:
        variant = on_views(variant, {"original": ("x",), "rephrased": ("x'",), "both": ("x", "x'")}[config.views])
    changes = {"kl_coef": config.kl_coef, "kl_reference": config.kl_ref}
    return replace(variant, **{name: value for name, value in changes.items() if value is not None})


def new_folder(config: Config) -> Path:
    """A folder that no other run has written to."""
    if config.out:
        if (Path(config.out) / "metrics.jsonl").exists():
            raise ConfigError(f"--out {config.out} holds a run: continue it with --resume auto, or name another folder")
        return Path(config.out)
    name = f"{config.variant}-{Path(config.model).name}-seed{config.seed}"
    candidates = (Path("runs") / (name + suffix) for suffix in ["", *(f"-{i}" for i in range(2, 10_000))])
    return next(folder for folder in candidates if not folder.exists())


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def catch_signals() -> list[int]:
    """The list fills when the run is asked to stop; the loop looks at it between steps. A second request is obeyed
    at once, without saving."""
    requested: list[int] = []

    def request(number: int, _: object) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request)
    return requested


def save_checkpoint(run: Run, steps_taken: int) -> Path:
    return checkpoint.save(
        run.folder / "checkpoints",
        steps_taken,
        run.policy,
        run.teacher,
        run.tokenizer,
        run.optimizer,
        asdict(run.config),
    )


def main() -> None:
    try:
        folder = train(parse())
    except (ConfigError, DataError, ModelError, checkpoint.CheckpointError) as error:
        raise SystemExit(f"error: {error}") from None
    curves = plot.draw([folder], folder / "curves.png")
    print(metrics.closing_table(folder))
    print(f"  curves             {curves}")


if __name__ == "__main__":
    main()
