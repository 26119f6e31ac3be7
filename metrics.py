"""What one sees of a run: the numbers of a step, its labels and rollouts, evaluations, an alarm for collapse.

Label-free rewards cannot be trusted to show their own failure: under majority voting the reward goes to 1 while the
model agrees with itself on one wrong answer. Every number here is a mean over the step; gold answers, where there are
any, are only ever used for measuring.
"""

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

import torch
from torch._dynamo.utils import calculate_time_spent
from transformers import PreTrainedModel

from data import Pair, PromptedPair, questions_of_step
from evaluate import Asked, EvaluationSettings, ask_questions, by_group, result_of
from lm import distributed
from lm.engine import Sampler
from lm.memory import attention_widths
from lm.record import Rollout
from rewards import Group, Variant, View, matches, rollouts_of
from rollout import Run, generate_rollouts
from store.jsonl import Record, read_rows, to_lines, write_atomic
from store.log import Records

# ---------------------------------------------------------------- time and memory


class Clock:
    """Seconds by phase: `clock.lap("rollout")` books the time since the last lap as seconds_rollout."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.sampler = sampler
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()
        self.compiled = calculate_time_spent()["total_wall_time"]

    def lap(self, phase: str, sampled: bool = False) -> None:
        """Book the time since the last lap, apart from compiling and, if it `sampled`, from the load of weights."""
        now = time.perf_counter()
        sync = self.sampler.sync_seconds if self.sampler and sampled else None
        if compiling := calculate_time_spent()["total_wall_time"] - self.compiled:
            self.seconds["seconds_compile"] += compiling
            self.compiled += compiling
        self.seconds[f"seconds_{phase}"] += now - self.last - (sync or 0.0) - compiling
        if sync is not None:
            self.seconds["seconds_sync"] += sync
        self.last = now


def peak_memory_gb(sleeping_bytes: int = 0) -> float:
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() - sleeping_bytes) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


BF16_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362}  # dense, of a card


def operations(lm: PreTrainedModel, rollouts: Sequence[Rollout]) -> float:
    """Count those of a forward and backward pass: 6 for a weight and token, and for causal attention's products."""
    model = lm.config.get_text_config()
    head = lm.get_output_embeddings().weight
    embedding = lm.get_input_embeddings().weight
    body = lm.num_parameters() - sum(weight.numel() for weight in {head, embedding})
    attention = attention_widths(lm)[0] * model.num_hidden_layers
    counts = [body * len(r) + head.numel() * len(r.response_ids) + attention * len(r) ** 2 for r in rollouts]
    return float(6 * sum(counts))


def throughput(
    run: Run, groups: Sequence[Group], teacher_groups: Sequence[Group], seconds: dict[str, float]
) -> dict[str, float]:
    """Compute tokens a second, sampled and trained on, and the share of a GPU's arithmetic that training uses (MFU)."""
    sampled = sum(group.sampled_tokens for group in [*groups, *teacher_groups])
    trained = [rollout for rollout in rollouts_of(groups) if run.variant.kl_coef or rollout.advantage]
    measured = {
        "tokens_per_second": sampled / sum(seconds.values()),
        "tokens_per_second/rollout": sampled / (seconds["seconds_rollout"] + seconds.get("seconds_teacher", 0)),
        "tokens_per_second/train": sum(map(len, trained)) / seconds["seconds_update"],
    }
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if peak := next((tflops for name, tflops in BF16_TFLOPS.items() if name in card), None):
        work = operations(run.policy.lm, trained) / distributed.world_size()
        measured["mfu"] = work / seconds["seconds_update"] / (peak * 1e12)
    return measured


def pace(measured: dict[str, float], steps: int) -> str:
    seconds = sum(value for name, value in measured.items() if name.startswith("seconds_"))
    rest = (seconds - measured.get("seconds_compile", 0.0)) * steps
    shown = f"{rest / 3600:.1f} hours" if rest > 5400 else f"{rest / 60:.1f} minutes"
    return f"the first step took {seconds:.1f} s; {steps:,} more like it take about {shown}"


# ---------------------------------------------------------------- one step


def commonest_answer(groups: Sequence[Group]) -> float:
    """Compute the share of the most frequent answer among all answers to all questions."""
    given = Counter(rollout.answer for rollout in rollouts_of(groups) if rollout.answer is not None)
    return max(given.values(), default=0) / max(given.total(), 1)


# Statistics of groups: each is logged over all, and by view and for the teacher where there are several.
STATISTICS: dict[str, Callable[[Sequence[Group]], float]] = {
    "response_tokens": lambda groups: fmean(len(rollout.response_ids) for rollout in rollouts_of(groups)),
    "truncated": lambda groups: fmean(not rollout.finished for rollout in rollouts_of(groups)),
    "answered": lambda groups: fmean(rollout.answer is not None for rollout in rollouts_of(groups)),
    "vote_share": lambda groups: fmean(group.vote.share for group in groups),
    "distinct_answers": lambda groups: fmean(group.vote.distinct for group in groups),
    "commonest_answer": commonest_answer,
}


def describe_step(
    run: Run,
    step: int,
    questions: Sequence[PromptedPair],
    groups: Sequence[Group],
    teacher_groups: Sequence[Group],
    clock: Clock,
) -> tuple[dict[str, float], Records]:
    """Measure a step, and record its labels and the rollouts to its first question; rank 0 compares for all."""
    gold_answers = [question.pair.gold for question in questions]

    def describe() -> tuple[dict[str, float], Records]:
        right = compare_with_gold(groups, gold_answers)
        labels = label_records(step, groups, right)
        measured = gold_metrics(groups, right) | label_metrics(labels)
        measured |= group_metrics(run.variant, groups, teacher_groups)
        shown = rollout_records(step, run.variant, questions[0].pair, groups, teacher_groups)
        return measured, {"labels": labels, "rollouts": shown}

    measured, records = distributed.run_on_rank0(describe)
    clock.lap("metrics")
    measured |= throughput(run, groups, teacher_groups, clock.seconds) | clock.seconds
    peak = peak_memory_gb(run.sampler.sleeping_bytes)
    return measured | {"peak_memory_gb": distributed.all_reduce_max(peak)}, records


def group_metrics(variant: Variant, groups: Sequence[Group], teacher_groups: Sequence[Group]) -> dict[str, float]:
    """Average over the policy's groups: /x and /x' by view where there are two, /teacher for the teacher's groups."""
    parts = {"": groups}
    if len(variant.policy_views) > 1:
        parts |= {f"/{view}": [group for group in groups if group.view == view] for view in variant.policy_views}
    metrics = {f"reward{suffix}": fmean(each.reward for each in rollouts_of(part)) for suffix, part in parts.items()}
    metrics["zero_std_groups"] = fmean(len({each.reward for each in group.rollouts}) == 1 for group in groups)
    if teacher_groups:
        parts["/teacher"] = teacher_groups
    for suffix, part in parts.items():
        metrics |= {f"{name}{suffix}": statistic(part) for name, statistic in STATISTICS.items()}
    return metrics


Right = dict[tuple[int, View], list[bool]]  # (place, view) of a group -> its label is right, and each of its answers


def compare_with_gold(groups: Sequence[Group], gold_answers: Sequence[str | None]) -> Right:
    """Compare labels and answers of the groups whose gold is known; a missing one is not right."""
    known = [group for group in groups if gold_answers[group.place] is not None]
    compared = [[group.label, *group.answers] for group in known]
    golds = chain.from_iterable([gold_answers[group.place]] * (1 + len(group.rollouts)) for group in known)
    right = iter(matches(list(golds), list(chain.from_iterable(compared)), "math"))
    pairs = zip(known, compared, strict=True)
    return {(group.place, group.view): list(islice(right, len(of_group))) for group, of_group in pairs}


def label_records(step: int, groups: Sequence[Group], right: Right) -> list[Record]:
    """Record each label that a vote gave: whether it is right, if gold is known, and whether the group's vote agrees.

    Under plain majority voting the group's vote always agrees.
    """
    records = []
    for group in groups:
        if group.label_vote is None:
            continue
        record: Record = {"step": step, "id": group.question_id, "view": group.view, "label": group.label}
        record |= {"share": group.label_share, "agrees": group.vote.label == group.label}
        if verdicts := right.get((group.place, group.view)):
            record["right"] = verdicts[0]
        records.append(record)
    return records


def label_metrics(labels: Sequence[Record]) -> dict[str, float]:
    """Compute label_agreement with the group's own vote, and label_accuracy where gold is known, also by view."""
    known = [label for label in labels if "right" in label]
    shares = {"label_agreement": [label["agrees"] for label in labels]}
    shares["label_accuracy"] = [label["right"] for label in known]
    views = dict.fromkeys(label["view"] for label in labels)
    if len(views) > 1:
        for view in views:
            shares[f"label_accuracy/{view}"] = [label["right"] for label in known if label["view"] == view]
    return {key: fmean(part) for key, part in shares.items() if part}


def gold_metrics(groups: Sequence[Group], right: Right) -> dict[str, float]:
    """Average over the rollouts whose gold is known.

    rollout_accuracy is the share of them that are right. reward_accuracy, for rewards of 0 or 1, is the share of
    rewards that match those from the gold answer.
    """
    rollouts = rollouts_of(group for group in groups if (group.place, group.view) in right)
    verdicts = list(chain.from_iterable(of_group[1:] for of_group in right.values()))
    metrics = {"rollout_accuracy": fmean(verdicts)} if verdicts else {}
    if verdicts and {rollout.reward for rollout in rollouts} <= {0.0, 1.0}:
        paid = zip(rollouts, verdicts, strict=True)
        metrics["reward_accuracy"] = fmean(rollout.reward == float(is_right) for rollout, is_right in paid)
    return metrics


def rollout_records(
    step: int, variant: Variant, question: Pair, groups: Sequence[Group], teacher_groups: Sequence[Group]
) -> list[Record]:
    """Record the rollouts to the step's first question, a record for each view: tools/look.py shows them."""
    shown = [group for group in groups if group.place == 0]
    votes = {f"policy on {group.view}": group.answers for group in shown}
    votes |= {f"teacher on {group.view}": group.answers for group in teacher_groups if group.place == 0}
    records = []
    for group in shown:
        voter, voted_view = variant.label_of.get(group.view, (None, None))
        record: Record = {"step": step, "id": question.id, "view": group.view}
        record |= {"question": question.wording(group.view), "gold": question.gold}
        record |= {"label": group.label, "label_from": f"{voter} on {voted_view}" if voter else None}
        record |= {"label_share": group.label_share, "votes": votes, "answers": group.answers}
        record["rewards"] = [rollout.reward for rollout in group.rollouts]
        record["texts"] = [rollout.text for rollout in group.rollouts]
        records.append(record)
    return records


def evaluate_policy(run: Run) -> dict[str, float]:
    """Measure the policy on the run's benchmark, if it has one: mean accuracy, sampled and greedy, also by group."""
    if run.benchmark is None:
        return {}
    clock = Clock()
    config = run.config
    settings = EvaluationSettings(
        k=config.data.eval_samples,
        temperature=config.sampling.temperature,
        max_response_tokens=config.sampling.max_response_tokens,
        seed=config.run.seed,
    )
    questions = enumerate(zip(run.benchmark.pairs, run.eval_prompts, strict=True))
    asked = [Asked(pair.id, place, pair, prompt) for place, (pair, prompt) in questions]
    with run.sampler.loaded(run.policy.lm) as sample:
        shared = distributed.shard_prompts(sample)
        answered = ask_questions(shared, run.tokenizer, asked, settings)
    values: dict[str, list[float]] = result_of(run.benchmark, answered)["values"]
    measured = {"eval_truncated": fmean(values["truncated"])}
    measured["eval_agreement"] = distributed.run_on_rank0(lambda: first_agreement(run.folder, answered))
    for name, key in {"eval_accuracy": f"avg@{settings.k}", "eval_accuracy/greedy": "greedy"}.items():
        measured[name] = fmean(values[key])
        measured[f"{name}/lenient"] = fmean(values[f"{key}, lenient"])
        for group, part in by_group(run.benchmark, values[key]).items():
            measured[f"{name}/{group}"] = fmean(part)
    clock.lap("evaluation")
    return measured | clock.seconds


def first_agreement(folder: Path, answered: Sequence[Record]) -> float:
    """Compute the share of sampled answers that equal the greedy one of the run's first evaluation.

    It needs no gold. Sharpening raises it, and decay lowers it, even where rewards, votes and lengths hide that. The
    first answers are kept in the folder.
    """
    file = folder / "first-answers.jsonl"
    greedy = {row["question"]: row["answer"] for row in answered if row["greedy"]}
    first = {row["question"]: row["answer"] for row in read_rows(file, is_answer)} if file.exists() else {}
    if first.keys() != greedy.keys():  # the first evaluation, or the first on another benchmark
        first = greedy
        write_atomic(file, to_lines([{"question": question, "answer": answer} for question, answer in first.items()]))
    sampled = [row for row in answered if not row["greedy"]]
    return fmean(matches([first[row["question"]] for row in sampled], [row["answer"] for row in sampled], "math"))


def is_answer(row: Record) -> bool:
    return isinstance(row.get("question"), str) and isinstance(row.get("answer", 0), str | None)


def preflight(run: Run) -> str:
    """Say by one step's rollouts of the policy whether votes can teach it, and why not; rank 0 compares for all."""
    questions = questions_of_step(run.questions, run.config.data.questions_per_step, run.config.run.seed, 0)
    groups = generate_rollouts(run, run.policy, "policy", run.variant.policy_views[:1], questions, 0)
    gold_answers = [question.pair.gold for question in questions]
    return distributed.run_on_rank0(lambda: describe_preflight(groups, gold_answers))


def describe_preflight(groups: Sequence[Group], gold_answers: Sequence[str | None]) -> str:
    for group in groups:
        group.label = group.vote.label
    right = compare_with_gold(groups, gold_answers)
    seen = {name: statistic(groups) for name, statistic in STATISTICS.items()}
    if right:
        seen["pass@1"] = fmean(fmean(of_group[1:]) for of_group in right.values())
        seen[f"pass@{len(groups[0].rollouts)}"] = fmean(any(of_group[1:]) for of_group in right.values())
        seen["label_accuracy"] = fmean(of_group[0] for of_group in right.values())
    reasons = {
        "most answers have no box: show the form with --chat-template docs/two-examples.jinja": seen["answered"] < 0.5,
        "most responses are cut: raise --max-response-tokens": seen["truncated"] > 0.5,
        "votes agree already, there is little to learn from": seen["vote_share"] > 0.95,
        "votes are no better than single answers": bool(right) and seen["pass@1"] >= max(seen["label_accuracy"], 0.01),
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    lines = [f"  {name:<17} {value:.2f}" for name, value in seen.items()]
    return "\n".join([f"preflight: {'no, ' + '; '.join(found) if found else 'yes'}", *lines])


# ---------------------------------------------------------------- the alarm

WINDOW = 5  # steps that an alarm averages over
LOST_AGREEMENT = 0.25  # from the best of the evaluations: no false alarm in half of the methods of docs/RESULTS.md
# Signs of collapse: a metric, and when its means over the first and the last steps are alarming.
SIGNS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "one answer to many questions": ("commonest_answer", lambda first, now: now > max(0.4, 1.5 * first)),
    "answers stop coming": ("answered", lambda first, now: now < max(first - 0.2, 0.4 * first)),
    "responses run into the limit": ("truncated", lambda first, now: now > first + 0.2),
    "responses shrink": ("response_tokens", lambda first, now: now < 0.4 * first),
    "entropy explodes": ("entropy", lambda first, now: now > 3 * first + 0.1),
}


def mean_of(key: str, steps: Sequence[dict[str, float]]) -> float:
    """Average a metric over the steps that have it: the row of the last evaluation has none of a step."""
    return fmean([step[key] for step in steps if key in step] or [0.0])


def detect_collapse(history: Sequence[dict[str, float]]) -> dict[str, str]:
    """Find signs that the policy games its reward, by the last steps against the first: {sign: what was seen}.

    Sharpening alone raises the vote share and lowers entropy in healthy runs too; what gives collapse away is the same
    answer to different questions, answers that stop coming, or a length or an entropy that leaves its range.
    """
    if len(history) < 2 * WINDOW:
        return {}
    seen = {}
    for sign, (key, is_alarming) in SIGNS.items():
        first = mean_of(key, history[:WINDOW])
        now = mean_of(key, history[-WINDOW:])
        if is_alarming(first, now):
            seen[sign] = f"{key} {first:.2f} -> {now:.2f}"
    agreement = [step["eval_agreement"] for step in history if "eval_agreement" in step] or [0.0]
    if agreement[-1] < max(agreement) - LOST_AGREEMENT:
        seen["the policy leaves its first answers"] = f"eval_agreement {max(agreement):.2f} -> {agreement[-1]:.2f}"
    return seen


def step_warnings(history: Sequence[dict[str, float]]) -> dict[str, str]:
    """Find what to warn of after a step, and a cure: what the first one shows at once, signs of collapse.

    Returns: {sign: what was seen}.
    """
    latest = history[-1]
    is_first = len(history) == 1
    seen = {}
    if is_first and latest["answered"] < 0.1:
        seen["no box"] = (
            f"{latest['answered']:.0%} of the answers are boxed, {latest['truncated']:.0%} are cut at the limit: "
            "raise --max-response-tokens, or show the form with --chat-template docs/two-examples.jinja"
        )
    if is_first and "label_agreement" in latest and "label_accuracy" not in latest:
        seen["no gold"] = "no gold answers: whether labels are right is not known"
    if len(history) >= WINDOW and all(step.get("zero_std_groups") == 1 for step in history[-WINDOW:]):
        seen["no difference"] = f"in {WINDOW} steps all rewards were equal in every group: nothing is learnt from them"
    if latest.get("skipped_steps"):
        seen["skipped"] = "its gradient is not finite, the weights stay as they were; lower --lr if it comes again"
    return seen | {sign: f"collapse? {sign} ({what})" for sign, what in detect_collapse(history).items()}
