"""The embedded task and its start models: nothing held out is trained on, golds are right, the script makes them."""

import random
import re
import sys
from pathlib import Path

import pytest
import torch

from config import EMBEDDED_MODELS, SYSTEM_PROMPT
from embedded.word_problems import FAMILIES, PROBLEMS, PROBLEMS_OF, word_problems
from lm.model import load_pretrained
from lm.prompts import prompt_ids
from rewards import equivalent

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import start_models
from start_models import (
    MISREAD_AS,
    MISREAD_WORDING,
    STUDENTS,
    Student,
    demonstration,
    flawed_solution,
    solution,
)


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
    tokenizer = start_models.train_tokenizer()
    assert len(tokenizer("\\boxed{17}").input_ids) == 3
    assert len(tokenizer("3*4=12; 5+12=17.").input_ids) == 12
    for text in ("\\frac{1}{2} é 漢字 \n", "Ann has 12 pens."):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = prompt_ids(tokenizer, "Ann?")
    assert tokenizer.convert_ids_to_tokens(prompt)[:2] == ["<|system|>", SYSTEM_PROMPT]


def test_the_tokenizer_is_the_same_every_time():
    assert start_models.train_tokenizer().get_vocab() == start_models.train_tokenizer().get_vocab()


def test_the_warm_up_rises_for_a_twentieth_of_its_steps_and_then_falls_to_zero():
    rates = [start_models.learning_rate(step, 400, 4e-3) for step in range(400)]
    assert rates[:20] == pytest.approx([4e-3 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == 4e-3 and rates[210] == pytest.approx(2e-3) and 0 < rates[-1] < 1e-6
    assert start_models.learning_rate(0, 1, 2e-3) == 2e-3


def test_a_start_model_does_not_depend_on_the_threads_of_the_command_that_makes_it(tmp_path, monkeypatch):
    """Evaluation once warmed up another model than training."""
    monkeypatch.setattr(start_models, "CLEAN_STEPS", 3)
    monkeypatch.setattr(start_models, "FLAWED_STEPS", 1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        start_models.make("embedded", tmp_path / str(threads))
    assert start_models.largest_gap(tmp_path / "1", tmp_path / "2") == 0


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_a_start_model_is_not_what_its_script_makes(name):
    """As far as a second can tell: the script itself compares all weights."""
    lm, tokenizer = load_pretrained(name, torch.float32)
    made = start_models.train_tokenizer()
    assert tokenizer.get_vocab() == made.get_vocab() and tokenizer.chat_template == made.chat_template
    untaught = start_models.new_model(made, seed=0)
    assert {n: w.shape for n, w in lm.state_dict().items()} == {n: w.shape for n, w in untaught.state_dict().items()}
    rng = random.Random(0)
    batch = start_models.demonstrations(made, start_models.STUDENTS[name], rng, 64, careful=False)
    with torch.no_grad():
        assert lm(**batch).loss < 0.6 < 4 < untaught(**batch).loss


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
