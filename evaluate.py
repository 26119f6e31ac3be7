"""Did it work? Accuracy on benchmarks, greedy and sampled, each number with its standard error.

    python evaluate.py --model runs/x/checkpoints/latest/policy --benchmarks math500 gsm8k amc
    python evaluate.py --model Qwen3-8B-Base --benchmarks mine.jsonl --k 0       # own questions, one greedy answer each
    python evaluate.py --compare runs/before/result.json runs/after/result.json  # question by question

Questions are asked as in training: its system message, its chat template, and the answer is what the last \\boxed{}
holds. With the temperature of 0.8 that is the protocol of the paper (arXiv 2508.00410), whose tables show pass@1, and
for AMC avg@8. Names of benchmarks are those in benchmark_data.py.

Of n = k sampled answers to a question, c of them correct:

    avg@k     c / n, which is also the sampled pass@1
    pass@j    1 - C(n - c, j) / C(n, j): at least one of j answers is correct, without bias (arXiv 2107.03374)
    maj@k     the most frequent answer is correct; equal mathematics is one answer, ties go to the first

A number is the mean over questions, its standard error std / sqrt(questions): how much it would move with other
questions of the same kind. The answers are kept as they come, so a killed evaluation goes on where it was.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from answers import algebra
from config import UserError
from data import Benchmark, load_benchmark, prompt_ids, read_chat_template
from lm.decoding import Sample, Sampler
from lm.model import load_policy, stop_token_ids
from lm.scoring import PackedLM
from rewards import Match, are_equal, extract_boxed, majority_vote
from rollout import choose_engine, decode, open_sampler, request_seed
from store.files import write_whole
from store.results import compare, estimate, read_result, table

# Columns to break numbers down by.
GROUPINGS = ("level", "subject", "type", "subfield", "category", "Type", "wording")


@dataclass(frozen=True)
class EvaluationSettings:
    model: str | None = None
    """hub name or local folder, such as runs/x/checkpoints/latest/policy"""
    benchmarks: tuple[str, ...] = ("math500", "gsm8k", "amc")
    """names, or files of one's own"""
    k: int = 8
    """sampled answers a question; 0: only the greedy one"""
    greedy: bool = True
    """also one answer at temperature 0"""
    temperature: float = 0.8
    """of the sampled answers"""
    max_tokens: int = 3072
    """longer answers are cut"""
    seed: int = 0
    """of the sampled answers"""
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """hf: transformers; auto: vllm if it is installed and there is a GPU, else hf"""
    engine_memory: float = 0.5
    """share of a GPU's memory for vLLM, next to the model as training loads it"""
    chat_template: str | None = None
    """Jinja file, for a tokenizer without a chat template"""
    questions_per_batch: int = 64
    """answered together, and lost together if the evaluation is killed"""
    limit: int | None = None
    """only the first so many questions of each benchmark"""
    data_dir: str = "data"
    """folder to search for the files of named benchmarks, before the Hugging Face hub"""
    question_column: str = "question"
    """in a file of one's own"""
    answer_column: str = "answer"
    """likewise"""
    out: str | None = None
    """folder to write (None: one under runs/evaluations, named after the model)"""
    compare: tuple[str, str] | None = None
    """instead of an evaluation: two result.json, before and after"""


# Settings that change no answer to any one question.
WITHOUT_EFFECT = {"benchmarks", "limit", "engine_memory", "data_dir", "out", "compare"}


@dataclass(frozen=True)
class Answered:
    """One answer to one question: a line of BENCHMARK.jsonl."""

    id: str
    question: str
    gold: str
    greedy: bool
    answer: str | None
    correct: bool
    tokens: int
    truncated: bool
    text: str


# ---------------------------------------------------------------- asking


def ask(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    prompts: Sequence[list[int]],
    which: range,
    settings: EvaluationSettings,
) -> list[Answered]:
    """The greedy and then the k sampled answers to each of these questions, question by question.

    The seeds depend on the question alone, so that two evaluations differ by the model alone.
    """
    asked = [prompts[i] for i in which]
    seeds = [request_seed(settings.seed, "evaluation", i) for i in which]
    answered: list[list[Answered]] = [[] for _ in which]
    for greedy, n in ((True, int(settings.greedy)), (False, settings.k)):
        if n == 0:
            continue
        temperature = 0.0 if greedy else settings.temperature
        rollouts = sample(asked, seeds, n=n, temperature=temperature, max_tokens=settings.max_tokens)
        texts = [response.text for response in decode(rollouts, tokenizer)]
        boxed = [extract_boxed(text) for text in texts]
        read = [None if answer is None else benchmark.read(answer) for answer in boxed]
        pairs = [benchmark.pairs[i] for i in which for _ in range(n)]
        correct = are_equal([pair.gold for pair in pairs], read, benchmark.match)
        for j, (pair, rollout) in enumerate(zip(pairs, rollouts, strict=True)):
            length, truncated = len(rollout.response_ids), not rollout.finished
            verdict = read[j], correct[j], length, truncated, texts[j]
            answered[j // n].append(Answered(pair.id, pair.question, str(pair.gold), greedy, *verdict))
    return [each for group in answered for each in group]


def kept_answers(path: Path, benchmark: Benchmark, settings: EvaluationSettings) -> list[Answered]:
    """The answers of an earlier run, which was perhaps killed while it wrote: those of its whole batches."""
    per_question = settings.k + settings.greedy
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    wanted = len(benchmark.pairs) * per_question
    if len(lines) < wanted:
        per_batch = settings.questions_per_batch * per_question
        lines = lines[: len(lines) // per_batch * per_batch]
        if path.exists():
            os.truncate(path, sum(map(len, lines)))
    kept = []
    for i, line in enumerate(lines[:wanted]):
        pair = benchmark.pairs[i // per_question]
        try:
            kept.append(Answered(**json.loads(line)))
        except (ValueError, TypeError) as problem:
            raise UserError(f"{path}, line {i + 1} is no answer of an evaluation: name another --out") from problem
        if (kept[i].question, kept[i].gold) != (pair.question, pair.gold):
            raise UserError(f"{path}, line {i + 1} answers another question than {benchmark.name}: name another --out")
    return kept


def answer_all(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    prompts: Sequence[list[int]],
    settings: EvaluationSettings,
    path: Path,
) -> list[Answered]:
    """All answers to a benchmark; those that `path` does not hold yet are asked for and added to it."""
    answered = kept_answers(path, benchmark, settings)
    done, total = len(answered) // (settings.k + settings.greedy), len(benchmark.pairs)
    with path.open("a") as file, tqdm(total=total, initial=done, desc=benchmark.name, unit="question") as bar:
        for start in range(done, total, settings.questions_per_batch):
            batch = range(start, min(start + settings.questions_per_batch, total))
            new = ask(sample, tokenizer, benchmark, prompts, batch, settings)
            file.writelines(json.dumps(asdict(each)) + "\n" for each in new)
            file.flush()
            answered += new
            bar.update(len(batch))
            bar.set_postfix(
                correct=f"{fmean(each.correct for each in answered):.1%}",
                truncated=f"{fmean(each.truncated for each in answered):.1%}",
            )
    return answered


# ---------------------------------------------------------------- numbers


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k answers, drawn without replacement from n of which `correct` are right, is
    right: the unbiased estimate of pass@k (arXiv 2107.03374)."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {correct} correct answers out of {n}: needs 1 <= k <= n and 0 <= correct <= n")
    return 1 - math.prod((n - correct - i) / (n - i) for i in range(k))


def question_values(answered: Sequence[Answered], match: Match) -> dict[str, float]:
    """What the answers to one question add to each number."""
    values: dict[str, float] = {}
    greedy = [each for each in answered if each.greedy]
    sampled = [each for each in answered if not each.greedy]
    if greedy:
        values["greedy"] = float(greedy[0].correct)
    if k := len(sampled):
        correct = sum(each.correct for each in sampled)
        vote = majority_vote([each.answer for each in sampled], match).label
        values[f"avg@{k}"] = correct / k
        values |= {f"pass@{2**i}": pass_at_k(k, correct, 2**i) for i in range(1, k.bit_length())}
        values[f"maj@{k}"] = float(any(each.correct for each in sampled if each.answer == vote))
    for suffix, part in (("", sampled), (" (greedy)", greedy)):
        if part:
            values[f"unanswered{suffix}"] = fmean(each.answer is None for each in part)
            values[f"truncated{suffix}"] = fmean(each.truncated for each in part)
            values[f"tokens{suffix}"] = fmean(each.tokens for each in part)
    return values


def by_group(benchmark: Benchmark, values: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """The questions' values, {column: {group: values}}, for the columns of GROUPINGS that the benchmark has."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for pair, value in zip(benchmark.pairs, values, strict=True):
        for column in GROUPINGS:
            if column in pair.meta:
                groups[column][str(pair.meta[column])].append(value)
    return groups


def result_of(benchmark: Benchmark, answered: Sequence[Answered]) -> dict[str, Any]:
    """Every number of a benchmark, as result.json keeps it: also by group, and its value for every question."""
    per_question = len(answered) // len(benchmark.pairs)
    values: dict[str, list[float]] = defaultdict(list)
    for i in range(len(benchmark.pairs)):
        group = answered[i * per_question : (i + 1) * per_question]
        for name, value in question_values(group, benchmark.match).items():
            values[name].append(value)
    main = next((name for name in values if name.startswith("avg@")), "greedy")
    groups = by_group(benchmark, values[main])
    questions = repr([(pair.question, pair.gold) for pair in benchmark.pairs])
    return {
        "questions": len(benchmark.pairs),
        "samples": len(answered),
        "numbers": {name: estimate(each) for name, each in values.items()},
        "groups of": main,
        "groups": {
            column: {group: estimate(each) for group, each in sorted(by.items())} for column, by in groups.items()
        },
        "fingerprint": blake2b(questions.encode(), digest_size=8).hexdigest(),
        "values": values,
    }


def accuracies(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    prompts: Sequence[list[int]],
    settings: EvaluationSettings,
) -> dict[str, float]:
    """What training logs of an evaluation: the mean accuracy of k sampled answers (avg@k), and that of a greedy one,
    over all questions and by group of questions."""
    answered = ask(sample, tokenizer, benchmark, prompts, range(len(prompts)), settings)
    values: dict[str, list[float]] = result_of(benchmark, answered)["values"]
    logged = {"eval_truncated": fmean(values["truncated"])}
    for name, each in {"eval_accuracy": values[f"avg@{settings.k}"], "eval_accuracy/greedy": values["greedy"]}.items():
        logged[name] = fmean(each)
        for column, groups in by_group(benchmark, each).items():
            logged |= {f"{name}/{column} {group}": fmean(part) for group, part in groups.items()}
    return logged


# ---------------------------------------------------------------- command line


def make_sampler(
    chosen: Literal["vllm", "hf"],
    model: PackedLM,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
    settings: EvaluationSettings,
) -> Sampler:
    return open_sampler(
        chosen,
        model.lm,
        stop_token_ids(model.lm, tokenizer),
        model.compute_dtype,
        max_sequence_tokens=longest_prompt + settings.max_tokens,
        rows=settings.questions_per_batch * max(settings.k, 1),
        engine_memory=settings.engine_memory,
    )


def output_folder(settings: EvaluationSettings) -> Path:
    """Where the answers are kept, with the settings that they were made with; other settings need another folder."""
    parts = [part for part in Path(str(settings.model)).parts[-4:] if part not in ("/", ".", "..", "checkpoints")]
    folder = Path(settings.out) if settings.out else Path("runs", "evaluations", "-".join(parts))
    now = {name: value for name, value in asdict(settings).items() if name not in WITHOUT_EFFECT}
    if any(file.stat().st_size for file in folder.glob("*.jsonl")):
        before = read_settings(folder)
        changed = [f"{name} (was {before.get(name)}, is {now[name]})" for name in now if before.get(name) != now[name]]
        if changed:
            raise UserError(f"{folder} holds answers of other settings: {', '.join(changed)}; name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "settings.json", json.dumps(now, indent=2) + "\n")
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "settings.json").read_text()))
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(f"{folder} holds .jsonl files but no settings.json of theirs: name another --out") from problem


def run(settings: EvaluationSettings) -> Path:
    """Ask, score, show; returns the path of result.json."""
    where = settings.data_dir, settings.question_column, settings.answer_column
    benchmarks = [load_benchmark(name, *where) for name in settings.benchmarks]
    if len({each.name for each in benchmarks}) < len(benchmarks):
        raise UserError(f"--benchmarks {' '.join(settings.benchmarks)}: two would write to one file, rename one")
    benchmarks = [replace(each, pairs=each.pairs[: settings.limit]) for each in benchmarks]
    folder, sampler = output_folder(settings), choose_engine(settings.sampler)
    model, tokenizer = load_policy(str(settings.model), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    template = read_chat_template(settings.chat_template) if settings.chat_template else None
    prompts = [[prompt_ids(tokenizer, pair.question, template) for pair in each.pairs] for each in benchmarks]
    longest = max(len(prompt) for of_one in prompts for prompt in of_one)
    results = {}
    with make_sampler(sampler, model, tokenizer, longest, settings).holding(model.lm) as sample:
        for benchmark, asked in zip(benchmarks, prompts, strict=True):
            path = folder / f"{benchmark.name}.jsonl"
            answered = answer_all(sample, tokenizer, benchmark, asked, settings, path)
            results[benchmark.name] = result_of(benchmark, answered)
    path = folder / "result.json"
    earlier = read_result(str(path))["benchmarks"] if path.exists() else {}
    result = {"settings": read_settings(folder), "benchmarks": earlier | results}
    write_whole(path, json.dumps(result, indent=2) + "\n")
    print(table(results))
    for what, count in algebra.counts().items():  # not in the file, as a killed run has forgotten its own
        if count:
            print(f"{what.replace('_', ' ')}: {count:,} comparisons of this run, taken as unequal")
    print(f"kept in {path}")
    return path


def check(settings: EvaluationSettings) -> EvaluationSettings:
    """Refuse what could only fail later; a link such as checkpoints/latest is followed, as it will move."""
    needed = {
        "--model is missing: a hub name or a local folder": settings.model,
        "--k 0 with --no-greedy asks for no answer": settings.k > 0 or settings.greedy,
        f"--k {settings.k} must not be negative": settings.k >= 0,
        f"--temperature {settings.temperature} must be over 0; the greedy answer is extra": settings.temperature > 0,
        f"--max-tokens {settings.max_tokens} must be at least 1": settings.max_tokens >= 1,
        f"--limit {settings.limit} must be at least 1": settings.limit is None or settings.limit >= 1,
        f"--questions-per-batch {settings.questions_per_batch} must be at least 1": settings.questions_per_batch >= 1,
    }
    for complaint, holds in needed.items():
        if not holds:
            raise UserError(complaint)
    model = str(settings.model)
    return replace(settings, model=str(Path(model).resolve()) if Path(model).exists() else model)


def main() -> None:
    settings = tyro.cli(EvaluationSettings, description=__doc__)
    try:
        if settings.compare:
            print(compare(*settings.compare))
        else:
            run(check(settings))
    except UserError as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the answers kept so far") from None


if __name__ == "__main__":
    main()
