"""What an attack on the program found (issue 17): each test is named after the bug it prevents."""

import ast
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from matplotlib.figure import Figure
from runs import PROGRAM, ROOT, SMALL, cut_in_half, metrics_of, small, tiny_training
from safetensors.torch import save_file
from tiny import CPU, byte_tokenizer, tiny_lm

import train
from config import Config, UserError, parse
from lm.model import load_policy
from lm.record import Rollout
from rewards import Group, rollouts_of
from store import checkpoint
from store.jsonl import read_rows

# ---------------------------------------------------------------- nothing lost

SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven."  # `splitlines` cuts at each


def test_a_separator_of_unicode_in_a_question_or_a_text_makes_a_run_unresumable(tmp_path, monkeypatch):
    questions = [{"question": f"Ann has {n} pens.{SEPARATORS}", "answer": str(n)} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    def say_it(rollouts: list[Rollout], _: Any) -> None:
        for each in rollouts:
            each.text = f"\ud800{SEPARATORS} \\boxed{{{SEPARATORS}}}"
            each.answer = SEPARATORS

    monkeypatch.setattr("rollout.read_answers", say_it)
    flags = ["--data", str(tmp_path / "data.jsonl"), "--model", "embedded", "--save-every", "1"]
    flags += ["--max-prompt-tokens", "512"]
    run = train.train(small(tmp_path / "run", *flags, "--steps", "1"))
    train.train(parse([*SMALL, *flags, "--steps", "2", "--out", str(run), "--resume", "auto"]))
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1]
    rollouts = read_rows(run / "rollouts.jsonl")
    assert [row["step"] for row in rollouts] == [0, 1]
    assert all(SEPARATORS in text for row in rollouts for text in (row["question"], *row["texts"]))


def test_lines_of_json_depend_on_the_locale(tmp_path):
    task = "import sys; from pathlib import Path; from store.jsonl import append_rows, read_rows\n"
    task += "append_rows(Path(sys.argv[1]), [{'text': 'S\\u00fc\\u00df \\u2028'}]); read_rows(Path(sys.argv[1]))"
    for locale in ("C", "C.UTF-8"):
        environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        subprocess.run([sys.executable, "-c", task, str(tmp_path / "rows")], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "rows").read_bytes() == b'{"text": "S\xc3\xbc\xc3\x9f \xe2\x80\xa8"}\n' * 2


def test_a_line_of_garbage_in_the_metrics_ends_a_resume_in_a_traceback(tmp_path):
    run = train.train(small(tmp_path / "run", "--steps", "1"))
    for garbage in (b"\0\0\0\0\n", b'{"step": \n', b"[1]\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n"):
        whole = (run / "metrics.jsonl").read_bytes()
        (run / "metrics.jsonl").write_bytes(garbage + whole)
        with pytest.raises(UserError, match="metrics.jsonl, line 1 .*repair it or move the file away"):
            train.train(parse(["--resume", str(run), "--steps", "2"]))
        assert (run / "metrics.jsonl").read_bytes() == garbage + whole, "nothing is cut"
        (run / "metrics.jsonl").write_bytes(whole)


def test_a_resumed_run_writes_into_a_folder_that_holds_another_run(tmp_path):
    run, other = (train.train(small(tmp_path / name, "--steps", "1")) for name in ("run", "other"))
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"is not the newest checkpoint of the run in {other}: start another run"):
        train.train(parse(["--resume", str(run / "checkpoints" / "step-000001"), "--out", str(other)]))
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_four_runs_that_start_at_once_share_a_folder(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--steps", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) for _ in range(4)]
    assert [run.wait(timeout=240) for run in runs] == [0] * 4, b"\n".join(run.communicate()[1] for run in runs)
    folders = sorted((tmp_path / "runs").iterdir())
    assert [len(metrics_of(folder)) for folder in folders] == [1] * 4


@pytest.mark.draws
def test_a_full_disk_while_curves_are_drawn_ends_a_finished_run_in_an_error(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", full)
    run = train.train(small(tmp_path / "run", "--steps", "1"))
    assert len(metrics_of(run)) == 1 and not (run / "curves.png").exists()


# ---------------------------------------------------------------- nothing silent


def diverge(monkeypatch: pytest.MonkeyPatch, in_steps: Callable[[int], bool]) -> None:
    """The advantages of these steps are not finite."""
    assign, calls = train.assign_advantages, iter(range(1000))

    def broken(groups: list[Group], rewards: list[list[float]], fixed: bool) -> None:
        assign(groups, rewards, fixed)
        if in_steps(next(calls)):
            for rollout in rollouts_of(groups):
                rollout.advantage = float("inf")

    monkeypatch.setattr(train, "assign_advantages", broken)


def test_a_run_that_skips_every_step_ends_with_exit_code_0(tmp_path, monkeypatch, capsys):
    diverge(monkeypatch, lambda step: True)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "30", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    *_, last_line = capsys.readouterr().err.splitlines()
    assert last_line == "error: 10 steps in a row had no finite gradient and were skipped: lower --lr"
    assert len(metrics_of(tmp_path / "run")) == 10


def test_one_mini_batch_without_a_gradient_counts_as_a_step_without_one(tmp_path, monkeypatch):
    assign = train.assign_advantages

    def half_broken(groups: list[Group], rewards: list[list[float]], fixed: bool) -> None:
        assign(groups, rewards, fixed)
        for rollout in groups[0].rollouts:
            rollout.advantage = float("inf")

    monkeypatch.setattr(train, "assign_advantages", half_broken)
    run = train.train(small(tmp_path / "run", "--steps", "12", "--mini-batches", "2"))
    assert [row["skipped_steps"] for row in metrics_of(run)] == [0.5] * 12


def test_a_skipped_step_is_only_a_number(tmp_path, monkeypatch, capsys):
    """It is said once, and two of them do not end the run."""
    diverge(monkeypatch, lambda step: step in (1, 3))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/warnings.txt").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("not to be added to\n")
    run = train.train(small(tmp_path / "run", "--steps", "5"))
    assert (tmp_path / "precious").read_text() == "not to be added to\n"
    said = "step 1: its gradient is not finite, the weights stay as they were; lower --lr if it comes again"
    assert [row["skipped_steps"] for row in metrics_of(run)] == [0, 1, 0, 1, 0]
    assert capsys.readouterr().err.count("gradient is not finite") == 1
    lines = (run / "warnings.txt").read_text().splitlines()
    assert [line for line in lines if "gradient" in line] == [said]


def test_weights_that_are_not_finite_become_a_checkpoint(tmp_path, monkeypatch):
    step = train.train_step

    def ruin(run: train.Run, number: int) -> Any:
        seen = step(run, number)
        if number == 1:
            next(run.policy.parameters()).data[0, 0] = float("nan")
        return seen

    monkeypatch.setattr(train, "train_step", ruin)
    with pytest.raises(UserError, match="weights are not finite after 2 steps, and are not saved"):
        train.train(small(tmp_path / "run", "--steps", "3", "--save-every", "1"))
    assert [path.name for path in checkpoint.newest_first(tmp_path / "run" / "checkpoints")] == ["step-000001"]


NUMBERS = [
    each.name for group in vars(Config()).values() for each in fields(group) if each.type in (float, float | None)
]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        *((f"--{name.replace('_', '-')} nan", f"--{name.replace('_', '-')} nan must be ") for name in NUMBERS),
        ("--lr 1e9", "--lr 1000000000.0 must be from 0 to 1"),
        ("--lr inf", "--lr inf must be"),
        ("--lr -1", "--lr -1.0 must be from 0 to 1"),
        ("--clip -0.1", "--clip -0.1 must be from 0 to 1000"),
        ("--clip 5000", "--clip 5000.0 must be from 0 to 1000"),
        ("--kl-coef -1", "--kl-coef -1.0 must be"),
        ("--kl-cap -10", "--kl-cap -10.0 must be"),
        ("--tis-cap -2", "--tis-cap -2.0 must be"),
        ("--beta2 1", "--beta2 1.0 must be from 0 to 0.999999999"),
        ("--beta2 -1", "--beta2 -1.0 must be from 0 to 0.999999999"),
        ("--weight-decay -0.1", "--weight-decay -0.1 must be"),
        ("--max-grad-norm 0", "--max-grad-norm 0.0 must be"),
        ("--warmup 2", "--warmup 2.0 must be from 0 to 1"),
        ("--engine-memory 0", "--engine-memory 0.0 must be"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--epochs 0", "--epochs 0 must be at least 1"),
        ("--save-every -1", "--save-every -1 must be at least 0"),
        ("--tokens-per-micro-batch 0", "--tokens-per-micro-batch 0 must be at least 1"),
    ],
)
def test_a_number_with_which_nothing_can_be_learnt_is_trained_with(flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse(flags.split())


def test_all_numbers_are_among_those_that_are_tried():
    assert {"lr", "clip", "kl_coef", "kl_cap", "tis_cap", "beta2", "temperature"} <= set(NUMBERS)


# ---------------------------------------------------------------- runs what it should not


class Touch:
    """Unpickled, or its source imported, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.file,)

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self)

    @property
    def source(self) -> str:
        return f"import pathlib\npathlib.Path({str(self.file)!r}).touch()\nX = C = T = generate = None\n"


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def sealed(folder: Path) -> Path:
    """Whoever makes a checkpoint makes its manifest too."""
    (folder / "manifest.json").write_text(json.dumps(checkpoint.manifest_of(folder)))
    return folder


@pytest.fixture(scope="module")
def training() -> checkpoint.Training:
    return tiny_training()


@pytest.fixture
def saved(training, tmp_path) -> Path:
    return checkpoint.save(tmp_path / "run" / "checkpoints", 1, training)


CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.X", "AutoTokenizer": ["evil.T", "evil.T"]}


def with_code(folder: Path, touch: Touch) -> None:
    """Every kind of code that transformers would run from a model's folder if it were trusted."""
    for file in ("evil.py", "custom_generate/generate.py", "modeling_evil.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(touch.source)
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        change(folder / file, auto_map=CODE, custom_generate="custom_generate")


def test_pickles_and_modules_beside_the_weights_of_a_checkpoint_run(saved, training, tmp_path):
    touch = Touch(tmp_path / "pwned")
    for who in ("policy", "teacher"):
        with_code(saved / who, touch)
    for file in ("policy/pytorch_model.bin", "policy/.metadata", "policy/optimizer.pt", "policy/training_args.bin"):
        (saved / file).write_bytes(touch.pickled)
    for file in (".metadata", "optimizer/.metadata", "optimizer/__0_0.distcp", "optimizer/exp_avg.pt", "rng.pkl"):
        (saved / file).write_bytes(touch.pickled)
    assert checkpoint.verify(sealed(saved)) is None
    assert checkpoint.restore(saved, training) == 1
    load_policy(str(saved), CPU)
    assert not touch.file.exists()


@pytest.mark.parametrize(
    "file",
    [
        "optimizer/exp_avg.safetensors",
        "optimizer/exp_avg_sq.safetensors",
        "policy/model.safetensors",
        "teacher/model.safetensors",
        "policy/config.json",
        "trainer.json",
    ],
)
def test_a_pickle_in_the_place_of_a_file_runs(saved, training, tmp_path, file):
    touch = Touch(tmp_path / "pwned")
    (saved / file).write_bytes(touch.pickled)
    with pytest.raises(UserError, match="--resume .*step-000001"):
        checkpoint.restore(sealed(saved), training)
    assert not touch.file.exists()


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "part.bin"])
def test_weights_as_a_pickle_run(saved, training, tmp_path, pickled):
    touch = Touch(tmp_path / "pwned")
    (saved / "policy" / "model.safetensors").unlink()
    (saved / "policy" / pickled).write_bytes(touch.pickled)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "part.bin"}}
    if pickled == "part.bin":
        (saved / "policy" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not hold the weights of this run"):
        checkpoint.restore(sealed(saved), training)
    with pytest.raises(UserError, match="transformers cannot load"):
        load_policy(str(saved), CPU)
    assert not touch.file.exists()


@pytest.mark.parametrize("kind", [{"model_type": "evil"}, {"model_type": None}, {"architectures": ["X"]}])
def test_a_model_of_a_kind_of_its_own_runs(tmp_path, tokenizer, kind):
    touch, folder = Touch(tmp_path / "pwned"), tmp_path / "model"
    tiny_lm().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with_code(folder, touch)
    change(folder / "config.json", **kind)
    change(folder / "tokenizer_config.json", tokenizer_class="T")
    with pytest.raises(UserError, match="transformers cannot load"):
        load_policy(str(folder), CPU)
    assert not touch.file.exists()


FORBIDDEN = re.compile(r"import pickle|weights_only=False|trust_remote_code=True|torch\.distributed\.checkpoint")


def test_a_model_that_somebody_else_wrote_is_loaded_with_trust():
    calls = 0
    for file in PROGRAM:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "hf_hub_download"):
                calls += 1
                by_name = {word.arg: ast.unparse(word.value) for word in node.keywords}
                text = f"{by_name}" if None not in by_name else file.read_text(encoding="utf-8")
                trusted = re.search(r"""trust_remote_code['"]: ['"]?False""", text)
                assert trusted or node.func.attr == "hf_hub_download", f"{file.name}, line {node.lineno}"
            if isinstance(node, ast.Attribute) and node.attr in ("loads", "load", "Unpickler"):
                assert ast.unparse(node.value) == "json", f"{file.name}, line {node.lineno}: {ast.unparse(node)}"
        assert not FORBIDDEN.search(file.read_text(encoding="utf-8")), file.name
    assert calls >= 3


@pytest.mark.draws
@pytest.mark.parametrize("name", [".lock", "config.json", "metrics.jsonl", "rollouts.jsonl", "curves.png"])
def test_a_link_in_a_runs_folder_overwrites_what_it_points_to(tmp_path, name):
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_bytes(b'{"step": -1}\n')
    run.mkdir()
    (run / "config.json").write_text(json.dumps(asdict(small(run))))
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious)
    flags = ["--steps", "1", "--resume", "auto"]
    if name == ".lock":
        with pytest.raises(UserError, match="cannot be written to"):
            train.train(small(run, *flags))
    else:
        train.train(small(run, *flags))
    assert precious.read_bytes() == b'{"step": -1}\n'


# ---------------------------------------------------------------- a sentence, not a traceback

DEEP = "[" * 100_000
SHAPES = ["", "[]", "{}", "null", "7", '"text"', "[1, 2]", "[[1, 2]]", '[["a", 1], [2, 3]]', '{"a": 1}', DEEP, "\0"]
SHAPES += ["\ud800"]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_a_manifest_of_another_shape_counts_as_intact_or_ends_in_a_traceback(saved, shape):
    (saved / "manifest.json").write_bytes(shape.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match="holds no checkpoint|is missing|is damaged"):
        checkpoint.find_checkpoint(str(saved), None)
    with pytest.raises(UserError, match="none of 1 checkpoints in .* is intact"):
        checkpoint.find_checkpoint("auto", str(saved.parents[1]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train.train(small(tmp_path_factory.mktemp("finished") / "run", "--steps", "1"))


TRAINERS: list[dict[str, Any]] = [
    {"step": None},
    {"step": "one"},
    {"step": float("inf")},
    {"step": -1},
    {"optimizer_steps": {}},
    {"settings": []},
    {"settings": {"run": 1}},
    {"settings": {"run": {"no such setting": 1}}},
    {"settings": {}},
]


@pytest.mark.parametrize("shape", [*SHAPES, *TRAINERS], ids=range(len(SHAPES) + len(TRAINERS)))
def test_a_trainer_json_of_another_shape_ends_in_a_traceback(finished, tmp_path, shape):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    saved = run / "checkpoints" / "step-000001"
    if isinstance(shape, dict):
        change(saved / "trainer.json", **shape)
    else:
        (saved / "trainer.json").write_bytes(shape.encode(errors="surrogatepass"))
    sealed(saved)
    for flags in (["--resume", str(saved)], [*SMALL, "--steps", "1", "--out", str(run), "--resume", "auto"]):
        with pytest.raises(UserError, match="trainer.json (is not one|holds no settings of)"):
            train.train(parse(flags))


def test_a_length_that_is_no_number_ends_in_a_traceback(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    saved = run / "checkpoints" / "step-000001"
    settings = json.loads((saved / "trainer.json").read_text())["settings"]
    settings["optimisation"]["steps"] = "abc"
    change(saved / "trainer.json", settings=settings)
    sealed(saved)
    with pytest.raises(UserError, match="--steps cannot be 'abc'"):
        train.train(parse([*SMALL, "--steps", "2", "--out", str(run), "--resume", "auto"]))


def test_settings_of_another_type_end_in_a_traceback(tmp_path):
    config = parse([])
    for wrong, sentence in (
        ({"optimisation": {"lr": "fast"}}, "--lr cannot be 'fast'"),
        ({"method": {"variant": ["II"]}}, r"--variant cannot be \['II'\]"),
    ):
        groups = {name: vars(group) | wrong.get(name, {}) for name, group in vars(config).items()}
        (tmp_path / "config.json").write_text(json.dumps(groups))
        with pytest.raises(UserError, match=sentence):
            train.train(parse(["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]))


def other_weights(saved: Path) -> None:
    tiny_lm(hidden_size=16).save_pretrained(saved / "policy")


def other_moments(saved: Path) -> None:
    save_file({"no.such.weight": torch.zeros(2)}, saved / "optimizer" / "exp_avg.safetensors")


def half_of_the_weights(saved: Path) -> None:
    cut_in_half(saved / "teacher" / "model.safetensors")


@pytest.mark.parametrize("wrong", [other_weights, other_moments, half_of_the_weights])
def test_a_checkpoint_of_another_model_ends_in_a_traceback(saved, wrong):
    wrong(saved)
    with pytest.raises(UserError, match="does not hold the weights of this run"):
        checkpoint.restore(sealed(saved), tiny_training())


@pytest.mark.parametrize("bytes_left", [0, 3, 5000])
def test_truncated_weights_of_a_users_model_end_in_a_traceback(tmp_path, tokenizer, bytes_left):
    tiny_lm().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:bytes_left])
    with pytest.raises(UserError, match=f"--model {tmp_path}: transformers cannot load"):
        load_policy(str(tmp_path), CPU)


def test_a_tokenizer_with_more_ids_than_the_embedding_ends_in_a_traceback(tmp_path):
    """Or on a GPU in an assertion of the device. An id that no prompt has may lie beyond: Gemma 3 has one."""
    tiny_lm(vocab_size=200).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="is token 2\\d\\d of a tokenizer, the embedding has 200 rows"):
        load_policy(str(tmp_path / "small"), CPU)
    tiny_lm().save_pretrained(tmp_path / "beyond")
    byte_tokenizer().save_pretrained(tmp_path / "beyond")
    added = type(byte_tokenizer()).from_pretrained(tmp_path / "beyond")
    added.add_special_tokens({"additional_special_tokens": ["<picture>", "<|user|>"]})
    added.save_pretrained(tmp_path / "beyond")
    load_policy(str(tmp_path / "beyond"), CPU)
    added.chat_template = "<|user|>{{ messages[-1].content }}"
    added.save_pretrained(tmp_path / "beyond")
    with pytest.raises(UserError, match="'<|user|>' is token 258 of a tokenizer, the embedding has 257 rows"):
        load_policy(str(tmp_path / "beyond"), CPU)
