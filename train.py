"""Co-rewarding (arXiv 2508.00410): reinforcement learning for reasoning without labels.

    python train.py                                             # variant II on the embedded task, a laptop, minutes
    python train.py --variant I --model Qwen3-8B-Base --data math
    torchrun --nproc-per-node 4 train.py --variant I --model Qwen3-8B-Base --data math

A view is a wording of a question: x as written, x' rephrased. Every variant is a row of `rewards.VARIANTS`:

           policy answers   teacher answers   labels of x, of x'              KL term to
    I      x, x'            -                 policy's vote on x', on x       initial policy
    II     x                x                 teacher's vote on x             teacher
    III    x, x'            x, x'             teacher's vote on x', on x      teacher

One step of any of them:

    1. the policy answers every question G times, in the row's views
    2. the teacher, if there is one, moves towards that policy and answers too       (Eq. 11)
    3. majority votes become pseudo-labels, each for the view that the row says       (Eqs. 7-10)
    4. rewards compare answers with pseudo-labels, advantages compare rewards         (Eq. 3)
    5. one optimizer step on the clipped surrogate plus KL to the reference           (Eqs. 4-6)

What differs from the paper's equations and from the authors' code is said at the head of grpo.py, rewards.py and
teacher.py. Shapes: Q questions a step, G rollouts a question and view (a group), N = views x Q x G rollouts of the
policy, always in this order: by view, by question, then those of a group.
"""

import errno
import json
import os
import signal
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import checkpoint
import metrics
import plot
import ranks
from config import Config, ConfigError, parse
from data import DataError
from evaluate import Settings, accuracies
from grpo import group_advantages, learning_rate, step_denominator
from packing import MicroBatch, PackedLM, micro_batches
from policy import ModelError, Objective, mean_per_rollout, optimizer_step, score
from preparation import Run, claimed, describe_plan, prepare, to_save
from prompts import PromptedPair, questions_of_step
from rewards import View, Voter, build_groups, pseudo_labels, read_answers
from rollout import Rollout, decode, request_seed
from teacher import ema_weight, update
from vllm_sampler import SamplerError


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One step of the algorithm; returns its metrics and a sample of its rollouts to read."""
    config, variant, clock = run.config, run.variant, metrics.Clock()
    method, sampling, optimisation = config.method, config.sampling, config.optimisation
    chosen = questions_of_step(len(run.questions), config.data.questions_per_step, config.run.seed, step)
    questions = [run.questions[i] for i in chosen]
    golds = [question.pair.gold for question in questions]
    measured: dict[str, float] = {}

    # 1. The policy answers.
    with clock("rollout"):
        rollouts = sample_views(run, clock, run.policy, "policy", variant.policy_views, questions, step)

    # 2. The teacher moves towards the policy that has just answered, then answers itself.
    if run.teacher is not None:
        with clock("teacher"):
            w = ema_weight(step, run.total_steps, method.ema_start, method.ema_end, method.ema_schedule)
            update(run.teacher, run.policy, w)  # teacher <- w teacher + (1 - w) policy
            rollouts |= sample_views(run, clock, run.teacher, "teacher", variant.teacher_views, questions, step)
            measured["ema_weight"] = w

    # 3. Majority votes become pseudo-labels: of each view, by the vote that the variant's row names.
    with clock("reward"):
        answers = {
            key: read_answers(decode(said, run.tokenizer), sampling.rollouts, method.answer_match)
            for key, said in rollouts.items()
        }
        labels = pseudo_labels(variant, answers, golds)  # golds label the baseline `gt` alone

    # 4. Rewards [views x Q][G], and advantages [N] within each group.
    policy_rollouts = [rollout for view in variant.policy_views for rollout in rollouts["policy", view]]
    with clock("reward"):
        groups = build_groups(variant, answers, labels, method.answer_match, read_logits(run, policy_rollouts))
        rewards = variant.reward(groups)
        advantages = group_advantages(torch.tensor(rewards).flatten(), sampling.rollouts).to(run.device)

    # 5. One optimizer step over all micro-batches; the old policy of the ratio is the policy at hand. The KL term's
    #    reference is the initial policy, or the teacher as it answered.
    batches = in_micro_batches(run, policy_rollouts, advantages)
    reference = None
    if run.reference is not None:
        with clock("reference"):
            reference = score(run.reference, batches, sampling.temperature)
    with clock("update"):
        lr = learning_rate(step, run.total_steps, optimisation.lr, optimisation.warmup, optimisation.lr_schedule)
        loss = objective(run, rollouts)
        measured |= optimizer_step(run.policy, run.optimizer, batches, advantages, reference, loss, lr)

    with clock("metrics"):
        measured |= metrics.step_metrics(variant, rollouts, answers, labels, golds, rewards)
    measured |= clock.seconds
    measured["tokens_per_second"] = metrics.sampled_tokens(rollouts) / sum(clock.seconds.values())
    return measured, metrics.readable_sample(step, variant, questions[0].pair, groups, rewards)


def sample_views(
    run: Run,
    clock: metrics.Clock,
    model: PackedLM,
    who: Voter,
    views: tuple[View, ...],
    questions: list[PromptedPair],
    step: int,
) -> dict[tuple[Voter, View], list[Rollout]]:
    """G rollouts of `model` on every view of every question, in one call of the sampler: Q * G a view."""
    if not views:
        return {}
    config, sampling = run.config, run.config.sampling
    asked = [(view, question) for view in views for question in questions]
    with run.sampler.holding(model.lm) as sample:  # with the weights that the model has now
        rollouts = ranks.shared_out(sample)(
            prompts=[question.prompts[view] for view, question in asked],
            seeds=[request_seed(config.run.seed, step, question.pair.id, view, who) for view, question in asked],
            n=sampling.rollouts,
            temperature=sampling.temperature,
            max_tokens=sampling.max_response_tokens,
        )
    if run.sampler.sync_seconds is not None:
        clock.set_apart("sync", run.sampler.sync_seconds)
    per_view = len(questions) * sampling.rollouts
    return {(who, view): rollouts[i * per_view : (i + 1) * per_view] for i, view in enumerate(views)}


def read_logits(run: Run, rollouts: list[Rollout]) -> dict[str, list[float]]:
    """Mean statistics [N] of each of the policy's rollouts, if the row's reward asks for them."""
    if not run.variant.reward_reads_logits:
        return {}
    batches = in_micro_batches(run, rollouts)
    stats = score(run.policy, batches, run.config.sampling.temperature)
    return mean_per_rollout(batches, stats, len(rollouts))


def in_micro_batches(run: Run, rollouts: list[Rollout], advantages: torch.Tensor | None = None) -> list[MicroBatch]:
    """This rank's share of the rollouts; given their advantages [N], without those that cannot change the gradient."""
    rows = None
    if advantages is not None and run.reference is None:
        # Without a KL term those of advantage 0. One is kept for a step without any other: AdamW has to see a gradient
        # of 0, not none.
        rows = advantages.nonzero().flatten().tolist() or [0]
    tokens = run.config.optimisation.tokens_per_micro_batch
    return micro_batches(rollouts, tokens, run.device, rows, ranks.rank(), ranks.count())


def objective(run: Run, rollouts: dict[tuple[Voter, View], list[Rollout]]) -> Objective:
    """The loss of this step; each view is averaged by itself, and the views are added (Eq. 6)."""
    method, sampling, denominators = run.config.method, run.config.sampling, []
    for view in run.variant.policy_views:
        said = rollouts["policy", view]
        tokens = sum(len(rollout.response_ids) for rollout in said)
        denominator = step_denominator(method.loss_agg, len(said), tokens, sampling.max_response_tokens)
        denominators += [float(denominator)] * len(said)
    return Objective(
        temperature=sampling.temperature,
        clip=method.clip,
        kl_coef=run.variant.kl_coef,
        tis_cap=method.tis_cap,
        aggregation=method.loss_agg,
        denominators=torch.tensor(denominators, device=run.device),
        max_grad_norm=run.config.optimisation.max_grad_norm,
    )


def evaluate(run: Run) -> dict[str, float]:
    """Sampled and greedy accuracy of the policy on the benchmark, if there is one, as evaluate.py measures it."""
    if run.benchmark is None:
        return {}
    sampling, clock = run.config.sampling, metrics.Clock()
    settings = Settings(
        k=run.config.data.eval_samples,
        temperature=sampling.temperature,
        max_tokens=sampling.max_response_tokens,
        seed=run.config.run.seed,
    )
    with clock("evaluation"), run.sampler.holding(run.policy.lm) as sample:
        accuracy = accuracies(ranks.shared_out(sample), run.tokenizer, run.benchmark, run.eval_prompts, settings)
    return accuracy | clock.seconds


def train(config: Config) -> Path:
    """Prepare and loop; returns the run's folder. Stops early, resumably, on SIGINT and SIGTERM."""
    run, first_step = prepare(config)
    with claimed(run.folder), closing(run.sampler):
        return loop(run, first_step)


def loop(run: Run, first_step: int) -> Path:
    """All steps from the first on, with evaluations and checkpoints when they are due."""
    config = run.config
    ranks.on_first(lambda: (run.folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n"))
    log = metrics.RunLog(run.folder, asdict(config), first_step) if ranks.is_first() else None
    signals = catch_signals()
    steps = range(first_step, run.total_steps)
    bar = tqdm(steps, initial=first_step, total=run.total_steps, desc="training", disable=log is None)
    for step in bar:
        evaluated = evaluate(run) if step == 0 or is_due(step, config.data.eval_every) else {}
        with metrics.tracing(
            run.folder / "trace.json", config.run.profile and step == first_step + 1 and log is not None
        ):
            seen, sample = train_step(run, step)
        seen["peak_memory_gb"] = ranks.largest(metrics.peak_memory_gb())
        if log:
            log.write({"step": step} | evaluated | seen, sample)
            bar.set_postfix(log.headline())
            for warning in log.new_collapse_signs():
                bar.write(f"collapse? step {step}: {warning}", file=sys.stderr)
        done, stop_signal = step + 1, int(ranks.largest(max(signals, default=0)))
        if done == run.total_steps or is_due(done, config.run.save_every) or stop_signal:
            saved = save_checkpoint(run, done)
        if stop_signal:
            bar.close()
            if log:
                print(f"stopped after step {step}; go on with --resume {saved}", file=sys.stderr)
            raise SystemExit(128 + stop_signal)
    evaluated = evaluate(run)
    if log and evaluated:
        log.write({"step": run.total_steps} | evaluated, [])
    return run.folder


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def catch_signals() -> list[int]:
    """The list fills when the run is asked to stop; the loop looks at it between steps. A second request is obeyed
    at once, without saving; not so under torchrun, which passes on what its processes may have got themselves."""
    requested: list[int] = []

    def request(number: int, _: object) -> None:
        if requested and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        requested.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request)
    return requested


def save_checkpoint(run: Run, steps_taken: int) -> Path:
    settings = run.config.run
    folder = run.folder / "checkpoints"
    return checkpoint.save(folder, steps_taken, to_save(run), settings.keep, settings.keep_every)


def main() -> None:
    try:
        config = parse()
        if config.memory.plan:
            return print(describe_plan(config))
        folder = train(config)
    except (ConfigError, DataError, ModelError, SamplerError, checkpoint.CheckpointError) as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SystemExit("error: the disk is full: make room, then go on with --resume auto") from None
    if ranks.is_first():
        plot.draw([folder], folder / "curves.png")
        print(metrics.closing_table(folder))
    ranks.stop()


if __name__ == "__main__":
    main()
