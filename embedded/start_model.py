"""The embedded model: a tokenizer and a small Qwen3, made on the spot from word problems, and cached.

It lets `python train.py` show the whole method on a laptop, without a download. The model is first taught by imitation:
clean solutions teach it the arithmetic, then solutions with mistakes of several kinds make its samples diverse.
"""

import hashlib
import math
import os
import random
import tempfile
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from config import SYSTEM_PROMPT, UserError
from embedded.word_problems import PROBLEMS, PROBLEMS_OF, STUDENTS, Student, demonstration, solution

CLEAN_STEPS, FLAWED_STEPS = 400, 120  # of the warm-up, 64 solutions each
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


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
    for careful, rate in tqdm(steps, desc="warm-up of the embedded model (once, then cached)"):
        for group in optimizer.param_groups:
            group["lr"] = rate
        lm(**demonstrations(tokenizer, student, rng, 64, careful), use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def model_folder(name: str = "embedded", seed: int = 0) -> str:
    """Folder of the warmed-up model in Hugging Face format, made at the first call and found again afterwards.

    Raises:
        UserError: the cache cannot be written to, or what is in it is damaged.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if str(cache).startswith("~"):  # a user whom the system does not know
        raise UserError("there is no home folder to keep the embedded model in: set XDG_CACHE_HOME to one")
    sources = [Path(__file__).with_name(file).read_bytes() for file in ("start_model.py", "word_problems.py")]
    recipe = [sources, SYSTEM_PROMPT, CLEAN_STEPS, FLAWED_STEPS, STUDENTS[name], seed]
    key = repr([*recipe, torch.__version__, transformers.__version__])
    folder = cache / "co-rewarding" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        if not folder.is_dir():
            make(folder, STUDENTS[name], seed)
        with safetensors.safe_open(folder / "model.safetensors", "pt"):  # compares its header with its length
            return str(folder)
    except (OSError, SafetensorError) as problem:
        cure = "delete it if it is damaged, make room, or set XDG_CACHE_HOME to a folder that can be written to"
        raise UserError(f"{folder}: the embedded model cannot be kept there ({problem}); {cure}") from problem


def make(folder: Path, student: Student, seed: int) -> None:
    """Whole or not at all: a killed or a second process never leaves half a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as aside:
        tokenizer, written = train_tokenizer(), Path(aside) / "model"
        lm, threads = new_model(tokenizer, seed), torch.get_num_threads()
        torch.set_num_threads(1)  # sums depend on how many threads share them, and the model must not
        warm_up(lm, tokenizer, student, seed)
        torch.set_num_threads(threads)
        lm.save_pretrained(written)
        tokenizer.save_pretrained(written)
        with suppress(OSError):  # another process was first
            written.rename(folder)
