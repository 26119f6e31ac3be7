"""Several gloo processes against one: the same rollouts, metrics, weights; checkpoints that move between them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import ROOT, SMALL, metrics_of, small, weights_of

import train

FLAGS = ["--variant", "III", "--steps", "2", "--save-every", "1", "--tokens-per-micro-batch", "150"]


def run_with(processes: int, out: Path, *flags: str) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["train.py", *SMALL, *FLAGS, "--out", str(out), *flags]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return out


def assert_same_run(folder: Path, alone: Path) -> None:
    """Metrics agree to rounding, so the rollouts are the same. Adam divides rounding noise by itself where a gradient
    is nearly 0: the policy's bound is a share of its learning rate of 5e-4, and the teacher has a hundredth of it."""
    for seen, expected in zip(metrics_of(folder), metrics_of(alone), strict=True):
        for key in ("mismatch_mean", "mismatch_max"):  # rounding itself
            assert seen.pop(key) < 1e-4 and expected.pop(key) < 1e-4
        assert seen == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for who, bound in (("policy", 2e-5), ("teacher", 1e-6)):
        ours, theirs = weights_of(folder, who), weights_of(alone, who)
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < bound


def test_two_processes_do_what_one_does_and_hand_over_to_four_and_to_one(tmp_path):
    """The silent bugs: gradients averaged instead of added, a teacher that follows stale weights, a local denominator,
    muted micro-batches in the metrics, optimizer shards that land elsewhere."""
    alone = train.train(small(tmp_path / "alone", *FLAGS))
    two = run_with(2, tmp_path / "two")
    assert_same_run(two, alone)
    shutil.rmtree(two / "checkpoints" / "step-000002")
    for processes in (1, 4):
        resumed = shutil.copytree(two, tmp_path / f"resumed-{processes}", symlinks=True)
        assert_same_run(run_with(processes, resumed, "--resume", "auto"), alone)
