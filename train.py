"""Co-rewarding (arXiv 2508.00410): reinforcement learning for reasoning without labels.

    python train.py                                             # variant II on the embedded task, a laptop, minutes
    python train.py --variant I --model Qwen3-8B-Base --data math
    torchrun --nproc-per-node 4 --shutdown-timeout 900 train.py --variant I --model Qwen3-8B-Base --data math

A view is a wording of a question: x as written, x' rephrased. The paper's variants are rows of `rewards.VARIANTS`:

           policy answers   teacher answers   labels of x, of x'              KL term to
    I      x, x'            -                 policy's vote on x', on x       initial policy
    II     x                x                 teacher's vote on x             teacher
    III    x, x'            x, x'             teacher's vote on x', on x      teacher

One step of any of them:

    1. the policy answers every question V times, in the row's views (V = G unless --votes asks for more)
    2. the teacher, if there is one, moves towards that policy and answers too       (Eq. 11)
    3. majority votes become pseudo-labels, each for the view that the row says       (Eqs. 7-10)
    4. rewards compare answers with pseudo-labels, advantages compare rewards         (Eq. 3)
    5. one optimizer step on the clipped surrogate plus KL to the reference           (Eqs. 4-6)

What differs from the paper's equations and from the authors' code is said at the head of grpo.py, rewards.py and
teacher.py. Shapes: Q questions a step, V >= G rollouts a question and view, which all vote; the first G of them
are the group that is trained on; N = views x Q x G rollouts of the policy, by view, by question, then those of a group.
"""

from config import Config, UserError, parse, told_in_a_sentence

if __name__ == "__main__":
    with told_in_a_sentence():
        given = parse()  # --help and wrong flags are answered at once: the imports that follow take seconds

import json
import os
import signal
import sys
from contextlib import closing, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import metrics
from data import questions_of_step
from evaluate import accuracy_of
from grpo import denominators, group_advantages, learning_rate, mini_batches, optimizer_step
from lm import ranks
from lm.packing import Rollout, micro_batches
from lm.scoring import mean_per_rollout, score
from prepare import Run, prepare, to_save
from rewards import Group, label_groups, read_groups, with_means
from rollout import ask, decode
from store import checkpoint, curves
from store.files import write_whole
from store.folder import claimed
from store.log import Records, RunLog, closing_table
from store.results import versions
from teacher import ema_weight, update


def train_step(run: Run, step: int) -> tuple[dict[str, float], Records]:
    """One step of the algorithm; returns its metrics, and records of its labels and rollouts to read."""
    config, method, row, clock = run.config, run.config.method, run.variant, metrics.Clock()
    G, V = config.sampling.rollouts, config.votes  # V answers to a question vote, the first G of them are trained on
    questions = questions_of_step(run.questions, config.data.questions_per_step, config.run.seed, step)
    golds = [question.pair.gold for question in questions]  # in no prompt: only where the row says so a label

    # 1. The policy answers every question V times, in the row's views: {(who, view): Q * V rollouts}, on all ranks.
    said = ask(run.sampler, run.policy, "policy", row.policy_views, questions, step, config)
    clock.lap("rollout", sync=run.sampler.sync_seconds)

    # 2. The teacher moves towards the policy that has just answered, then answers too (Algorithm 2).          Eq. 11
    if run.teacher is not None:
        w = ema_weight(step, run.total_steps, method.ema_start, method.ema_end, method.ema_schedule)
        update(run.teacher, run.policy, w)  # teacher <- w teacher + (1 - w) policy
        said |= ask(run.sampler, run.teacher, "teacher", row.teacher_views, questions, step, config)
        clock.lap("teacher", sync=run.sampler.sync_seconds)

    # 3. Every group of V votes; the row says whose vote labels which of the policy's groups.             Eqs. 7-10
    # Answers are compared on the first rank, which tells the others: a comparison may time out on one of them.
    voted = ranks.on_first(
        lambda: {key: read_groups(decode(each, run.tokenizer), V, method.answer_match, G) for key, each in said.items()}
    )
    groups = label_groups(row, voted, golds)

    # 4. Rewards [views x Q][G] compare answers with labels; advantages [N] compare rewards within a group.    Eq. 3
    rollouts = [rollout for view in row.policy_views for i, rollout in enumerate(said["policy", view]) if i % V < G]
    groups = read_logits(run, groups, rollouts) if row.reward_reads_logits else groups
    rewards = ranks.on_first(lambda: row.reward(groups))
    advantages = group_advantages(torch.tensor(rewards).flatten(), G).to(run.device)  # (r - mean) / (std + 1e-6)
    clock.lap("reward")

    # 5. One optimizer step on Eq. 4's loss; with --mini-batches several, each on a part of the questions. Eqs. 4-6
    measured = learn(run, step, rollouts, advantages, clock)

    labels = ranks.on_first(lambda: metrics.label_records(step, row, questions, groups))
    measured |= ranks.on_first(lambda: metrics.step_metrics(row, voted, groups, golds, rewards, labels))
    measured |= {"ema_weight": w} if run.teacher is not None else {}
    clock.lap("metrics")
    tokens = sum(len(rollout.response_ids) for each in said.values() for rollout in each)
    measured["tokens_per_second"] = tokens / sum(clock.seconds.values())
    sample = metrics.readable_sample(step, row, questions[0].pair, voted, groups, rewards)
    return measured | clock.seconds, {"labels": labels, "rollouts": sample}


def learn(
    run: Run, step: int, rollouts: list[Rollout], advantages: torch.Tensor, clock: metrics.Clock
) -> dict[str, float]:
    """M optimizer steps (`--mini-batches`, 1) on -min(c A, clip(c) A) + beta k3(policy, anchor), each on its part of
    the questions (Eqs. 4-6). c is the ratio to the policy that has answered, whose log-probs take a pass of their own
    if M > 1, and else are those at hand (c = 1). The anchor is the initial policy, or the teacher as it answered."""
    row, settings, sampling = run.variant, run.config.optimisation, run.config.sampling
    anchor = {"init": run.initial, "ema": run.teacher}[row.kl_reference] if row.kl_coef else None
    views, G, M = len(row.policy_views), sampling.rollouts, settings.mini_batches
    parts = mini_batches(len(rollouts) // views // G, G, views, M)
    trained = [with_gradient(part, None if anchor else advantages.tolist()) for part in parts]
    batches = [micro_batches(rollouts, settings.tokens_per_micro_batch, run.device, of_part) for of_part in trained]
    anchors = [score(anchor, each, sampling.temperature) if anchor else None for each in batches]
    old = [score(run.policy, each, sampling.temperature) if M > 1 else None for each in batches]
    clock.lap("reference")
    counts = denominators(run.config.method.loss_agg, rollouts, list(chain(*parts)), sampling.max_response_tokens)
    policy, optimizer, counts = run.policy, run.optimizer, counts.to(run.device)
    rate = learning_rate(step, run.total_steps, settings)
    measured = [
        optimizer_step(policy, optimizer, each, advantages, of_anchor, counts, row.kl_coef, rate, run.config, of_old)
        for each, of_anchor, of_old in zip(batches, anchors, old, strict=True)
    ]
    clock.lap("update")
    return {name: fmean(of_step[name] for of_step in measured) for name in measured[0]}


def read_logits(run: Run, groups: list[Group], rollouts: list[Rollout]) -> list[Group]:
    """The groups with the policy's entropy and self-certainty of each rollout: one more forward pass."""
    batches = micro_batches(rollouts, run.config.optimisation.tokens_per_micro_batch, run.device)
    stats = score(run.policy, batches, run.config.sampling.temperature)
    return with_means(groups, mean_per_rollout(batches, stats, len(rollouts)))


def with_gradient(part: list[range], advantages: list[float] | None) -> list[int]:
    """Which rollouts of a mini-batch have a gradient: all with a KL term (no `advantages` given), else those whose
    advantage is not 0. If none has, the first stays: AdamW must see a gradient of 0, not none."""
    places = [place for of_view in part for place in of_view]
    return places if advantages is None else [place for place in places if advantages[place]] or places[:1]


SKIPPED_AT_MOST = 9  # steps in a row without a finite gradient


def train(config: Config) -> Path:
    """Prepare and loop; returns the run's folder. Stops early, resumably, on SIGINT and SIGTERM."""
    ranks.start()
    with claimed(config) as (folder, resumed):
        watch = ranks.Watch()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, watch.request)
        run, first_step = prepare(config, folder, resumed)
        with closing(run.sampler):
            try:
                loop(run, first_step, watch)
            except KeyboardInterrupt:
                saved = checkpoint.newest_first(folder / "checkpoints")
                on_disk = f"go on with --resume {saved[0]}" if saved else "no checkpoint had been written"
                raise KeyboardInterrupt(f"stopped at once; {on_disk}") from None
            finally:
                if ranks.is_first():
                    with suppress(OSError, UserError):  # a picture is not worth the reason why the run has ended
                        (folder / "curves.png").unlink(missing_ok=True)  # a link is not followed
                        curves.draw([folder], folder / "curves.png")
    return folder


def loop(run: Run, first_step: int, watch: ranks.Watch) -> None:
    """All steps from the first on, with evaluations and checkpoints when they are due."""
    config, settings, skipped = run.config, run.config.run, 0
    record = json.dumps(asdict(config) | {"versions": versions()}, indent=2) + "\n"
    ranks.on_first(lambda: write_whole(run.folder / "config.json", record))
    log = RunLog(run.folder, asdict(config), first_step) if ranks.is_first() else None
    steps = range(first_step, run.total_steps)
    bar = tqdm(steps, initial=first_step, total=run.total_steps, desc="training", smoothing=0, disable=log is None)
    for step in bar:
        watch.at_work_on = f"step {step}"
        evaluated = accuracy_of(run) if step == 0 or is_due(step, config.data.eval_every) else {}
        seen, records = train_step(run, step)
        seen["peak_memory_gb"] = ranks.largest(metrics.peak_memory_gb(run.sampler.sleeping_bytes))
        if log:
            log.write({"step": step} | evaluated | seen, records)
            bar.set_postfix(log.headline())
            for warning in log.warnings(metrics.signs(log.history, first=step == first_step)):
                bar.write(f"step {step}: {warning}", file=sys.stderr)
        skipped = skipped + 1 if seen["skipped_steps"] == 1 else 0  # with mini-batches it is a share of them
        if skipped > SKIPPED_AT_MOST:
            raise UserError(f"{skipped} steps in a row had no finite gradient and were skipped: lower --lr")
        done, stop_signal = step + 1, int(ranks.largest(watch.signal))
        if done == run.total_steps or is_due(done, settings.save_every) or stop_signal:
            saved = checkpoint.save(run.folder / "checkpoints", done, to_save(run), settings.keep, settings.keep_every)
        if stop_signal:
            bar.close()
            if log:
                log.close()
                print(f"stopped after step {step}; go on with --resume {saved}", file=sys.stderr)
            raise SystemExit(128 + stop_signal)
    watch.at_work_on = ""
    evaluated = accuracy_of(run)
    if log and evaluated:
        log.write({"step": run.total_steps} | evaluated, {})
    if log:
        log.close()


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main(config: Config | None = None) -> None:
    with told_in_a_sentence():
        folder = train(config or parse())
    if ranks.is_first():
        print(closing_table(folder))
    ranks.stop()


if __name__ == "__main__":
    main(given)
    sys.stdout.flush()
    os._exit(0)  # finished: whatever a library does at the interpreter's exit must not make it look like a failure
