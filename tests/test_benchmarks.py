"""The scripts in benchmarks/: a change of the trainer must not be found out on a rented GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_benchmark(file: str, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / file), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu_and_no_part_of_it_fails(tmp_path):
    flags = ["--models", "tiny", "--response-tokens", "20", "--tokens", "800", "--repeats", "1", "--steps", "2"]
    run_benchmark("gpu.py", *flags, "--out", str(tmp_path / "gpu.json"))
    result = json.loads((tmp_path / "gpu.json").read_text())
    for part in ("sanity", "head", "profile", "training", "long", "sampling", "learning", "resume"):
        assert "failed" not in result[part], part
    assert result["resume"]["largest_gap"]["grad_norm"] == 0, "on a CPU a resumed run is the same to the bit"


@pytest.mark.slow
def test_a_part_that_fails_does_not_end_the_others(tmp_path):
    run_benchmark("gpu.py", "--models", "tiny", "--parts", "nothing", "head", "--out", str(tmp_path / "gpu.json"))
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert "failed" in result["nothing"] and "failed" not in result["head"]


def test_the_step_beside_trl_runs():
    pytest.importorskip("trl")
    flags = ["--questions", "4", "--rollouts", "2", "--response-tokens", "6", "--steps", "1"]
    assert "| --- |" in run_benchmark("step_vs_trl.py", *flags)


@pytest.mark.slow
def test_the_two_choices_of_a_laptop_are_measured():
    flags = ["--questions", "2", "--rollouts", "2", "--response-tokens", "4", "--trained", "2", "--repeats", "1"]
    printed = run_benchmark("cpu.py", *flags, "--no-vllm")
    assert [line.split(" |")[0] for line in printed.splitlines()[-3:]] == [
        "| training",
        "| scoring",
        "| sampling, transformers",
    ]
