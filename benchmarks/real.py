"""A real language model on real questions: does label-free RL teach it anything, and which reward does?

    python benchmarks/real.py --data-dir DATA --model SmolLM2-135M-Instruct.Q4_1.gguf --sampler vllm      # two cores
    python benchmarks/real.py --data-dir DATA --model MODEL --methods gt majority I II III entropy --seeds 0 1 --jobs 6
    python benchmarks/real.py --task gsm8k --data-dir DATA --model MODEL           # a GPU: see benchmarks/gsm8k.sh
    python benchmarks/real.py --jobs 0 --results FOLDER            # no new runs: the tables of a results.json

DATA holds addsub.jsonl, singleeq.jsonl, singleop.jsonl, multiarith.jsonl (columns input and target) and SVAMP.json, for
the other task gsm8k_train.jsonl and gsm8k_test.jsonl, in folders of any name. MODEL is a hub name, a folder, or a .gguf
file (which needs the packages gguf and accelerate).

    --task        singleop                                         gsm8k
    start model   imitation of one-line solutions, made by rule,   the model as it is
                  of AddSub's and SingleEq's questions
    training      one half of SingleOp, by a hash of the question  GSM8K's training questions that the rule rewords
    evaluation    the other half, MultiArith and SVAMP             GSM8K's test questions and SVAMP

I and III read a rewording that is made by rule. Evaluations, sampled at temperature 1 and greedy, are before and after.

Everything is kept in --out: the start model, each run, each evaluation. What is there is not made again, and what a
kill has cut off goes on from its last checkpoint (imitation, minutes, begins again). --results gets one file,
results.json, which is written again and again meanwhile. In the end it writes every table as
docs/results/real-NAME.csv, fills in those that docs/RESULTS.md shows, and draws the figure; the text stays.
"""

import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from one_step import (
    ELSEWHERE,
    IMITATED,
    TRAINED,
    Question,
    bare_sum,
    exact,
    imitation_set,
    in_training,
    plain,
    read_questions,
    rewordable,
    reworded,
)
from pack_model import load_start
from study import COLUMNS as OF_STUDY
from study import Table, askings, publish

from baselines import BASELINES
from config import UserError, exit_on_user_error
from lm.model import newest_policy
from lm.prompts import prompt_ids
from lm.scoring import autocast
from metrics import detect_collapse
from rewards import VARIANTS
from store.jsonl import Record, changes, fingerprint, read_rows, to_lines, write_atomic
from store.results import estimate, written

HOW = ("sampled", "greedy")
COLOURS = {"sampled": "tab:blue", "greedy": "tab:orange"}
READ = 20  # answers to read, of every model
IMITATION_WARM_UP = 10  # steps
SUMS = 8  # in a row of the drill: as long as a question with its solution
WRITE_EVERY = 20  # seconds
COLUMNS = {name: key for name, key in OF_STUDY.items() if not key.startswith("eval")}  # of the table of training
PHASES = ("evaluation", "rollout", "sync", "teacher", "reward", "reference", "update", "metrics")
PASSED_ON = ("steps", "rollouts", "lr", "max_response_tokens", "sampler", "engine_memory")
PASSED_ON += ("tokens_per_micro_batch", "compute_dtype")  # settings that train.py gets under the same names

Example = tuple[list[int], list[bool]]  # tokens, and which of them are to be learnt


@dataclass(frozen=True)
class Settings:
    task: Literal["singleop", "gsm8k"] = "singleop"
    data_dir: Path = Path("data")  # folder of the five files, searched through
    # where imitation starts: a hub name, a folder, or a .gguf file
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    methods: tuple[str, ...] = ("gt", "majority", "II")  # variants of train.py
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1  # runs and evaluations side by side, each a process; 0: none, only the tables
    steps: int = 50
    questions_per_step: int = 8
    rollouts: int = 8
    lr: float = 1e-5
    max_response_tokens: int = 64
    same_rollouts: bool = False  # I and III, which read two wordings, ask half as many questions a step
    eval_every: int = 10  # steps between evaluations in training, on the held-out set; 0: none
    save_every: int = 10  # steps between checkpoints, from which a killed run goes on; 0: only at the end
    k: int = 4  # sampled answers a question in the evaluations before and after
    eval_batch: int = 64  # questions answered together in them
    limit: int = 300  # questions of MultiArith, and of SVAMP
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # of training
    # of the evaluations before and after; where --jobs share a GPU: hf, as vLLM would take half of its memory
    eval_sampler: Literal["auto", "vllm", "hf"] = "auto"
    engine_memory: float = 0.5  # share of a GPU's memory for the vLLM of one run: divide it among --jobs
    engine_cache_gb: float | None = None  # fixed size of the vLLM cache of a run or an evaluation, for --jobs on a GPU
    tokens_per_micro_batch: int = 2048  # activations are kept, not computed again: costs memory, changes no result
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of training
    imitation_steps: int = 200
    imitation_batch: int = 8
    imitation_lr: float = 2e-4
    train_flags: str = ""  # more flags for train.py
    train_seconds: float = math.inf  # after which runs save, and are evaluated as they are
    attempts: int = 2  # at a command that fails, before its run is given up
    out: Path = ROOT / "runs" / "real"
    results: Path | None = None  # folder of results.json (None: --out)
    document: Path = ROOT / "docs" / "RESULTS.md"


# ---------------------------------------------------------------- start model


def question_sets(settings: Settings) -> dict[str, list[Question]]:
    """What is trained on, and the benchmarks, the first of which is held out of the same set."""

    def some(name: str) -> list[Question]:
        return read_questions(settings.data_dir, name)[: settings.limit]

    if settings.task == "gsm8k":
        trained = [each for each in read_questions(settings.data_dir, "gsm8k_train") if rewordable(each[0])]
        return {"train": trained, "held-out": some("gsm8k_test"), "svamp": some("svamp")}
    both_halves = exact(read_questions(settings.data_dir, TRAINED))
    sets = {"train": [each for each in both_halves if in_training(each[0])]}
    sets["held-out"] = [each for each in both_halves if not in_training(each[0])]
    return sets | {name: some(name) for name in ELSEWHERE}


def write_questions(settings: Settings, folder: Path) -> None:
    """train.jsonl, with rewordings, and a file of each benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in question_sets(settings).items():
        rows = [{"question": text, "answer": plain(gold)} for text, gold in questions]
        if name == "train":
            rows = [row | {"rephrased": reworded(row["question"])} for row in rows]
        write_atomic(folder / f"{name}.jsonl", to_lines(rows))


def drill(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Example:
    """Bare sums, without a prompt: what such a model gets wrong most often is not the operation but its result."""
    example: Example = ([], [])
    for _ in range(SUMS):
        for text, learnt in zip(bare_sum(rng), (False, True), strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            example = (example[0] + ids, example[1] + [learnt] * len(ids))
        ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
        example = (example[0] + ids, example[1] + [False] * len(ids))
    return example


def imitation_loss(lm: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of the tokens to learn; in bfloat16, and with logits of these tokens alone [T, vocabulary].
    Padding on the right needs no mask under causal attention."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in examples], batch_first=True).to(lm.device)
    learnt = nn.utils.rnn.pad_sequence([torch.tensor(flags) for _, flags in examples], batch_first=True).to(lm.device)
    with autocast(lm.device, torch.bfloat16):
        hidden = lm.base_model(tokens, use_cache=False).last_hidden_state[:, :-1]
        logits = lm.get_output_embeddings()(hidden[learnt[:, 1:]])
    return F.cross_entropy(logits.float(), tokens[:, 1:][learnt[:, 1:]])


def imitate(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, solved: Sequence[tuple[str, str]], settings: Settings
) -> list[float]:
    """Imitation of worked solutions with AdamW, the learning rate rising and then falling to 0; returns the loss of
    each step. To two solutions comes one row of bare sums."""
    rng, order, losses = random.Random("imitation"), list[int](), list[float]()
    examples = list[Example]()
    for text, solution in solved:
        prompt = prompt_ids(tokenizer, text)
        ids = tokenizer(solution + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        examples.append((prompt + ids, [False] * len(prompt) + [True] * len(ids)))
    optimizer = torch.optim.AdamW(lm.train().parameters(), lr=settings.imitation_lr, weight_decay=0.0)
    for step in range(settings.imitation_steps):
        while len(order) < settings.imitation_batch:  # each example once an epoch
            order += rng.sample(range(len(examples)), len(examples))
        chosen, order = order[: settings.imitation_batch], order[settings.imitation_batch :]
        sums = [drill(tokenizer, rng) for _ in range(settings.imitation_batch // 2)]
        optimizer.param_groups[0]["lr"] = settings.imitation_lr * min(
            (step + 1) / IMITATION_WARM_UP, 1 - step / settings.imitation_steps
        )
        loss = imitation_loss(lm, [examples[i] for i in chosen] + sums)
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"imitation, step {step + 1} of {settings.imitation_steps}: loss {losses[-1]:.3f}", flush=True)
    return losses


def make_start(settings: Settings) -> Path:
    """The imitating model in --out/start, or the given one as it is; made once, whole or not at all."""
    folder, recipe = settings.out / "start", {"model": Path(settings.model).name}
    recipe |= {name: value for name, value in asdict(settings).items() if name.startswith("imitation")}
    if (folder / "imitation.json").is_file():
        made = json.loads((folder / "imitation.json").read_text())["recipe"]
        if differing := changes(made, recipe):
            raise UserError(f"{folder} holds another start model, {differing}: name another --out")
        return folder
    imitates = settings.task == "singleop"
    examples, counts = imitation_set(settings.data_dir) if imitates else ([], {})
    lm, tokenizer = load_start(settings.model)
    begin = time.perf_counter()
    lm.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    losses = imitate(lm, tokenizer, examples, settings) if imitates else []
    note = {"recipe": recipe, "questions": counts, "losses": losses, "seconds": time.perf_counter() - begin}
    aside = settings.out / "start.unfinished"
    lm.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    write_atomic(aside / "imitation.json", json.dumps(note) + "\n")
    aside.rename(folder)
    return folder


# ---------------------------------------------------------------- runs


class Run(NamedTuple):
    method: str
    seed: int

    def name(self, settings: Settings) -> str:
        """Of its folder: whatever makes it another run."""
        each = settings
        parts = [self.method, f"lr{each.lr:g}", f"{each.steps}x{self.questions(each)}x{each.rollouts}"]
        return "-".join([*parts, *re.findall(r"[\w.]+", each.train_flags), f"seed{self.seed}"])

    def questions(self, settings: Settings) -> int:
        """Return how many questions a step asks."""
        wordings = len((VARIANTS | BASELINES)[self.method].policy_views) if settings.same_rollouts else 1
        return settings.questions_per_step // wordings

    def folder(self, settings: Settings) -> Path:
        return settings.out / "runs" / self.name(settings)

    def command(self, settings: Settings) -> list[str]:
        """The same one begins the run and goes on with it."""
        each, questions = settings, settings.out / "questions"
        flags = {"variant": self.method, "seed": self.seed, "model": each.out / "start", "out": self.folder(each)}
        flags |= {"data": questions / "train.jsonl", "resume": "auto", "save-every": each.save_every, "keep": 1}
        flags |= {"questions-per-step": self.questions(each), "activation-checkpointing": "off"}
        if each.eval_every:
            flags |= {"eval-data": questions / "held-out.jsonl", "eval-every": each.eval_every}
        flags |= {name.replace("_", "-"): getattr(each, name) for name in PASSED_ON}
        if each.engine_cache_gb:
            flags["engine-cache-gb"] = each.engine_cache_gb
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        return [sys.executable, str(ROOT / "train.py"), *words, *each.train_flags.split()]


def evaluation(settings: Settings, model: Path, name: str) -> list[str]:
    files = [str(file) for file in sorted((settings.out / "questions").glob("*.jsonl")) if file.stem != "train"]
    flags: Record = {"model": model, "out": settings.out / "evaluations" / name, "sampler": settings.eval_sampler}
    flags |= {"k": settings.k, "temperature": 1.0, "max-response-tokens": settings.max_response_tokens}
    flags["questions-per-batch"] = settings.eval_batch
    if settings.engine_cache_gb:
        flags["engine-cache-gb"] = settings.engine_cache_gb
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [sys.executable, str(ROOT / "evaluate.py"), *words, "--benchmarks", *files]


class Processes:
    """The commands that run at the moment; after `stop` no other one begins."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.stopped, self.running = settings, False, set[subprocess.Popen[bytes]]()
        threads = max(1, (os.cpu_count() or 1) // max(settings.jobs, 1))
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        self.end_of_training = time.monotonic() + settings.train_seconds

    def run(self, command: list[str], log: Path, end: float = math.inf) -> None:
        """What it says goes to the end of a file. One that fails is tried again: on a GPU that several processes share,
        vLLM does not start while another one is just taking or returning memory. At its `end` it is told to stop."""
        log.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(self.settings.attempts):
            if self.stopped or time.monotonic() > end:
                return
            with log.open("ab") as stream:
                process = subprocess.Popen(command, stdout=stream, stderr=stream, env=self.environment)
                self.running.add(process)
                try:
                    code = process.wait(None if end == math.inf else max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.terminate()
                    code = process.wait()
                self.running.discard(process)
            if code == 0 or self.stopped or time.monotonic() > end:
                return
        raise UserError(f"exit code {code}, see the end of {log}")

    def stop(self, tell: bool) -> None:
        """Training finishes its step and saves."""
        self.stopped = True
        for process in list(self.running) if tell else []:
            process.terminate()


def train_and_evaluate(run: Run, settings: Settings, processes: Processes) -> str:
    """Whatever of it is missing. Of a finished run the policy stays, not the optimizer's moments."""
    folder, name = run.folder(settings), run.name(settings)
    policy = folder / "policy"
    if not policy.is_dir():
        if not is_finished(folder, settings):
            processes.run(run.command(settings), settings.out / "logs" / f"{name}.txt", processes.end_of_training)
        is_late = time.monotonic() > processes.end_of_training and (folder / "checkpoints" / "latest").is_dir()
        if processes.stopped or not (is_late or is_finished(folder, settings)):
            return f"{name}: stopped"
        Path(newest_policy(str(folder))).rename(policy)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return evaluate_once(name, policy, settings, processes)


def evaluate_once(name: str, model: Path, settings: Settings, processes: Processes) -> str:
    if not (settings.out / "evaluations" / name / "result.json").is_file():
        processes.run(evaluation(settings, model, name), settings.out / "logs" / f"{name}.txt")
    return f"{name}: done"


def is_finished(folder: Path, settings: Settings) -> bool:
    """Tell whether its last checkpoint is written, and the evaluation after it, if there is one."""
    file = folder / "metrics.jsonl"
    evaluated = file.is_file() and any(row["step"] == settings.steps for row in read_rows(file))
    saved = (folder / "checkpoints" / f"step-{settings.steps:06d}").is_dir()
    return saved and (evaluated or not settings.eval_every)


def run_all(settings: Settings) -> list[str]:
    """Everything that is not there yet; results.json is written again and again meanwhile. Returns what failed."""
    start, processes, failed = make_start(settings), Processes(settings), list[str]()
    runs = [Run(method, seed) for seed in settings.seeds for method in settings.methods]
    write_results(settings)  # whenever it is killed, there are tables
    with ThreadPoolExecutor(settings.jobs) as pool:
        left = {pool.submit(evaluate_once, "start", start, settings, processes)}
        left |= {pool.submit(train_and_evaluate, run, settings, processes) for run in runs}
        try:
            while left:
                done, left = wait(left, timeout=WRITE_EVERY, return_when="FIRST_COMPLETED")
                write_results(settings)
                failed += [str(problem) for future in done if (problem := future.exception())]
                print("".join(f"{future.exception() or future.result()}\n" for future in done), end="", flush=True)
        except BaseException as reason:
            processes.stop(tell=not isinstance(reason, KeyboardInterrupt))  # a terminal's Ctrl-C they have heard
            raise
    return failed


# ---------------------------------------------------------------- results


def short(value: Any) -> Any:
    """Numbers to four digits."""
    if isinstance(value, list):
        return [short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_results(settings: Settings) -> None:
    """What the tables need, of everything in --out, as one small file."""
    out = settings.out
    evaluations = {file.parent.name: file for file in sorted(out.glob("evaluations/*/result.json"))}
    result = {
        "task": settings.task,
        "imitation": json.loads((out / "start" / "imitation.json").read_text()),
        "questions": {file.stem: len(read_rows(file)) for file in sorted(out.glob("questions/*.jsonl"))},
        "evaluations": {name: evaluation_of(file) for name, file in evaluations.items()},
        "read": {name: to_read(file.with_name("held-out.jsonl")) for name, file in evaluations.items()},
        "runs": {file.parent.name: run_of(file) for file in sorted(out.glob("runs/*/metrics.jsonl"))},
    }
    folder = settings.results or out
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "results.json", json.dumps(result, ensure_ascii=False) + "\n")


def evaluation_of(file: Path) -> Record:
    """Its numbers, and of the accuracies also the value of every question, for differences question by question."""
    result = json.loads(file.read_text())
    kept = {}
    for benchmark, found in result["benchmarks"].items():
        values = {name: short(found["values"][name]) for name in (found["groups of"], "greedy")}
        kept[benchmark] = {"numbers": found["numbers"], "values": values, "fingerprint": found["fingerprint"]}
    return {"versions": result["versions"], "k": result["settings"]["k"], "benchmarks": kept}


def to_read(file: Path) -> list[Record]:
    """The first sampled answer (without any, the greedy one) to READ questions, the same ones of every model."""
    answers: dict[str, Record] = {}
    for row in read_rows(file):
        if row["question"] not in answers or answers[row["question"]]["greedy"]:
            answers[row["question"]] = row
    chosen = sorted(answers, key=lambda question: fingerprint(question))[:READ]
    return [{key: answers[question][key] for key in ("question", "gold", "text", "correct")} for question in chosen]


def run_of(file: Path) -> Record:
    """Its settings and all its metrics."""
    config = json.loads(file.with_name("config.json").read_text())
    of = {"method": config["method"]["variant"], "seed": config["run"]["seed"], "lr": config["optimisation"]["lr"]}
    of |= {"steps": config["optimisation"]["steps"], "questions_per_step": config["data"]["questions_per_step"]}
    of |= {"rollouts": config["sampling"]["rollouts"], "versions": config["versions"]}
    of["dtype"] = config["model"]["compute_dtype"]
    return of | {"metrics": [{key: short(value) for key, value in row.items()} for row in read_rows(file)]}


def label(run: Record) -> str:
    """Of the row that seeds share: `II, lr 1e-05, 50 steps of 8 x 8`; of a run that was cut, the steps taken."""
    steps = steps_done(run)
    return f"{run['method']}, lr {run['lr']:g}, {steps} steps of {run['questions_per_step']} x {run['rollouts']}"


def steps_done(run: Record) -> int:
    return sum("reward" in each for each in run["metrics"])


def by_label(result: Record) -> dict[str, dict[str, Record]]:
    """Runs that have finished a step, by name, of each row of the tables; methods in the order of the two tables."""
    groups: dict[str, dict[str, Record]] = {}
    methods = [*VARIANTS, *BASELINES]
    begun = {name: run for name, run in result["runs"].items() if run["metrics"]}
    for name, run in sorted(begun.items(), key=lambda item: methods.index(item[1]["method"])):
        groups.setdefault(label(run), {})[name] = run
    return groups


# ---------------------------------------------------------------- tables and figure


def imitation_table(result: Record) -> Table:
    counts = result["imitation"]["questions"]
    steps = ("questions", "solved by the rule", "asked elsewhere, dropped")
    rows = [[name, *(str(counts.get(f"{name}: {step}", 0)) for step in steps)] for name in IMITATED]
    return [["", *steps], *rows]


def benchmarks_of(result: Record) -> list[str]:
    return [name for name in sorted(result["questions"]) if name != "train"]


def accuracy_cell(evaluations: Sequence[Record], benchmark: str, how: str) -> str:
    """`43.2 ± 1.8`, percent: the mean over questions of the mean over seeds, and its error over questions."""
    seeds = [values_of(each, benchmark, how) for each in evaluations]
    return written(estimate([fmean(of_question) for of_question in zip(*seeds, strict=True)]), "accuracy")


def values_of(evaluation: Record, benchmark: str, how: str) -> list[float]:
    """Of every question; the sampled ones come first."""
    values = evaluation["benchmarks"][benchmark]["values"]
    return values["greedy" if how == "greedy" else next(iter(values))]


def accuracy_table(result: Record) -> Table:
    """Before and after."""
    columns = [(name, how) for name in benchmarks_of(result) for how in HOW]
    groups = {"before": [result["evaluations"]["start"]]} if "start" in result["evaluations"] else {}
    for row, runs in by_label(result).items():
        groups[row] = [result["evaluations"][name] for name in runs if name in result["evaluations"]]
    rows = []
    for row, group in groups.items():
        if group:
            cells = [accuracy_cell(group, *column) for column in columns]
            rows.append([row, "" if row == "before" else str(len(group)), *cells])
    return [["", "seeds", *(f"{name}, {how}" for name, how in columns)], *rows]


def seeds_table(result: Record, file: Path) -> Table:
    """Each seed's change of accuracy in points, with its error over questions; rows of other machines' seeds stay."""
    before = result["evaluations"].get("start")
    rows = {}
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as stream:
            rows = {tuple(row[:4]): row for row in list(csv.reader(stream))[1:]}
    for row, runs in by_label(result).items() if before else ():
        for name in runs.keys() & result["evaluations"].keys():
            for benchmark, how in product(benchmarks_of(result), HOW):
                after = values_of(result["evaluations"][name], benchmark, how)
                was = values_of(before, benchmark, how)
                change = estimate([a - b for a, b in zip(after, was, strict=True)])
                key = (row, str(runs[name]["seed"]), benchmark, how)
                rows[key] = [*key, f"{100 * change['value']:+.1f}", f"{100 * (change['error'] or 0):.1f}"]
    return [["name", "seed", "benchmark", "how", "change", "error over questions"], *rows.values()]


def change_table(seeds: Table) -> Table:
    """Mean change over seeds, ± the error over questions (of one seed), for several seeds ± the error over seeds."""
    found: dict[str, dict[str, list[list[str]]]] = {}
    for name, _, benchmark, how, *numbers in seeds[1:]:
        found.setdefault(name, {}).setdefault(f"{benchmark}, {how}", []).append(numbers)
    columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
    rows = []
    for name, cells in found.items():
        row = [name, str(max(map(len, cells.values())))]
        for column in columns:
            changes, errors = zip(*((float(a), float(b)) for a, b in cells[column]), strict=True)
            over_seeds = estimate(changes)["error"]
            shown = f"{fmean(changes):+.1f} ± {fmean(errors):.1f}"
            row.append(shown if over_seeds is None else f"{shown} ± {over_seeds:.1f}")
        rows.append(row)
    return [["", "seeds", *columns], *rows]


def answers_a_step(run: Record) -> int:
    """How many responses a step samples: in II and III the teacher answers too, in I and III two wordings."""
    return run["questions_per_step"] * run["rollouts"] * askings((VARIANTS | BASELINES)[run["method"]])


def equal_table(result: Record) -> Table:
    """Held-out accuracy, sampled, in training: after as many sampled answers as every run has an evaluation at."""
    measured = {}
    for name, run in result["runs"].items():
        evaluated = {each["step"]: each["eval_accuracy"] for each in run["metrics"] if "eval_accuracy" in each}
        measured[name] = {step * answers_a_step(run): accuracy for step, accuracy in evaluated.items()}
    budget = max(set.intersection(*(set(each) for each in measured.values())), default=0) if measured else 0
    rows = []
    for row, runs in by_label(result).items() if budget else ():
        step = budget // answers_a_step(next(iter(runs.values())))
        changes = [measured[name][budget] - measured[name][0] for name in runs]
        rows.append([row, str(len(runs)), str(step), f"{100 * fmean(changes):+.1f}"])
    return [["", "seeds", f"step at which {budget:,} answers were sampled", "change of accuracy, points"], *rows]


def training_table(result: Record) -> Table:
    """Means of the first and the last five steps, of all seeds."""
    rows = []
    for row, runs in by_label(result).items():
        histories = [run["metrics"] for run in runs.values()]
        cells = []
        for key in COLUMNS.values():
            of_seeds = [[each[key] for each in history if key in each] for history in histories]
            ends = [(fmean(each[:5]), fmean(each[-5:])) for each in of_seeds if each]
            cells.append(" to ".join(f"{fmean(side):.2f}" for side in zip(*ends, strict=True)) if ends else "-")
        warned = sum(any(detect_collapse(each[: i + 1]) for i in range(len(each))) for each in histories)
        steps = min(map(steps_done, runs.values()))
        rows.append([row, str(len(runs)), str(steps), *cells, str(warned)])
    return [["", "seeds", "steps done", *COLUMNS, "warned"], *rows]


def time_table(result: Record) -> Table:
    """Median seconds of a step by phase, after the first step."""
    rows = []
    for row, runs in by_label(result).items():
        steps = [each for run in runs.values() for each in run["metrics"][1:]]
        cells = []
        for key in (*(f"seconds_{phase}" for phase in PHASES), "tokens_per_second", "peak_memory_gb"):
            values = [each[key] for each in steps if key in each]
            cells.append(f"{median(values):.1f}" if values else "-")
        first = next(iter(runs.values()))
        dtype = "" if first["dtype"] == "auto" else f", {first['dtype']}"
        rows.append([row, first["versions"]["device"] + dtype, *cells])
    return [["", "device", *PHASES, "sampled tokens/s", "peak memory (GB)"], *rows]


def rollouts_table(result: Record, methods: Sequence[str] = ("majority", "II")) -> Table:
    """The same questions before and after: of each method its first run that was evaluated."""
    shown = {"before": result["read"].get("start", [])}
    for row, runs in by_label(result).items():
        name = next((name for name in runs if name in result["read"]), None)
        if name and runs[name]["method"] in methods:
            shown[f"after {row}"] = result["read"][name]
    rows = []
    for i, asked in enumerate(shown["before"]):
        cells = [f"{'right' if read[i]['correct'] else 'wrong'}: {read[i]['text']}" for read in shown.values()]
        rows.append([" ".join(each.split()) for each in (asked["question"], asked["gold"], *cells)])
    return [["question", "gold", *shown], *rows]


def draw(change: Table, seeds: Table, file: Path) -> None:
    """Draw a panel for each benchmark: of each method the mean with its error over questions, and each seed."""
    header, *rows = change
    benchmarks = list(dict.fromkeys(column.partition(",")[0] for column in header[2:]))
    figure = Figure(figsize=(12, 0.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(benchmarks), sharex=True, sharey=True)
    for axis, benchmark in zip(axes, benchmarks, strict=True):
        for how, marker, shift in (("sampled", "o", -0.12), ("greedy", "s", 0.12)):
            for i, row in enumerate(rows):
                value, error, *_ = map(float, row[header.index(f"{benchmark}, {how}")].split(" ± "))
                style = {"fmt": marker, "color": COLOURS[how], "capsize": 3, "label": how if i == 0 else None}
                axis.errorbar(value, i + shift, xerr=error, **style)
                each = [float(seed[4]) for seed in seeds[1:] if [seed[0], *seed[2:4]] == [row[0], benchmark, how]]
                if len(each) > 1:
                    axis.plot(each, [i + shift] * len(each), "|", color=COLOURS[how], markersize=9)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(benchmark, fontsize=10)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(rows)), [f"{row[0].partition(',')[0]}, seeds: {row[1]}" for row in rows])
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False)
    figure.supxlabel("change of accuracy, points; bars: error over questions, strokes: each seed", fontsize=10)
    figure.savefig(file, dpi=160)


def report(result: Record, document: Path) -> None:
    prefix = "real" if result.get("task", "singleop") == "singleop" else result["task"]
    seeds = seeds_table(result, document.parent / "results" / f"{prefix}-seeds.csv")
    tables = {"accuracy": accuracy_table(result), "seeds": seeds, "change": change_table(seeds)}
    tables |= {"training": training_table(result), "time": time_table(result), "rollouts": rollouts_table(result)}
    if result["imitation"]["questions"]:
        tables["imitation"] = imitation_table(result)
    tables["equal"] = equal_table(result)
    for name, rows in tables.items():
        if len(rows) > 1:
            publish(document, f"{prefix}-{name}", rows)
    if len(tables["change"]) > 1:
        draw(tables["change"], seeds, document.with_name(f"{prefix}.png"))


def main(settings: Settings) -> None:
    failed = []
    if settings.jobs:
        write_questions(settings, settings.out / "questions")
        failed = run_all(settings)
    file = (settings.results or settings.out) / "results.json"
    if not file.is_file():
        raise UserError(f"{file} is not there: run something first, with --jobs 1")
    report(json.loads(file.read_text()), settings.document)
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with exit_on_user_error("stopped; the same command goes on"):
        main(tyro.cli(Settings, description=__doc__))
