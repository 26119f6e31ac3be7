"""Wrong usages, as a newcomer makes them: each ends with exit code 2 and a sentence that names the culprit, before any
long work, and leaves nothing behind."""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import data
import evaluate
import train
from tools import ask, look, plan, plot, rephrase

ROWS = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(1, 5)]

TRAIN = {
    "a mistyped flag": ("--learning-rate 1", "learning-rate"),
    "a mistyped choice": ("--sampler vlm", "vlm"),
    "no number": ("--lr much", "much"),
    "an unknown variant": ("--variant IV", "--variant IV is not known: choose from I, II, III"),
    "views of a variant that fixes its own": ("--variant II --views both", "--views both is for baselines"),
    "a real model without questions": ("--model Qwen3-8B-Base", "--data is missing"),
    "questions without a model": ("--data questions.jsonl", "without --model: name one"),
    "a model that is no name": ("--model nonsense --data questions.jsonl", "neither a folder nor a hub name"),
    "a model folder without a model": ("--model empty --data questions.jsonl", "no config.json"),
    "a file that is not there": ("--model embedded --data nowhere.jsonl", "nowhere.jsonl is no file"),
    "a file of an unknown kind": ("--model embedded --data notes.txt", "notes.txt is of no known kind"),
    "a file that is empty": ("--model embedded --data nothing.jsonl", "nothing.jsonl holds no rows"),
    "a file that is no JSON": ("--model embedded --data broken.jsonl", "line 2"),
    "a column that is not there": ("--model embedded --data other.jsonl", "no column 'question'"),
    "a column that is not there, named": (
        "--model embedded --data questions.jsonl --question-column problem",
        "choose with --question-column from",
    ),
    "rephrasings that nobody wrote": ("--variant I --model embedded --data questions.jsonl", "no rephrasing"),
    "gold that nobody knows": ("--variant gt --model embedded --data bare.jsonl", "no gold"),
    "evaluation without answers": ("--model embedded --data questions.jsonl --eval-data bare.jsonl", "no gold answer"),
    "an unknown benchmark": ("--eval-data math501", "math501 is no file, no folder and no benchmark"),
    "prompts that do not fit": ("--max-prompt-tokens 3", "no prompt fits --max-prompt-tokens 3"),
    "answers that do not fit": ("--max-response-tokens 9000", "the model knows 512 positions"),
    "a chat template that is not there": ("--chat-template nowhere.jinja", "nowhere.jinja is not a file"),
    "a chat template that is none": ("--chat-template notes.txt", "cannot be used"),
    "options that are no JSON": ("--template-options thinking", "is no JSON object"),
    "training on itself": ("--decontaminate embedded", "leaves no training question"),
    "steps and epochs": ("--steps 7 --epochs 2", "--steps and --epochs say the same thing twice"),
    "fewer votes than rollouts": ("--votes 4", "--votes 4 are fewer than --rollouts 8, which all vote"),
    "more mini-batches than questions": ("--mini-batches 17", "--questions-per-step 16: raise that over it"),
    "mini-batches without a question": (
        "--model embedded --data questions.jsonl --mini-batches 5",
        "--mini-batches 5, but some steps ask 4 questions",
    ),
    "resuming nothing in particular": ("--resume auto", "--resume auto: say of which run"),
    "resuming what is not there": ("--resume runs/nowhere", "holds no settings of a run"),
    "resuming a folder of something else": ("--resume empty", "holds no settings of a run"),
    "settings that are none": ("--config broken.jsonl", "holds no settings of a run"),
    "a folder that is a file": ("--out notes.txt", "cannot be written to"),
    "a folder that nobody may write": ("--out /proc/self/run", "cannot be written to"),
    "W&B that is not installed": ("--wandb", "pip install wandb"),
    "vLLM that is not installed": ("--sampler vllm", "vLLM is not installed"),
    **{
        f"{flag} {value}": (f"--{flag} {value}", f"--{flag} {shown or value} must be")
        for flag, value, shown in [
            ("lr", "1e9", "1000000000.0"), ("lr", "-1", "-1.0"), ("lr", "nan", ""), ("rollouts", "1", ""),
            ("questions-per-step", "0", ""), ("temperature", "0", "0.0"), ("temperature", "nan", ""),
            ("kl-coef", "-0.1", ""), ("kl-cap", "-1", "-1.0"), ("clip", "-0.2", ""), ("clip", "nan", ""),
            ("clip-high", "-1", "-1.0"), ("votes", "1", ""), ("mini-batches", "0", ""),
            ("tis-cap", "-1", "-1.0"), ("beta2", "1", "1.0"), ("weight-decay", "-1", "-1.0"), ("warmup", "2", "2.0"),
            ("max-grad-norm", "-1", "-1.0"), ("max-grad-norm", "nan", ""), ("ema-start", "1.5", ""),
            ("ema-end", "-1", "-1.0"), ("save-every", "-1", ""), ("keep", "-1", ""), ("eval-every", "-3", ""),
            ("eval-samples", "0", ""), ("steps", "0", ""), ("epochs", "0", ""), ("engine-memory", "1", "1.0"),
            ("tokens-per-micro-batch", "0", ""), ("max-response-tokens", "0", ""),
        ]
    },
}  # fmt: skip
EVALUATE = {
    "no model": ("", "--model is missing"),
    "fewer than no samples": ("--model embedded --k -1", "--k -1 must be at least 0"),
    "greedy sampling": ("--model embedded --temperature 0", "must be over 0"),
    "an unknown benchmark": ("--model embedded --benchmarks math501", "math501 is no file"),
    "two benchmarks of one name": ("--model embedded --benchmarks questions.jsonl questions.jsonl", "rename one"),
    "options that are no JSON": ("--model embedded --template-options yes", "--template-options yes is no JSON object"),
    "no question": ("--model embedded --limit 0 --benchmarks questions.jsonl", "--limit 0 must be at least 1"),
    "comparing what is no result": ("--compare empty notes.txt", "is no result.json of an evaluation"),
    "seeds of what is no result": ("--seeds empty notes.txt", "is no result.json of an evaluation"),
}
OTHERS: dict[str, tuple[Callable[..., object], str, str]] = {
    "data: nothing there": (data.show, "nowhere", "nowhere is no file"),
    "plot: no run": (plot.main, "empty", "empty"),
    "look: no run": (look.look, "empty", "is no run's folder"),
    "ask: no model": (ask.ask, "nonsense question", "neither a folder nor a hub name"),
    "plan: no questions": (plan.main, "--model Qwen3-8B-Base", "--data is missing"),
    "rephrase: nothing there": (rephrase.main, "--data nowhere --model M --out o.jsonl", "nowhere is no file"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, rows in {"questions": ROWS, "bare": [{"question": "What?"}], "other": [{"problem": "What?"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "broken.jsonl").write_text('{"question": "What?"}\n{"question": \n')
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    return tmp_path


def sentence_of(command: Callable[[], object], arguments: str, monkeypatch, capsys, here: Path) -> str:
    """What the command says; it must end at once, with exit code 2, and write nothing."""
    before = sorted(os.listdir(here))
    monkeypatch.setattr(sys, "argv", ["command", *arguments.split()])
    begin = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2 and time.monotonic() - begin < 30
    assert sorted(os.listdir(here)) == before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize("usage", TRAIN)
def test_training(usage, monkeypatch, capsys, here):
    arguments, expected = TRAIN[usage]
    if usage == "vLLM that is not installed":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert expected in sentence_of(train.main, arguments, monkeypatch, capsys, here)


@pytest.mark.parametrize("usage", EVALUATE)
def test_evaluating(usage, monkeypatch, capsys, here):
    arguments, expected = EVALUATE[usage]
    assert expected in sentence_of(evaluate.main, arguments, monkeypatch, capsys, here)


@pytest.mark.parametrize("usage", OTHERS)
def test_other_commands(usage, monkeypatch, capsys, here):
    command, arguments, expected = OTHERS[usage]
    file = Path(sys.modules[command.__module__].__file__ or "")
    module = file.stem if file.parent.name != "tools" else f"tools.{file.stem}"
    assert expected in sentence_of(
        lambda: runpy.run_module(module, run_name="__main__"), arguments, monkeypatch, capsys, here
    )


QUICK = "--steps 1 --eval-every 0 --max-response-tokens 8 --rollouts 2 --questions-per-step 2"
# What a wrong usage says, and the command that its cure makes of it.
CURES = {
    "--variant II --views both": ("try --variant majority", "--variant majority --views both"),
    "--data questions.jsonl": ("or --model embedded", "--model embedded --data questions.jsonl"),
    "--model embedded --data other.jsonl": (
        "choose with --question-column from problem",
        "--model embedded --data other.jsonl --question-column problem",
    ),
    "--model embedded --data questions.jsonl --variant I": (
        "a variant that needs none, such as II",
        "--model embedded --data questions.jsonl --variant II",
    ),
    "--model embedded --data bare.jsonl --variant gt": (
        "train a variant that needs none",
        "--model embedded --data bare.jsonl --variant II",
    ),
    "--model embedded --data solved.jsonl --variant gt": (
        "name the column of answers with --answer-column",
        "--model embedded --data solved.jsonl --variant gt --answer-column solution",
    ),
    "--model embedded --data questions.jsonl --eval-data solved.jsonl": (
        "in training --eval-answer-column",
        "--model embedded --data questions.jsonl --eval-data solved.jsonl --eval-answer-column solution",
    ),
    "--max-prompt-tokens 3": ("--max-prompt-tokens 3 (tokens of x: min", "--max-prompt-tokens 64"),
    "--steps 7 --epochs 2": ("give one of them", "--steps 1"),
    "--votes 1": ("--votes 1 must be at least 2", "--votes 2"),
    "--mini-batches 3": ("raise that over it", "--mini-batches 3 --questions-per-step 4"),
    "--resume auto": ("with --out runs/NAME", "--resume auto --out runs/mine"),
    "--temperature 0": ("must be 0.01 to 100", "--temperature 0.01"),
}


@pytest.mark.parametrize("wrong", CURES)
def test_the_cure_that_an_error_names_works(wrong, monkeypatch, capsys, here):
    solved = [row | {"solution": row["answer"]} for row in ROWS]
    (here / "solved.jsonl").write_text("".join(json.dumps({**row, "answer": None}) + "\n" for row in solved))
    cure, right = CURES[wrong]
    assert cure in sentence_of(train.main, f"{QUICK} {wrong}", monkeypatch, capsys, here)
    folder = train.train(train.parse(f"{QUICK} {right}".split()))
    assert (folder / "checkpoints" / "latest" / "policy").is_dir()
