"""Rephrasing: a model puts each question into other words; what it says is read, checked and, if bad, asked again.

    python -m tools.rephrase --data questions.jsonl --model Qwen3-32B --out pairs.jsonl
    python -m tools.rephrase ... --verify Qwen3-8B     # keep only pairs whose two wordings this model answers alike
    torchrun --nproc-per-node 8 -m tools.rephrase ...  # shares the questions out, a model on each GPU

The rewriter is the paper's: Qwen3-32B, not thinking, temperature 0.7, top_p 0.8. A question that has a rephrasing keeps
it, so the same command fills the gaps of a set, or of its own output under another seed.

Every batch of questions becomes a file in OUT.parts (see store/parts.py), so after a kill the same command goes on.
Batches and seeds depend on nothing but questions and settings: the output is the same however often the work was
stopped and whatever the number of processes. When OUT has been put together, OUT.parts may be deleted.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from transformers import PreTrainedTokenizerBase

from config import told_in_a_sentence
from data import Pair, Report, load_pairs
from lm.decoding import Sample
from lm.model import newest_policy
from lm.prompts import chat_ids, prompt_ids
from rewards import Response, are_equal, read_groups
from rollout import decode, frozen_sampler, request_seed
from sources.faults import TEMPLATE_ECHO, strict_fault
from store.files import Row, fingerprint, to_lines, write_whole
from store.parts import Part, claim, make_parts, read_part, read_whole, split, stand_alone

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
    data: str
    """questions: a file or folder, or a published set, as in train.py"""
    model: str
    """the rewriter: hub name, local folder, or a run, which means its newest policy"""
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
    max_response_tokens: int = 2048
    """a longer reply is cut, and turned down; a question of more than half as many is not asked"""
    batch_size: int = 64
    """questions that are sampled together and saved together"""
    seed: int = 0
    """of everything random"""
    sampler: Literal["auto", "vllm", "hf"] = "auto"
    """hf: transformers; auto: vLLM if it is installed and there is a GPU"""
    chat_template: str | None = None
    """Jinja file, for a tokenizer without a chat template"""
    question_column: str = "question"
    """in a file of one's own"""
    rephrased_column: str = "rephrased"
    """rephrasings that are there already"""
    answer_column: str = "answer"
    """gold answers: only to notice a rewrite that gives them away"""


# ---------------------------------------------------------------- a model that replies


@dataclass(frozen=True)
class ChatModel:
    """A model and all that its replies depend on."""

    tokenizer: PreTrainedTokenizerBase
    sample: Sample
    longest_prompt: int  # in tokens
    chat_template: str | None

    def replies(
        self, prompts: Sequence[list[int]], keys: Sequence[tuple[str | int, ...]], **how: Any
    ) -> list[Response]:
        """n replies a prompt, contiguous; `keys` are what their seeds are derived from, `how` goes to the sampler."""
        if not prompts:
            return []
        return decode(self.sample(prompts, [request_seed(*key) for key in keys], **how), self.tokenizer)


def instruction_ids(tokenizer: PreTrainedTokenizerBase, question: str, chat_template: str | None) -> list[int]:
    def render(question: str) -> str:
        messages = [{"role": "user", "content": INSTRUCTION + question}]
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,  # templates that do not know it pass over it
        )
        return str(text)

    return chat_ids(tokenizer, question, render)


@contextmanager
def chat_model(name: str, reply_tokens: int, batch: int, settings: RephrasingSettings) -> Iterator[ChatModel]:
    """A model, loaded when the context is entered, for replies of so many tokens, `batch` at a time."""

    def longest_prompt(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int:
        # The rewriter's reply holds the question and its rewrite.
        return len(instruction_ids(tokenizer, "", template)) + settings.max_response_tokens // 2

    opened = frozen_sampler(name, settings.sampler, settings.chat_template, longest_prompt, reply_tokens, batch)
    with opened as (sample, tokenizer, template):
        yield ChatModel(tokenizer, sample, longest_prompt(tokenizer, template), template)


# ---------------------------------------------------------------- questions -> rewrites


def read_reply(reply: Response) -> tuple[str, str | None]:
    """The rewrite in a reply, and what is wrong with its form; in a time linear in the reply's length."""
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


def rewrite_batch(settings: RephrasingSettings, pairs: Sequence[Pair], model: ChatModel) -> list[Row]:
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
            max_tokens=settings.max_response_tokens,
        )
        for place, i in enumerate(missing):
            rows[i]["rephrased"] = first_good(pairs[i], replies[place * n : (place + 1) * n], faults[i])
        missing = [i for i in missing if not rows[i]["rephrased"]]
    return [row | {"faults": dict(sorted(counted.items()))} for row, counted in zip(rows, faults, strict=True)]


def first_good(pair: Pair, candidates: Sequence[Response], faults: Counter[str]) -> str | None:
    """The first rewrite without a fault; the faults of those before it are counted."""
    for candidate in candidates:
        rewrite, fault = read_reply(candidate)
        fault = fault or strict_fault(pair.question, rewrite, pair.gold)
        if fault is None:
            return rewrite
        faults[fault] += 1
    return None


# ---------------------------------------------------------------- verification


def verify_part(settings: RephrasingSettings, rewritten: Part, model: ChatModel) -> list[Row]:
    """Its rows, without the rephrasings to which the model's majority gives another answer, or none."""
    rows, k = read_part(rewritten), settings.verify_samples
    to_ids = partial(prompt_ids, model.tokenizer, chat_template=model.chat_template)
    prompts = {row["id"]: [to_ids(row["question"]), to_ids(row["rephrased"])] for row in rows if row["rephrased"]}
    asked = [name for name, both in prompts.items() if max(map(len, both)) <= model.longest_prompt]
    faults = dict.fromkeys(prompts.keys() - set(asked), "too long to verify")
    replies = model.replies(
        [prompt for name in asked for prompt in prompts[name]],
        [(settings.seed, "verify", name, view) for name in asked for view in ("x", "x'")],
        n=k,
        temperature=1.0,
        max_tokens=settings.verify_tokens,
    )
    votes = [group.vote.label for group in read_groups(replies, k, "math")]
    for name, *labels, same in zip(asked, votes[::2], votes[1::2], are_equal(votes[::2], votes[1::2]), strict=True):
        if not same:
            faults[name] = "not answered" if None in labels else "other answer"
    return [
        row | {"rephrased": None, "faults": row["faults"] | {faults[row["id"]]: 1}} if row["id"] in faults else row
        for row in rows
    ]


# ---------------------------------------------------------------- the command


def rephrase(settings: RephrasingSettings) -> bool:
    """Give each question a second wording, by a model, checked. Returns False where that is done here and the verifying
    model is still to come, in a process of its own: one engine that can sleep is all that vLLM allows in each."""
    verifier = settings.verify and newest_policy(settings.verify)
    settings, report = replace(settings, model=newest_policy(settings.model), verify=verifier), Report()
    pairs = load_pairs(
        settings.data,
        question=settings.question_column,
        rephrased=settings.rephrased_column,
        answer=settings.answer_column,
        report=report,
    )
    process, folder, size = stand_alone(), Path(f"{settings.out}.parts"), settings.batch_size
    claim(folder, asdict(settings) | {"out": None, "questions": fingerprint(pairs)}, settings.out)
    rewrites = split(folder, "rewritten-", len(pairs), size)
    model = chat_model(settings.model, settings.max_response_tokens, size, settings)
    batches = {part: pairs[places.start : places.stop] for part, places in rewrites.items()}
    loaded = make_parts("rephrasing", batches, process, partial(rewrite_batch, settings), model, tally)
    parts = list(rewrites)
    if settings.verify:
        if loaded:
            return False
        parts = list(split(folder, "verified-", len(pairs), size))
        model = chat_model(settings.verify, settings.verify_tokens, size * 2 * settings.verify_samples, settings)
        of_part = dict(zip(parts, rewrites, strict=True))
        make_parts("verifying", of_part, process, partial(verify_part, settings), model, tally)
    if (rows := read_whole(parts)) is not None:  # the process that finds nothing missing is the last
        write_whole(settings.out, to_lines(rows))
        print(report, summary(settings.out, rows), sep="\n")
    return True


def summary(out: Path, rows: Sequence[Row]) -> str:
    counted = tally(rows)
    lines = [f"{out}: {counted.pop('good', 0):,} of {len(rows):,} questions have a rephrasing; turned down:"]
    return "\n".join(lines + [f"{number:>8,}  {reason}" for reason, number in counted.most_common()])


def tally(rows: Sequence[Row]) -> Counter[str]:
    """Questions with a rephrasing, and rewrites turned down by reason."""
    return sum((Counter(row["faults"]) for row in rows), Counter(good=sum(bool(row["rephrased"]) for row in rows)))


def main() -> None:
    command, environment = [sys.executable, *sys.orig_argv[1:]], dict(os.environ)
    settings = tyro.cli(RephrasingSettings, description=__doc__)
    with told_in_a_sentence(f"stopped; the same command goes on from {settings.out}.parts"):
        if not rephrase(settings):  # the same command, in place of this process, finds the rewriting done
            sys.stdout.flush()
            os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main()
