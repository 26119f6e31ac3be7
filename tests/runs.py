"""Runs on the embedded task, what they leave behind, and the files of the program."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_lm
from transformers import AutoModelForCausalLM

from config import Config, parse
from lm.model import frozen_copy
from lm.scoring import PackedLM
from prepare import build_optimizer
from store import checkpoint

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lm", "answers", "sources", "embedded", "store", "tools")
PROGRAM = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))])
SMALL = ["--questions-per-step", "4", "--rollouts", "4", "--eval-data", "None"]
FLAGS = ["--variant", "III", "--steps", "2", "--save-every", "1", "--tokens-per-micro-batch", "150"]  # on processes
TIMING = ("seconds_", "tokens_per_second", "peak_memory_gb")


def small(out: Path, *flags: str) -> Config:
    return parse([*SMALL, "--out", str(out), *flags])


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock or a memory gauge said."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMING)} for line in lines]


def weights_of(folder: Path, who: str = "policy") -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "latest" / who).state_dict()


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def tiny_training() -> checkpoint.Training:
    """On a tiny model, after an optimizer step."""
    policy = PackedLM(tiny_lm())
    optimizer = build_optimizer(policy, (0.9, 0.99), 0.0)
    sum(parameter.sum() for parameter in policy.parameters()).backward()
    optimizer.step()
    return checkpoint.Training(policy, frozen_copy(policy), byte_tokenizer(), optimizer, {"run": {}}, "questions")


def moments_of(folder: Path) -> dict[str, torch.Tensor]:
    """Adam's first moments of every weight in the latest checkpoint."""
    return load_file(folder / "checkpoints" / "latest" / "optimizer" / "exp_avg.safetensors")


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


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def torchrun(processes: int, out: Path, *flags: str, script: str = "train.py") -> list[str]:
    return [*TORCHRUN, str(processes), script, *SMALL, *FLAGS, "--out", str(out), *flags]


def run_with(processes: int, out: Path, *flags: str) -> Path:
    subprocess.run(torchrun(processes, out, *flags), cwd=ROOT, check=True, capture_output=True, timeout=300)
    return out
