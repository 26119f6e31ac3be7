"""What one sees while it trains: the numbers, the alarm, the table."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import ScriptedSampler, group_of, tiny_lm, tiny_rollouts, tiny_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import metrics
from config import UserError
from data import Pair
from grpo import assign_advantages
from metrics import compare_with_gold, detect_collapse, gold_metrics, group_metrics, label_metrics, label_records
from rewards import VARIANTS, Group, Variant, View, label_groups, rollouts_of
from store import log
from store.jsonl import append_rows


def groups(*answers: list[str | None], view: View = "x") -> list[Group]:
    """Rollouts of as many tokens as their answer has characters; no answer is a cut one of 9."""
    voted = [group_of(of_question, view, place) for place, of_question in enumerate(answers)]
    for rollout in rollouts_of(voted):
        rollout.finished = rollout.answer is not None
        rollout.response_ids = [1] * len(rollout.answer or "no answer")
    return voted


def labelled(row: Variant, policy_groups: list[Group], golds: list[str | None]) -> list[Group]:
    label_groups(row, policy_groups, [], golds)
    return policy_groups


def statistics(part: list[Group]) -> dict[str, float]:
    return {name: statistic(part) for name, statistic in metrics.STATISTICS.items()}


def test_means_are_over_rollouts_and_cut_ones_are_marked():
    found = statistics(groups(["12", "12", "3", None]))
    expected = {"response_tokens": 3.5, "truncated": 0.25, "answered": 0.75, "commonest_answer": 2 / 3}
    assert expected.items() <= found.items()


def test_no_answer_at_all_is_not_a_division_by_zero():
    assert statistics(groups([None]))["commonest_answer"] == 0


def test_operations_are_those_that_pytorch_counts():
    """Of an untied model, whose head sees the responses alone; attention, counted whole by PyTorch, is causal here."""
    lm, rollouts = tiny_lm(hidden_size=64), tiny_rollouts(5)
    counted = 0.0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            lm(ids, use_cache=False, logits_to_keep=len(rollout.response_ids))
        counted += 3 * counter.get_total_flops()
    squares = 3 * 2 * 2 * 64 * 2 * sum(len(rollout) ** 2 for rollout in rollouts)
    assert metrics.operations(lm, rollouts) == pytest.approx(counted - squares / 2, rel=0.01)


def test_the_time_of_compiling_is_booked_as_the_update_s(monkeypatch: pytest.MonkeyPatch):
    spent = iter([{"total_wall_time": 1.0}, {"total_wall_time": 4.0}, {"total_wall_time": 4.0}])
    monkeypatch.setattr(metrics, "calculate_time_spent", lambda: next(spent))
    monkeypatch.setattr(metrics.time, "perf_counter", iter([0.0, 5.0, 6.0]).__next__)
    clock = metrics.Clock()
    clock.lap("update")
    clock.lap("metrics")
    assert clock.seconds == {"seconds_compile": 3.0, "seconds_update": 2.0, "seconds_metrics": 1.0}
    assert metrics.pace(clock.seconds, 60) == "the first step took 6.0 s; 60 more like it take about 3.0 minutes"


def test_views_and_teacher_do_not_mix():
    policy_groups = groups(["1", "1", "2", None]) + groups(["5", "5", "5", "5"], view="x'")
    teacher_groups = groups(["1", "1", "1", "2"]) + groups(["3", "3", "4", "4"], view="x'")
    row = VARIANTS["III"]
    label_groups(row, policy_groups, teacher_groups, ["1"])
    assign_advantages(policy_groups, [[0, 0, 0, 0], [1, 0, 0, 0]])
    found = group_metrics(row, policy_groups, teacher_groups)
    found |= label_metrics(label_records(7, policy_groups, compare_with_gold(policy_groups, ["1"])))
    assert found["reward"] == 1 / 8 and found["reward/x"] == 0 and found["reward/x'"] == 1 / 4
    assert found["zero_std_groups"] == 1 / 2
    assert found["vote_share"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["vote_share/teacher"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["distinct_answers/x'"] == 1 and found["distinct_answers/teacher"] == 2
    assert found["label_accuracy"] == 1 / 2
    assert found["label_accuracy/x"] == 0 and found["label_accuracy/x'"] == 1


def test_label_accuracy_counts_missing_labels_as_wrong_and_missing_golds_not_at_all():
    policy_groups = labelled(VARIANTS["majority"], groups(["1", "1"], [None, None], ["2", "2"]), [None] * 3)
    found = label_metrics(label_records(0, policy_groups, compare_with_gold(policy_groups, ["1.0", "7", None])))
    assert found == {"label_accuracy": 1 / 2, "label_agreement": 1.0}


def test_gold_labels_have_no_accuracy():
    of_gold = labelled(VARIANTS["gt"], groups(["1", "1"]), ["1"])
    assert label_records(0, of_gold, compare_with_gold(of_gold, ["1"])) == []


def test_the_record_of_a_label_says_whose_it_is_how_sure_and_whether_it_is_right():
    both = groups(["1", "1", "2", None]) + groups(["2", "2", "2", "2"], view="x'")
    records = label_records(7, labelled(VARIANTS["I"], both, [None]), compare_with_gold(both, ["1"]))
    assert records == [
        {"step": 7, "id": "0", "view": "x", "label": "2", "share": 1.0, "agrees": False, "right": False},
        {"step": 7, "id": "0", "view": "x'", "label": "1", "share": 2 / 3, "agrees": False, "right": True},
    ]
    (without_gold, _) = label_records(7, both, compare_with_gold(both, [None]))
    assert "right" not in without_gold


def test_rewards_are_measured_by_gold_where_it_is_known_and_only_if_they_are_0_or_1():
    two = groups(["1", "1", "2", None], ["3", "3", "3", "3"])
    rewards = [[1, 1, 0, 0], [1, 1, 1, 1]]  # majority's; gold would have paid the third answer, and knows no second
    assign_advantages(two, rewards)
    assert gold_metrics(two, compare_with_gold(two, ["2", None])) == {
        "rollout_accuracy": 1 / 4,
        "reward_accuracy": 1 / 4,
    }
    assert gold_metrics(two, compare_with_gold(two, [None, None])) == {}
    assign_advantages(two, [[0.5, 0.5, 0, 0], [1] * 4])
    assert gold_metrics(two, compare_with_gold(two, ["2", None])) == {"rollout_accuracy": 1 / 4}


def test_labels_that_flip_between_visits_are_counted_also_after_a_resume(tmp_path: Path):
    def open_log(first_step: int) -> log.RunLog:
        return log.RunLog(tmp_path, {"run": {"tensorboard": False, "wandb": False}}, first_step)

    def labels(step: int, **of_question: str) -> dict:
        return {"labels": [{"step": step, "id": id, "view": "x", "label": label} for id, label in of_question.items()]}

    run = open_log(0)
    run.write({"step": 0}, labels(0, a="1", b="2"))
    run.write({"step": 1}, labels(1, a="1", b="3", c="4"))
    run.write({"step": 2}, labels(2, a="9"))
    resumed = open_log(2)  # the last step is going to be repeated
    resumed.write({"step": 2}, labels(2, a="1", b="2"))
    flipped = [step.get("labels_flipped") for step in resumed.history]
    assert flipped == [None, 1 / 2, 1 / 2]


HEALTHY = {"commonest_answer": 0.2, "answered": 0.95, "truncated": 0.0, "response_tokens": 16.0, "entropy": 0.3}
HEALTHY |= {"eval_agreement": 0.7}


@pytest.mark.parametrize(
    ("late", "sign"),
    [
        ({}, None),
        ({"entropy": 0.03, "response_tokens": 15.0, "answered": 1.0}, None),  # sharpening is not collapse
        ({"commonest_answer": 0.95}, "one answer to many questions"),
        ({"answered": 0.5}, "answers stop coming"),
        ({"truncated": 0.6}, "responses run into the limit"),
        ({"response_tokens": 4.0}, "responses shrink"),
        ({"entropy": 2.0}, "entropy explodes"),
        ({"eval_agreement": 0.5}, None),  # a wording was learnt
        ({"eval_agreement": 0.4}, "the policy leaves its first answers"),
    ],
)
def test_the_alarm_names_the_sign_and_is_silent_in_health(late, sign):
    history = [HEALTHY] * 20 + [HEALTHY | late] * 5
    assert list(detect_collapse(history)) == ([sign] if sign else [])


def test_the_alarm_waits_for_a_baseline():
    assert detect_collapse([HEALTHY] * 3 + [HEALTHY | {"answered": 0.0}] * 3) == {}


def test_silent_decay_is_not_seen_by_the_last_evaluation_of_a_run():
    rest = {key: value for key, value in HEALTHY.items() if key != "eval_agreement"}
    trained = [{"eval_agreement": 0.5} | rest, *[rest] * 9, {"eval_agreement": 0.7} | rest, *[rest] * 9]
    assert detect_collapse(trained) == {}
    sign = {"the policy leaves its first answers": "eval_agreement 0.70 -> 0.40"}
    assert detect_collapse([*trained, {"step": 20, "eval_agreement": 0.4}]) == sign


def test_a_resumed_run_takes_its_later_answers_for_its_first(tmp_path):
    def evaluated(greedy, *sampled):
        rows = [(question, answer, True) for question, answer in greedy.items()]
        rows += [(question, answer, False) for each in sampled for question, answer in each.items()]
        return [{"question": question, "answer": answer, "greedy": is_greedy} for question, answer, is_greedy in rows]

    first = {"1+1?": "2", "2+2?": "4", "3+3?": None, "4+4?": "8"}
    assert metrics.first_agreement(tmp_path, evaluated(first, first, first | {"2+2?": "5"})) == 5 / 8
    later = {"1+1?": "3", "2+2?": "5", "3+3?": "6", "4+4?": "9"}
    assert metrics.first_agreement(tmp_path, evaluated(later, later)) == 0
    assert metrics.first_agreement(tmp_path, evaluated(later, {"1+1?": "2.0", "4+4?": "8"})) == 1  # 2.0 is 2
    assert metrics.first_agreement(tmp_path, evaluated({"5+5?": "10"}, {"5+5?": "10"})) == 1  # another benchmark
    (tmp_path / "first-answers.jsonl").write_text('{"question": "5+5?", "answer": 10}\n')
    with pytest.raises(UserError, match="first-answers.jsonl"):
        metrics.first_agreement(tmp_path, evaluated({"5+5?": "10"}, {"5+5?": "10"}))


def test_steps_after_the_checkpoint_are_not_logged_twice(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    log.keep_steps_before(file, 2)
    assert file.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_step_whose_gradient_is_not_finite_leaves_a_log_that_is_json(tmp_path: Path):
    config = {"run": {"tensorboard": False, "wandb": False}}
    run = log.RunLog(tmp_path, config, first_step=0)
    run.write({"step": 0, "skipped_steps": 1.0, "grad_norm": float("nan"), "kl": float("inf")}, {})

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 0, "skipped_steps": 1.0}


def test_tensorboard_and_wandb_get_every_step_and_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[object] = []
    wandb = SimpleNamespace(
        log=lambda metrics, step: seen.append((step, metrics)), finish=lambda: seen.append("closed")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: wandb))
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = log.RunLog(tmp_path, {"run": {"tensorboard": True, "wandb": True}}, first_step=3)
    run.write({"step": 3, "reward": 0.5, "kl": float("nan")}, {})
    run.close()
    assert seen == [(3, {"reward": 0.5}), "closed"]
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["reward"]
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [(3, 0.5)]


def test_the_closing_table_reads_the_run_and_nothing_else(tmp_path: Path):
    history = [
        {"step": 0, "reward": 0.25, "seconds_rollout": 1.5, "eval_accuracy": 0.5, "eval_accuracy/greedy": 0.75},
        {"step": 1, "reward": 0.75, "seconds_rollout": 2.5},
        {"step": 2, "eval_accuracy": 0.875, "eval_accuracy/greedy": 1.0, "seconds_evaluation": 1.0},
    ]
    append_rows(tmp_path / "metrics.jsonl", history)
    table = log.closing_table(tmp_path)
    assert "0.50 -> 0.88" in table and "0.75 -> 1.00" in table
    assert "5 (rollout 4, evaluation 1)" in table
    assert not any(absent in table for absent in ("label accuracy", "warned of", "nothing was learnt"))


def test_a_run_that_taught_nothing_ends_like_one_that_did(tmp_path: Path):
    history = [{"step": step, "reward": 0.0, "zero_std_groups": 1.0, "peak_memory_gb": 2.5} for step in range(2)]
    append_rows(tmp_path / "metrics.jsonl", history)
    (tmp_path / "warnings.txt").write_text("step 0: one thing\nstep 1: another\n")
    table = log.closing_table(tmp_path)
    assert "nothing was learnt" in table and "2.50" in table
    assert "step 0: one thing" in table and "step 1: another" in table


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (["1", "1", "2", "3"], "preflight: yes"),
        (["", "", "", "1"], "preflight: no, most answers have no box"),
        (["1", "1", "1", "1"], "preflight: no, votes agree already"),
        (["2", "2", "1", "3"], "preflight: no, votes are no better than single answers"),
    ],
)
def test_a_run_that_cannot_work_begins_all_the_same(said: list[str], verdict: str) -> None:
    """Gold is 1. Four samples a question: yes where they differ, are boxed and the vote is better than one of them."""
    boxed = [f"\\boxed{{{answer}}}" if answer else "no idea" for answer in said]
    pairs = [Pair("a", "1?", gold="1"), Pair("b", "2?", gold="1")]
    run = tiny_run("majority", pairs, ScriptedSampler(lambda _lm, _prompt, g: boxed[g]))
    lines = metrics.preflight(run).splitlines()
    assert lines[0].startswith(verdict)
    seen = dict(line.split() for line in lines[1:])
    assert float(seen["pass@1"]) == said.count("1") / 4 and float(seen["pass@4"]) == 1.0
    run.questions = [replace(each, pair=replace(each.pair, gold=None)) for each in run.questions]
    assert "pass@1" not in metrics.preflight(run), "without gold the rest is said"
