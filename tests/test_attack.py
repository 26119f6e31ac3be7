"""What a second attack on the program found (issue 29): each test is named after the bug it prevents."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from runs import ROOT, SMALL, metrics_of, small, tiny_training, weights_of
from safetensors.torch import load_file, save_file
from test_hostile import sealed
from tiny import byte_tokenizer, tiny_lm
from transformers import PreTrainedModel

import evaluate
import train
from config import UserError, exit_on_user_error, flag_name, load_config, parse
from lm.distributed import STOP_SIGNALS
from lm.model import limit_threads, load_pretrained, meta_model, stop_token_ids
from lm.prompts import prompt_encoder
from metrics import detect_collapse, step_warnings
from prepare import check_sense
from store import checkpoint
from store.curves import draw
from store.folder import lock
from store.log import LOGS, RunLog, closing_table
from tools.look import look

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


def logged(tmp_path: Path, steps: int = 4) -> Path:
    """A run's folder with logs of so many steps."""
    tmp_path.mkdir(exist_ok=True)
    rows = {
        "metrics.jsonl": {"reward": 0.5, "label_agreement": 1.0},
        "labels.jsonl": {"id": "1", "view": "x", "label": "7"},
        "rollouts.jsonl": {"view": "x"},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text("".join(json.dumps({"step": step} | row) + "\n" for step in range(steps)))
    return tmp_path


def test_logs_that_are_deleted_or_lack_a_step_or_hold_one_twice_resume_without_a_word(tmp_path, capsys):
    config = asdict(parse([]))
    RunLog(logged(tmp_path), config, 3)
    assert not capsys.readouterr().err
    (tmp_path / "labels.jsonl").unlink()
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(rows[0] * 2 + rows[2])
    (tmp_path / "rollouts.jsonl").write_text("")
    assert len(RunLog(tmp_path, config, 3).history) == 3
    said = capsys.readouterr().err
    assert "metrics.jsonl lacks 1 of 3 steps" in said and "metrics.jsonl holds 1 of its steps twice" in said
    assert "labels.jsonl lacks 3 of 3 steps" in said and "rollouts.jsonl lacks 3 of 3 steps" in said


WRONG = ["{}", '{"step": "1"}', '{"step": null}', '{"step": [1]}', '{"step": 1, "reward": "high"}']
WRONG += ['{"step": 1, "reward": null}', '{"step": 1, "entropy": {}}']


@pytest.mark.parametrize("line", WRONG)
def test_a_line_of_another_shape_ends_in_a_traceback(tmp_path, line):
    run = logged(tmp_path)
    (run / "config.json").write_text("{}")
    for name in LOGS if "reward" not in line and "entropy" not in line else ["metrics.jsonl"]:
        before = (run / name).read_text()
        (run / name).write_text(before + line + "\n")
        tasks: list[Callable[[], object]] = [lambda: RunLog(run, asdict(parse([])), 9)]
        tasks += {
            "metrics.jsonl": [lambda: closing_table(run), lambda: draw([run], run / "curves.png")],
            "rollouts.jsonl": [lambda: look(run)],
        }.get(name, [])
        for task in tasks:
            with pytest.raises(UserError, match=f"{name}, line 5 is damaged"):
                task()
        (run / name).write_text(before)


KINDS = [("optimisation", "lr_schedule", "nonsense"), ("optimisation", "steps", 2.5), ("run", "wandb", 1)]
KINDS += [
    ("method", "loss_agg", []),
    ("data", "eval_data", 5),
    ("sampling", "votes", True),
]


@pytest.mark.parametrize(("group", "name", "value"), KINDS)
def test_settings_from_a_file_are_checked_for_ranges_only(tmp_path, group, name, value):
    settings = asdict(parse([]))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert asdict(load_config(tmp_path / "config.json")) == settings
    settings[group][name] = value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"config.json holds no settings .*{flag_name(name)} cannot be"):
        load_config(tmp_path / "config.json")


def test_template_options_that_do_nothing_are_accepted(capsys):
    for options in ("[]", "7", "null", "[" * 100_000):
        with pytest.raises(UserError, match="is no JSON object"):
            parse(["--template-options", options])
    tokenizer = byte_tokenizer()
    template = "{{ messages[0].content }}{{ messages[1].content }}{% if shout %}!{% endif %}"
    encode = prompt_encoder(tokenizer, template, '{"shout": true, "shuot": true}')
    assert tokenizer.decode(encode("1+1?")).endswith("1+1?!")
    assert "does not name shuot, which has no effect" in capsys.readouterr().out
    for name in ("question", "tokenize", "chat_template", "tokenizer"):
        with pytest.raises(UserError, match=f"{name} is not for a chat template: leave it out"):
            prompt_encoder(tokenizer, template, json.dumps({name: 1}))


def test_a_schedule_that_runs_backwards_is_accepted_without_a_word(capsys):
    check_sense(parse([]))
    assert not capsys.readouterr().out
    check_sense(parse(["--ema-start", ".9999", "--ema-end", ".9"]))
    assert "the teacher follows ever faster: --ema-start 0.9999 is over --ema-end" in capsys.readouterr().out


# ---------------------------------------------------------------- reads as if something else were wrong


def test_fewer_steps_are_other_settings(tmp_path):
    saved = str(train.train(small(tmp_path / "run", "--steps", "2")))
    with pytest.raises(UserError, match=r"--steps \(was 2, is 1\); leave these out; fewer steps are refused"):
        train.train(parse(["--resume", saved, "--steps", "1"]))
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-2²").mkdir()
    shutil.copytree(checkpoints / "step-000002", checkpoints / "best")
    with pytest.raises(UserError, match="is no step-N in a run's checkpoints/: say where to write, with --out"):
        train.train(parse(["--resume", str(checkpoints / "best"), "--steps", "3"]))
    branch = ["--resume", str(checkpoints / "best"), "--steps", "3", "--out", str(tmp_path / "branch")]
    assert len(metrics_of(train.train(parse(branch)))) == 3
    train.train(parse(["--resume", saved, "--steps", "3"]))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--resume", "nothere"], "nothere/config.json does not exist"),
        (["--config", "nothere.json"], "nothere.json does not exist"),
        (["--out", "n" * 300], "File name too long"),
        (["--model", "n" * 300, "--data", "embedded"], "File name too long"),
        (["--out", "run\udcff"], r"'run\\udcff' has characters that cannot be printed"),
    ],
)
def test_names_that_cannot_be_are_a_traceback(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as ended:
        train.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(sentence, said) and not list(tmp_path.iterdir())


def test_an_end_token_that_is_no_number_is_a_traceback():
    lm = tiny_lm()
    assert lm.generation_config
    lm.generation_config.eos_token_id = "stop"
    assert stop_token_ids(lm, byte_tokenizer()) == [0]


def test_an_evaluation_of_the_toy_asks_real_benchmarks(monkeypatch):
    for flags, benchmarks, tokens in (
        ([], ("embedded:held-out",), 32),
        (["--benchmarks", "gsm8k", "--max-response-tokens", "9"], ("gsm8k",), 9),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "embedded", *flags])
        settings = evaluate.parse_settings()
        assert settings and (settings.benchmarks, settings.max_response_tokens) == (benchmarks, tokens)


def test_the_closing_table_announces_an_empty_file_and_hundredths_of_a_token(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0, "tokens_per_second": 2440.14}\n')
    (tmp_path / "labels.jsonl").write_text("")
    shown = closing_table(tmp_path)
    assert "labels.jsonl" not in shown and "2,440 -> 2,440" in shown


def test_small_models_share_a_busy_machine_with_themselves(capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        limit_threads(tiny_lm())
        assert torch.get_num_threads() == 1 and "one thread" in capsys.readouterr().out
        torch.set_num_threads(2)
        limit_threads(load_pretrained_shape(hidden_size=1024, vocab_size=30_000))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def load_pretrained_shape(**sizes: int) -> PreTrainedModel:
    """A model on the meta device."""
    config = tiny_lm().config
    config.update(sizes)
    return meta_model(config)


def test_a_curve_of_one_point_is_not_seen_and_a_picture_does_not_say_of_what(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    for name, sampler in (("one", "hf"), ("two", "vllm")):
        run = logged(tmp_path / name, steps=1)
        settings = {"method": {"variant": "II"}, "sampling": {"sampler": sampler}, "data": {"eval_every": 5}}
        (run / "config.json").write_text(json.dumps(settings))
    draw([tmp_path / "one"], tmp_path / "one.png")
    draw([tmp_path / "one", tmp_path / "two"], tmp_path / "two.png")
    one, two = figures
    assert one.get_suptitle() == "one" and one.axes[-1].get_xlabel() == "training step"
    assert one.axes[2].lines[0].get_marker() == "o"
    assert all(step == int(step) for step in one.axes[2].get_xticks())
    assert [text.get_text() for text in two.legends[0].get_texts()] == ["II"], "the sampler changes no curve"


@pytest.mark.slow
def test_streams_that_are_closed_at_the_start_hang_the_run(tmp_path):
    command = f"{sys.executable} train.py {' '.join(SMALL)} --steps 1 --out {tmp_path / 'run'} >&- 2>&- <&-"
    assert subprocess.run(command, shell=True, cwd=ROOT, check=False, timeout=60).returncode == 0
    assert len(metrics_of(tmp_path / "run")) == 1


def test_the_help_does_not_list_config(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "--config" in capsys.readouterr().out.partition("run options")[2]
