"""tools/rephrase.py, store/batches.py, sources/faults.py, the sampler's top_p: each test is named after the bug it
prevents."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import TORCHRUN
from tiny import untrained

from config import UserError
from data import load_pairs
from lm.decoding import TransformersSampler, draw, request_seed, uniform_numbers
from lm.engine import InferenceModel
from lm.model import load_pretrained, stop_token_ids
from lm.record import Rollout
from sources.faults import lost_numbers, numbers, strict_fault
from store.jsonl import read_rows
from tools import rephrase
from tools.rephrase import RephrasingSettings, read_reply

Reply = partial(Rollout, [], [], [])  # of a text that is `finished` or not
ROOT = Path(rephrase.__file__).parents[1]

# ---------------------------------------------------------------- parsing

GOOD = "### RESULT_START\nORIGINAL:\nWhat is 2+3?\nREWRITE:\nAdd 2 and 3: how much?\n### RESULT_END"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "Sure! Here it is:\n\n" + GOOD + "\n\nI hope this helps.",
        f"```\n{GOOD}\n```",
        GOOD.replace("### ", "###").replace("_", " "),
        GOOD.replace("REWRITE:\n", "**REWRITE:** "),
        GOOD.replace("REWRITE:\n", "Rewrite: "),
        GOOD.replace("\n### RESULT_END", ""),
        GOOD.replace("### RESULT_END", "```"),
        GOOD.replace("Add 2 and 3: how much?", "```text\nAdd 2 and 3: how much?\n```"),
        GOOD.replace("Add 2 and 3: how much?", "<Add 2 and 3: how much?>"),
        GOOD.replace("Add 2 and 3: how much?", "“Add 2 and 3: how much?”"),
        "<think>\nThey want ### RESULT_START, REWRITE: and so on.\nREWRITE: Add 9?\n</think>\n\n" + GOOD,
        "I will write ### RESULT_START and ### RESULT_END.\n" + GOOD,
        GOOD.replace("Add", "Subtract") + "\n\nNo, that changes it. Again:\n\n" + GOOD,
        "### RESULT_START\nREWRITE:\nAdd 2 and 3: how much?\nORIGINAL:\nWhat is 2+3?\n### RESULT_END",
    ],
)
def test_a_good_rewrite_is_found_however_it_is_wrapped(text):
    assert read_reply(Reply(True, text)) == ("Add 2 and 3: how much?", None)


def test_the_rewriter_samples_as_the_papers_did():
    settings = RephrasingSettings(data="q.jsonl", model="Qwen3-32B", out=Path("pairs.jsonl"))
    assert (settings.temperature, settings.top_p) == (0.7, 0.8)


@pytest.mark.parametrize(
    ("fault", "text", "finished"),
    [
        ("no result", "Add 2 and 3: how much?", True),
        ("no result", "", True),
        ("no result", "### RESULT_START\nAdd 2 and 3.\n### RESULT_END", True),
        ("no result", "### RESULT_START\nORIGINAL: q\nREWRITE:\n\n### RESULT_END", True),
        ("no result", "<think> I would start with ### RESULT_START", False),
        ("cut off", GOOD.partition(" how much?")[0], False),
    ],
)
def test_a_reply_without_a_whole_rewrite_is_not_used(fault, text, finished):
    assert read_reply(Reply(finished, text)) == ("", fault)


def test_a_complete_rewrite_counts_even_if_the_chatter_after_it_was_cut():
    assert read_reply(Reply(False, GOOD + "\nNow let me explain"))[1] is None


@pytest.mark.parametrize("padding", ["\n", " ", "#", "`", "*\n", "\n ORIGINAL", "RESULT_START\n"])
def test_a_reply_of_a_thousand_lines_stops_the_work(padding):
    """32,000 newlines took 25 seconds."""
    long = padding * (64_000 // len(padding))
    begin = time.perf_counter()
    for text in (long + GOOD, GOOD.replace("Add", long + "Add"), GOOD + long, GOOD.partition("Add")[0] + long):
        read_reply(Reply(False, text))
    assert time.perf_counter() - begin < 2


def test_several_lines_and_latex_survive_parsing():
    rewrite = "Let $x_1 < 3$.\n\n\\[x^2 = \\text{ORIGINAL value}\\]\nFind $x$."
    assert read_reply(Reply(True, GOOD.replace("Add 2 and 3: how much?", rewrite))) == (rewrite, None)


# ---------------------------------------------------------------- checks

Q = "Ann has 12 apples and buys 28 more. How many apples has she now?"
R = "A library owns 12 maps and is given 28. What number of maps does it own in the end?"


@pytest.mark.parametrize(
    ("fault", "question", "rewrite", "gold"),
    [
        (None, Q, R, "40"),
        (None, Q, R.replace("28", "twenty-eight").replace("12", "a dozen"), "40"),
        ("numbers lost", Q, R.replace("28", "27"), "40"),
        ("answer leaked", Q, R + " Is it 40?", "40"),
        (None, Q, R + " Is it 40?", None),
        ("answer leaked", Q, R + " The answer is $\\boxed{40}$.", None),
        ("unchanged", Q, Q.upper(), None),
        ("placeholder", Q, "<rewritten question>", None),
        ("placeholder", Q, R + " <question reworded>", None),
        ("placeholder", Q, R + "\nREWRITE: " + R, None),
        ("too short or too long", Q, R * 8, None),
        ("too short or too long", Q * 3, "12 and 28?", None),
        ("asks nothing", Q, R.replace("What", "That").replace("?", "."), None),
        ("figure lost", f"{Q} [asy] draw((0,0)--(1,1)); [/asy]", R, None),
        (None, "小明有12个苹果，又买了28个。他现在有多少个苹果？", "图书馆有12张地图，又得到28张，共有几张？", None),
        (None, "$\\frac{3}{4} + 5 =$", "What do you get when you add 5 to three quarters?", None),
        (None, "Is 7 prime?", "Does 7 have a divisor other than 1 and itself?", "1"),
    ],
)
def test_a_bad_rewrite_is_asked_for_again(fault, question, rewrite, gold):
    assert strict_fault(question, rewrite, gold) == fault


def test_numbers_are_compared_by_value_not_by_spelling():
    assert numbers("$1,234$, 1{,}234 and .50 or 007; not x_5, x_{12}") == {"1234", ".50", "7"}
    assert not lost_numbers("1,500 at 0.25, 2 and 64", "1500, .25, twice, sixty-four")
    assert lost_numbers("from 15 to 30, 1 at 0", "75 and 90") == {"15", "30"}
    assert numbers('[asy] draw((3,4)--(5,6)); label("$60^\\circ$", (7,8)); [/asy] 9') == {"60", "9"}


GSM_PLUS = ROOT.parent / "shared" / "data" / "small" / "gsmplus_paraphrase_300.jsonl"


@pytest.mark.skipif(not GSM_PLUS.exists(), reason="GSM-Plus is not beside this repository")
def test_few_good_paraphrases_are_turned_down():
    rows = [json.loads(line) for line in GSM_PLUS.read_text().splitlines()]
    faults = Counter(strict_fault(row["seed_question"], row["paraphrase"], str(row["answer"])) for row in rows)
    assert faults == {None: 293, "numbers lost": 7}


# ---------------------------------------------------------------- a model of scripted words


class Scripted:
    """Stands for a model; `say(question, key, g)` is its g-th reply."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def sample(self, prompts, seeds, n, **how):
        """Seeds are keys here, and what it samples are replies."""
        self.asked += [(*key[1:], n) for key in seeds]
        asked = zip(prompts, seeds, strict=True)
        texts = [self.say(bytes(prompt).decode(), key, g) for prompt, key in asked for g in range(n)]
        return [text if isinstance(text, Rollout) else Reply(True, text) for text in texts]


def use(monkeypatch, model: Scripted) -> None:
    monkeypatch.setattr(rephrase.engine, "load_inference_model", lambda *_: InferenceModel(None, None, None, "hf"))
    monkeypatch.setattr(rephrase.engine, "sampling_from", lambda *_: nullcontext(model.sample))
    monkeypatch.setattr(rephrase, "longest_prompt", lambda *_: 100)
    monkeypatch.setattr(rephrase, "request_seed", lambda *key: key)
    monkeypatch.setattr(rephrase, "read_answers", lambda replies, _: None)
    monkeypatch.setattr(rephrase, "instruction_ids", lambda _, text: list(text.encode()))


def wrap(rewrite: str) -> str:
    return f"### RESULT_START\nREWRITE: {rewrite}\n### RESULT_END"


def questions(folder: Path, count: int = 5) -> Path:
    rows = [{"id": f"q{i}", "question": f"What is 1{i} + 20?", "answer": str(30 + i), "level": i} for i in range(count)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "q.jsonl"


def answer_in_other_words(question: str, key: tuple, g: int) -> str:
    return wrap(f"Add {question[8:10]} to 20; how much does that make?")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_question_comes_out_once_in_order_and_is_read_back_as_a_pair(tmp_path, monkeypatch, capsys):
    use(monkeypatch, Scripted(answer_in_other_words))
    out = tmp_path / "pairs.jsonl"
    rephrase.rephrase(RephrasingSettings(str(questions(tmp_path)), "m", out, batch_size=2))
    assert [row["id"] for row in rows_of(out)] == ["q0", "q1", "q2", "q3", "q4"]
    pairs = load_pairs(str(out))
    assert [pair.rephrased for pair in pairs] == [f"Add 1{i} to 20; how much does that make?" for i in range(5)]
    assert [(pair.gold, pair.meta["level"]) for pair in pairs] == [(str(30 + i), i) for i in range(5)]
    assert "5 of 5 questions have a rephrasing" in capsys.readouterr().out


def test_a_bad_candidate_is_asked_again_and_the_first_good_one_wins(tmp_path, monkeypatch):
    def say(question: str, key: tuple, g: int) -> str:
        _, _, name, attempt = key
        if name == "q0" or (attempt, g) == (2, 1) or (name == "q3" and attempt == 1):
            return answer_in_other_words(question, key, g)
        return {0: "no markers", 1: wrap(question)}.get(attempt, wrap("What is 1 + 1 then?"))

    model = Scripted(say)
    use(monkeypatch, model)
    out = tmp_path / "pairs.jsonl"
    rephrase.rephrase(RephrasingSettings(str(questions(tmp_path, 4)), "m", out))
    assert [row["faults"] for row in rows_of(out)] == [
        {},
        {"no result": 1, "numbers lost": 1, "unchanged": 2},
        {"no result": 1, "numbers lost": 1, "unchanged": 2},
        {"no result": 1},
    ]
    assert all(row["rephrased"] for row in rows_of(out))
    # What is settled is not asked again: 4 questions once, 3 twice, 2 four times.
    assert Counter(n for *_, n in model.asked) == {1: 4, 2: 3, 4: 2}


def test_a_question_without_a_good_rewrite_is_recorded_with_its_reasons_not_lost(tmp_path, monkeypatch):
    use(
        monkeypatch,
        Scripted(lambda question, key, g: wrap("<question reworded>") if g else Reply(False, "### RES")),
    )
    out = tmp_path / "pairs.jsonl"
    rephrase.rephrase(RephrasingSettings(str(questions(tmp_path, 2)), "m", out, attempts=2))
    assert [(row["rephrased"], row["faults"]) for row in rows_of(out)] == [
        (None, {"no result": 2, "placeholder": 1})
    ] * 2
    assert [pair.rephrased for pair in load_pairs(str(out))] == [None, None]


def test_a_question_too_long_to_be_repeated_is_not_asked(tmp_path, monkeypatch):
    model = Scripted(answer_in_other_words)
    use(monkeypatch, model)
    (tmp_path / "q.jsonl").write_text(
        '{"question": "What is 1 + 20?"}\n{"question": "What is 1 + 20?%s"}\n' % (" " * 100)
    )
    rephrase.rephrase(RephrasingSettings(str(tmp_path / "q.jsonl"), "m", tmp_path / "pairs.jsonl"))
    assert [row["faults"] for row in rows_of(tmp_path / "pairs.jsonl")][1] == {"question too long": 1}
    assert {name for _, name, *_ in model.asked} == {"0"}


def test_a_rephrasing_that_is_there_is_kept(tmp_path, monkeypatch):
    model = Scripted(answer_in_other_words)
    use(monkeypatch, model)
    rows = [{"question": "What is 10 + 20?", "rephrased": "Sum of 10 and 20?"}, {"question": "What is 11 + 20?"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rephrase.rephrase(RephrasingSettings(str(tmp_path / "q.jsonl"), "m", tmp_path / "pairs.jsonl"))
    assert rows_of(tmp_path / "pairs.jsonl")[0]["rephrased"] == "Sum of 10 and 20?"
    assert [name for _, name, *_ in model.asked] == ["1"]


def test_odd_characters_survive_the_way_through_the_file(tmp_path, monkeypatch):
    use(monkeypatch, Scripted(lambda question, key, g: wrap("Süß\u2028 \x0b “数” 12: how many $\\frac{1}{2}$?")))
    (tmp_path / "q.jsonl").write_text('{"question": "What is\u2028 数 12?"}\n')
    settings = RephrasingSettings(str(tmp_path / "q.jsonl"), "m", tmp_path / "pairs.jsonl")
    rephrase.rephrase(settings)
    (pair,) = load_pairs(str(settings.out))
    assert (pair.question, pair.rephrased) == (
        "What is\u2028 数 12?",
        "Süß\u2028 \x0b “数” 12: how many $\\frac{1}{2}$?",
    )


# ---------------------------------------------------------------- kill and resume

STUB = """
import os, random, sys, time
from contextlib import nullcontext
sys.path[:0] = [{root!r}]
from lm.engine import InferenceModel
from lm.record import Rollout
from tools import rephrase

def sample(prompts, seeds, n, **how):
    keys = seeds
    time.sleep({seconds})
    with open({log!r}, "a") as log:
        log.writelines(f"{{key[2]}} {{key[3]}}\\n" for key in keys)
    asked = [(bytes(prompt).decode(), f"{{key}} {{g}}") for prompt, key in zip(prompts, keys) for g in range(n)]
    return [reply(question, random.Random(seed)) for question, seed in asked]

def reply(question, rng):
    start = rng.choice(["Please add", "Sum up", "Let me see", "Add"])
    text = f"{{start}} {{question[8:10]}} and {{rng.choice(['20', '20', '21'])}}; how much is it?"
    text = "### RESULT_START\\nREWRITE: " + text + "\\n### RESULT_END"
    return Rollout([], [], [], rng.random() < 0.9, text)

rephrase.engine.load_inference_model = lambda *_: InferenceModel(None, None, None, "hf")
rephrase.engine.sampling_from = lambda *_: nullcontext(sample)
rephrase.longest_prompt = lambda *_: 100
rephrase.request_seed = lambda *key: key
rephrase.read_answers = lambda replies, _: None
rephrase.instruction_ids = lambda _, question: list(question.encode())
rephrase.main()
"""


def start(folder: Path, out: str, *flags: str, seconds: float = 0.0, launcher: Sequence[str] = ()) -> subprocess.Popen:
    """`python -m tools.rephrase` on ten questions in batches of two, by a random stub that notes what it was asked."""
    script = folder / f"stub{seconds}.py"
    script.write_text(STUB.format(root=str(ROOT), seconds=seconds, log=str(folder / "asked.txt")))
    command = [
        sys.executable,
        *launcher,
        script,
        "--data",
        questions(folder, 10),
        "--model",
        "m",
        "--out",
        folder / out,
    ]
    return subprocess.Popen(
        [*map(str, command), "--batch-size", "2", "--attempts", "2", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def done_in(folder: Path) -> set[str]:
    file = folder / "killed.jsonl.work" / "rows.jsonl"
    return {str(row["id"]) for row in read_rows(file)} if file.exists() else set()


@pytest.mark.slow
def test_a_killed_run_continues_without_losing_or_repeating_a_question(tmp_path):
    finish(start(tmp_path, "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    texts = [row["rephrased"] for row in map(json.loads, whole.splitlines())]
    assert len(texts) == 10 and len({text and text.split()[0] for text in texts}) > 1  # the seeds reach the stub
    for sign in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        already = done_in(tmp_path)
        process = start(tmp_path, "killed.jsonl", seconds=1.5)
        while process.poll() is None and done_in(tmp_path) == already:
            time.sleep(0.01)
        process.send_signal(sign)
        error = process.communicate(timeout=60)[1]
        assert "Traceback" not in error and ("stopped; the same command goes on" in error) == (sign == signal.SIGINT)
        assert process.returncode != 0 and done_in(tmp_path) > already and not (tmp_path / "killed.jsonl").exists()
    done = done_in(tmp_path)
    (tmp_path / "asked.txt").unlink()
    finish(start(tmp_path, "killed.jsonl"))
    asked = {line.split()[0] for line in (tmp_path / "asked.txt").read_text().splitlines()}
    assert asked == {f"q{i}" for i in range(10)} - done and 0 < len(done) < 10
    assert (tmp_path / "killed.jsonl").read_bytes() == whole


def test_two_processes_write_what_one_writes(tmp_path):
    finish(start(tmp_path, "one.jsonl"))
    torchrun = [*TORCHRUN[1:], "2"]
    summary = finish(start(tmp_path, "two.jsonl", launcher=torchrun))
    asked = Counter((tmp_path / "asked.txt").read_text().splitlines())
    assert set(asked.values()) == {2}  # by the one process, and by one of the two
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert summary.count("of 10 questions have a rephrasing") == 1


@pytest.mark.parametrize("damage", [b"", b'{"id": "q2", "quest', b"null\n", b"\xff\n", b"{}\n"])
def test_damaged_rows_are_taken_for_whole_ones(tmp_path, monkeypatch, damage):
    use(monkeypatch, Scripted(answer_in_other_words))
    settings = RephrasingSettings(str(questions(tmp_path)), "m", tmp_path / "pairs.jsonl", batch_size=2)
    rephrase.rephrase(settings)
    whole = settings.out.read_bytes()
    settings.out.unlink()
    (tmp_path / "pairs.jsonl.work" / "rows.jsonl").write_bytes(whole.splitlines(keepends=True)[0] + damage)
    if damage.endswith(b"\n"):
        with pytest.raises(UserError, match=r"rows\.jsonl, line 2 is (damaged|of another question)"):
            rephrase.rephrase(settings)
        (tmp_path / "pairs.jsonl.work" / "rows.jsonl").unlink()
    rephrase.rephrase(settings)
    assert settings.out.read_bytes() == whole


def test_a_run_is_not_continued_with_other_settings_or_questions(tmp_path, monkeypatch):
    use(monkeypatch, Scripted(answer_in_other_words))
    settings = RephrasingSettings(str(questions(tmp_path)), "m", tmp_path / "pairs.jsonl")
    rephrase.rephrase(settings)
    finished = settings.out.read_bytes()
    with pytest.raises(UserError, match=r"temperature \(was 0\.7, is 0\.9\); name another --out, or delete it"):
        rephrase.rephrase(replace(settings, temperature=0.9))
    rephrase.rephrase(replace(settings, temperature=0.9, out=tmp_path / "another.jsonl"))
    questions(tmp_path, 4)
    with pytest.raises(UserError, match=r"work was begun with other settings: questions"):
        rephrase.rephrase(settings)
    assert settings.out.read_bytes() == finished


def test_a_finished_file_is_not_overwritten(tmp_path, monkeypatch):
    use(monkeypatch, Scripted(answer_in_other_words))
    (tmp_path / "pairs.jsonl").write_text("precious")
    with pytest.raises(UserError, match="settings.json, kept for .*pairs.jsonl, cannot be used .*: name another --out"):
        rephrase.rephrase(RephrasingSettings(str(questions(tmp_path)), "m", tmp_path / "pairs.jsonl"))
    assert (tmp_path / "pairs.jsonl").read_text() == "precious"
    rephrase.rephrase(RephrasingSettings(str(questions(tmp_path)), "m", tmp_path / "another.jsonl"))
    assert rows_of(tmp_path / "another.jsonl")


# ---------------------------------------------------------------- a real sampler


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> str:
    """Untrained: it babbles, and never in the form that is asked for."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = untrained()
    model.config.max_position_embeddings = 8192  # its tokens are short, the instruction has thousands of them
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_real_model_that_babbles_gives_no_pair_and_every_reply_is_counted(tmp_path, small_model):
    outputs = []
    for name in ("a.jsonl", "b.jsonl"):
        settings = RephrasingSettings(
            str(questions(tmp_path, 3)),
            small_model,
            tmp_path / name,
            max_response_tokens=40,
            batch_size=2,
        )
        rephrase.rephrase(settings)
        outputs.append(settings.out.read_bytes())
    assert outputs[0] == outputs[1]
    assert [(row["rephrased"], row["faults"]) for row in rows_of(settings.out)] == [(None, {"no result": 7})] * 3


def test_a_model_that_cannot_be_used_is_named(tmp_path, small_model):
    settings = RephrasingSettings(str(questions(tmp_path)), "./none", tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="--model ./none: neither a folder nor a hub name"):
        rephrase.rephrase(settings)
    with pytest.raises(UserError, match="absent.jinja cannot be read"):
        rephrase.rephrase(replace(settings, model=small_model, chat_template="absent.jinja", out=tmp_path / "other"))


def test_the_command_line_turns_its_errors_into_one_sentence(tmp_path):
    out = tmp_path / "pairs.jsonl"
    out.write_text("precious")
    command = [sys.executable, "-m", "tools.rephrase", "--data", questions(tmp_path), "--model", "m", "--out", out]
    result = subprocess.run([*map(str, command)], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: {out}.work/settings.json, kept for {out}, cannot be used")


# ---------------------------------------------------------------- top_p


def test_the_nucleus_is_the_fewest_tokens_that_hold_top_p():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]] * 100 + [[0.97, 0.01, 0.01, 0.01]] * 100)
    (uniforms,) = uniform_numbers(range(200), 1, torch.device("cpu"))
    for top_p, kept in ((0.75, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}), (0.7, {1: 4 / 7, 3: 3 / 7})):
        drawn, logps = draw(probabilities.log(), uniforms, 1.0, top_p)
        assert set(drawn[:100].tolist()) == set(kept) and set(drawn[100:].tolist()) == {0}
        expected = [kept[token] for token in drawn[:100].tolist()] + [1.0] * 100
        assert torch.allclose(logps.exp(), torch.tensor(expected), atol=1e-6)


def test_log_probs_are_those_of_the_truncated_distribution_and_draws_follow_it():
    rows, temperature, logits = 4000, 0.5, torch.tensor([1.0, 0.2, 0.9, -3.0])
    (uniforms,) = uniform_numbers(range(rows), 1, torch.device("cpu"))
    drawn, logps = draw(logits.repeat(rows, 1), uniforms, temperature, top_p=0.8)
    p = (logits / temperature).softmax(-1)
    assert p[0] < 0.8 < p[0] + p[2]  # the nucleus: the first and the third token
    expected = {0: (p[0] / (p[0] + p[2])).item(), 2: (p[2] / (p[0] + p[2])).item()}
    shares = Counter(drawn.tolist())
    assert set(shares) == {0, 2} and abs(shares[0] / rows - expected[0]) < 0.03
    for token, logp in zip(drawn.tolist(), logps.tolist(), strict=True):
        assert logp == pytest.approx(torch.tensor(expected[token]).log().item(), abs=1e-5)


def test_top_p_reaches_the_sampler(small_model):
    lm, tokenizer = load_pretrained(small_model, torch.float32)
    sampler = TransformersSampler(stop_token_ids(lm, tokenizer))
    prompt = tokenizer("How many apples?").input_ids
    with sampler.loaded(lm) as sample:
        how = {"prompts": [prompt], "seeds": [request_seed(0)], "n": 4, "temperature": 1.0, "max_tokens": 8}
        free, narrow = sample(**how), sample(**how, top_p=1e-6)
        greedy = sample(**how | {"temperature": 0.0})
    assert [r.response_ids for r in narrow] == [r.response_ids for r in greedy] != [r.response_ids for r in free]
    assert all(logp == 0 for rollout in narrow for logp in rollout.logp)
