"""Rephrasing: a model puts each question into other words; what it says is parsed, checked and, if bad, asked again.

    python data.py rephrase --data questions.jsonl --model Qwen3-32B --out pairs.jsonl
    python data.py rephrase ... --verify Qwen3-8B     # keep only pairs whose two wordings this model answers alike
    torchrun --nproc-per-node 8 data.py rephrase ...  # shares the questions out, a model on each GPU

The rewriter is the paper's: Qwen3-32B, not thinking, temperature 0.7, top_p 0.8. A question that has a rephrasing keeps
it, so the same command fills the gaps of a set, or of its own output under another seed.

Every batch of questions becomes a file in OUT.parts (see parts.py), so after a kill the same command goes on. Batches
and seeds depend on nothing but questions and settings: the output is the same however often the work was stopped and
whatever the number of processes. When OUT has been put together, OUT.parts may be deleted.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tyro.conf import OmitArgPrefixes

from answers.equivalence import extract_boxed
from config import UserError
from data import Pair, Report, load_pairs, prompt_ids, read_chat_template
from rewards import are_equal, majority_vote
from sources.faults import TEMPLATE_ECHO, strict_fault
from store.parts import Row, claim, make_parts, read_part, stand_alone, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout import Sample

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
class Settings:
    data: str
    """questions: a file or folder, or a published set, as in train.py"""
    model: str
    """the rewriter: hub name, or local folder"""
    out: Path
    """JSONL to write: id, question, rephrased (or null), answer, faults"""
    verify: str | None = None
    """keep only pairs on which the majority answers of this model agree"""
    verify_samples: int = 8
    """answers to each wording that vote"""
    verify_tokens: int = 3072
    """longer answers are cut"""
    attempts: int = 3
    """at a question; the first asks for one rewrite, each further one for twice as many"""
    temperature: float = 0.7
    """of the rewriter; answers to verify are sampled as in training, at 1"""
    top_p: float = 0.8
    """of the rewriter"""
    max_tokens: int = 2048
    """a longer reply is cut, and turned down; a question of more than half as many is not asked"""
    batch_size: int = 64
    """questions that are sampled together and saved together"""
    seed: int = 0
    """of everything random"""
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """hf: transformers' generate; auto: vLLM if it is installed and there is a GPU"""
    chat_template: str | None = None
    """Jinja file, for a tokenizer without a chat template"""
    question_column: str = "question"
    """in a file of one's own"""
    rephrased_column: str = "rephrased"
    """rephrasings that are there already"""
    answer_column: str = "answer"
    """gold answers: only to notice a rewrite that gives them away"""


# ---------------------------------------------------------------- a model that replies


class Reply(NamedTuple):
    text: str
    finished: bool  # not cut at the limit


@dataclass(frozen=True)
class ChatModel:
    """A model and all that its replies depend on."""

    tokenizer: PreTrainedTokenizerBase
    sample: Sample
    longest_prompt: int  # in tokens
    chat_template: str | None

    def replies(self, prompts: Sequence[list[int]], keys: Sequence[tuple[str | int, ...]], **how: Any) -> list[Reply]:
        """n replies a prompt, contiguous; `keys` are what their seeds are derived from, `how` goes to the sampler."""
        from rollout import request_seed

        rollouts = self.sample(prompts, [request_seed(*key) for key in keys], **how)
        ids = [rollout.response_ids for rollout in rollouts]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Reply(text, rollout.finished) for text, rollout in zip(texts, rollouts, strict=True)]


def instruction_ids(tokenizer: PreTrainedTokenizerBase, question: str, chat_template: str | None) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": INSTRUCTION + question}],
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,  # templates that do not know it pass over it
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def chat_model(name: str, reply_tokens: int, batch: int, settings: Settings) -> Iterator[ChatModel]:
    """A model, loaded when the context is entered, for replies of so many tokens, `batch` at a time."""
    import torch

    from lm.model import load_pretrained, stop_token_ids
    from lm.vllm_engine import build_sampler, choose_sampler

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    try:
        chosen = choose_sampler(settings.sampler)
        lm, tokenizer = load_pretrained(name, dtype)
        lm.to("cuda" if on_gpu else "cpu")  # type: ignore[arg-type]
        template = read_chat_template(settings.chat_template) if settings.chat_template else None
        prompt_ids(tokenizer, "1+1?", template)  # a template that cannot be used fails here, with the cure
        # The rewriter's reply holds the question and its rewrite.
        longest_prompt = len(instruction_ids(tokenizer, "", template)) + settings.max_tokens // 2
        sampler = build_sampler(
            chosen,
            lm,
            stop_token_ids(lm, tokenizer),
            dtype,
            max_sequence_tokens=longest_prompt + reply_tokens,
            rows=batch,
        )
        with sampler.holding(lm) as sample:
            yield ChatModel(tokenizer, sample, longest_prompt, template)
    except UserError as problem:
        raise UserError(str(problem)) from problem


# ---------------------------------------------------------------- questions -> rewrites


def parse(reply: Reply) -> tuple[str, str | None]:
    """The rewrite in a reply, and what is wrong with its form."""
    said = reply.text.rpartition("</think>")[2]
    # A model that reasons first may name the markers there, or the label in the question: what counts comes last.
    blocks = re.split(r"RESULT[_ ]START", said, flags=re.IGNORECASE)[1:]
    labelled = [re.split(r"(?mi)^\W*REWRITE\W*?:", block) for block in blocks]
    rewrites = [parts[-1] for parts in labelled if len(parts) > 1]
    if not rewrites:
        return "", "no result"
    rewrite, *ending = re.split(r"(?i)[\s#*`]*RESULT[_ ]END|^\W*ORIGINAL\W*?:", rewrites[-1], flags=re.MULTILINE)
    if not ending and not reply.finished:
        return "", "cut off"
    rewrite = re.sub(r"^(?:\*\*)?\s*(?:```\w*\n)?|\s*(?:```\s*)?$", "", rewrite)
    for opening, closing in ('""', "“”", "<>"):
        quoted = rewrite.startswith(opening) and rewrite.endswith(closing) and not TEMPLATE_ECHO.fullmatch(rewrite)
        rewrite = rewrite[1:-1].strip() if quoted else rewrite
    return (rewrite, None) if rewrite else ("", "no result")


def as_row(pair: Pair) -> Row:
    own: Row = {
        "id": pair.id,
        "question": pair.question,
        "rephrased": pair.rephrased,
        "answer": pair.gold,
        "faults": {},
    }
    return own | {name: value for name, value in pair.meta.items() if name not in own}


def rewrite_batch(pairs: Sequence[Pair], model: ChatModel, settings: Settings) -> list[Row]:
    """A row for each pair; `faults` counts what was turned down, also where no rewrite was good enough."""
    rows = [as_row(pair) for pair in pairs]
    faults: list[Counter[str]] = [Counter() for _ in pairs]
    prompts = [instruction_ids(model.tokenizer, pair.question, model.chat_template) for pair in pairs]
    missing = [i for i, row in enumerate(rows) if not row["rephrased"]]
    for i in missing:
        if len(prompts[i]) > model.longest_prompt:
            faults[i]["question too long"] = 1
    missing = [i for i in missing if not faults[i]]
    for attempt in range(settings.attempts):
        if not missing:
            break
        n = 2**attempt
        replies = model.replies(
            [prompts[i] for i in missing],
            [(settings.seed, "rewrite", pairs[i].id, attempt) for i in missing],
            n=n,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
        )
        for place, i in enumerate(missing):
            rows[i]["rephrased"] = first_good(pairs[i], replies[place * n : (place + 1) * n], faults[i])
        missing = [i for i in missing if not rows[i]["rephrased"]]
    return [row | {"faults": dict(sorted(counted.items()))} for row, counted in zip(rows, faults, strict=True)]


def first_good(pair: Pair, candidates: Sequence[Reply], faults: Counter[str]) -> str | None:
    """The first rewrite without a fault; the faults of those before it are counted."""
    for candidate in candidates:
        rewrite, fault = parse(candidate)
        fault = fault or strict_fault(pair.question, rewrite, pair.gold)
        if fault is None:
            return rewrite
        faults[fault] += 1
    return None


# ---------------------------------------------------------------- verification


def verify_batch(rows: Sequence[Row], model: ChatModel, settings: Settings) -> list[Row]:
    """The rows, without the rephrasings to which the model's majority gives another answer, or none."""
    prompts = {
        row["id"]: [
            prompt_ids(model.tokenizer, row[wording], model.chat_template) for wording in ("question", "rephrased")
        ]
        for row in rows
        if row["rephrased"]
    }
    asked = [name for name, both in prompts.items() if max(map(len, both)) <= model.longest_prompt]
    faults = dict.fromkeys(prompts.keys() - set(asked), "too long to verify")
    votes = majority_answers(
        [prompt for name in asked for prompt in prompts[name]],
        [(settings.seed, "verify", name, view) for name in asked for view in ("x", "x'")],
        model,
        settings,
    )
    x, rephrased = votes[::2], votes[1::2]
    for name, *labels, same in zip(asked, x, rephrased, are_equal(x, rephrased), strict=True):
        if not same:
            faults[name] = "not answered" if None in labels else "other answer"
    return [
        row | {"rephrased": None, "faults": row["faults"] | {faults[row["id"]]: 1}} if row["id"] in faults else row
        for row in rows
    ]


def majority_answers(
    prompts: Sequence[list[int]], keys: Sequence[tuple[str | int, ...]], model: ChatModel, settings: Settings
) -> list[str | None]:
    k = settings.verify_samples
    if not prompts:
        return []
    replies = model.replies(prompts, keys, n=k, temperature=1.0, max_tokens=settings.verify_tokens)
    boxed = [extract_boxed(reply.text) for reply in replies]
    return [majority_vote(boxed[start : start + k], "math").label for start in range(0, len(boxed), k)]


# ---------------------------------------------------------------- the command


def rephrase(settings: OmitArgPrefixes[Settings]) -> None:
    """Give each question a second wording, by a model, checked; resumable, also by torchrun."""
    report = Report()
    pairs = load_pairs(
        settings.data,
        question=settings.question_column,
        rephrased=settings.rephrased_column,
        answer=settings.answer_column,
        report=report,
    )
    decisive = {name: str(value) for name, value in asdict(settings).items() if name != "out"}
    decisive["questions"] = blake2b(repr(pairs).encode(), digest_size=8).hexdigest()
    folder, (rank, processes) = claim(settings.out, decisive), stand_alone()
    batches = [pairs[start : start + settings.batch_size] for start in range(0, len(pairs), settings.batch_size)]
    share = range(rank, len(batches), processes)
    parts = rewritten = [folder / f"rewritten-{i:06d}.jsonl" for i in range(len(batches))]
    try:
        make_parts(
            "rephrasing",
            rewritten,
            share,
            lambda i, model: rewrite_batch(batches[i], model, settings),
            chat_model(settings.model, settings.max_tokens, settings.batch_size, settings),
            count,
        )
        if settings.verify:
            parts = [folder / f"verified-{i:06d}.jsonl" for i in range(len(batches))]
            votes = settings.batch_size * 2 * settings.verify_samples
            make_parts(
                "verifying",
                parts,
                share,
                lambda i, model: verify_batch(read_part(rewritten[i]), model, settings),
                chat_model(settings.verify, settings.verify_tokens, votes, settings),
                count,
            )
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {folder}", file=sys.stderr)
        raise SystemExit(130) from None
    if all(part.exists() for part in parts):  # the process that finds nothing missing is the last
        rows = [row for part in parts for row in read_part(part)]
        write_whole(settings.out, "".join(part.read_text(encoding="utf-8") for part in parts))
        print(report, summary(settings.out, rows), sep="\n")


def summary(out: Path, rows: Sequence[Row]) -> str:
    tally = count(rows)
    lines = [f"{out}: {tally.pop('good', 0):,} of {len(rows):,} questions have a rephrasing; turned down:"]
    return "\n".join(lines + [f"{number:>8,}  {reason}" for reason, number in tally.most_common()])


def count(rows: Sequence[Row]) -> Counter[str]:
    """Questions with a rephrasing, and rewrites turned down by reason."""
    return sum((Counter(row["faults"]) for row in rows), Counter(good=sum(bool(row["rephrased"]) for row in rows)))
