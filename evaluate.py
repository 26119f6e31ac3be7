"""Did it work? Accuracy on benchmarks, greedy and sampled, each number with its standard error.

    python evaluate.py --model runs/x --benchmarks math500 gsm8k amc             # the newest policy of a run
    python evaluate.py --model Qwen3-8B-Base --benchmarks mine.jsonl --k 0       # own questions, one greedy answer each
    python evaluate.py --compare runs/before runs/after                          # question by question
    torchrun --nproc-per-node 8 evaluate.py ...                                  # shared out, a model on each GPU

Questions are asked as in training: its system message, its chat template, and the answer is what the last \\boxed{}
holds. With the temperature of 0.8 that is the protocol of the paper (arXiv 2508.00410), whose tables show pass@1, and
for AMC avg@8. Names of benchmarks are those in sources/benchmarks.py.

Of n = k sampled answers to a question, c of them correct:

    avg@k     c / n, which is also the sampled pass@1
    pass@j    1 - C(n - c, j) / C(n, j): at least one of j answers is correct, without bias (arXiv 2107.03374)
    maj@k     the most frequent answer is correct; equal mathematics is one answer, ties go to the first

A number is the mean over questions, its standard error std / sqrt(questions): how much it would move with other
questions of the same kind. Every batch of questions becomes a file in BENCHMARK.parts (see store/parts.py), so a killed
evaluation goes on where it was, and ends with the same BENCHMARK.jsonl and result.json whatever became of it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import tyro
from transformers import PreTrainedTokenizerBase

from answers import algebra
from config import UserError, told_in_a_sentence
from data import Benchmark, load_benchmark
from lm.decoding import Sample
from lm.model import newest_policy
from lm.prompts import prompt_ids
from rewards import Match, are_equal, extract_boxed, majority_vote
from rollout import decode, frozen_sampler, request_seed
from store.files import Row, fingerprint, to_lines, write_whole
from store.parts import Part, claim, make_parts, read_whole, split, stand_alone
from store.results import compare, estimate, keep_results, table

GROUPINGS = ("level", "subject", "type", "subfield", "category", "Type", "wording")  # columns to break numbers down by


@dataclass(frozen=True)
class EvaluationSettings:
    model: str | None = None
    """hub name, local folder, or a run such as runs/x, which means its newest policy"""
    benchmarks: tuple[str, ...] = ("math500", "gsm8k", "amc")
    """names, or files of one's own"""
    k: int = 8
    """sampled answers a question; 0: only the greedy one"""
    greedy: bool = True
    """also one answer at temperature 0"""
    temperature: float = 0.8
    """of the sampled answers"""
    max_response_tokens: int = 3072
    """longer answers are cut"""
    seed: int = 0
    """of the sampled answers"""
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """hf: transformers; auto: vllm if it is installed and there is a GPU, else hf"""
    engine_memory: float = 0.5
    """share of a GPU's memory for vLLM, next to a copy of the model"""
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
    """instead of an evaluation: the folders of two, or their result.json, before and after"""

    @property
    def decisive(self) -> Row:
        """Those that can change the answer to a question."""
        others = {"benchmarks", "limit", "engine_memory", "data_dir", "out", "compare"}
        return {name: value for name, value in asdict(self).items() if name not in others}


Job = tuple[Benchmark, range]  # questions of a benchmark, by their places


# ---------------------------------------------------------------- asking


def ask_questions(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    prompts: Sequence[list[int]],
    settings: EvaluationSettings,
) -> list[Row]:
    """The greedy and then the k sampled answers to each question, question by question: lines of BENCHMARK.jsonl.

    The seeds depend on the question alone, so that two evaluations differ by the model alone.
    """
    benchmark, which = job
    seeds = [request_seed(settings.seed, "evaluation", i) for i in which]
    answered: list[list[Row]] = [[] for _ in which]
    for greedy, n in ((True, int(settings.greedy)), (False, settings.k)):
        if n == 0:
            continue
        temperature = 0.0 if greedy else settings.temperature
        rollouts = sample(prompts, seeds, n=n, temperature=temperature, max_tokens=settings.max_response_tokens)
        responses = decode(rollouts, tokenizer)
        read = [read_answer(response.text, benchmark) for response in responses]
        pairs = [benchmark.pairs[i] for i in which for _ in range(n)]
        correct = are_equal([pair.gold for pair in pairs], read, benchmark.match)
        for j, (pair, (text, tokens, finished)) in enumerate(zip(pairs, responses, strict=True)):
            asked = {"id": pair.id, "question": pair.question, "gold": str(pair.gold), "greedy": greedy}
            said = {"answer": read[j], "correct": correct[j], "tokens": tokens, "truncated": not finished, "text": text}
            answered[j // n].append(asked | said)
    return [each for group in answered for each in group]


def read_answer(text: str, benchmark: Benchmark) -> str | None:
    """What the last box says. Whatever a model writes, a reader that stumbles over it ends no evaluation."""
    boxed = extract_boxed(text)
    try:
        return None if boxed is None else benchmark.read(boxed)
    except Exception:
        return boxed


# ---------------------------------------------------------------- numbers


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k answers, drawn without replacement from n of which `correct` are right, is
    right: the unbiased estimate of pass@k (arXiv 2107.03374)."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {correct} correct answers out of {n}: needs 1 <= k <= n and 0 <= correct <= n")
    return 1 - math.prod((n - correct - i) / (n - i) for i in range(k))


def question_values(answered: Sequence[Row], match: Match) -> dict[str, float]:
    """What the answers to one question add to each number."""
    values: dict[str, float] = {}
    greedy = [each for each in answered if each["greedy"]]
    sampled = [each for each in answered if not each["greedy"]]
    if greedy:
        values["greedy"] = float(greedy[0]["correct"])
    if k := len(sampled):
        correct = sum(each["correct"] for each in sampled)
        vote = majority_vote([each["answer"] for each in sampled], match).label
        values[f"avg@{k}"] = correct / k
        values |= {f"pass@{2**i}": pass_at_k(k, correct, 2**i) for i in range(1, k.bit_length())}
        values[f"maj@{k}"] = float(any(each["correct"] for each in sampled if each["answer"] == vote))
    for suffix, part in (("", sampled), (" (greedy)", greedy)):
        if part:
            values[f"unanswered{suffix}"] = fmean(each["answer"] is None for each in part)
            values[f"truncated{suffix}"] = fmean(each["truncated"] for each in part)
            values[f"tokens{suffix}"] = fmean(each["tokens"] for each in part)
    return values


def by_group(benchmark: Benchmark, values: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """The questions' values, {column: {group: values}}, for the columns of GROUPINGS that the benchmark has."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for pair, value in zip(benchmark.pairs, values, strict=True):
        for column in GROUPINGS:
            if column in pair.meta:
                groups[column][str(pair.meta[column])].append(value)
    return groups


def result_of(benchmark: Benchmark, answered: Sequence[Row]) -> dict[str, Any]:
    """Every number of a benchmark, as result.json keeps it: also by group, and its value for every question."""
    n = len(answered) // len(benchmark.pairs)
    each = [question_values(answered[i : i + n], benchmark.match) for i in range(0, len(answered), n)]
    values = {name: [of_one[name] for of_one in each] for name in each[0]}
    main = next((name for name in values if name.startswith("avg@")), "greedy")
    groups = by_group(benchmark, values[main])
    return {
        "questions": len(benchmark.pairs),
        "samples": len(answered),
        "numbers": {name: estimate(each) for name, each in values.items()},
        "groups of": main,
        "groups": {
            column: {group: estimate(each) for group, each in sorted(by.items())} for column, by in groups.items()
        },
        "fingerprint": fingerprint([(pair.question, pair.gold) for pair in benchmark.pairs]),
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
    answered = ask_questions(sample, tokenizer, (benchmark, range(len(prompts))), prompts, settings)
    values: dict[str, list[float]] = result_of(benchmark, answered)["values"]
    logged = {"eval_truncated": fmean(values["truncated"])}
    for name, each in {"eval_accuracy": values[f"avg@{settings.k}"], "eval_accuracy/greedy": values["greedy"]}.items():
        logged[name] = fmean(each)
        for column, groups in by_group(benchmark, each).items():
            logged |= {f"{name}/{column} {group}": fmean(part) for group, part in groups.items()}
    return logged


# ---------------------------------------------------------------- a whole evaluation


def evaluate_model(settings: EvaluationSettings) -> Path | None:
    """Ask, score, show; returns the path of result.json, or None where other processes are still making their parts.

    Raises:
        UserError: a benchmark, the model or the folder cannot be used.
    """
    process, folder = stand_alone(), Path(str(settings.out))
    where = settings.data_dir, settings.question_column, settings.answer_column
    benchmarks = [load_benchmark(name, *where) for name in settings.benchmarks]
    if len({each.name for each in benchmarks}) < len(benchmarks):
        raise UserError(f"--benchmarks {' '.join(settings.benchmarks)}: two would write to one file, rename one")
    claim(folder, settings.decisive, folder / "result.json")
    jobs: dict[str, dict[Part, Job]] = {}
    for each in benchmarks:  # more can be added to a folder; each keeps its questions
        parts, file = folder / f"{each.name}.parts", folder / f"{each.name}.jsonl"
        claim(parts, {"questions": fingerprint(each.pairs)}, file)
        asked = replace(each, pairs=each.pairs[: settings.limit])
        batches = split(parts, "", len(asked.pairs), settings.questions_per_batch, settings.k + settings.greedy)
        jobs[each.name] = {part: (asked, which) for part, which in batches.items()}
    answer_missing({part: job for of_one in jobs.values() for part, job in of_one.items()}, process, settings)
    results = {}
    for name, of_one in jobs.items():
        if (rows := read_whole(of_one)) is None:
            return None
        write_whole(folder / f"{name}.jsonl", to_lines(rows))
        results[name] = result_of(next(iter(of_one.values()))[0], rows)
    keep_results(folder / "result.json", settings.decisive, results)
    print(table(results))
    for what, count in algebra.counts().items():  # not in the file, as a killed run has forgotten its own
        if count:
            print(f"{what.replace('_', ' ')}: {count:,} comparisons of this run, taken as unequal")
    print(f"kept in {folder / 'result.json'}")
    return folder / "result.json"


def answer_missing(jobs: dict[Part, Job], process: tuple[int, int], settings: EvaluationSettings) -> None:
    """Ask for what no part holds yet; the model is loaded if there is anything."""
    opened = frozen_sampler(
        str(settings.model),
        settings.sampler,
        settings.chat_template,
        lambda *how: max(len(prompt) for job in jobs.values() for prompt in prompts_of(job, *how)),
        settings.max_response_tokens,
        rows=settings.questions_per_batch * max(settings.k, 1),
        engine_memory=settings.engine_memory,
    )

    def answer(job: Job, model: tuple[Sample, PreTrainedTokenizerBase, str | None]) -> list[Row]:
        sample, tokenizer, template = model
        return ask_questions(sample, tokenizer, job, prompts_of(job, tokenizer, template), settings)

    def tally(rows: Sequence[Row]) -> Counter[str]:
        return Counter({name: sum(row[name] for row in rows) for name in ("correct", "truncated")})

    make_parts("evaluating", jobs, process, answer, opened, tally)


def prompts_of(job: Job, tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[list[int]]:
    benchmark, which = job
    return [prompt_ids(tokenizer, benchmark.pairs[i].question, template) for i in which]


def checked_settings(settings: EvaluationSettings) -> EvaluationSettings:
    """Refuse what could only fail later; fill in the newest policy of a run, and the folder to write."""
    needed = {
        "--model is missing: a hub name or a local folder": settings.model,
        "--k 0 with --no-greedy asks for no answer": settings.k > 0 or settings.greedy,
        f"--k {settings.k} must not be negative": settings.k >= 0,
        f"--temperature {settings.temperature} must be over 0; the greedy answer is extra": settings.temperature > 0,
        f"--max-response-tokens {settings.max_response_tokens} must be at least 1": settings.max_response_tokens >= 1,
        f"--engine-memory {settings.engine_memory} is a share: between 0 and 1": 0 < settings.engine_memory < 1,
        f"--limit {settings.limit} must be at least 1": settings.limit is None or settings.limit >= 1,
        f"--questions-per-batch {settings.questions_per_batch} must be at least 1": settings.questions_per_batch >= 1,
    }
    for complaint, holds in needed.items():
        if not holds:
            raise UserError(complaint)
    model = newest_policy(str(settings.model))
    name = "-".join(part for part in Path(model).parts[-4:] if part not in ("/", ".", "..", "checkpoints"))
    return replace(settings, model=model, out=settings.out or str(Path("runs", "evaluations", name)))


def main() -> None:
    settings = tyro.cli(EvaluationSettings, description=__doc__)
    with told_in_a_sentence("stopped; the same command goes on from the answers kept so far"):
        if settings.compare:
            print(compare(*settings.compare))
        else:
            evaluate_model(checked_settings(settings))


if __name__ == "__main__":
    main()
