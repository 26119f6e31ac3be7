"""SIGKILL at random moments of a run and at every file operation of a save: nothing is lost but the unfinished step."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SMALL, assert_same_weights, metrics_of, small, tiny_training, weights_of
from tqdm import tqdm

import train
from config import parse
from store import checkpoint

FLAGS = ["--steps", "4", "--save-every", "1"]


def in_a_child(task: Callable[[], object]) -> multiprocessing.Process:
    """A process that starts with everything imported, so that kills fall into the work and not into the start."""

    def with_its_own_lock() -> None:
        tqdm.set_lock(threading.RLock())  # forks share tqdm's: one that is killed while it holds it stops all others
        task()

    process = multiprocessing.get_context("fork").Process(target=with_its_own_lock)
    process.start()
    return process


@pytest.mark.parametrize("variant", ["I", "II", "III"])
def test_a_run_killed_again_and_again_ends_as_if_it_had_never_been(tmp_path, variant):
    begin = time.monotonic()
    undisturbed = train.train(small(tmp_path / "undisturbed", "--variant", variant, *FLAGS))
    duration, rng, killed = time.monotonic() - begin, random.Random(variant), 0
    flags = [*SMALL, "--variant", variant, *FLAGS, "--out", str(tmp_path / "killed"), "--resume", "auto"]
    for _ in range(60):
        process = in_a_child(lambda: train.train(parse(flags)))
        process.join(rng.uniform(0, duration / 3) if killed < 8 else None)
        if process.exitcode == 0:
            break
        assert process.exitcode is None, "it ended by itself, with an error"
        process.kill()
        process.join()
        killed += 1
    assert killed >= 3
    assert metrics_of(tmp_path / "killed") == metrics_of(undisturbed)
    rollouts = [(folder / "rollouts.jsonl").read_text() for folder in (tmp_path / "killed", undisturbed)]
    assert rollouts[0] == rollouts[1]
    for who in ("policy", "teacher") if variant != "I" else ("policy",):
        assert_same_weights(weights_of(tmp_path / "killed", who), weights_of(undisturbed, who))


def kill_at(operation: int) -> None:
    """SIGKILL for this process at its n-th operation on files from now on."""
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if event in ("open", "shutil.rmtree") or (
            event.startswith("os.") and event not in ("os.listdir", "os.scandir")
        ):
            seen += 1
            if seen > operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_run_that_was_copied_by_what_follows_links_can_save_again(tmp_path):
    """`latest` is then a real folder, which no link replaces."""
    training = tiny_training()
    checkpoint.save(tmp_path / "run", 1, training)
    run = shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)
    assert not (run / "latest").is_symlink()
    for step in (2, 3):
        checkpoint.save(run, step, training, keep=2)
        assert (run / "latest").is_symlink() and (run / "latest").resolve().name == f"step-{step:06d}"
        assert checkpoint.restore(run / "latest", training) == step
    assert sorted(os.listdir(run)) == ["latest", "step-000002", "step-000003"]


@pytest.mark.slow
def test_a_save_killed_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path):
    training = tiny_training()
    for step in (1, 2):
        checkpoint.save(tmp_path / "before" / "checkpoints", step, training)
    found = []
    for operation in range(500):
        run = shutil.copytree(tmp_path / "before", tmp_path / "run", symlinks=True)

        def task(operation: int = operation, run: Path = run) -> None:
            kill_at(operation)
            checkpoint.save(run / "checkpoints", 3, training, keep=2)

        process = in_a_child(task)
        process.join()
        newest = checkpoint.find_checkpoint("auto", str(run))
        found.append(checkpoint.step_of(newest))
        latest = (run / "checkpoints" / "latest").resolve()
        assert checkpoint.verify(latest) is None, "latest points to a damaged or missing checkpoint"
        if process.exitcode == 0:
            break
        checkpoint.save(run / "checkpoints", 3, training, keep=2)  # not hindered by what the killed one left behind
        assert sorted(os.listdir(run / "checkpoints")) == ["latest", "step-000002", "step-000003"]
        restored = checkpoint.find_checkpoint("auto", str(run))
        assert restored is not None and checkpoint.restore(restored, training) == 3
        shutil.rmtree(run)
    assert process.exitcode == 0 and operation > 30
    assert found == sorted(found) and found[0] == 2 and found[-1] == 3
