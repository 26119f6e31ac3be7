"""What one sees while it trains: the numbers of a step, a readable sample of it, and an alarm for collapse.

Label-free rewards cannot be trusted to show their own failure: under majority voting the reward goes to 1 while the
model agrees with itself on one wrong answer. Every number here is a mean over the step; gold answers, where there are
any, are only ever used for measuring.
"""

import json
import math
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from data import Pair
from parts import write_whole
from rewards import Answers, Group, Variant, View, Vote, Voter, are_equal
from rollout import Rollout


class Clock:
    """Seconds by phase: `with clock("rollout"): ...` adds to clock.seconds["seconds_rollout"]."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.phase = ""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase, begin = phase, time.perf_counter()
        yield
        self._add(phase, time.perf_counter() - begin)

    def set_apart(self, phase: str, seconds: float) -> None:
        """Count `seconds` of the present phase as another's."""
        self._add(phase, seconds)
        self._add(self.phase, -seconds)

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[f"seconds_{phase}"] = self.seconds.get(f"seconds_{phase}", 0.0) + seconds


@contextmanager
def tracing(file: Path, wanted: bool) -> Iterator[None]:
    """PyTorch's trace of what happens inside, if `wanted`."""
    if not wanted:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(file))


def response_metrics(rollouts: Sequence[Rollout], answers: Sequence[str | None], suffix: str = "") -> dict[str, float]:
    """Length, cuts and answers of rollouts, one question or many."""
    given = Counter(answer for answer in answers if answer is not None)
    commonest = max(given.values(), default=0)
    return {
        f"response_tokens{suffix}": fmean(len(rollout.response_ids) for rollout in rollouts),
        f"truncated{suffix}": fmean(not rollout.finished for rollout in rollouts),
        f"answered{suffix}": fmean(answer is not None for answer in answers),
        f"commonest_answer{suffix}": commonest / max(given.total(), 1),
    }


def sampled_tokens(rollouts: dict[tuple[Voter, View], list[Rollout]]) -> int:
    return sum(len(rollout.response_ids) for said in rollouts.values() for rollout in said)


def vote_metrics(votes: Sequence[Vote], suffix: str = "") -> dict[str, float]:
    return {
        f"vote_share{suffix}": fmean(vote.share for vote in votes),
        f"distinct_answers{suffix}": fmean(vote.distinct for vote in votes),
    }


def label_metrics(
    variant: Variant,
    labels: dict[View, list[str | None]],
    answers: dict[tuple[Voter, View], Answers],
    golds: Sequence[str | None],
) -> dict[str, float]:
    """label_accuracy: share of labels equivalent to the gold answer, where there is one; a missing label is wrong.
    label_agreement: share of labels equal to the policy's own vote on the same view (under plain majority it is 1)."""
    metrics: dict[str, float] = {}
    accuracy: list[bool] = []
    agreement: list[bool] = []
    for view, (voter, _) in variant.label_of.items():
        if voter == "gold":
            continue
        known = [(gold, label) for gold, label in zip(golds, labels[view], strict=True) if gold is not None]
        correct = are_equal([gold for gold, _ in known], [label for _, label in known])
        if correct and len(variant.label_of) > 1:
            metrics[f"label_accuracy/{view}"] = fmean(correct)
        accuracy += correct
        own_votes = answers["policy", view].votes
        agreement += [vote.label == label for vote, label in zip(own_votes, labels[view], strict=True)]
    metrics |= {"label_accuracy": fmean(accuracy)} if accuracy else {}
    return metrics | ({"label_agreement": fmean(agreement)} if agreement else {})


def step_metrics(
    variant: Variant,
    rollouts: dict[tuple[Voter, View], list[Rollout]],
    answers: dict[tuple[Voter, View], Answers],
    labels: dict[View, list[str | None]],
    golds: Sequence[str | None],
    rewards: Sequence[Sequence[float]],
) -> dict[str, float]:
    """Means over the policy's rollouts of a step; /x and /x' by view where there are two, /teacher for the teacher."""
    by_view = len(rewards) // len(variant.policy_views)
    metrics = {"reward": fmean(r for group in rewards for r in group)}
    metrics["zero_std_groups"] = fmean(len(set(group)) == 1 for group in rewards)
    parts: dict[str, list[tuple[Voter, View]]] = {"": [("policy", view) for view in variant.policy_views]}
    if len(variant.policy_views) > 1:
        parts |= {f"/{view}": [("policy", view)] for view in variant.policy_views}
        for i, view in enumerate(variant.policy_views):
            metrics[f"reward/{view}"] = fmean(r for g in rewards[i * by_view : (i + 1) * by_view] for r in g)
    if variant.teacher_views:
        parts["/teacher"] = [("teacher", view) for view in variant.teacher_views]
    for suffix, keys in parts.items():
        boxed = [answer for key in keys for group in answers[key].boxed for answer in group]
        metrics |= response_metrics([r for key in keys for r in rollouts[key]], boxed, suffix)
        metrics |= vote_metrics([vote for key in keys for vote in answers[key].votes], suffix)
    return metrics | label_metrics(variant, labels, answers, golds)


def readable_sample(
    step: int,
    variant: Variant,
    question: Pair,
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float]],
) -> list[dict[str, Any]]:
    """One question of the step in each of the policy's views: for rollouts.jsonl."""
    by_view = len(groups) // len(variant.policy_views)
    sample = []
    for i, view in enumerate(variant.policy_views):
        group = groups[i * by_view]
        voter, voted_view = variant.label_of.get(view, (None, None))
        sample.append(
            {
                "step": step,
                "id": question.id,
                "view": view,
                "question": question.wording(view),
                "gold": question.gold,
                "label": group.label,
                "label_from": f"{voter} on {voted_view}" if voter else None,
                "answers": group.boxed,
                "rewards": rewards[i * by_view],
                "text": group.texts[0],
            }
        )
    return sample


WINDOW = 5  # steps that an alarm averages over


def collapse_signs(history: Sequence[dict[str, float]]) -> dict[str, str]:
    """Signs that the policy games its reward, comparing the last steps with the first: {sign: what was seen}.

    Sharpening alone raises the vote share and lowers entropy in healthy runs too; what gives collapse away is the same
    answer to different questions, answers that stop coming, or a length or an entropy that leaves its range.
    """
    if len(history) < 2 * WINDOW:
        return {}

    def at_first(key: str) -> float:
        return fmean(metrics.get(key, 0.0) for metrics in history[:WINDOW])

    def now(key: str) -> float:
        return fmean(metrics.get(key, 0.0) for metrics in history[-WINDOW:])

    def moved(key: str) -> str:
        return f"{key} {at_first(key):.2f} -> {now(key):.2f}"

    signs = {
        "one answer to many questions": (
            now("commonest_answer") > max(0.4, 1.5 * at_first("commonest_answer")),
            "commonest_answer",
        ),
        "answers stop coming": (now("answered") < at_first("answered") - 0.2, "answered"),
        "responses run into the limit": (now("truncated") > at_first("truncated") + 0.2, "truncated"),
        "responses shrink": (now("response_tokens") < 0.4 * at_first("response_tokens"), "response_tokens"),
        "entropy explodes": (now("entropy") > 3 * at_first("entropy") + 0.1, "entropy"),
    }
    return {sign: moved(key) for sign, (seen, key) in signs.items() if seen}


def board_scalars(board: Any, step: int, metrics: dict[str, float]) -> None:
    for key, value in metrics.items():
        board.add_scalar(key, value, step)


def peak_memory_gb() -> float:
    """Of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class RunLog:
    """metrics.jsonl and rollouts.jsonl of a run's folder, and on request TensorBoard and Weights & Biases."""

    def __init__(self, folder: Path, config: dict[str, Any], first_step: int) -> None:
        self.metrics_file = folder / "metrics.jsonl"
        self.rollouts_file = folder / "rollouts.jsonl"
        for file in (self.metrics_file, self.rollouts_file):
            keep_steps_before(file, first_step)
        self.history = [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
        self.alarms: set[str] = set()
        self.writers: list[Any] = []
        if config["run"]["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
            self.writers.append(lambda step, metrics: board_scalars(board, step, metrics))
        if config["run"]["wandb"]:
            import wandb

            wandb.init(project="co-rewarding", name=folder.name, dir=str(folder), config=config, resume="allow")
            self.writers.append(lambda step, metrics: wandb.log(metrics, step=step))

    def headline(self) -> dict[str, str]:
        """The numbers that matter, for the progress bar."""
        shown = {"reward": "reward", "label_accuracy": "label acc", "eval_accuracy": "held-out acc"}
        latest = {name: next((m[key] for m in reversed(self.history) if key in m), None) for key, name in shown.items()}
        return {name: f"{value:.2f}" for name, value in latest.items() if value is not None}

    def new_collapse_signs(self) -> list[str]:
        """One line for each sign that was not seen before."""
        signs = collapse_signs(self.history)
        new = [f"{sign} ({seen})" for sign, seen in signs.items() if sign not in self.alarms]
        self.alarms |= set(signs)
        return new

    def write(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Of one step; what a skipped step could not measure is left out, as NaN is no JSON."""
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.history.append(metrics)
        append(self.metrics_file, [metrics])
        append(self.rollouts_file, samples)
        for writer in self.writers:
            writer(metrics["step"], {key: value for key, value in metrics.items() if key != "step"})


def append(file: Path, records: Sequence[dict[str, Any]]) -> None:
    with file.open("a") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def keep_steps_before(file: Path, step: int) -> None:
    """What a killed run wrote after its last checkpoint, perhaps half a line, is going to be written again."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    # Killed here, too, a run loses nothing.
    write_whole(file, "".join(line for line in whole if json.loads(line)["step"] < step))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def closing_table(folder: Path) -> str:
    """What a run achieved, where the time went, and what to try next."""
    config, history = json.loads((folder / "config.json").read_text()), read_metrics(folder)

    def change(key: str, window: int = 1) -> str | None:
        values = [metrics[key] for metrics in history if key in metrics]
        return f"{fmean(values[:window]):.2f} -> {fmean(values[-window:]):.2f}" if values else None

    seconds: dict[str, float] = {}
    for key, value in ((key, value) for metrics in history for key, value in metrics.items()):
        if key.startswith("seconds_"):
            seconds[key.removeprefix("seconds_")] = seconds.get(key.removeprefix("seconds_"), 0.0) + value
    by_phase = ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
    model, source, variant = config["model"]["name"], config["data"]["source"], config["method"]["variant"]
    flags = f" --model {model}" if model != "embedded" else ""
    flags += f" --data {source}" if source != "embedded" else ""
    rows = {
        "held-out accuracy, sampled": change("eval_accuracy"),
        "held-out accuracy, greedy": change("eval_accuracy/greedy"),
        "label accuracy": change("label_accuracy", window=5),
        "reward": change("reward", window=5),
        "seconds": f"{sum(seconds.values()):.0f} ({by_phase})",
        "written to": f"{folder}/ (config.json, metrics.jsonl, rollouts.jsonl, curves.png)",
        "policy": f"{folder}/checkpoints/latest/policy (AutoModelForCausalLM.from_pretrained loads it)",
        "see it collapse": f"python train.py{flags} --variant entropy, or --variant majority --lr 1e-3",
        "compare": f"python plot.py {folder} runs/ANOTHER --out comparison.png",
    }
    lines = [f"  {name:<27} {value}" for name, value in rows.items() if value is not None]
    return "\n".join([f"variant {variant}, model {model}, data {source}", *lines])
