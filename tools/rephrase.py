"""Rephrasing: a model puts each question into other words; what it says is read, checked and, if bad, asked again.

    python -m tools.rephrase --data questions.jsonl --model Qwen3-32B --out pairs.jsonl
    torchrun --nproc-per-node 8 -m tools.rephrase ...  # shares the questions out, a model on each GPU

The rewriter is the paper's: Qwen3-32B, not thinking, temperature 0.7, top_p 0.8. A question that has a rephrasing keeps
it, so the same command fills the gaps of a set, or of its own output under another seed.

Every batch is appended to OUT.work/rows.jsonl (store/batches.py), so after a kill the same command goes on. Seeds
depend on questions and settings alone: the output is the same however often the work was stopped. Once OUT is there,
OUT.work may be deleted.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from config import exit_on_user_error, parse_flags
from lm import distributed, engine
from lm.decoding import Capacity, Sample, request_seed
from lm.model import newest_policy
from lm.prompts import chat_ids
from lm.record import Rollout
from rewards import read_answers
from sources import faults
from sources.pairs import Pair, Report, load_pairs
from store import batches, checkpoint, jsonl
from store.jsonl import Record

INSTRUCTION = """\
Reword the mathematics question at the end, so that at first sight nobody would take it for the same question.

- Choose other words and other sentences, and set it in another real-world situation where that comes naturally.
- Its mathematics must not change. Keep every number, condition and formula, and the form in which the answer is
  wanted: the final answer must stay exactly the same.
- The new question must be complete by itself. If a figure belongs to it, copy the code of the figure unchanged.
- Do not solve it. Give no hint, no step, no answer.

Reply with nothing but these lines, your text in place of the words in angle brackets:

### RESULT_START
ORIGINAL:
<question as given>
REWRITE:
<question reworded>
### RESULT_END

The question:

"""


@dataclass(frozen=True)
class RephrasingSettings:
    data: str  # questions: a file or folder, or a published set, as in train.py
    model: str  # the rewriter: hub name, local folder, or a run, which means its newest policy
    out: Path  # JSONL to write: id, question, rephrased (or null), answer, faults
    attempts: int = 3  # at a question; the first asks for one rewrite, each further one for twice as many
    temperature: float = 0.7
    top_p: float = 0.8
    # a longer reply is cut, and turned down; a question of more than half as many is not asked
    max_response_tokens: int = 2048
    batch_size: int = 64  # questions that are sampled together and saved together
    seed: int = 0  # of everything random
    # hf: transformers; auto: vLLM if it is installed and there is a GPU
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    chat_template: str | None = None  # Jinja file, for a tokenizer without a chat template
    question_column: str = "question"  # in a file of one's own
    answer_column: str = "answer"  # gold answers: only to notice a rewrite that gives them away


def instruction_ids(model: engine.InferenceModel, question: str) -> list[int]:
    # Templates that do not know enable_thinking pass over it.
    how: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}

    def render(question: str) -> str:
        messages = [{"role": "user", "content": INSTRUCTION + question}]
        return str(model.tokenizer.apply_chat_template(messages, chat_template=model.template, **how))

    return chat_ids(model.tokenizer, question, render)


def longest_prompt(settings: RephrasingSettings, model: engine.InferenceModel) -> int:
    """Return the longest prompt in tokens: the rewriter's reply must hold the question and its rewrite."""
    return len(instruction_ids(model, "")) + settings.max_response_tokens // 2


def read_reply(reply: Rollout) -> tuple[str, str | None]:
    """Read the rewrite in a reply, and what is wrong with its form; in a time linear in the reply's length."""
    said = reply.text.rpartition("</think>")[2]
    # A model that reasons first may name the markers there, or the label in the question: what counts comes last.
    blocks = re.split(r"RESULT[_ ]START", said, flags=re.IGNORECASE)[1:]
    labelled = [re.split(r"(?mi)^[^\w\n]*REWRITE[^\w\n]*?:", block) for block in blocks]
    rewrites = [parts[-1] for parts in labelled if len(parts) > 1]
    if not rewrites:
        return "", "no result"
    rewrite, *ending = re.split(r"(?mi)RESULT[_ ]END|^[^\w\n]*ORIGINAL[^\w\n]*?:", rewrites[-1])
    if not ending and not reply.finished:
        return "", "cut off"
    rewrite = rewrite.rstrip("#*` \t\n") if ending else rewrite.rstrip().removesuffix("```").rstrip()
    rewrite = re.sub(r"\A(?:\*\*)?\s*(?:```\w*\n)?", "", rewrite)
    for opening, closing in ('""', "“”", "<>"):
        quoted = rewrite.startswith(opening) and rewrite.endswith(closing)
        if quoted and not faults.TEMPLATE_ECHO.fullmatch(rewrite):
            rewrite = rewrite[1:-1].strip()
    return rewrite, None if rewrite else "no result"


def as_row(pair: Pair) -> Record:
    own: Record = {"id": pair.id, "question": pair.question, "rephrased": pair.rephrased, "answer": pair.gold}
    own["faults"] = Counter()  # what was turned down, also where no rewrite was good enough
    return own | {name: value for name, value in pair.meta.items() if name not in own}


def rewrite_batch(
    settings: RephrasingSettings, pairs: Sequence[Pair], model: engine.InferenceModel, sample: Sample
) -> list[Record]:
    """Return a row for each pair, with a rephrasing where there is one by now."""
    rows = {pair.id: as_row(pair) for pair in pairs}
    longest = longest_prompt(settings, model)
    prompts = {pair.id: instruction_ids(model, pair.question) for pair in pairs if not pair.rephrased}
    for name in [name for name, prompt in prompts.items() if len(prompt) > longest]:
        rows[name]["faults"]["question too long"] = 1
        del prompts[name]
    how = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_response_tokens}
    for attempt in range(settings.attempts):
        missing = list(prompts)
        n = 2**attempt
        seeds = [request_seed(settings.seed, "rewrite", name, attempt) for name in missing]
        said = sample(prompts=list(prompts.values()), seeds=seeds, n=n, **how) if missing else []
        read_answers(said, model.tokenizer)
        for i, name in enumerate(missing):
            rows[name]["rephrased"] = first_good(rows[name], said[i * n : (i + 1) * n])
            if rows[name]["rephrased"]:
                del prompts[name]
    return [row | {"faults": dict(sorted(row["faults"].items()))} for row in rows.values()]


def first_good(row: Record, candidates: Sequence[Rollout]) -> str | None:
    """Return the first rewrite without a fault; count the faults of those before it."""
    for candidate in candidates:
        rewrite, fault = read_reply(candidate)
        fault = fault or faults.strict_fault(row["question"], rewrite, row["answer"])
        if fault is None:
            return rewrite
        row["faults"][fault] += 1
    return None


def rephrase(settings: RephrasingSettings) -> None:
    distributed.start()
    settings = replace(settings, model=distributed.run_on_rank0(lambda: newest_policy(settings.model)))
    report = Report()
    pairs = load_pairs(settings.data, question=settings.question_column, answer=settings.answer_column, report=report)
    made_with = asdict(settings) | {"out": None, "questions": jsonl.fingerprint(pairs)}
    made_with["weights"] = distributed.run_on_rank0(lambda: checkpoint.weights_fingerprint(Path(settings.model)))
    folder = Path(f"{settings.out}.work")
    with batches.claim_folder(folder, made_with, settings.out):
        if not distributed.run_on_rank0(settings.out.exists):
            rows = rewrite_all(settings, pairs, folder / "rows.jsonl")
            distributed.run_on_rank0(lambda: jsonl.write_atomic(settings.out, jsonl.to_lines(rows)))
    print(report, summary(settings.out), sep="\n")


def rewrite_all(settings: RephrasingSettings, pairs: Sequence[Pair], file: Path) -> list[Record]:
    model = engine.load_inference_model(settings.model, settings.sampler, settings.chat_template)
    tokens = longest_prompt(settings, model) + settings.max_response_tokens
    with engine.sampling_from(model, Capacity(tokens, settings.batch_size)) as sample:

        def rewrite(batch: Sequence[Pair]) -> list[Record]:
            return rewrite_batch(settings, batch, model, distributed.shard_prompts(sample))

        size = settings.batch_size * distributed.world_size()
        return batches.work_through(file, pairs, size, rewrite, shown="rephrased")


def summary(out: Path) -> str:
    rows = jsonl.read_rows(out)
    faults_of_all = sum((Counter(row["faults"]) for row in rows), Counter[str]())
    good = sum(bool(row["rephrased"]) for row in rows)
    lines = [f"{out}: {good:,} of {len(rows):,} questions have a rephrasing; turned down:"]
    return "\n".join(lines + [f"{number:>8,}  {reason}" for reason, number in faults_of_all.most_common()])


def main() -> None:
    settings = parse_flags(RephrasingSettings, description=__doc__, prog="python -m tools.rephrase")
    with exit_on_user_error(f"stopped; the same command goes on from {settings.out}.work"):
        rephrase(settings)
    distributed.stop()


if __name__ == "__main__":
    main()
