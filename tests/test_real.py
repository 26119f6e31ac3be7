"""benchmarks/real.py, its rules and a whole small run; and the published formats, from a few rows of them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import tyro
from tiny import byte_tokenizer, tiny_lm

from rewards import matches
from sources.pairs import load_benchmark
from store.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SMALL_SETS = ROOT.parent / "shared" / "data" / "small"
sys.path.insert(0, str(ROOT / "benchmarks"))

import one_step  # noqa: E402
import pack_model  # noqa: E402
import real  # noqa: E402
import study  # noqa: E402
from overlap import digits  # noqa: E402

# ---------------------------------------------------------------- published rows


@pytest.mark.parametrize(
    "name, golds",
    [
        ("gsm8k", ["18", "3", "70000", "6250"]),
        ("svamp", ["51", "1", "2", "17"]),
        ("math500", ["6", "\\frac{1}{8}", "\\text{east}", "76^\\circ"]),
    ],
)
def test_the_gold_of_a_published_row_is_read_wrongly(name, golds):
    benchmark = load_benchmark(name, str(FIXTURES))
    assert [pair.gold for pair in benchmark.pairs] == golds
    said = {"\\frac{1}{8}": "1/8", "\\text{east}": "east", "76^\\circ": "76", "6250": "6,250"}
    read = [said.get(gold, gold) for gold in golds]
    assert matches(golds, read, "math") == [True] * len(golds)


def test_a_story_of_svamp_loses_its_full_stop_or_gets_a_second_one():
    questions = [pair.question for pair in load_benchmark("svamp", str(FIXTURES)).pairs]
    assert "discount of 25 dollars on each pack. How much do you have to pay" in questions[0]
    assert "9 salty cookies. How many salty cookies did Paco have left?" in questions[3]


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    "question, gold, solution",
    [
        ("Joan found 70 shells. She has 27 left. How many did she give away?", "43", "70 - 27 = 43"),
        ("There were 28 bales. There are now 54. How many did he store?", "26", "54 - 28 = 26"),
        ("We ordered 21 pizzas. Each has 8 slices. How many slices?", "168", "21 * 8 = 168"),
        ("She brought 48 stones and wanted 8 in each. How many bracelets?", "6", "48 / 8 = 6"),
        ("Sally had 9 cards, Dan has 3 cats, she bought 24 more. How many cards?", "33", "9 + 24 = 33"),
        ("A corporation has 2,041 and 63,093 employees. How many?", "65134.0", "2041 + 63093 = 65134"),
        ("One worm was 0.8 inch, the other .1 inch. How much longer?", "0.70", "0.8 - 0.1 = 0.7"),
        ("Sam has 2 and gets 2. How many?", "4", None),  # 2 + 2, or 2 * 2
        ("Tom found 15 and Fred 43. How many now, if Tom ate one?", "57", None),
        ("Wendy ran 19.833333 miles and walked 9.166666 miles. How much farther?", "10.666667", None),
    ],
)
def test_the_rule_finds_another_operation_than_a_reader(question, gold, solution):
    expected = solution and f"{solution}. The answer is \\boxed{{{solution.rpartition('= ')[2]}}}."
    assert one_step.worked_solution(question, Decimal(gold)) == expected


def test_a_rewording_leaves_out_a_fact_or_the_question():
    said = {
        "Sean has 55 blocks. 29 are eaten. How many blocks will he have?": "How many blocks will he have? "
        "This is what we know: Sean has 55 blocks. 29 are eaten.",
        "If each ball costs $1.54, how much must Kyoko pay for 3 balls?": "How much must Kyoko pay for 3 balls? "
        "This is what we know: Each ball costs $1.54.",
        "He has 2 in all. If he buys 3, how many does he have altogether?": "How many does he have in total? "
        "This is what we know: He has 2 altogether. He buys 3.",
        "What is 3 plus 5?": "Please work this out: What is 3 plus 5?",
    }
    assert {question: one_step.reworded(question) for question in said} == said


@pytest.mark.skipif(not SMALL_SETS.exists(), reason="the published data sets are not here")
def test_a_published_question_loses_a_number_in_its_rewording_or_is_in_both_halves(tmp_path):
    real.write_questions(real.Settings(data_dir=SMALL_SETS), tmp_path)
    halves = {name: read_rows(tmp_path / f"{name}.jsonl") for name in ("train", "held-out")}
    for row in halves["train"]:
        assert digits(row["question"]) == digits(row["rephrased"]), row
        assert row["rephrased"] != row["question"]
    train, held_out = ({one_step.normalised(row["question"]) for row in rows} for rows in halves.values())
    assert not train & held_out and min(len(train), len(held_out)) > 200
    imitated, counts = one_step.imitation_set(SMALL_SETS)
    assert not {one_step.normalised(text) for text, _ in imitated} & (train | held_out)
    assert counts["imitated"] == len(imitated) > 400 and counts["singleeq: asked elsewhere, dropped"] > 0


def test_a_gold_of_gsm8k_is_read_with_its_solution_or_its_comma_and_what_cannot_be_reworded_is_trained_on(tmp_path):
    facts = "Tom has 1,200 cards. He buys 3 packs of 10."
    rows = [
        {"question": f"{facts} How many has he now?", "answer": "3*10=<<3*10=30>>30 and 1,230.\n#### 1,230"},
        {"question": "How much is twice 4?", "answer": "8\n#### 8"},  # no facts
        {"question": f"{facts} Find how many he has.", "answer": "#### 1230"},  # no question
        {"question": f"{facts} How many has Mr. Poe now?", "answer": "#### 1230"},  # the rule would begin with Poe
        {"question": f"If he works, he earns 3. {facts} How many?", "answer": "#### 1230"},  # it would drop the if
    ]
    for name in ("train", "test"):
        (tmp_path / f"gsm8k_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "SVAMP.json").write_text((FIXTURES / "SVAMP.json").read_text())
    settings = real.Settings(task="gsm8k", data_dir=tmp_path, out=tmp_path / "out", limit=2)
    real.write_questions(settings, tmp_path / "out" / "questions")
    (trained,) = read_rows(tmp_path / "out" / "questions" / "train.jsonl")
    assert trained["answer"] == "1230"
    assert trained["rephrased"] == f"How many has he now? This is what we know: {facts}"
    assert len(read_rows(tmp_path / "out" / "questions" / "held-out.jsonl")) == 2


@pytest.mark.skipif(not SMALL_SETS.exists(), reason="the published data sets are not here")
def test_a_question_of_gsm8k_loses_a_number_in_its_rewording_or_is_evaluated_too(tmp_path):
    sets = real.question_sets(real.Settings(task="gsm8k", data_dir=SMALL_SETS.parent, limit=2000))
    assert len(sets["train"]) == 6968 and len(sets["held-out"]) == 1319
    reworded = {text: one_step.reworded(text) for text, _ in sets["train"]}
    for text, other in reworded.items():
        assert digits(text) == digits(other) and one_step.normalised(text) != one_step.normalised(other), text
    assert len(set(reworded.values())) == len(reworded)
    asked = {one_step.normalised(text) for text, _ in sets["held-out"]}
    assert not asked & {one_step.normalised(text) for text, _ in sets["train"]}


def test_seeds_of_another_machine_are_lost_or_the_errors_over_seeds_and_questions_are_mixed(tmp_path):
    file = tmp_path / "real-seeds.csv"
    cells = {("0", "sampled"): "+3.0,1.0", ("0", "greedy"): "+1.0,2.0", ("1", "sampled"): "+5.0,1.4"}
    lines = [f"II,{seed},held-out,{how},{numbers}" for (seed, how), numbers in cells.items()]
    file.write_text("\n".join(["name,seed,benchmark,how,change,error over questions", *lines]) + "\n")
    empty = {"questions": {}, "evaluations": {"start": {}}, "runs": {}}
    seeds = real.seeds_table(empty, file)
    assert len(seeds) == 4
    table = real.change_table(seeds)
    # (3 + 5) / 2; the seeds' errors over questions, on average; |5 - 3| / sqrt(2) / sqrt(2)
    assert table[1] == ["II", "2", "+4.0 ± 1.2 ± 1.0", "+1.0 ± 2.0"]
    study.write_csv(table, tmp_path / "change.csv")
    names = '"held-out, sampled","held-out, sampled error","held-out, sampled error over seeds"'
    assert (tmp_path / "change.csv").read_text().startswith(f"name,seeds,{names}")


@pytest.mark.parametrize("bits, bound", [(4, 0.1), (8, 0.006)])
def test_a_packed_model_is_another_one_or_lies_about_its_size(tmp_path, bits, bound):
    lm = tiny_lm("qwen2", tied=False, hidden_size=64)
    lm.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    pack_model.pack(str(tmp_path / "model"), tmp_path / "packed", bits)
    read, tokenizer = pack_model.load_start(str(tmp_path / "packed"))
    head = lm.get_output_embeddings().weight
    assert read.get_input_embeddings().weight is read.get_output_embeddings().weight, "tied, with the output's values"
    assert (read.get_output_embeddings().weight - head).norm() < bound * head.norm()
    before, after = dict(lm.named_parameters()), dict(read.named_parameters())
    assert before.keys() - after.keys() == {"lm_head.weight"}
    for name in after.keys() - {"model.embed_tokens.weight"}:
        assert (after[name] - before[name]).norm() <= bound * before[name].norm(), name
    assert read.generation_config.eos_token_id == lm.generation_config.eos_token_id
    assert tokenizer("1+1")["input_ids"] == byte_tokenizer()("1+1")["input_ids"]
    weights = read.num_parameters()
    assert (tmp_path / "packed" / "packed.safetensors").stat().st_size < (bits + 1) / 8 * weights + 8000


def test_a_model_without_weights_is_taken_for_a_trained_one(tmp_path):
    tiny_lm("qwen2", tied=True).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError):
        (tmp_path / "described").mkdir()
        pack_model.read_packed(tmp_path / "described")
    pack_model.pack(str(tmp_path / "model"), tmp_path / "random", 0)  # asked for by name
    assert pack_model.load_start(str(tmp_path / "random"))[0].num_parameters()


# ---------------------------------------------------------------- a whole run

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")


def story(rng: random.Random) -> dict[str, object]:
    a, b = rng.sample(range(3, 40), 2)
    name, thing = rng.choice(NAMES), rng.choice(("apples", "cards", "stones"))
    return {"input": f"{name} has {a} {thing}. {name} finds {b} more. How many {thing} now?", "target": float(a + b)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model that knows nothing, questions in the layout of the published files, and a document."""
    tokenizer, rng = byte_tokenizer(), random.Random(0)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tiny_lm("qwen3", tied=True, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data" / "small"
    data.mkdir(parents=True)
    rows = [story(rng) for _ in range(60)]
    for name, of in {
        "addsub": rows[:8],
        "singleeq": rows[6:14],
        "singleop": rows[12:40],
        "multiarith": rows[40:],
    }.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    (data / "SVAMP.json").write_text((FIXTURES / "SVAMP.json").read_text())
    (tmp_path / "RESULTS.md").write_text((ROOT / "docs" / "RESULTS.md").read_text())
    return tmp_path


def flags(place: Path) -> list[str]:
    small = "--methods III --steps 12 --questions-per-step 2 --rollouts 2 --max-response-tokens 6 --k 1 --limit 3 "
    small += "--eval-every 0 --save-every 1 --jobs 2 --imitation-steps 2 --imitation-batch 2"
    where = {"model": "model", "data-dir": "data", "out": "out", "results": "results", "document": "RESULTS.md"}
    return [*small.split(), *(word for flag, name in where.items() for word in (f"--{flag}", str(place / name)))]


@pytest.mark.slow
def test_a_killed_run_begins_again_or_what_is_there_is_made_twice(place):
    run = place / "out" / "runs" / "III-lr1e-05-12x2x2-seed0"
    command = [sys.executable, str(ROOT / "benchmarks" / "real.py"), *flags(place)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-00000[2-9]")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    note = place / "out" / "start" / "imitation.json"
    imitated = note.stat().st_mtime_ns
    assert len(read_rows(run / "metrics.jsonl")) < 12
    settings = tyro.cli(real.Settings, args=flags(place))
    real.main(settings)
    assert note.stat().st_mtime_ns == imitated, "once"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(12))
    assert (run / "policy").is_dir() and not (run / "checkpoints").exists()

    document = (place / "RESULTS.md").read_text()
    assert "| III, lr 1e-05, 12 steps of 2 x 2 | 1 |" in document and (place / "real.png").is_file()
    result = json.loads((place / "results" / "results.json").read_text())
    assert result["imitation"]["questions"]["singleeq: asked elsewhere, dropped"] == 2
    assert len(result["read"]["start"]) and result["evaluations"].keys() == {"start", run.name}
    # A second time there is nothing to do, and the tables can be made elsewhere, of results.json alone.
    (place / "RESULTS.md").write_text((ROOT / "docs" / "RESULTS.md").read_text())
    (place / "out").rename(place / "moved")
    real.main(replace(settings, jobs=0))
    assert (place / "RESULTS.md").read_text() == document


def test_a_run_of_another_papers_method_has_no_place_in_the_tables():
    of = {"lr": 1e-5, "steps": 1, "questions_per_step": 2, "rollouts": 2, "metrics": [{"step": 0}]}
    runs = {name: of | {"method": name} for name in ("empo", "II", "rent")}
    assert [list(names) for names in real.by_label({"runs": runs}).values()] == [["II"], ["empo"], ["rent"]]


def test_methods_that_sample_more_are_compared_at_the_same_step():
    def run(method: str, questions: int) -> dict:
        of = {"method": method, "lr": 1e-5, "steps": 60, "questions_per_step": questions, "rollouts": 8}
        rows = [{"step": step, "eval_accuracy": 0.4 + step / 1000} for step in (0, 20, 40, 60)]
        return of | {"metrics": rows}

    asked = {"majority": 8, "I": 4, "II": 8, "III": 4}
    table = real.equal_table({"runs": {name: run(name, questions) for name, questions in asked.items()}})
    assert table[0][2] == "step at which 2,560 answers were sampled"
    steps = {row[0].partition(",")[0]: (row[2], row[3]) for row in table[1:]}
    assert steps == {"majority": ("40", "+4.0"), "I": ("40", "+4.0"), "II": ("20", "+2.0"), "III": ("20", "+2.0")}
    assert len(real.equal_table({"runs": {}})) == 1


def test_a_run_whose_time_is_up_is_lost(tmp_path, monkeypatch):
    """It is told to stop, saves, and is evaluated as it is; one that has saved nothing is not."""
    settings = real.Settings(out=tmp_path, train_seconds=4)
    runs = {saves: real.Run("II", saves) for saves in (0, 1)}
    policy = runs[1].folder(settings) / "checkpoints" / "step-000003" / "policy"
    saving = (
        f"p = pathlib.Path({str(policy)!r}); p.mkdir(parents=True); (p.parents[1] / 'latest').symlink_to('step-000003')"
    )
    script = "import pathlib, signal, sys, time\ndef stop(*_):\n    {}\n    sys.exit(143)\n"
    script += "signal.signal(signal.SIGTERM, stop)\ntime.sleep(60)"
    command = {0: script.format("pass"), 1: script.format(saving)}
    monkeypatch.setattr(real.Run, "command", lambda run, _: [sys.executable, "-c", command[run.seed]])
    monkeypatch.setattr(real, "evaluate_once", lambda name, model, *_: f"{name}: evaluated {model.name}")
    said = [real.train_and_evaluate(runs[saves], settings, real.Processes(settings)) for saves in (0, 1)]
    assert [each.partition(": ")[2] for each in said] == ["stopped", "evaluated policy"]
    assert (runs[1].folder(settings) / "policy").is_dir()


def test_a_question_in_two_wordings_makes_a_method_train_on_twice_as_many_rollouts(tmp_path):
    settings = real.Settings(out=tmp_path, questions_per_step=8, same_rollouts=True, eval_every=0)
    for method, asked in {"II": "8", "III": "4"}.items():
        command = real.Run(method, 0).command(settings)
        assert command[command.index("--questions-per-step") + 1] == asked and "--eval-data" not in command
        assert real.Run(method, 0).name(settings) == f"{method}-lr1e-05-50x{asked}x8-seed0"


def test_a_run_that_was_cut_has_a_place_among_those_that_were_not():
    of = {"method": "II", "lr": 1e-5, "steps": 3, "questions_per_step": 2, "rollouts": 2}
    metrics = [{"step": step, "reward": 0.5} for step in range(3)] + [{"step": 3, "eval_accuracy": 0.5}]
    assert real.label(of | {"metrics": metrics}) == "II, lr 1e-05, 3 steps of 2 x 2"
    assert real.label(of | {"metrics": metrics[:2]}) == "II, lr 1e-05, 2 steps of 2 x 2"
