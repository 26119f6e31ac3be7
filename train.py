"""Co-rewarding (arXiv 2508.00410): reinforcement learning for reasoning, without labels.

    python train.py                                             # variant II on the embedded task, a laptop, a minute
    torchrun --nproc-per-node 4 --shutdown-timeout 900 train.py --variant II --model Qwen3-8B-Base

           policy answers   teacher answers   label of x, of x'              KL term to
    I      x, x'            -                 policy's vote on x', on x      initial policy
    II     x                x                 teacher's vote on x            teacher
    III    x, x'            x, x'             teacher's vote on x', on x     teacher

    policy      the model that is trained
    teacher     a moving average of the policy's weights (Eq. 11)
    reference   the model that the KL term keeps the policy close to: the initial policy, or the teacher
    view        a wording of a question: x as written, x' rephrased
    rollout     one sampled response to a question in one view
    group       the rollouts to one question in one view: V of them vote, the first G are trained on (V = G by default)
    vote        a group's most frequent answer, and how many gave it
    label       the answer that a group's rewards compare with: by a vote of another group, of the teacher or its own,
                or gold where the variant says so
    gold        the true answer: for metrics alone, unless the variant says that it is the label

What differs from the paper and from the authors' code is said at the head of grpo.py, rewards.py and teacher.py.
Shapes: Q questions a step, N = views x Q x G rollouts that are trained on.
"""

from baselines import choose_variant
from config import Config, UserError, exit_on_user_error, parse
from sources.pairs import check_sources

if __name__ == "__main__":
    with exit_on_user_error():  # before the imports that take seconds: --help and mistakes are answered at once
        given = parse()
        choose_variant(given.method)
        check_sources(given.data.source, given.data.eval_data)

import json
import os
import sys
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

import metrics
from data import questions_of_step
from grpo import (
    assign_advantages,
    assign_denominators,
    learning_rate,
    mask_answers,
    optimizer_step,
    select_with_gradient,
    split_mini_batches,
)
from lm import distributed
from lm.packing import micro_batches
from lm.scoring import assign_token_stats, score
from prepare import prepare, train_state
from rewards import Group, label_groups, rollouts_of
from rollout import Run, generate_rollouts
from store import checkpoint, curves
from store.folder import lock_run_dir
from store.jsonl import write_atomic
from store.log import Records, RunLog, closing_table
from store.results import versions
from teacher import ema_weight, update


def train_step(run: Run, step: int) -> tuple[dict[str, float], Records]:
    """Take one step of the algorithm; return its metrics, and the records of its labels and rollouts."""
    config = run.config
    method = config.method
    variant = run.variant
    clock = metrics.Clock(run.sampler)
    questions = questions_of_step(run.questions, config.data.questions_per_step, config.run.seed, step)
    gold_answers = [question.pair.gold for question in questions]

    # 1. The policy answers every question V times in the variant's views.
    groups = generate_rollouts(run, run.policy, "policy", variant.policy_views, questions, step)
    clock.lap("rollout", sampled=True)

    # 2. The teacher moves towards that policy, then answers too.                                       Eq. 11
    teacher_groups: list[Group] = []
    if run.teacher is not None:
        weight = ema_weight(step, run.total_steps, method.ema_start, method.ema_end, method.ema_schedule)
        update(run.teacher, run.policy, weight)  # teacher <- weight * teacher + (1 - weight) * policy
        teacher_groups = generate_rollouts(run, run.teacher, "teacher", variant.teacher_views, questions, step)
        clock.lap("teacher", sampled=True)

    # 3. Majority votes become pseudo-labels; the variant says whose vote labels which group.           Eqs. 7-10
    label_groups(variant, groups, teacher_groups, gold_answers)
    rollouts = rollouts_of(groups)

    # 4. Rewards compare answers with labels, advantages compare rewards within a group.                Eq. 3
    if variant.needs_token_stats:
        assign_token_stats(
            run.policy, rollouts, run.plan.tokens_per_micro_batch, run.device, config.sampling.temperature
        )
    rewards = distributed.run_on_rank0(lambda: [variant.reward(group) for group in groups])
    assign_advantages(groups, rewards, variant.fixed_advantages)
    clock.lap("reward")

    # 5. The policy takes an optimizer step for each mini-batch (by default one, the whole step).       Eqs. 4-6
    measured = update_policy(run, groups, step, clock)

    if run.teacher is not None:
        measured["ema_weight"] = weight
    described, records = metrics.describe_step(run, step, questions, groups, teacher_groups, clock)
    return measured | described, records


def update_policy(run: Run, groups: list[Group], step: int, clock: metrics.Clock) -> dict[str, float]:
    """Take one optimizer step for each mini-batch (Eqs. 4-6); the paper has one, which is the whole step.

    The ratio in Eq. 4 is to the policy that generated the rollouts. With one mini-batch that is the current policy, so
    the ratio is 1; with several, its log-probs are stored before the first update.
    """
    config = run.config
    variant = run.variant
    temperature = config.sampling.temperature
    reference = {"init": run.initial, "ema": run.teacher}[variant.kl_reference] if variant.kl_coef else None
    if config.method.mask_answer:
        mask_answers(rollouts_of(groups), run.tokenizer)
    mini_batches = []
    for part in split_mini_batches(groups, config.optimisation.mini_batches):
        assign_denominators(part, config.method.loss_agg, config.sampling.max_response_tokens)
        rollouts = rollouts_of(part)  # all of them are counted, also those without a gradient
        if reference is None:
            rollouts = select_with_gradient(rollouts)
        batches = micro_batches(rollouts, run.plan.tokens_per_micro_batch, run.device)
        if reference is not None:
            for batch, stats in zip(batches, score(reference, batches, temperature), strict=True):
                batch.reference_logp = stats.logp
        if config.optimisation.mini_batches > 1:
            for batch, stats in zip(batches, score(run.policy, batches, temperature), strict=True):
                batch.old_logp = stats.logp
        mini_batches.append(batches)
    clock.lap("reference")

    rate = learning_rate(step, run.total_steps, config.optimisation)
    measured = []
    for batches in mini_batches:
        measured.append(optimizer_step(run.policy, run.optimizer, batches, rate, variant.kl_coef, config))
    clock.lap("update")
    means = {name: fmean(each[name] for each in measured) for name in measured[0]}
    return means | {"mismatch_max": max(each["mismatch_max"] for each in measured)}


MAX_SKIPPED_STEPS = 9  # in a row, without a finite gradient


def train(config: Config) -> Path:
    """Prepare a run and train; return its folder. SIGINT, SIGTERM and the like end it early, so that it can resume."""
    distributed.start()
    with lock_run_dir(config) as (folder, resumed), distributed.catch_stop_signals() as stop:
        run, first_step = prepare(config, folder, resumed)
        with closing(run.sampler):
            if config.run.preflight:
                print(metrics.preflight(run))
                return folder
            try:
                loop(run, first_step, stop)
            finally:
                if distributed.is_rank0():
                    with suppress(OSError, UserError):  # a picture must not hide why the run has ended
                        (folder / "curves.png").unlink(missing_ok=True)  # not through a link
                        curves.draw([folder], folder / "curves.png")
    return folder


def loop(run: Run, first_step: int, stop: distributed.StopRequest) -> None:
    """Take all steps from the first on; evaluate and save when it is due."""
    config = run.config
    record = json.dumps(asdict(config) | {"plan": run.plan._asdict(), "versions": versions()}, indent=2) + "\n"
    distributed.run_on_rank0(lambda: write_atomic(run.folder / "config.json", record))
    log = RunLog(run.folder, asdict(config), first_step) if distributed.is_rank0() else None
    skipped = 0
    steps = range(first_step, run.total_steps)
    bar = tqdm(steps, initial=first_step, total=run.total_steps, desc="training", smoothing=0, disable=log is None)
    for step in bar:
        stop.unsaved = f"step {step}"
        evaluated = metrics.evaluate_policy(run) if step == 0 or is_due(step, config.data.eval_every) else {}
        measured, records = train_step(run, step)
        row = {"step": step} | evaluated | measured
        ended = distributed.run_on_rank0(partial(write_step, log, bar, row, records, config))
        skipped = skipped + 1 if measured["skipped_steps"] == 1 else 0  # with mini-batches it is a share of them
        if skipped > MAX_SKIPPED_STEPS:
            raise UserError(f"{skipped} steps in a row had no finite gradient and were skipped: lower --lr")
        done = step + 1
        if log and step == first_step and done < run.total_steps:
            bar.write(metrics.pace(measured, run.total_steps - done), file=sys.stderr)
        signal_number = int(distributed.all_reduce_max(stop.number))
        if done == run.total_steps or is_due(done, config.run.save_every) or signal_number or ended:
            saved = checkpoint.save(
                run.folder / "checkpoints", done, train_state(run), config.run.keep, config.run.keep_every
            )
        if signal_number or ended:
            bar.close()
            if log:
                log.close()
                print(f"stopped after {done} steps; go on with --resume {saved}", file=sys.stderr)
            raise ended or SystemExit(128 + signal_number)
    stop.unsaved = ""
    evaluated = metrics.evaluate_policy(run)
    if log:
        if evaluated:
            log.write({"step": run.total_steps} | evaluated, {})
            warn(log)
        log.close()


def write_step(
    log: RunLog | None, bar: "tqdm[int]", measured: dict[str, float], records: Records, config: Config
) -> OSError | UserError | None:
    """Log a step, and warn of what it shows; return what ends the run, so that the policy is saved first."""
    assert log, "rank 0 has one"
    try:
        log.write(measured, records)
        bar.set_postfix(log.headline())
        warn(log)
    except OSError as error:
        return error
    if config.run.stop_on_collapse == "on" and (seen := metrics.detect_collapse(log.history)):
        return UserError(f"collapse: {', '.join(seen)}; --stop-on-collapse off goes on all the same")
    return None


def warn(log: RunLog) -> None:
    for warning in log.warnings(metrics.step_warnings(log.history)):
        tqdm.write(f"step {log.history[-1]['step']}: {warning}", file=sys.stderr)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main(config: Config | None = None) -> None:
    with exit_on_user_error("stopped at once; --resume goes on from the last checkpoint, if there is one"):
        folder = train(config or parse())
        if distributed.is_rank0() and (folder / "metrics.jsonl").exists():
            print(closing_table(folder))
    distributed.stop()


if __name__ == "__main__":
    main(given)
    sys.stdout.flush()
    os._exit(0)  # finished: whatever a library does at the interpreter's exit must not make it look like a failure
