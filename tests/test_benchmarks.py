"""The scripts in benchmarks/: a change of the trainer must not be found out on a rented GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BENCHMARKS = {
    "growth.py": ["--doublings", "1", "--questions", "2", "--repeats", "1", "--hidden", "32"],
    "gpu.py": ["--models", "tiny", "--response-tokens", "20", "--tokens", "800", "--repeats", "1", "--steps", "2"],
    "step_vs_trl.py": ["--questions", "4", "--rollouts", "2", "--response-tokens", "6", "--steps", "1"],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_on_a_cpu(name):
    """A change of the trainer must not be found out on a rented GPU."""
    if name == "step_vs_trl.py":
        pytest.importorskip("trl")
    file, *subcommand = name.split()
    command = [sys.executable, str(ROOT / "benchmarks" / file), *subcommand, *BENCHMARKS[name]]
    output = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert output.returncode == 0, output.stderr
    assert "| --- |" in output.stdout
