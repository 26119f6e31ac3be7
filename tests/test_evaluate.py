"""evaluate.py, store/results.py, benchmarks of sources/pairs.py: each test is named after the bug it prevents."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import TORCHRUN
from tiny import untrained

import evaluate
from config import UserError
from evaluate import EvaluationSettings, check_settings, evaluate_model, pass_at_k, question_values, result_of
from lm.engine import InferenceModel
from lm.model import newest_policy
from lm.record import Rollout
from rewards import equivalent
from sources.pairs import SOURCES, Benchmark, Pair, load_benchmark
from store import batches
from store.checkpoint import weights_fingerprint
from store.folder import lock
from store.jsonl import Record
from store.results import compare, estimate, seeds, table

SETS = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_sets = pytest.mark.skipif(not SETS.exists(), reason="the published data sets are not here")


# ---------------------------------------------------------------- helpers


class Letters:
    """A tokenizer whose tokens are characters."""

    name_or_path, chat_template, added_tokens_decoder = "letters", "any", {}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "\n".join(message["content"] for message in messages)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*map(ord, text)]}

    def batch_decode(self, ids: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return ["".join(map(chr, each)) for each in ids]


class Guesser:
    """A sampler that boxes a digit drawn from each request's own seed, and counts what it was asked."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    def loaded(self, model: str, *_: Any) -> InferenceModel:
        """In the place of `load_inference_model`."""
        if model == "leters":
            raise UserError("no such model")
        return InferenceModel(None, Letters(), None, "hf")

    def sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], n: int, temperature: float, max_tokens: int
    ) -> list[Rollout]:
        rollouts = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.requests.append("".join(map(chr, prompt)).splitlines()[-1])
            for g in range(n):
                rng = random.Random(seed + g if temperature else 0)
                text = "x" * rng.randrange(9) + rng.choice(["\\boxed{0}", "\\boxed{1}", "\\boxed{1.0}", "no idea"])
                rollouts.append(Rollout(prompt, [*map(ord, text)], [0.0] * len(text), finished=rng.random() < 0.7))
        return rollouts


@pytest.fixture
def guesser(monkeypatch: pytest.MonkeyPatch) -> Guesser:
    guesser = Guesser()
    monkeypatch.setattr(evaluate.engine, "load_inference_model", guesser.loaded)
    monkeypatch.setattr(evaluate.engine, "sampling_from", lambda *_, **__: nullcontext(guesser.sample))
    return guesser


def write_questions(path: Path, count: int = 7, **more: Any) -> str:
    rows = [{"question": f"What is {i} modulo 2?", "answer": i % 2, "level": i % 3, **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings_of(tmp_path: Path, **changes: Any) -> EvaluationSettings:
    defaults = {"benchmarks": (write_questions(tmp_path / "own.jsonl"),), "k": 3, "questions_per_batch": 2}
    return EvaluationSettings(**{"model": "letters", "out": str(tmp_path / "out"), **defaults, **changes})


def result_in(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    path = evaluate_model(settings_of(tmp_path, **changes))
    assert path is not None
    return dict(json.loads(path.read_text()))


def answered(answer: str | None, correct: bool, greedy: bool = False) -> Record:
    row = {"greedy": greedy, "answer": answer, "correct": correct, "lenient": correct}
    return row | {"tokens": 5, "truncated": answer is None}


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_biased(n: int) -> None:
    """Against the share of all k-subsets of the n answers that hold a correct one."""
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        drawn = list(itertools.combinations([i < correct for i in range(n)], k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, drawn)) / len(drawn), abs=1e-12)
    assert pass_at_k(8, 1, 4) == 0.5


def test_majority_counts_spellings_as_rivals_or_breaks_ties_by_luck() -> None:
    """Every sequence of four answers, against counting values of fractions."""
    value_of = {"1/2": Fraction(1, 2), "0.5": Fraction(1, 2), "3": Fraction(3), None: None}
    for sequence in itertools.product(value_of, repeat=4):
        samples = [answered(answer, value_of[answer] == Fraction(1, 2)) for answer in (None, *sequence)]
        given = [value_of[answer] for answer in sequence if answer is not None]
        winner = max(given, key=given.count) if given else None  # of equals, max keeps the first
        assert question_values(samples)["maj@4"] == (winner == Fraction(1, 2)), sequence


def test_standard_error_is_that_of_one_sample_or_divides_by_the_wrong_count() -> None:
    """Against all ways to draw as many questions again, with replacement (the bootstrap, enumerated)."""
    values = [0.0, 0.25, 1.0, 0.625]
    means = [sum(drawn) / 4 for drawn in itertools.product(values, repeat=4)]
    center = sum(means) / len(means)
    variance = sum((mean - center) ** 2 for mean in means) / len(means)
    assert estimate(values)["value"] == pytest.approx(center)
    assert estimate(values)["error"] == pytest.approx(math.sqrt(variance * 4 / 3))
    assert estimate([0.5]) == {"value": 0.5, "error": None, "questions": 1}


def test_greedy_answer_leaks_into_the_sampled_numbers() -> None:
    samples = [answered("1", True, greedy=True), answered("2", False), answered("2", False), answered(None, False)]
    values = question_values(samples)
    assert (values["greedy"], values["avg@3"], values["maj@3"]) == (1.0, 0.0, 0.0)
    assert values["unanswered"] == values["truncated"] == pytest.approx(1 / 3)
    others = {"unanswered": 0.0, "truncated": 0.0, "tokens": 5.0}
    assert question_values(samples[:1]) == {"greedy": 1.0, "greedy, lenient": 1.0} | others
    assert [name for name in values if name.startswith("pass@")] == ["pass@2"]


def test_sampled_answers_are_drawn_at_the_papers_temperature():
    assert (EvaluationSettings().temperature, EvaluationSettings().k) == (0.8, 8)


def test_answers_are_scored_against_the_gold_of_a_neighbour(tmp_path: Path, guesser: Guesser) -> None:
    result = result_in(tmp_path)["benchmarks"]["own"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "own.jsonl").read_text().splitlines()]
    assert len(lines) == 7 * 4
    for i, line in enumerate(lines):
        assert line["question"] == f"What is {i // 4} modulo 2?"
        assert line["greedy"] == (i % 4 == 0)
        assert line["correct"] == (line["answer"] is not None and float(line["answer"]) == (i // 4) % 2)
        assert line["tokens"] == len(line["text"])
    sampled = [line for line in lines if not line["greedy"]]
    assert result["numbers"]["avg@3"]["value"] == pytest.approx(sum(line["correct"] for line in sampled) / 21)
    assert result["numbers"]["truncated"]["value"] == pytest.approx(sum(line["truncated"] for line in sampled) / 21)
    assert result["numbers"]["tokens"]["value"] == pytest.approx(sum(line["tokens"] for line in sampled) / 21)
    assert result["groups"]["level 1"]["questions"] == 2
    assert guesser.requests == [f"What is {i} modulo 2?" for pair in ((0, 1), (2, 3), (4, 5), (6,)) for i in pair * 2]


# ---------------------------------------------------------------- killed and resumed


def files_of(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}


def test_killed_evaluation_repeats_or_loses_questions(
    tmp_path: Path, guesser: Guesser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any write, it ends with the files of an undisturbed run, and asks nothing twice that it kept."""
    settings = settings_of(tmp_path)
    evaluate_model(settings)
    undisturbed, real = files_of(tmp_path), batches.append_rows
    assert undisturbed.keys() == {"settings.json", "own.jsonl", "result.json"}
    for fatal in range(4):
        shutil.rmtree(tmp_path / "out")
        written: list[int] = []

        def dies(file: Path, rows: list[Record], written: list[int] = written, fatal: int = fatal) -> None:
            if len(written) == fatal:
                real(file, rows[:3])
                with file.open("a") as stream:
                    stream.write('{"id": "4", "quest')
                raise MemoryError
            written.append(len(rows) // 4)
            real(file, rows)

        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(batches, "append_rows", dies)
            evaluate_model(settings)
        guesser.requests.clear()
        evaluate_model(settings)
        assert files_of(tmp_path) == undisturbed
        assert len(guesser.requests) == 2 * (7 - sum(written)), "a greedy and a sampled request for each"


@pytest.mark.parametrize("damage", [b"", b'{"id": "2", "quest', b"\xff\n", b"[]\n" * 8, b'{"id": "5"}\n' * 4])
def test_damaged_answers_end_in_the_result(tmp_path: Path, guesser: Guesser, damage: bytes) -> None:
    settings = settings_of(tmp_path)
    evaluate_model(settings)
    lines = files_of(tmp_path)["own.jsonl"].splitlines(keepends=True)
    (tmp_path / "out" / "own.jsonl").write_bytes(b"".join(lines[:8]) + damage + b"".join(lines[12:]))
    (tmp_path / "out" / "result.json").unlink()
    with pytest.raises(UserError, match=r"own\.jsonl, line 9 is (damaged|of another question).*move the file away"):
        evaluate_model(settings)


def test_finished_evaluation_asks_again(tmp_path: Path, guesser: Guesser, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_model(settings_of(tmp_path))
    shown = capsys.readouterr().out
    guesser.requests.clear()
    evaluate_model(settings_of(tmp_path))
    assert guesser.requests == [] and capsys.readouterr().out == shown


def test_a_new_policy_under_an_old_name_gets_the_old_result(tmp_path: Path, guesser: Guesser) -> None:
    """A run is deleted, trained again and evaluated into the same folder: its weights are others."""
    policy = tmp_path / "step-000001" / "policy"
    policy.mkdir(parents=True)
    for manifest in ("one", "another"):
        (policy.parent / "manifest.json").write_text(manifest)
        if manifest == "one":
            evaluate_model(settings_of(tmp_path, model=str(policy)))
    with pytest.raises(UserError, match=r"begun with other settings: weights \(was .*delete it"):
        evaluate_model(settings_of(tmp_path, model=str(policy)))
    (policy / "model.safetensors").write_text("weights")
    (policy.parent / "manifest.json").unlink()
    before = weights_fingerprint(policy)
    (policy / "model.safetensors").write_text("others!")
    os.utime(policy / "model.safetensors", ns=(1, 1))
    assert weights_fingerprint(policy) != before


def test_two_evaluations_at_once_share_a_result(tmp_path: Path, guesser: Guesser) -> None:
    with lock(tmp_path / "out"), pytest.raises(UserError, match="another run is writing to it"):
        evaluate_model(settings_of(tmp_path))


@pytest.fixture
def babbling(tmp_path: Path) -> str:
    model, tokenizer = untrained()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_answers_run_past_the_positions_that_the_model_knows(tmp_path: Path, babbling: str) -> None:
    with pytest.raises(UserError, match="the model knows 512 positions; ask for shorter responses"):
        evaluate_model(settings_of(tmp_path, model=babbling, max_response_tokens=512))


def test_resumed_sampling_differs_from_undisturbed_sampling(tmp_path: Path, babbling: str) -> None:
    """With a real model, whose third batch and what was made of it are lost."""
    settings = settings_of(tmp_path, model=babbling, max_response_tokens=6, k=2)
    evaluate_model(settings)
    lines = tmp_path / "out" / "own.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(b"".join(whole.splitlines(keepends=True)[: 4 * 3]))
    (tmp_path / "out" / "result.json").unlink()
    evaluate_model(settings)
    assert lines.read_bytes() == whole


def test_torchrun_makes_one_engine_of_its_processes(tmp_path: Path, babbling: str) -> None:
    settings = settings_of(tmp_path, model=babbling, max_response_tokens=6, k=2)
    evaluate_model(settings)
    flags = ["--model", babbling, "--benchmarks", *settings.benchmarks, "--k", "2", "--questions-per-batch", "2"]
    command = [*TORCHRUN, "2", evaluate.__file__, *flags]
    command += ["--max-response-tokens", "6", "--out", str(tmp_path / "shared")]
    subprocess.run(command, check=True, capture_output=True, timeout=240, cwd=tmp_path)
    for name in ("own.jsonl", "settings.json"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_stopped_evaluation_ends_in_a_traceback(
    tmp_path: Path, guesser: Guesser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(guesser, "sample", stop)
    settings = settings_of(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "letters", "--benchmarks", *settings.benchmarks])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err


def test_resumed_with_other_settings_mixes_two_protocols(tmp_path: Path, guesser: Guesser) -> None:
    evaluate_model(settings_of(tmp_path))
    with pytest.raises(
        UserError, match=r"out was begun with other settings: temperature \(was 0.8, is 1.0\); name another --out"
    ):
        evaluate_model(settings_of(tmp_path, temperature=1.0))
    with pytest.raises(
        UserError, match=r"out was begun with other settings: limit \(was None, is 2\), questions \(was"
    ):
        evaluate_model(settings_of(tmp_path, limit=2))
    settings = settings_of(tmp_path)
    path = Path(settings.benchmarks[0])
    path.write_text(path.read_text().replace("2 modulo", "4 modulo"))
    with pytest.raises(UserError, match=r"out was begun with other settings: questions \(was"):
        evaluate_model(settings)


def test_failed_start_blocks_its_folder(tmp_path: Path, guesser: Guesser) -> None:
    """A mistyped model leaves a folder with settings and no answers."""
    with pytest.raises(UserError, match="no such model"):
        evaluate_model(settings_of(tmp_path, model="leters"))
    result = evaluate_model(settings_of(tmp_path))
    assert result and result.exists()


def test_foreign_file_is_taken_for_answers(tmp_path: Path, guesser: Guesser) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "own.jsonl").write_text('{"question": "1+1?"}\n')
    with pytest.raises(UserError, match="settings.json, kept for .*result.json, cannot be used .*: name another --out"):
        evaluate_model(settings_of(tmp_path))
    assert (tmp_path / "out" / "own.jsonl").read_text() == '{"question": "1+1?"}\n'


def test_limit_is_passed_over(tmp_path: Path, guesser: Guesser) -> None:
    assert result_in(tmp_path, limit=4)["benchmarks"]["own"]["questions"] == 4
    assert set(guesser.requests) == {f"What is {i} modulo 2?" for i in range(4)}


def test_result_does_not_say_with_what_it_was_made(tmp_path: Path, guesser: Guesser) -> None:
    made = result_in(tmp_path)["versions"]
    assert {"torch", "transformers", "math-verify", "device"} <= made.keys()
    assert made["torch"] == torch.__version__.partition("+")[0] or made["torch"] == torch.__version__


def test_text_that_is_not_ascii_or_has_odd_line_breaks_is_changed(tmp_path: Path, guesser: Guesser) -> None:
    path = tmp_path / "odd.jsonl"
    question = "Süß\u2028数\x85\x0b?"
    path.write_text(json.dumps({"question": question, "answer": "1"}) + "\n")
    evaluate_model(settings_of(tmp_path, benchmarks=(str(path),)))
    lines = (tmp_path / "out" / "odd.jsonl").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 5 and json.loads(lines[0])["question"] == question


def test_second_benchmark_is_mixed_with_the_first(tmp_path: Path, guesser: Guesser) -> None:
    own, other = write_questions(tmp_path / "own.jsonl"), write_questions(tmp_path / "other.jsonl", count=3)
    result = result_in(tmp_path, benchmarks=(own, other))
    assert {name: each["questions"] for name, each in result["benchmarks"].items()} == {"own": 7, "other": 3}
    for name, count in (("own", 7), ("other", 3)):
        lines = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert [line["question"] for line in lines[::4]] == [f"What is {i} modulo 2?" for i in range(count)]


# ---------------------------------------------------------------- compare


def two_results(tmp_path: Path) -> tuple[str, str]:
    pairs = [Pair(str(i), f"question {i}", gold="1") for i in range(5)]
    paths = []
    for name, correct in (("before", (0, 1, 0, 0, 1)), ("after", (1, 1, 0, 1, 0))):
        result = result_of(Benchmark("own", pairs), [answered("1", bool(each), greedy=True) for each in correct])
        paths.append(tmp_path / f"{name}.json")
        made = {"settings": {"model": name, "k": 0}, "versions": {"torch": "2"}, "benchmarks": {"own": result}}
        paths[-1].write_text(json.dumps(made))
    return str(paths[0]), str(paths[1])


def test_training_logs_another_groups_accuracy() -> None:
    pairs = [Pair(str(i), f"q{i}", "1", meta={"level": level}) for i, level in enumerate(("easy", "hard", "easy"))]
    groups = evaluate.by_group(Benchmark("own", pairs), [1.0, 0.0, 0.5])
    assert groups == {"level easy": [1.0, 0.5], "level hard": [0.0]}


def test_difference_has_the_error_of_unpaired_means(tmp_path: Path) -> None:
    """Differences 1, 0, 0, 1, -1: mean 0.2, variance 0.7, standard error sqrt(0.7 / 5) = 0.3742 (unpaired: 0.3464)."""
    row = next(line.split() for line in compare(*two_results(tmp_path)).splitlines() if " greedy " in line)
    assert row == ["own", "greedy", "40.0", "±", "24.5", "60.0", "±", "24.5", "+20.0", "±", "37.4"]


def test_difference_hides_how_many_questions_were_lost(tmp_path: Path) -> None:
    """0 1 0 0 1 before, 1 1 0 1 0 after: two acquired, one lost, one of two still right."""
    moved = next(line for line in compare(*two_results(tmp_path)).splitlines() if line.startswith("own, by greedy: "))
    assert "2 questions acquired (never right before, mostly after), 1 lost (mostly, then never)" in moved
    assert moved.endswith("of 2 solvable before (once or more) 1 are mostly right")


def test_folder_of_an_evaluation_is_no_result(tmp_path: Path) -> None:
    for path in two_results(tmp_path):
        folder = Path(path).with_suffix("")
        folder.mkdir()
        Path(path).rename(folder / "result.json")
    assert "own, by greedy: 2 questions acquired" in compare(str(tmp_path / "before"), str(tmp_path / "after"))


def test_several_seeds_of_a_setting_are_several_lines(tmp_path: Path) -> None:
    """Two seeds with 40 and 60 percent: mean 50, standard deviation 14.1; a run with other settings is another line."""
    pairs = [Pair(str(i), f"question {i}", gold="1") for i in range(5)]
    paths = []
    for name, right, variant in (("a", 2, "II"), ("b", 3, "II"), ("c", 5, "gt")):
        run = tmp_path / name
        (run / "checkpoints" / "step-000010" / "policy").mkdir(parents=True)
        (run / "metrics.jsonl").write_text("")
        (run / "config.json").write_text(json.dumps({"method": {"variant": variant}, "run": {"seed": name}}))
        result = result_of(Benchmark("own", pairs), [answered("1", i < right, greedy=True) for i in range(5)])
        made = {"settings": {"model": str(run / "checkpoints" / "step-000010" / "policy")}, "versions": {}}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(made | {"benchmarks": {"own": result}}))
    lines = [line.split() for line in seeds([str(path) for path in paths]).splitlines()]
    assert lines[0][:3] == ["own", "seeds", "greedy"]
    assert lines[1][:5] == ["II", "2", "50.0", "±", "14.1"] and lines[2][:3] == ["gt", "1", "100.0"]
    before, _ = two_results(tmp_path)
    with pytest.raises(UserError, match="measures before, which is in no run's folder"):
        seeds([before])


def test_compared_results_have_other_questions_or_settings(tmp_path: Path) -> None:
    before, after = two_results(tmp_path)
    shown = compare(before, after)
    assert "other settings: model (was before, is after)" in shown and "versions" not in shown
    other = json.loads(Path(after).read_text())
    other["benchmarks"]["own"]["fingerprint"] = "0"
    Path(after).write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"own has other questions in .*before.json than in .*after.json"):
        compare(before, after)
    with pytest.raises(UserError, match=r"nowhere.json is no result.json"):
        compare("nowhere.json", after)


def test_table_hides_the_error_or_a_group(tmp_path: Path, guesser: Guesser) -> None:
    result = result_in(tmp_path)["benchmarks"]
    shown = [line.split() for line in table(result).splitlines()]
    number, hard = result["own"]["numbers"]["avg@3"], result["own"]["groups"]["level 2"]
    assert ["questions", "7"] in shown
    assert ["avg@3", f"{100 * number['value']:.1f}", "±", f"{100 * number['error']:.1f}"] in shown
    assert ["level", "2", f"{100 * hard['value']:.1f}", "±", f"{100 * hard['error']:.1f}", "(2)"] in shown


# ---------------------------------------------------------------- benchmarks


@needs_sets
@pytest.mark.parametrize(
    "name, count, golds",
    [
        ("math500", 500, {0: "\\left( 3, \\frac{\\pi}{2} \\right)", 3: "9"}),
        ("gsm8k", 1319, {0: "18", 2: "70000"}),
        ("amc", 83, {0: "142.0"}),
        ("amc23", 40, {0: "27"}),
        ("aime24", 30, {0: "73"}),
        ("aime25", 30, {0: "70"}),
        ("math", 5000, {0: "2", 2: "\\dfrac{9}{7}"}),
        ("olympiadbench", 675, {0: "2", 13: "$69$,$84$"}),
        ("svamp", 1000, {0: "51"}),
    ],
)
def test_gold_is_a_whole_solution_or_has_lost_its_digits(name: str, count: int, golds: dict[int, str]) -> None:
    benchmark = load_benchmark(name, str(SETS))
    read = [str(pair.gold) for pair in benchmark.pairs]
    assert len(read) == count
    assert {i: read[i] for i in golds} == golds
    assert all(gold.strip() and "####" not in gold and len(gold) < 250 for gold in read)
    if name in {"gsm8k", "amc", "amc23", "aime24", "aime25", "svamp"}:
        assert all(float(gold) == int(float(gold)) for gold in read)


@needs_sets
def test_question_lost_half_of_its_text() -> None:
    first = load_benchmark("svamp", str(SETS)).pairs[0].question
    assert first.endswith("discount of 25 dollars on each pack. How much do you have to pay to buy each pack?")


def test_right_answers_in_a_benchmarks_own_notation_are_wrong() -> None:
    for gold, answer in (("142.0", "142"), ("$69$,$84$", "84, 69"), ("$166$", "166 \\text{ cm}^2"), ("2125", "2,125")):
        assert equivalent(gold, answer), (gold, answer)


def test_every_named_benchmark_reads_its_hub_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns that the hub's data sets have, where they differ from the files that circulate elsewhere."""
    rows = {
        "math": {"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "level": "Level 1", "type": "Algebra"},
        "svamp": {"Body": "One.", "Question": "1+1?", "Answer": "2.0"},
        "aime25": {"problem": "1+1?", "answer": 2},
        "olympiadbench": {"question": "1+1?", "final_answer": ["2"]},
        "gsm8k": {"question": "1+1?", "answer": "1+1\n#### 2"},
    }
    for name, row in rows.items():
        file = tmp_path / name / SOURCES[name].hub_files.replace("*", "0")
        file.parent.mkdir(parents=True)
        if file.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), file)
        else:
            file.write_text(json.dumps(row) + "\n")

    def snapshot_download(hub: str, **_: Any) -> str:
        return str(tmp_path / next(name for name, source in SOURCES.items() if source.hub == hub))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in rows:
        (pair,) = load_benchmark(name, str(tmp_path / "nothing")).pairs
        assert float(str(pair.gold)) == 2 and "1+1?" in pair.question


def test_own_file_is_cleared_of_its_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"problem": "1+1?", "solution": 2}\n' * 3)
    benchmark = load_benchmark(str(path), question_column="problem", answer_column="solution")
    assert [(pair.question, pair.gold) for pair in benchmark.pairs] == [("1+1?", "2")] * 3


def test_bad_benchmark_is_found_after_the_model_was_loaded(tmp_path: Path, guesser: Guesser) -> None:
    with pytest.raises(UserError, match="nonsense is no file, no folder and none of"):
        evaluate_model(settings_of(tmp_path, benchmarks=("nonsense",)))
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text('{"question": "1+1?"}\n{"question": "1+2?", "answer": 3}\n')
    with pytest.raises(UserError, match="1 of 2 questions have no gold answer"):
        evaluate_model(settings_of(tmp_path, benchmarks=(str(unlabelled),)))
    (tmp_path / "copy").mkdir()
    same_name = write_questions(tmp_path / "copy" / "own.jsonl")
    with pytest.raises(UserError, match="two would write to one file"):
        evaluate_model(settings_of(tmp_path, benchmarks=(str(tmp_path / "own.jsonl"), same_name)))
    assert not guesser.requests


def test_missing_benchmark_ends_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"HuggingFaceH4/MATH-500 .* \(ConnectionError\): put math500.jsonl below"):
        load_benchmark("math500", str(tmp_path))


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ({"model": None}, "--model is missing"),
        ({"k": -1}, "--k -1 must be at least 0"),
        ({"temperature": 0.0}, "--temperature 0.0 must be from 0.01 to 100"),
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"questions_per_batch": 0}, "--questions-per-batch 0 must be at least 1"),
    ],
)
def test_senseless_flag_is_obeyed(flags: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_settings(EvaluationSettings(**{"model": "letters", **flags}))


def test_evaluation_follows_a_moving_link(tmp_path: Path, guesser: Guesser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or does not know what a run's or a checkpoint's folder means."""
    monkeypatch.chdir(tmp_path)
    policy = tmp_path / "runs" / "x" / "checkpoints" / "step-000010" / "policy"
    policy.mkdir(parents=True)
    (policy.parents[1] / "latest").symlink_to("step-000010")
    for given in ("", "checkpoints/latest", "checkpoints/latest/policy", "checkpoints/step-000010"):
        path = evaluate_model(settings_of(tmp_path, model=str(policy.parents[2] / given), out=None))
        assert path == Path("runs/evaluations/x-step-000010-policy/result.json")
        assert json.loads(path.read_text())["settings"]["model"] == str(policy)


def test_a_built_in_model_is_taken_for_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    assert newest_policy("embedded") == "embedded"


def test_error_ends_in_a_traceback_or_in_success(tmp_path: Path) -> None:
    command = [sys.executable, evaluate.__file__, "--compare", str(tmp_path), "nowhere"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith(f"error: {tmp_path}/result.json is no result.json of an evaluation")
