"""Several gloo processes against one: the same rollouts, metrics, weights; checkpoints that move between them."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_train import ROOT, SMALL, metrics_of, small, weights_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import train

FLAGS = ["--variant", "III", "--steps", "2", "--save-every", "1", "--tokens-per-micro-batch", "150"]


FRUGAL = ["--activation-checkpointing", "on", "--offload-optimizer", "--offload-teacher"]


def run_with(processes: int, out: Path, *flags: str) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["train.py", *SMALL, *FLAGS, "--out", str(out), *flags]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return out


def moments_of(folder: Path) -> dict[str, torch.Tensor]:
    """Adam's first moments of every weight in the latest checkpoint, put together from all shards."""
    whole = folder / "optimizer.pt"
    dcp_to_torch_save(folder / "checkpoints" / "latest" / "optimizer", whole)
    state = torch.load(whole, weights_only=True)["optimizer"]["state"]
    return {name: values["exp_avg"] for name, values in state.items()}


def assert_same_run(folder: Path, alone: Path) -> None:
    """Metrics agree to rounding, so the rollouts are the same; so do Adam's first moments, which are sums of gradients.
    Adam divides by their size, and where that is nearly 0, rounding noise by itself: the policy's bound is a share of
    the learning rate of 5e-4, and the teacher has a hundredth of it."""
    for seen, expected in zip(metrics_of(folder), metrics_of(alone), strict=True):
        for key in ("mismatch_mean", "mismatch_max"):  # rounding itself
            assert seen.pop(key) < 1e-4 and expected.pop(key) < 1e-4
        assert seen == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for bound, read in (
        (1e-6, moments_of),
        (1e-4, weights_of),
        (1e-6, partial(weights_of, who="teacher")),
    ):
        ours, theirs = read(folder), read(alone)
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < bound


def test_two_processes_do_what_one_does_and_hand_over_to_four_and_to_one(tmp_path):
    """The silent bugs: gradients averaged instead of added, a teacher that follows stale weights, a local denominator,
    muted micro-batches in the metrics, optimizer shards that land elsewhere."""
    alone = train.train(small(tmp_path / "alone", *FLAGS))
    two = run_with(2, tmp_path / "two")
    assert_same_run(two, alone)
    shutil.rmtree(two / "checkpoints" / "step-000002")
    for processes, flags in ((1, []), (4, FRUGAL)):
        resumed = shutil.copytree(two, tmp_path / f"resumed-{processes}", symlinks=True)
        assert_same_run(run_with(processes, resumed, "--resume", "auto", *flags), alone)
