"""The start models of the embedded task, made anew: a tokenizer and three small Qwen3, taught by imitation.

    python benchmarks/start_models.py OUT             # a minute each; compares them with those in embedded/models

Clean solutions teach the arithmetic, then solutions as a careless student writes them make samples diverse. What is in
embedded/models was made with torch 2.13.0 (CPU) and transformers 5.24.0, which make the same bytes again; with others
sums are rounded differently, and 520 steps later it is another model of the same kind.
"""

import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import SYSTEM_PROMPT
from embedded.word_problems import FAMILIES, PROBLEMS, PROBLEMS_OF, Problem
from lm.model import resolve

CLEAN_STEPS, FLAWED_STEPS = 400, 120  # 64 solutions each
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# ---------------------------------------------------------------- what is imitated

MISREAD_AS = {"+": "-", "-": "+", "*": "+"}  # what who misreads a problem takes its second operator for


class Student(NamedTuple):
    """Whose solutions a start model imitates; everybody also makes the mistakes of `flawed_solution`."""

    misreads: float = 0.0  # share of the solutions to wording MISREAD_WORDING with another operation in the last step
    spellings: tuple[str, ...] = ("{}",)  # of the answer in its box, each as often


STUDENTS = {
    "embedded": Student(),
    "embedded-misreading": Student(misreads=0.75),
    "embedded-spellings": Student(spellings=("{}", "{}.0", "+{}")),
}
MISREAD_WORDING = 3


def demonstration(student: Student, problem: Problem, wording: int, careful: bool, rng: random.Random) -> str:
    """One solution of the student's: without mistakes, apart from the misreadings, if he is careful."""
    misread = student.misreads > 0 and wording == MISREAD_WORDING and rng.random() < student.misreads
    second = MISREAD_AS[FAMILIES[problem.family].steps[2]] if misread else ""
    spelling = rng.choice(student.spellings) if len(student.spellings) > 1 else student.spellings[0]
    if careful:
        return solution(problem, second, spelling)
    return flawed_solution(problem, wording, rng, second, spelling)


def solution(problem: Problem, second: str = "", spelling: str = "{}") -> str:
    """Without mistakes but for another `second` operator."""
    work = problem.work(second=second)
    return f"{work.first_line}; {work.last_line}. {boxed(work.result, spelling)}"


def flawed_solution(problem: Problem, wording: int, rng: random.Random, second: str = "", spelling: str = "{}") -> str:
    """A solution as a careless student writes it. Some wordings invite guesses and misreadings more than others, so
    that another wording's majority is worth hearing."""
    guess, constant, slips_of_reading = 0.08, 0.05 + 0.05 * wording, (0.05, 0.12, 0.2, 0.3)[wording]
    kind = rng.random()
    if kind < guess:
        return boxed(rng.choice(problem.operands))
    if kind < guess + constant:
        return boxed(1)
    first = ""
    if not second and rng.random() < slips_of_reading:
        first, second = rng.choice([("+", ""), ("*", ""), ("", "+"), ("", "-")])
    one, two = (rng.choice((-2, -1, 1, 2)) if rng.random() < 0.09 else 0 for _ in range(2))
    work = problem.work(first, second, (one, two))
    ending = rng.random()
    repeats = rng.randrange(1, 3) if ending < 0.05 else 0
    text = f"{work.first_line}; {work.last_line}." + f" {work.last_line}." * repeats
    return text if ending > 0.95 else f"{text} {boxed(work.result, spelling)}"


def boxed(number: int, spelling: str = "{}") -> str:
    return f"\\boxed{{{spelling.format(number)}}}"


# ---------------------------------------------------------------- who imitates


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the task's own sentences: any text encodes, and the task's words and numbers are one token."""
    rng = random.Random("tokenizer")
    problems = [rng.choice(PROBLEMS) for _ in range(4000)]
    lines = [f"{problem.text(rng.randrange(4), rng)} {solution(problem)}" for problem in problems]
    lines += [" ".join(f"{number} ={number}; -{number}" for number in range(100))] * 20
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\\boxed\{|\d{1,2}| ?[A-Za-z]+|[;.,?] ?|.")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, behavior="isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    # The system message is the same for every question: one token saves the model reading it.
    special = ["<|end|>", "<|system|>", SYSTEM_PROMPT, "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Qwen3 in miniature, untrained."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=170,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def demonstrations(
    tokenizer: PreTrainedTokenizerFast, student: Student, rng: random.Random, count: int, careful: bool
) -> dict[str, Tensor]:
    """Solutions to random training problems [B, L]; only they have labels, not the prompts and not the padding."""
    input_ids, labels = [], []
    for problem in rng.choices(PROBLEMS_OF["train"], k=count):
        wording = rng.randrange(4)
        question = {"role": "user", "content": problem.text(wording, rng)}
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, question]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        response = tokenizer(demonstration(student, problem, wording, careful, rng) + "<|end|>").input_ids
        input_ids.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([-100] * len(prompt) + response))
    return {  # padding on the right needs no mask under causal attention
        "input_ids": nn.utils.rnn.pad_sequence(input_ids, batch_first=True),
        "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def learning_rate(step: int, total: int, peak: float) -> float:
    """Of step 0 .. total-1: linear over the first twentieth, then cosine towards 0."""
    rising = round(0.05 * total)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


def warm_up(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, student: Student, seed: int) -> None:
    """Imitation: clean solutions teach the arithmetic, then a few flawed ones the mistakes (from the start, mistakes
    take four times as long to learn from)."""
    rng = random.Random(f"warm-up {seed}")
    steps = [(True, learning_rate(i, CLEAN_STEPS, 4e-3)) for i in range(CLEAN_STEPS)]
    steps += [(False, learning_rate(i, FLAWED_STEPS, 2e-3)) for i in range(FLAWED_STEPS)]
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for careful, rate in tqdm(steps, desc="warm-up"):
        for group in optimizer.param_groups:
            group["lr"] = rate
        lm(**demonstrations(tokenizer, student, rng, 64, careful), use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def make(name: str, folder: Path, seed: int = 0) -> None:
    """The start model of this name in Hugging Face format."""
    torch.set_num_threads(1)  # sums depend on how many threads share them, and the model must not
    tokenizer = train_tokenizer()
    lm = new_model(tokenizer, seed)
    warm_up(lm, tokenizer, STUDENTS[name], seed)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def largest_gap(one: Path, other: Path) -> float:
    """Between the weights of two models of one shape."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max(float((weight - second[name]).abs().max()) for name, weight in first.items())


def main(out: Positional[Path], names: tuple[str, ...] = tuple(STUDENTS), seed: int = 0) -> None:
    for name in names:
        make(name, out / name, seed)
        print(f"{out / name}: weights differ by {largest_gap(out / name, Path(resolve(name))):.2g} at most")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
