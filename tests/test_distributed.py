"""Several gloo processes against one: the same rollouts, metrics, weights; checkpoints that move between them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import FLAGS, ROOT, SMALL, assert_same_run, metrics_of, run_with, small, torchrun

import train
from store import checkpoint

FRUGAL = ["--activation-checkpointing", "on", "--offload-optimizer", "--offload-teacher"]


# On the second rank every comparison times out, and the votes are others. On the first no clock decides either.
DISAGREEING = """
import os
import rewards, train
first = os.environ.get("RANK", "0") == "0"
rewards.equivalent_many = lambda pairs: [first and one == other for one, other in pairs]
rewards.vote_classes = lambda answers, match: list(answers) if first else [f"{i}" for i, _ in enumerate(answers)]
train.main()
"""


def started(out: Path, errors: Path) -> subprocess.Popen[bytes]:
    """A long run on two processes that has taken its first step."""
    command = torchrun(2, out, "--steps", "500", "--save-every", "0")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors.open("w"))
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
        time.sleep(0.2)
    return process


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_ranks_what_can_be_resumed(tmp_path):
    process = started(tmp_path / "run", tmp_path / "errors")
    process.terminate()
    process.wait(timeout=60)
    assert process.returncode != 0, "a scheduler has to see that the run is not finished"
    assert "go on with --resume" in (tmp_path / "errors").read_text()
    steps_taken = len(metrics_of(tmp_path / "run"))
    found = checkpoint.find_checkpoint("auto", str(tmp_path / "run"))
    assert found is not None and checkpoint.step_of(found) == steps_taken


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_within_a_minute_and_says_so(tmp_path):
    """Without this the others would wait for it until the group's timeout, half an hour."""
    process = started(tmp_path / "run", tmp_path / "errors")
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in workers if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    process.wait(timeout=60)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_hand_over_to_four_and_to_one(tmp_path):
    """The silent bugs: gradients averaged instead of added, a teacher that follows stale weights, a local denominator,
    fully_masked micro-batches in the metrics, optimizer shards that land elsewhere."""
    alone = train.train(small(tmp_path / "alone", *FLAGS))
    two = run_with(2, tmp_path / "two")
    assert_same_run(two, alone)
    shutil.rmtree(two / "checkpoints" / "step-000002")
    for processes, flags in ((1, []), (4, FRUGAL)):
        resumed = shutil.copytree(two, tmp_path / f"resumed-{processes}", symlinks=True)
        assert_same_run(run_with(processes, resumed, "--resume", "auto", *flags), alone)


@pytest.mark.slow
def test_ranks_that_judge_answers_differently_hang_or_train_on_other_rewards(tmp_path):
    """Without a KL term, rollouts that teach nothing are skipped: ranks that disagreed on them waited for ever."""
    (tmp_path / "disagreeing.py").write_text(DISAGREEING)
    flags, environment = ["--answer-match", "math", "--kl-coef", "0"], os.environ | {"PYTHONPATH": str(ROOT)}
    for processes, name in ((1, "alone"), (2, "two")):
        command = torchrun(processes, tmp_path / name, *flags, script=str(tmp_path / "disagreeing.py"))
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stderr
    learnt = [metrics["zero_std_groups"] < 1 for metrics in metrics_of(tmp_path / "alone")]
    assert any(learnt), "nothing is learnt, nothing is shown"
    assert_same_run(tmp_path / "two", tmp_path / "alone")


# What a library may do at the interpreter's exit: CUDA, NCCL and vLLM all have.
ABORTING = """
import atexit, os, runpy
atexit.register(os.abort)
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_finished_run_is_a_failed_job_if_a_library_aborts_at_the_exit(tmp_path):
    """A scheduler would start it again. What was printed last is not lost either."""
    (tmp_path / "aborting.py").write_text(ABORTING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    two = torchrun(2, tmp_path / "two", script=str(tmp_path / "aborting.py"))
    alone = [sys.executable, str(tmp_path / "aborting.py"), *SMALL, *FLAGS, "--out", str(tmp_path / "alone")]
    for command in (two, alone):
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stderr
        assert "checkpoints/latest/policy" in ended.stdout
    assert len(metrics_of(tmp_path / "two")) == len(metrics_of(tmp_path / "alone")) == 2


def test_two_processes_throw_other_coins_or_cut_other_mini_batches(tmp_path):
    flags = ["--variant", "random", "--votes", "6", "--mini-batches", "2", "--steps", "2"]
    alone = train.train(small(tmp_path / "alone", *flags))
    two = run_with(2, tmp_path / "two", *flags)
    for seen, expected in zip(metrics_of(two), metrics_of(alone), strict=True):
        assert seen == pytest.approx(expected, rel=1e-4, abs=1e-5)
