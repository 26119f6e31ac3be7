"""Checkpoints that the disk has damaged, a full disk, data that changed, two runs in one folder."""

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import SMALL, cut_in_half, metrics_of, small

import train
from config import UserError, parse
from embedded.word_problems import word_problems
from store import checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two steps with a checkpoint after each; tests work on copies."""
    return train.train(small(tmp_path_factory.mktemp("run") / "run", "--steps", "2", "--save-every", "1"))


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "fault"),
    [
        ("policy/model.safetensors", cut_in_half, "policy/model.safetensors is damaged"),
        ("teacher/model.safetensors", flip_a_bit, "teacher/model.safetensors is damaged"),
        ("optimizer/exp_avg.safetensors", Path.unlink, "optimizer/exp_avg.safetensors is missing"),
        ("manifest.json", cut_in_half, "holds no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder, capsys, file, damage, fault):
    newest = folder / "checkpoints" / "step-000002"
    damage(newest / file)
    assert checkpoint.find_checkpoint("auto", str(folder)) == (folder / "checkpoints" / "step-000001").resolve()
    assert fault in capsys.readouterr().err
    with pytest.raises(UserError, match=fault):
        checkpoint.find_checkpoint(str(newest), None)


def test_resume_auto_repeats_the_lost_step_exactly(folder, finished):
    cut_in_half(folder / "checkpoints" / "step-000002" / "policy" / "model.safetensors")
    flags = ["--steps", "2", "--save-every", "1", "--out", str(folder), "--resume", "auto"]
    assert metrics_of(train.train(parse([*SMALL, *flags]))) == metrics_of(finished)
    weights = [run / "checkpoints" / "step-000002" / "policy" / "model.safetensors" for run in (folder, finished)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resume_auto_starts_a_run_that_has_no_checkpoint_yet(tmp_path, finished):
    """A job that is requeued before its first checkpoint would otherwise never start again."""
    flags = ["--steps", "2", "--save-every", "1", "--out", str(tmp_path / "new"), "--resume", "auto"]
    assert metrics_of(train.train(parse([*SMALL, *flags]))) == metrics_of(finished)


def test_nothing_intact_is_an_error_and_not_a_fresh_start(folder):
    for path in checkpoint.newest_first(folder / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of 2 checkpoints"):
        checkpoint.find_checkpoint("auto", str(folder))


def test_a_full_disk_leaves_the_checkpoints_before_intact(tmp_path, monkeypatch):
    """RLIMIT_FSIZE fails a write as a full disk does, in the middle of a file."""
    small_files, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = checkpoint.save

    def save_on_full_disk(folder: Path, step: int, *what: object) -> Path:
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited))
        return save(folder, step, *what)

    monkeypatch.setattr(checkpoint, "save", save_on_full_disk)
    try:
        with pytest.raises(UserError, match="step-000002 could not be written .*make room"):
            train.train(small(tmp_path / "run", "--steps", "2", "--save-every", "1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (small_files, unlimited))
    assert checkpoint.find_checkpoint("auto", str(tmp_path / "run")).name == "step-000001"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 6 MB, mounted for this test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6M", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_during_a_run_leaves_the_last_whole_checkpoint(small_disk):
    with pytest.raises(UserError, match="could not be written .*make room"):
        train.train(small(small_disk / "run", "--steps", "9", "--save-every", "1", "--keep", "0"))
    found = checkpoint.find_checkpoint("auto", str(small_disk / "run"))
    assert found is not None and checkpoint.verify(found) is None
    kept = sorted(path.name for path in found.parent.glob("step-*[0-9]"))
    for left_over in found.parent.glob("*.incomplete"):
        shutil.rmtree(left_over)
    shutil.rmtree(found.parent / kept[0]) if len(kept) > 1 else None
    flags = ["--steps", "9", "--save-every", "1", "--keep", "1", "--out", str(small_disk / "run"), "--resume", "auto"]
    assert len(metrics_of(train.train(parse([*SMALL, *flags])))) == 9, "with room made, it goes on"


def test_a_disk_that_is_full_from_the_start_is_one_sentence(small_disk, monkeypatch, capsys):
    (small_disk / "others").write_bytes(b"0" * 6 * 2**20)
    monkeypatch.setattr("sys.argv", ["train.py", *SMALL, "--steps", "1", "--out", str(small_disk / "run")])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert re.search("error: .*(disk is full|No space left)", capsys.readouterr().err)


def test_a_run_on_a_read_only_disk_is_refused_in_one_sentence(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="cannot be written to .*name another --out"):
        train.train(small(small_disk / "run", "--steps", "1"))


def test_only_the_last_and_every_nth_checkpoint_stay(tmp_path):
    for step in range(1, 8):
        (tmp_path / f"step-{step:06d}").mkdir()
    checkpoint.prune(tmp_path / "step-000007", keep=2, keep_every=3)
    assert sorted(map(checkpoint.step_of, tmp_path.iterdir())) == [3, 6, 7]
    checkpoint.prune(tmp_path / "step-000007", keep=0, keep_every=0)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_goes_on_from_a_checkpoint_of_the_policy_alone_with_a_fresh_optimizer(tmp_path, finished):
    run = train.train(small(tmp_path / "run", "--steps", "2", "--save", "policy"))
    kept = {path.relative_to(run / "checkpoints" / "step-000002").parts[0] for path in run.glob("checkpoints/step-*/*")}
    assert kept == {"policy", "optimizer", "trainer.json", "manifest.json"}
    weights = "checkpoints/latest/policy/model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()
    with pytest.raises(UserError, match="none of 1 checkpoints"):
        train.train(small(run, "--steps", "3", "--resume", "auto"))


def test_a_data_file_that_changed_under_a_run_is_refused(tmp_path):
    rows, file = word_problems()[:12], tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--steps", "1", "--model", "embedded", "--data", str(file)]
    folder = train.train(small(tmp_path / "run", *flags))
    rows[3]["question"] += " Tell me."
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"questions of .*data.jsonl.* have changed"):
        train.train(parse([*SMALL, *flags, "--out", str(folder), "--resume", "auto"]))


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with train.lock_run_dir(small(tmp_path / "run")), pytest.raises(UserError, match="another run is writing to it"):
        train.train(small(tmp_path / "run", "--steps", "1"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_written_to_is_one_sentence():
    with pytest.raises(UserError, match="cannot be written to"), train.lock_run_dir(small(Path("/proc/self/run"))):
        pass
