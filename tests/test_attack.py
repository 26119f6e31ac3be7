"""What a second attack on the program found (issue 29): each test is named after the bug it prevents."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, SMALL, metrics_of, small, tiny_training, weights_of
from safetensors.torch import load_file, save_file
from test_hostile import sealed
from tiny import byte_tokenizer, tiny_lm

import train
from config import UserError, exit_on_user_error, parse
from lm.distributed import STOP_SIGNALS
from lm.model import load_pretrained
from metrics import detect_collapse, step_warnings
from store import checkpoint
from store.folder import lock

# ---------------------------------------------------------------- loses or mixes up results


class Dead(io.StringIO):
    """A stream whose reader has died."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None:
        self.write("")

    def fileno(self) -> int:
        raise OSError


def test_a_run_whose_output_nobody_reads_any_more_loses_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Dead())
    monkeypatch.setattr(sys, "stderr", Dead())
    train.main(small(tmp_path / "run", "--steps", "2"))
    assert len(metrics_of(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


def test_a_write_inside_a_write_ends_a_run(monkeypatch):
    """A signal's handler prints while its own process does: Python refuses with a RuntimeError."""

    class Busy(io.StringIO):
        def write(self, _: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Busy())
    with exit_on_user_error():
        print("finishing step 3, then saving", file=sys.stderr)


def started(tmp_path: Path, *flags: str, **how: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "train.py", *SMALL, "--out", str(tmp_path / "run"), *flags]
    return subprocess.Popen(command, cwd=ROOT, text=True, **how)


def until_a_step_is_logged(run: Path) -> None:
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_that_ends_tee_too_loses_the_run(tmp_path):
    run = started(tmp_path, "--steps", "500", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until_a_step_is_logged(tmp_path / "run")
    assert run.stdout
    run.stdout.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 128 + signal.SIGINT
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert (tmp_path / "run" / "curves.png").is_file()


@pytest.mark.slow
def test_a_closed_terminal_kills_a_run_without_saving(tmp_path):
    run = started(tmp_path, "--steps", "500", stderr=subprocess.PIPE)
    until_a_step_is_logged(tmp_path / "run")
    run.send_signal(signal.SIGHUP)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGHUP
    saved = checkpoint.find_checkpoint("auto", str(tmp_path / "run"))
    assert saved and f"stopped after {checkpoint.step_of(saved)} steps; go on with --resume" in said


def test_a_host_process_keeps_dead_handlers_after_a_run(tmp_path):
    def own(*_: object) -> None:
        pass

    former = {number: signal.signal(number, own) for number in STOP_SIGNALS}
    try:
        train.train(small(tmp_path / "run", "--steps", "1"))
        assert all(signal.getsignal(number) is own for number in STOP_SIGNALS)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_a_run_in_a_thread_is_a_value_error(tmp_path):
    thread = threading.Thread(target=train.train, args=[small(tmp_path / "run", "--steps", "1")])
    thread.start()
    thread.join()
    assert len(metrics_of(tmp_path / "run")) == 1


def test_resuming_a_run_without_a_checkpoint_begins_another_one_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train.train(small(tmp_path / "run", "--steps", "2"))
    shutil.rmtree(run / "checkpoints")
    for with_folder in (False, True):
        if with_folder:
            (run / "checkpoints").mkdir()
        with pytest.raises(UserError, match="this run has no checkpoint yet; begin it again with (.*)") as refused:
            train.train(parse(["--resume", str(run)]))
    train.train(parse(str(refused.value).partition("again with ")[2].split()))
    assert len(metrics_of(run)) == 2 and not Path("runs").exists()
    assert checkpoint.find_checkpoint(str(run), None) == (run / "checkpoints" / "step-000002").resolve()


def with_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"


def test_a_model_with_a_missing_weight_trains_with_a_new_one(tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with_weights(tmp_path / "model.safetensors", lambda weights: weights.pop(Q))
    with pytest.raises(UserError, match=f"cannot load .*its files lack the weights {Q}"):
        load_pretrained(str(tmp_path), torch.float32)


def test_a_tied_head_counts_as_missing(tmp_path):
    tiny_lm("qwen3", tied=True).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_pretrained(str(tmp_path), torch.float32)


def full(*_: object) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "labels.jsonl")


def test_a_log_that_cannot_be_written_loses_the_steps_since_the_last_save(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as quota, pytest.raises(SystemExit) as ended:
        quota.setattr("store.log.RunLog.warnings", full)
        train.main(small(tmp_path / "run", "--steps", "3"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    assert "error: labels.jsonl: Disk quota exceeded; put that right, then go on" in said
    command = said.partition("stopped after 1 steps; go on with ")[2].split("\n")[0]
    run = train.train(parse(command.split()))
    undisturbed = train.train(small(tmp_path / "undisturbed", "--steps", "3"))
    assert metrics_of(run) == metrics_of(undisturbed)
    assert all(map(torch.equal, weights_of(run).values(), weights_of(undisturbed).values()))


def test_a_folder_that_is_removed_during_a_run_hides_the_first_reason(tmp_path, monkeypatch, capsys):
    write = train.RunLog.write

    def removed(*arguments: Any) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(tmp_path / "run")
        write(*arguments)

    monkeypatch.setattr("store.log.RunLog.write", removed)
    with pytest.raises(SystemExit) as ended:
        train.main(small(tmp_path / "run", "--steps", "3"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "metrics.jsonl: No such file or directory" in said
    assert checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-000001") is None
    with pytest.raises(UserError, match="first reason"), lock(tmp_path / "other"):
        shutil.rmtree(tmp_path / "other")
        raise UserError("first reason")


# ---------------------------------------------------------------- goes on in silence


def test_a_crafted_checkpoint_is_taken_or_ends_in_a_traceback(tmp_path):
    training = tiny_training()
    saved = checkpoint.save(tmp_path / "run" / "checkpoints", 1, training)
    first, second = (f"optimizer/{moment}.safetensors" for moment in checkpoint.MOMENTS)
    nan = float("nan")
    crafted: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
        (first, lambda tensors: tensors.update({Q: tensors[Q][:1].contiguous()}), rf"{Q} of exp_avg .*\[1, 32\]"),
        (second, lambda tensors: tensors.pop(Q), f"{Q} has one moment of two"),
        (first, lambda tensors: tensors.update({Q: tensors[Q].half()}), f"{Q} of exp_avg is torch.float16"),
        (second, lambda tensors: tensors[Q].fill_(nan), f"{Q} of exp_avg_sq is not finite"),
        ("policy/model.safetensors", lambda tensors: tensors.pop(Q), f"lack the weights {Q}"),
        ("policy/model.safetensors", lambda tensors: tensors.update({Q: tensors[Q].char()}), "policy holds F32 and I8"),
        ("teacher/model.safetensors", lambda tensors: tensors[Q].fill_(nan), f"{Q} of teacher is not finite"),
    ]
    for file, change, sentence in crafted:
        wrong = shutil.copytree(saved, tmp_path / "wrong")
        with_weights(wrong / file, change)
        with pytest.raises(UserError, match=f"does not hold the weights of this run .*{sentence}.*another step"):
            checkpoint.restore(sealed(wrong), tiny_training())
        shutil.rmtree(wrong)


def test_a_teacher_that_is_not_finite_is_saved_again_and_again(tmp_path):
    training = tiny_training()
    assert training.teacher
    next(training.teacher.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="the teacher's weights are not finite"):
        checkpoint.save(tmp_path, 1, training)


HEALTHY = {"commonest_answer": 0.2, "answered": 0.15, "truncated": 0.0, "response_tokens": 16.0, "entropy": 0.3}


def test_answers_that_stop_coming_are_not_noticed_where_few_came(tmp_path):
    assert list(detect_collapse([HEALTHY] * 5 + [HEALTHY | {"answered": 0.02}] * 5)) == ["answers stop coming"]
    assert not detect_collapse([HEALTHY] * 5 + [HEALTHY | {"answered": 0.08}] * 5)


def test_groups_without_a_difference_are_judged_at_the_first_step_only():
    step = HEALTHY | {"skipped_steps": 0.0, "label_accuracy": 0.5}
    history = [step | {"zero_std_groups": 1.0}] + [step | {"zero_std_groups": 0.5}] * 4
    assert not step_warnings(history[:1]) and not step_warnings(history)
    assert list(step_warnings(history + [step | {"zero_std_groups": 1.0}] * 5)) == ["no difference"]
