"""The embedded task and model: nothing held out is trained on, golds are right, the cache is made once."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config import SYSTEM_PROMPT, UserError
from embedded import start_model
from embedded.word_problems import (
    FAMILIES,
    MISREAD_AS,
    MISREAD_WORDING,
    PROBLEMS,
    PROBLEMS_OF,
    STUDENTS,
    Student,
    demonstration,
    flawed_solution,
    solution,
    word_problems,
)
from lm.prompts import prompt_ids
from rewards import equivalent


def test_held_out_problems_occur_in_no_wording_of_training():
    train, held_out = (set(PROBLEMS_OF[split]) for split in ("train", "held-out"))
    assert not train & held_out
    assert len(held_out) >= 40 and len(train) >= 300
    assert {row["question"] for row in word_problems("train")}.isdisjoint(
        row["question"] for row in word_problems("held-out")
    )


def test_every_held_out_sum_is_practised_in_training():
    practised = {problem.work().last_line for problem in PROBLEMS_OF["train"]}
    assert all(problem.work().last_line in practised for problem in PROBLEMS_OF["held-out"])


def by_structure(family: int, a: int, b: int, c: int) -> int:
    return [a + b * c, a * b - c, (a + b) * c, a + b - c][family]


def test_answers_are_those_of_the_problem_and_both_wordings_state_its_numbers():
    for row in word_problems():
        family, numbers, _ = row["id"].split(":")
        a, b, c = map(int, numbers.split(","))
        assert int(row["answer"]) == by_structure(int(family), a, b, c) > 0
        for wording in (row["question"], row["rephrased"]):
            assert sorted(map(int, re.findall(r"\d+", wording))) == sorted((a, b, c))
        assert row["question"] != row["rephrased"]


def test_clean_solutions_are_right_and_flawed_ones_often_not():
    rng = random.Random(0)
    boxed = re.compile(r"\\boxed\{(-?\d+)\}$")
    right = 0
    for problem in PROBLEMS:
        found = boxed.search(solution(problem))
        assert found and int(found[1]) == problem.work().result
        flawed = boxed.search(flawed_solution(problem, rng.randrange(4), rng))
        right += bool(flawed) and int(flawed[1]) == problem.work().result
    assert 0.35 < right / len(PROBLEMS) < 0.75


def test_wordings_permute_the_operands():
    orders = {re.sub("[^abc]", "", "".join(re.findall(r"\{[abc]\}", w))) for f in FAMILIES for w in f.wordings}
    assert len(orders) >= 5


def test_the_tokenizer_keeps_numbers_whole_and_encodes_anything():
    tokenizer = start_model.train_tokenizer()
    assert len(tokenizer("\\boxed{17}").input_ids) == 3
    assert len(tokenizer("3*4=12; 5+12=17.").input_ids) == 12
    for text in ("\\frac{1}{2} é 漢字 \n", "Ann has 12 pens."):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = prompt_ids(tokenizer, "Ann?")
    assert tokenizer.convert_ids_to_tokens(prompt)[:2] == ["<|system|>", SYSTEM_PROMPT]


def test_the_tokenizer_is_the_same_every_time():
    assert start_model.train_tokenizer().get_vocab() == start_model.train_tokenizer().get_vocab()


@pytest.fixture
def short_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(start_model, "CLEAN_STEPS", 1)
    monkeypatch.setattr(start_model, "FLAWED_STEPS", 1)
    return tmp_path / "co-rewarding"


def test_the_warm_up_runs_once_and_again_when_its_recipe_changes(short_warm_up, monkeypatch):
    warmed_up = []
    real = start_model.warm_up
    monkeypatch.setattr(start_model, "warm_up", lambda *args: warmed_up.append(args[-1]) or real(*args))
    first = start_model.model_folder()
    assert start_model.model_folder() == first and warmed_up == [0]
    assert start_model.model_folder(seed=1) != first and warmed_up == [0, 1]
    monkeypatch.setattr(start_model, "CLEAN_STEPS", 2)
    assert start_model.model_folder() not in (first, None) and warmed_up == [0, 1, 0]
    assert not [folder for folder in short_warm_up.iterdir() if folder.name.startswith("tmp")]


def test_the_warm_up_rises_for_a_twentieth_of_its_steps_and_then_falls_to_zero():
    rates = [start_model.learning_rate(step, 400, 4e-3) for step in range(400)]
    assert rates[:20] == pytest.approx([4e-3 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == 4e-3 and rates[210] == pytest.approx(2e-3) and 0 < rates[-1] < 1e-6
    assert start_model.learning_rate(0, 1, 2e-3) == 2e-3


def test_the_start_model_does_not_depend_on_the_threads_of_the_command_that_makes_it(tmp_path):
    """`evaluate.py --model embedded` warmed up another model than `train.py`."""
    script = (
        "import torch; torch.set_num_threads({}); from embedded import start_model; "
        "start_model.CLEAN_STEPS, start_model.FLAWED_STEPS = 3, 1; "
        "print(start_model.model_folder(), torch.get_num_threads())"
    )
    made = []
    for threads in (1, 2):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / str(threads))}
        command = [sys.executable, "-c", script.format(threads)]
        root = Path(start_model.__file__).parents[1]
        said = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
        folder, after = said.split()
        assert int(after) == threads
        made.append((Path(folder).name, load_file(Path(folder) / "model.safetensors")))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(weight, made[1][1][name]) for name, weight in made[0][1].items())


def test_a_damaged_file_in_the_cache_is_a_sentence(short_warm_up):
    weights = Path(start_model.model_folder()) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be kept there .*; delete it if it is damaged"):
        start_model.model_folder()


def test_a_full_disk_is_a_sentence_and_leaves_no_half_model(short_warm_up):
    full, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot be kept there .* make room, or set XDG_CACHE_HOME"):
            start_model.model_folder()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, full)
    assert not list(short_warm_up.iterdir())


def test_a_cache_that_cannot_be_made_is_a_sentence(short_warm_up, monkeypatch):
    short_warm_up.write_text("a file in the way")
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        start_model.model_folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom the system does not know
    with pytest.raises(UserError, match="no home folder .*: set XDG_CACHE_HOME"):
        start_model.model_folder()


def answers_in_the_box(student: Student, wording: int) -> list[tuple[int, str]]:
    """(true answer, what the careful student boxes), for every problem."""
    rng = random.Random(wording)
    texts = [(problem, demonstration(student, problem, wording, careful=True, rng=rng)) for problem in PROBLEMS]
    return [(problem.work().result, text.split("\\boxed{")[1].removesuffix("}")) for problem, text in texts]


def test_one_wording_alone_is_misread_and_always_in_the_same_way():
    student = STUDENTS["embedded-misreading"]
    shares = []
    for wording in range(4):
        pairs = answers_in_the_box(student, wording)
        shares.append(sum(str(answer) != boxed for answer, boxed in pairs) / len(pairs))
    assert shares[:3] == [0, 0, 0] and abs(shares[MISREAD_WORDING] - student.misreads) < 0.06
    misread = [solution(problem, MISREAD_AS[FAMILIES[problem.family].steps[2]]) for problem in PROBLEMS]
    by_chance = [p for p, text in zip(PROBLEMS, misread, strict=True) if text.endswith(f"{{{p.work().result}}}")]
    assert all(problem.work().last_line == "2*2=4" for problem in by_chance)  # = 2 + 2


def test_spellings_of_an_answer_are_equal_as_mathematics_and_not_as_strings():
    pairs = answers_in_the_box(STUDENTS["embedded-spellings"], wording=0)
    assert all(equivalent(str(answer), boxed) for answer, boxed in pairs)
    as_written = sum(str(answer) == boxed for answer, boxed in pairs) / len(pairs)
    assert abs(as_written - 1 / 3) < 0.06
