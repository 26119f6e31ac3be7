r"""Did it work? Accuracy on benchmarks, greedy and sampled, each number with its standard error.

    python evaluate.py --model runs/x --benchmarks math500 gsm8k amc             # the newest policy of a run
    python evaluate.py --model Qwen3-8B-Base --benchmarks mine.jsonl --k 0       # own questions, one greedy answer each
    python evaluate.py --compare runs/before runs/after                          # question by question
    python evaluate.py --seeds runs/evaluations/*                                # a line a setting, over its seeds
    torchrun --nproc-per-node 8 evaluate.py ...                                  # shared out, a model on each GPU

Questions are asked as in training: its system message, its chat template, and the answer is what the last \boxed{}
holds. With the temperature of 0.8 that is the protocol of the paper (arXiv 2508.00410), whose tables show pass@1, and
for AMC avg@8. Names of benchmarks are those in sources/pairs.py.

Of n = k sampled answers to a question, c of them correct:

    avg@k     c / n, which is also the sampled pass@1
    pass@j    1 - C(n - c, j) / C(n, j): at least one of j answers is correct, without bias (arXiv 2107.03374)
    maj@k     the most frequent answer is correct; equal mathematics is one answer, ties go to the first
    lenient   of an answer without a box the last number counts, as in lm-evaluation-harness's flexible extraction

A number is the mean over questions, its standard error std / sqrt(questions): how much it would move with other
questions of the same kind. The answers to each batch of questions are appended to BENCHMARK.jsonl (store/batches.py): a
killed evaluation goes on behind them, and ends with the same BENCHMARK.jsonl and result.json.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from config import EMBEDDED_MODELS, UserError, check_ranges, exit_on_user_error, parse_flags, parse_template_options
from sources.pairs import Benchmark, Pair, check_sources, load_benchmark
from store.results import compare, estimate, read_result, seeds, table, versions


@dataclass(frozen=True)
class EvaluationSettings:
    model: str | None = None  # hub name, local folder, or a run such as runs/x, which means its newest policy
    benchmarks: tuple[str, ...] = ("math500", "gsm8k", "amc")  # names, or files of one's own
    k: int = 8  # sampled answers a question, besides the greedy one; 0: that one alone
    temperature: float = 0.8  # of the sampled answers
    max_response_tokens: int = 3072  # longer answers are cut
    seed: int = 0  # of the sampled answers
    # hf: transformers; auto: vllm if it is installed and there is a GPU, else hf
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    engine_cache_gb: float | None = None  # fixed size of vLLM's key-value cache, where several share a GPU
    chat_template: str | None = None  # Jinja file, for a tokenizer without a chat template
    template_options: str = "{}"  # JSON that the chat template gets, as in training
    questions_per_batch: int = 64  # answered together, and lost together if the evaluation is killed
    limit: int | None = None  # only the first so many questions of each benchmark
    question_column: str = "question"  # in a file of one's own
    answer_column: str = "answer"  # likewise
    out: str | None = None  # folder to write (None: one under runs/evaluations, named after the model)
    # instead of an evaluation: the folders of two, or their result.json, before and after
    compare: tuple[str, str] | None = None
    seeds: tuple[str, ...] = ()  # instead of an evaluation: results of runs, of which those of a setting make one line


def parse_settings() -> EvaluationSettings:
    """Read the settings from the command line and check them; exit where --compare or --seeds has been answered."""
    settings: EvaluationSettings = parse_flags(EvaluationSettings, description=__doc__)
    if settings.compare or settings.seeds:
        print(compare(*settings.compare) if settings.compare else seeds(settings.seeds))
        raise SystemExit
    if settings.model in EMBEDDED_MODELS:  # a toy: of its own task, unless something else is asked for
        usual = vars(EvaluationSettings())
        toy: dict[str, Any] = {"benchmarks": ("embedded:held-out",), "max_response_tokens": 32}
        settings = replace(settings, **{name: toy[name] for name in toy if getattr(settings, name) == usual[name]})
    return check_settings(settings)


def check_settings(settings: EvaluationSettings) -> EvaluationSettings:
    """Refuse what could only fail later.

    Raises:
        UserError: one of the settings is impossible.
    """
    if not settings.model:
        raise UserError("--model is missing: a hub name or a local folder")
    check_ranges(vars(settings))
    parse_template_options(settings.template_options)
    check_sources(*settings.benchmarks)
    return settings


STOPPED = "stopped; the same command goes on from the answers kept so far"

if __name__ == "__main__":
    with exit_on_user_error(STOPPED):  # before the imports that take seconds
        given = parse_settings()

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from answers.equivalence import extract_lenient
from lm import distributed, engine
from lm.decoding import Capacity, Sample, request_seed
from lm.model import newest_policy
from lm.prompts import prompt_encoder
from rewards import majority_vote, matches, read_answers
from store import batches, checkpoint
from store.jsonl import Record, fingerprint, write_atomic

GROUPINGS = ("level", "subject", "type", "subfield", "Type", "wording")  # columns to break numbers down by


class Asked(NamedTuple):
    id: str
    place: int  # in the benchmark
    pair: Pair
    prompt: list[int]


def ask_questions(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], settings: EvaluationSettings
) -> list[Record]:
    """Sample a greedy and k further answers to each question, question by question: lines of BENCHMARK.jsonl.

    The seeds depend on the question alone, so that two evaluations differ by the model alone.
    """
    prompts = [question.prompt for question in asked]
    seeds = [request_seed(settings.seed, "evaluation", question.place) for question in asked]
    answered: list[list[Record]] = [[] for _ in asked]
    for n, temperature in ((1, 0.0), (settings.k, settings.temperature)):
        if n == 0:
            continue
        rollouts = sample(
            prompts=prompts, seeds=seeds, n=n, temperature=temperature, max_tokens=settings.max_response_tokens
        )
        read_answers(rollouts, tokenizer)
        pairs = list(chain.from_iterable(repeat(question.pair, n) for question in asked))
        golds = [pair.gold for pair in pairs]
        correct = matches(golds, [rollout.answer for rollout in rollouts], "math")
        lenient = matches(golds, [extract_lenient(rollout.text) for rollout in rollouts], "math")
        for j, (pair, rollout) in enumerate(zip(pairs, rollouts, strict=True)):
            row = {"id": pair.id, "question": pair.question, "gold": str(pair.gold), "greedy": temperature == 0}
            row |= {"answer": rollout.answer, "correct": correct[j], "lenient": lenient[j]}
            row |= {"tokens": len(rollout.response_ids), "truncated": not rollout.finished, "text": rollout.text}
            answered[j // n].append(row)
    return list(chain.from_iterable(answered))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate pass@k without bias (arXiv 2107.03374): the chance that one of k answers, drawn from n, is right."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {correct} correct answers out of {n}: needs 1 <= k <= n and 0 <= correct <= n")
    return 1 - math.prod((n - correct - i) / (n - i) for i in range(k))


def question_values(answered: Sequence[Record]) -> dict[str, float]:
    """Compute what the answers to one question, the greedy one first, add to each number."""
    greedy, *sampled = answered
    values = {"greedy": float(greedy["correct"]), "greedy, lenient": float(greedy["lenient"])}
    if k := len(sampled):
        correct = sum(each["correct"] for each in sampled)
        vote = majority_vote([each["answer"] for each in sampled], "math").label
        values[f"avg@{k}"] = correct / k
        values[f"avg@{k}, lenient"] = fmean(each["lenient"] for each in sampled)
        values |= {f"pass@{2**i}": pass_at_k(k, correct, 2**i) for i in range(1, k.bit_length())}
        values[f"maj@{k}"] = float(any(each["correct"] for each in sampled if each["answer"] == vote))
    seen = sampled or answered
    values["unanswered"] = fmean(each["answer"] is None for each in seen)
    values["truncated"] = fmean(each["truncated"] for each in seen)
    values["tokens"] = fmean(each["tokens"] for each in seen)
    return values


def by_group(benchmark: Benchmark, values: Sequence[float]) -> dict[str, list[float]]:
    """Group the questions' values by each of GROUPINGS that the benchmark has: "level 3" and the like."""
    groups = defaultdict(list)
    for pair, value in zip(benchmark.pairs, values, strict=True):
        for column in GROUPINGS:
            if column in pair.meta:
                groups[f"{column} {pair.meta[column]}"].append(value)
    return dict(sorted(groups.items()))


def result_of(benchmark: Benchmark, answered: Sequence[Record]) -> dict[str, Any]:
    """Compute every number of a benchmark for result.json: also by group, and its value for every question."""
    n = len(answered) // len(benchmark.pairs)
    by_question = [question_values(answered[i : i + n]) for i in range(0, len(answered), n)]
    values = {name: [of_one[name] for of_one in by_question] for name in by_question[0]}
    main = next((name for name in values if name.startswith("avg@")), "greedy")
    return {
        "questions": len(benchmark.pairs),
        "numbers": {name: estimate(each) for name, each in values.items()},
        "groups of": main,
        "groups": {group: estimate(each) for group, each in by_group(benchmark, values[main]).items()},
        "fingerprint": fingerprint([(pair.question, pair.gold) for pair in benchmark.pairs]),
        "values": values,
    }


def evaluate_model(settings: EvaluationSettings) -> Path:
    """Ask, score, show; return the path of result.json.

    Raises:
        UserError: a benchmark, the model or the folder cannot be used.
    """
    distributed.start()
    model = distributed.run_on_rank0(lambda: newest_policy(str(settings.model)))
    name = "-".join(part for part in Path(model).parts[-4:] if part not in ("/", ".", "..", "checkpoints"))
    settings = replace(settings, model=model, out=settings.out or str(Path("runs", "evaluations", name)))
    folder = Path(str(settings.out))
    columns = {"question_column": settings.question_column, "answer_column": settings.answer_column}
    loaded = [load_benchmark(name, **columns) for name in settings.benchmarks]
    benchmarks = [replace(each, pairs=each.pairs[: settings.limit]) for each in loaded]
    if len({each.name for each in benchmarks}) < len(benchmarks):
        raise UserError(f"--benchmarks {' '.join(settings.benchmarks)}: two would write to one file, rename one")
    made_with = asdict(settings) | {
        "out": None,
        "engine_cache_gb": None,
        "questions": fingerprint([each.pairs for each in benchmarks]),
    }
    made_with["weights"] = distributed.run_on_rank0(lambda: checkpoint.weights_fingerprint(Path(model)))
    file = folder / "result.json"
    with batches.claim_folder(folder, made_with, file):
        if not distributed.run_on_rank0(file.exists):
            result = {
                "settings": made_with,
                "versions": versions(),
                "benchmarks": ask_all(benchmarks, settings, folder),
            }
            distributed.run_on_rank0(lambda: write_atomic(file, json.dumps(result, indent=2) + "\n"))
    print(table(read_result(str(file))["benchmarks"]), f"kept in {file}", sep="\n")
    return file


def ask_all(benchmarks: Sequence[Benchmark], settings: EvaluationSettings, folder: Path) -> dict[str, Any]:
    model = engine.load_inference_model(str(settings.model), settings.sampler, settings.chat_template)
    encode = prompt_encoder(model.tokenizer, model.template, settings.template_options)
    asked: dict[str, list[Asked]] = {}
    for benchmark in benchmarks:
        pairs = enumerate(benchmark.pairs)
        asked[benchmark.name] = [Asked(pair.id, i, pair, encode(pair.question)) for i, pair in pairs]
    longest = max(len(question.prompt) for question in chain.from_iterable(asked.values()))
    size = settings.questions_per_batch * distributed.world_size()
    sequences = settings.questions_per_batch * max(settings.k, 1)
    capacity = Capacity(longest + settings.max_response_tokens, sequences, engine_cache_gb=settings.engine_cache_gb)
    results = {}
    with engine.sampling_from(model, capacity) as sample:

        def ask(batch: Sequence[Asked]) -> list[Record]:
            return ask_questions(distributed.shard_prompts(sample), model.tokenizer, batch, settings)

        for each in benchmarks:
            rows = batches.work_through(
                folder / f"{each.name}.jsonl", asked[each.name], size, ask, "correct", settings.k + 1
            )
            results[each.name] = result_of(each, rows)
    return results


def main(settings: EvaluationSettings | None = None) -> None:
    with exit_on_user_error(STOPPED):
        evaluate_model(settings or parse_settings())
    distributed.stop()


if __name__ == "__main__":
    main(given)
