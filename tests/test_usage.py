"""Wrong usages, as a newcomer makes them: each ends with exit code 2 and a sentence that names the culprit, before any
long work, and leaves nothing behind."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import ROOT, TORCHRUN
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

import config
import data
import evaluate
import train
from baselines import choose_variant
from lm.model import resolve
from store.folder import lock_run_dir
from tools import look, plot, rephrase

ROWS = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(1, 5)]

TRAIN = {
    "a mistyped flag": ("--learning-rate 1", "learning-rate"),
    "a mistyped choice": ("--sampler vlm", "vlm"),
    "no number": ("--lr much", "much"),
    "an unknown variant": ("--variant IV", "--variant IV is not known: choose from I, II, III"),
    "views of a variant that fixes its own": ("--variant II --views both", "--views both is for baselines"),
    "a real model where its default questions are not": ("--model Qwen3-8B-Base", "or give its path"),
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
    "an unknown benchmark": ("--eval-data math501", "math501 is no file, no folder and none of embedded"),
    "prompts that do not fit": ("--max-prompt-tokens 3", "no prompt fits --max-prompt-tokens 3"),
    "answers that do not fit": ("--max-response-tokens 9000", "the model knows 512 positions"),
    "a chat template that is not there": ("--chat-template nowhere.jinja", "nowhere.jinja cannot be read"),
    "a chat template that is none": ("--chat-template notes.txt", "cannot be used"),
    "options that are no JSON": ("--template-options thinking", "is no JSON object"),
    "steps and epochs": ("--steps 7 --epochs 2", "--steps and --epochs say the same thing twice"),
    "fewer votes than rollouts": ("--votes 4", "--votes 4 are fewer than --rollouts 8, which all vote"),
    "more mini-batches than questions": ("--mini-batches 17", "some steps ask 15 questions: lower it"),
    "mini-batches without a question": (
        "--model embedded --data questions.jsonl --mini-batches 5",
        "--mini-batches 5, but some steps ask 4 questions",
    ),
    "resuming nothing in particular": ("--resume auto", "--resume auto: say of which run"),
    "resuming what is not there": ("--resume runs/nowhere", "runs/nowhere/config.json does not exist"),
    "resuming a folder of something else": ("--resume empty", "empty/config.json does not exist"),
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
    "greedy sampling": ("--model embedded --temperature 0", "--temperature 0.0 must be from 0.01 to 100"),
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


@pytest.mark.parametrize("given", ["ii", "Co-rewarding-II", "II "])
def test_a_variant_written_otherwise_gets_no_hint(given, monkeypatch, capsys, here):
    with pytest.raises(config.UserError, match="did you mean II\\?"):
        choose_variant(config.Method(variant=given))


EARLY = ["train.py --variant ii", "train.py --data nowhere.jsonl --model embedded", "train.py --eval-data math501"]
EARLY += ["train.py --help", "evaluate.py", "evaluate.py --compare nothing nowhere", "evaluate.py --help"]
EARLY += ["evaluate.py --model m --benchmarks math501", "train.py --learning-rate 1"]


@pytest.mark.parametrize("command", EARLY)
def test_a_mistake_waits_for_pytorch(command):
    script, *arguments = command.split()
    code = f"import runpy, sys\nsys.argv = {[script, *arguments]}\ntry: runpy.run_path({str(ROOT / script)!r}, "
    code += "run_name='__main__')\nexcept SystemExit as ended: print(ended.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{0 if '--help' in command else 2} False"


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--variant ii", "--learning-rate 1", "--model nowhere --data questions.jsonl"])
def test_an_error_under_torchrun_is_printed_by_every_rank(flags, here):
    command = [*TORCHRUN, "2", str(ROOT / "train.py")]
    done = subprocess.run([*command, *flags.split()], cwd=here, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0 and "Traceback" in done.stderr  # torchrun's own
    ours = done.stderr.partition("Traceback")[0]
    mark = "Unrecognized options: " if "learning" in flags else "error: --"
    assert ours.count(mark) == 1


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


EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "two-examples.jinja"
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
    "--max-prompt-tokens 3": ("--max-prompt-tokens 3: the shortest has 22", "--max-prompt-tokens 64"),
    "--steps 7 --epochs 2": ("give one of them", "--steps 1"),
    "--votes 1": ("--votes 1 must be at least 2", "--votes 2"),
    "--mini-batches 3": ("lower it", "--mini-batches 2"),
    "--resume auto": ("with --out runs/NAME", "--resume auto --out runs/mine"),
    "--temperature 0": ("must be from 0.01 to 100", "--temperature 0.01"),
    "--model model": ("or give its path", "--model model --data questions.jsonl"),
    "--model empty --data questions.jsonl": (
        "give one written by save_pretrained",
        "--model model --data questions.jsonl",
    ),
    "--model nonsense --data questions.jsonl": ("or give a path", "--model ./model --data questions.jsonl"),
    "--model embedded --data notes.txt": ("give one of .jsonl, .json", "--model embedded --data questions.jsonl"),
    "--model embedded --data two": ("name the one to read", "--model embedded --data two/train.jsonl"),
    "--model embedded --data empty": ("name the file itself", "--model embedded --data two/train.jsonl"),
    "--model embedded --data rewrites": ("leave one in it", "--model embedded --data rewrites/train_rewrite_a.parquet"),
    "--model embedded --data blank.jsonl": ("fill the column of questions", "--model embedded --data questions.jsonl"),
    "--model embedded --data ids.jsonl": ("or leave them out", "--model embedded --data questions.jsonl"),
    "--model embedded --data questions.jsonl --questions-per-step 8 --mini-batches 5": (
        "some steps ask 4 questions: lower it",
        "--model embedded --data questions.jsonl --questions-per-step 8 --mini-batches 4",
    ),
    "--rollouts 4 --votes 3": ("--votes 3 are fewer than --rollouts 4", "--rollouts 4 --votes 4"),
    "--max-response-tokens 9000": ("shorter responses (--max-response-tokens)", "--max-response-tokens 9"),
    "--chat-template notes.txt": (
        "give one with --chat-template FILE",
        f"--chat-template {EXAMPLES} --max-prompt-tokens 400",
    ),
    "--template-options yes": ("is no JSON object", "--template-options {}"),
    "--eval-data math501": ("math500, gsm8k", "--eval-data gsm8k --data-dir two"),
    "--offload-teacher": ("has no effect on a CPU: leave it out", ""),
    "--offload-optimizer": ("has no effect on a CPU: leave it out", ""),
    "--sampler vllm": ("or take --sampler hf", "--sampler hf"),
    "--out notes.txt": ("name another --out", "--out elsewhere"),
}
EVALUATE_CURES = {
    "": ("a hub name or a local folder", "--model model"),
    "--model model --temperature 0": ("must be from 0.01 to 100", "--model model --temperature 0.1"),
    "--model model --k -1": ("must be at least 0", "--model model --k 0"),
    "--model model --benchmarks questions.jsonl ./questions.jsonl": (
        "rename one",
        "--model model --benchmarks questions.jsonl renamed.jsonl",
    ),
    "--model model --benchmarks solved.jsonl": (
        "name the column of answers (--answer-column",
        "--model model --benchmarks solved.jsonl --answer-column solution",
    ),
    "--model model --out notes.txt": ("name another --out", "--model model --out elsewhere"),
}


@pytest.fixture
def with_everything(here: Path) -> Path:
    """What cures need: a model, golds in another column, a benchmark, a folder of two files."""
    (here / "model").symlink_to(resolve("embedded"))
    lines = {name: [json.dumps(row) + "\n" for row in ROWS] for name in ("renamed.jsonl", "two/train.jsonl")}
    lines["solved.jsonl"] = [json.dumps({**row, "answer": None, "solution": row["answer"]}) + "\n" for row in ROWS]
    lines["blank.jsonl"] = [json.dumps({"question": " "}) + "\n"]
    lines["ids.jsonl"] = [json.dumps({**row, "id": "one"}) + "\n" for row in ROWS]
    lines["two/gsm8k_test.jsonl"] = [json.dumps({**row, "answer": f"#### {row['answer']}"}) + "\n" for row in ROWS]
    lines["two/train.json"] = ['{"question": "What is 1 plus 1?", "answer": "2"}\n']
    (here / "two").mkdir()
    (here / "rewrites").mkdir()
    for name in ("original", "rewrite_a", "rewrite_b"):
        pq.write_table(pa.Table.from_pylist(ROWS), here / "rewrites" / f"train_{name}.parquet")
    for name, of_file in lines.items():
        (here / name).write_text("".join(of_file))
    return here


def trained(flags: str) -> Path:
    return train.train(train.parse(f"{QUICK} {flags}".split()))


def evaluated(flags: str, monkeypatch, capsys) -> str:
    """What evaluate.py prints."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags.split()])
    try:
        evaluate.main()
    except SystemExit as ended:  # --compare and --seeds end at once
        assert not ended.code
    return capsys.readouterr().out


@pytest.mark.parametrize("wrong", CURES)
def test_the_cure_that_an_error_names_works(wrong, monkeypatch, capsys, with_everything):
    cure, right = CURES[wrong]
    with monkeypatch.context() as patched:
        if wrong == "--sampler vllm":
            patched.setattr("importlib.util.find_spec", lambda name: None)
        assert cure in sentence_of(train.main, f"{QUICK} {wrong}", patched, capsys, with_everything)
    folder = trained(right)
    assert (folder / "checkpoints" / "latest" / "policy").is_dir()


@pytest.mark.parametrize("wrong", EVALUATE_CURES)
def test_the_cure_that_an_error_of_an_evaluation_names_works(wrong, monkeypatch, capsys, with_everything):
    quick = "--k 1 --limit 2 --max-response-tokens 8 --benchmarks questions.jsonl"
    cure, right = EVALUATE_CURES[wrong]
    assert cure in sentence_of(evaluate.main, f"{quick} {wrong}", monkeypatch, capsys, with_everything)
    assert "kept in" in evaluated(f"{quick} {right}", monkeypatch, capsys)


SETTINGS = [name for group in vars(config.Config()).values() for name in vars(group)]


@pytest.mark.parametrize("name", sorted(config.RANGES.keys() & set(SETTINGS)))
def test_the_ends_of_a_range_that_an_error_names_are_refused(name):
    lowest, highest, _ = config.RANGES[name]
    for value in (lowest, highest):
        if value < 10**6:
            config.parse(["--rollouts", "2", config.flag_name(name), f"{value}"])


@pytest.mark.slow
def test_the_cures_for_a_run_that_is_there_do_not_work(monkeypatch, capsys, here):
    flags = "--out mine"
    trained(flags)
    said = sentence_of(train.main, f"{QUICK} {flags}", monkeypatch, capsys, here)
    assert "continue it with --resume auto, or name another folder" in said
    trained(f"{flags} --resume auto --steps 2")
    assert (trained("--out other") / "metrics.jsonl").exists()

    checkpoint = here / "mine" / "checkpoints" / "step-000001"
    said = sentence_of(train.main, f"{QUICK} --resume {checkpoint}", monkeypatch, capsys, here)
    assert "start another run from its policy/ with --model" in said
    trained(f"--model {checkpoint}/policy --data embedded --steps 2 --out from-it")

    with lock_run_dir(train.parse(f"{QUICK} {flags} --resume auto --steps 3".split())):
        with pytest.raises(config.UserError, match="wait for it, or name another --out"):
            trained(f"{flags} --resume auto --steps 3")
        trained("--out meanwhile")
    trained(f"{flags} --resume auto --steps 3 --keep 0")


def test_the_cures_for_questions_that_have_changed_do_not_work(monkeypatch, capsys, here):
    flags = "--model embedded --data questions.jsonl --out mine"
    trained(flags)
    before = (here / "questions.jsonl").read_text()
    (here / "questions.jsonl").write_text(before.replace("plus", "and"))
    said = sentence_of(train.main, f"{QUICK} {flags} --resume auto --steps 2", monkeypatch, capsys, here)
    assert "restore the file, or start a new run from the checkpoint's policy/ with --model" in said
    policy = "mine/checkpoints/latest/policy"
    trained(f"--model {policy} --data questions.jsonl --out new")
    (here / "questions.jsonl").write_text(before)
    trained(f"{flags} --resume auto --steps 2")


def test_the_cures_for_other_settings_do_not_work(monkeypatch, capsys, here):
    trained("--out mine")
    said = sentence_of(train.main, f"{QUICK} --out mine --resume auto --steps 2 --lr 1e-5", monkeypatch, capsys, here)
    assert "leave these out, or start a new run from the checkpoint's policy/ with --model" in said
    trained("--out mine --resume auto --steps 2")
    trained("--model mine/checkpoints/latest/policy --data questions.jsonl --lr 1e-5 --out new")


def test_the_cure_for_a_run_that_diverges_does_not_work(monkeypatch, here):
    """A stand-in: with this little model no learning rate that is allowed ends in weights that are not finite."""
    step = torch.optim.AdamW.step

    def overflow(self: torch.optim.AdamW, *args: Any) -> Any:
        if self.param_groups[0]["lr"] > 0.1:
            next(iter(self.param_groups[0]["params"])).data.fill_(float("inf"))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(config.UserError, match="weights are not finite after 1 steps, and are not saved: lower --lr"):
        trained("--lr 0.5 --out mine")
    trained("--lr 0.05 --out other")


@pytest.mark.slow
def test_the_cures_for_models_do_not_work(monkeypatch, capsys, with_everything):
    """A tokenizer without an end-of-sequence token, and a family that cannot be packed."""
    shutil.copytree(resolve("embedded"), "mute")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads(Path("mute", name).read_text())
        kept = {key: value for key, value in settings.items() if not key.startswith("eos_token")}
        Path("mute", name).write_text(json.dumps(kept))
    flags = f"{QUICK} --model mute --data questions.jsonl"
    said = sentence_of(train.main, flags, monkeypatch, capsys, with_everything)
    assert "names an end-of-sequence token: set tokenizer.eos_token" in said
    tokenizer = AutoTokenizer.from_pretrained("mute")
    tokenizer.eos_token = AutoTokenizer.from_pretrained("model").eos_token
    tokenizer.save_pretrained("mute")
    trained("--model mute --data questions.jsonl")

    tokenizer.save_pretrained("other")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "n_layer": 1, "n_head": 2, "initializer_range": 1.0}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained("other")
    said = sentence_of(
        train.main, f"{QUICK} --model other --data questions.jsonl", monkeypatch, capsys, with_everything
    )
    assert "use a model of another family" in said
    trained("--model model --data questions.jsonl")


@pytest.mark.slow
def test_the_cures_for_what_cannot_be_downloaded_do_not_work(monkeypatch, capsys, with_everything):
    def no_network(*_: Any, **__: Any) -> str:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    flags = "--model embedded --data math"
    said = sentence_of(train.main, f"{QUICK} {flags}", monkeypatch, capsys, with_everything)
    assert "copy data/math of github.com/tmlr-group/Co-rewarding to data/math, or give its path" in said
    (with_everything / "rewrites" / "train_rewrite_b.parquet").unlink()
    shutil.copytree("rewrites", "data/math")
    trained(flags)
    trained("--model embedded --data rewrites")

    said = sentence_of(train.main, f"{QUICK} --eval-data math500", monkeypatch, capsys, with_everything)
    assert "put math500.jsonl below data" in said
    lines = [json.dumps({"problem": row["question"], "answer": row["answer"]}) + "\n" for row in ROWS]
    Path("data/math500.jsonl").write_text("".join(lines))
    trained("--eval-data math500")


def test_a_hub_that_cannot_be_reached_is_asked_for_a_minute(here):
    unreachable = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(here / "hub")}
    command = [sys.executable, str(ROOT / "train.py"), "--model", "Qwen3-8B-Base", "--data", "embedded"]
    done = subprocess.run(command, cwd=here, env=unreachable, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Retrying" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --model Qwen3-8B-Base: transformers cannot load Qwen/Qwen3-8B-Base")
    assert last.endswith("give the path of a whole copy")


def test_the_cures_for_results_do_not_work(monkeypatch, capsys, with_everything):
    def evaluate_to(out: str, flags: str = "") -> str:
        return f"--model model --k 0 --max-response-tokens 8 --benchmarks questions.jsonl --out {out} {flags}"

    evaluated(evaluate_to("a"), monkeypatch, capsys)
    longer = "--max-response-tokens 9"
    said = sentence_of(evaluate.main, evaluate_to("a", longer), monkeypatch, capsys, with_everything)
    assert "max_response_tokens (was 8, is 9); name another --out, or delete it" in said
    evaluated(evaluate_to("b", longer), monkeypatch, capsys)
    shutil.rmtree("a")
    evaluated(evaluate_to("a", f"{longer} --limit 2"), monkeypatch, capsys)

    said = sentence_of(evaluate.main, "--compare a b", monkeypatch, capsys, with_everything)
    assert "questions has other questions in a than in b: evaluate one again" in said
    evaluated(evaluate_to("c", "--limit 2"), monkeypatch, capsys)
    assert "0 questions acquired" in evaluated("--compare a c", monkeypatch, capsys)

    policy = trained("--out mine") / "checkpoints" / "latest" / "policy"
    evaluated(evaluate_to("d", f"--model {policy}"), monkeypatch, capsys)
    said = sentence_of(evaluate.main, "--seeds c d", monkeypatch, capsys, with_everything)
    assert "c measures" in said and "which is in no run's folder: leave it out" in said
    assert "questions" in evaluated("--seeds d", monkeypatch, capsys)


def test_the_cures_for_pictures_and_logs_do_not_work(here):
    good = trained("--out good")
    bad = trained("--out bad")
    with pytest.raises(config.UserError, match=r"choose another --out"):
        plot.main([good], here / "curves.nothing")
    plot.main([good], here / "curves.png")
    (bad / "config.json").write_text("{")
    with pytest.raises(config.UserError, match="repair it, or leave the run out"):
        plot.main([good, bad], here / "two.png")
    plot.main([good], here / "two.png")
    with pytest.raises(config.UserError, match="has steps 0 to 0, and no 7"):
        look.look(good, step=7)
    look.look(good, step=0)
    whole = (bad / "rollouts.jsonl").read_text()
    (bad / "rollouts.jsonl").write_text(f"half{whole}")
    with pytest.raises(config.UserError, match="repair it or move the file away"):
        look.look(bad)
    (bad / "rollouts.jsonl").write_text(whole)
    look.look(bad)
