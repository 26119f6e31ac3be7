"""The embedded task and model: nothing held out is trained on, golds are right, the cache is made once."""

import random
import re

from data import SYSTEM_PROMPT
from embedded import start_model
from embedded.word_problems import (
    FAMILIES,
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
    practised = {problem.last_step() for problem in PROBLEMS_OF["train"]}
    assert all(problem.last_step() in practised for problem in PROBLEMS_OF["held-out"])


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
        assert found and int(found[1]) == problem.answer
        flawed = boxed.search(flawed_solution(problem, rng.randrange(4), rng))
        right += bool(flawed) and int(flawed[1]) == problem.answer
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


def test_the_warm_up_runs_once_and_again_when_its_recipe_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(start_model, "CLEAN_STEPS", 1)
    monkeypatch.setattr(start_model, "FLAWED_STEPS", 1)
    warmed_up = []
    real = start_model.warm_up
    monkeypatch.setattr(start_model, "warm_up", lambda *args: warmed_up.append(args[-1]) or real(*args))
    first = start_model.model_folder()
    assert start_model.model_folder() == first and warmed_up == [0]
    assert start_model.model_folder(seed=1) != first and warmed_up == [0, 1]
    monkeypatch.setattr(start_model, "CLEAN_STEPS", 2)
    assert start_model.model_folder() not in (first, None) and warmed_up == [0, 1, 0]
    assert not [folder for folder in (tmp_path / "co-rewarding").iterdir() if folder.name.startswith("tmp")]


def answers_in_the_box(student: Student, wording: int) -> list[tuple[int, str]]:
    """(true answer, what the careful student boxes), for every problem."""
    rng = random.Random(wording)
    texts = [(problem, demonstration(student, problem, wording, careful=True, rng=rng)) for problem in PROBLEMS]
    return [(problem.answer, text.split("\\boxed{")[1].removesuffix("}")) for problem, text in texts]


def test_one_wording_alone_is_misread_and_always_in_the_same_way():
    student = STUDENTS["embedded-misreading"]
    shares = []
    for wording in range(4):
        pairs = answers_in_the_box(student, wording)
        shares.append(sum(str(answer) != boxed for answer, boxed in pairs) / len(pairs))
    assert shares[:3] == [0, 0, 0] and abs(shares[MISREAD_WORDING] - student.misreads) < 0.06
    by_chance = [problem for problem in PROBLEMS if solution(problem, misread=True).endswith(f"{{{problem.answer}}}")]
    assert all(problem.last_step() == (2, "*", 2) for problem in by_chance)  # 2 * 2 = 2 + 2


def test_spellings_of_an_answer_are_equal_as_mathematics_and_not_as_strings():
    pairs = answers_in_the_box(STUDENTS["embedded-spellings"], wording=0)
    assert all(equivalent(str(answer), boxed) for answer, boxed in pairs)
    as_written = sum(str(answer) == boxed for answer, boxed in pairs) / len(pairs)
    assert abs(as_written - 1 / 3) < 0.06
