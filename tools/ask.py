"""Ask a model: k samples of its answer and their vote, asked as in training.

python -m tools.ask runs/II-embedded-seed0 "Ann has 3 pens and buys 2 bags of 4 pens. How many pens now?"
python -m tools.ask Qwen/Qwen3-1.7B-Base "What is 7 * 8?" --k 4
"""

import tyro
from rich import print
from rich.text import Text
from tyro.conf import Positional

from config import told_in_a_sentence
from lm.engine import load_frozen, sampling_from
from lm.model import newest_policy
from lm.prompts import prompt_ids
from rewards import read_groups
from rollout import decode, request_seed
from tools.look import side_by_side


def ask(
    model: Positional[str],
    question: Positional[str],
    k: int = 8,
    temperature: float = 1.0,
    max_response_tokens: int = 256,
    chat_template: str | None = None,
    seed: int = 0,
) -> None:
    """Of a run, a folder or a hub name."""
    asked = load_frozen(newest_policy(model), "auto", chat_template)
    prompt = prompt_ids(asked.tokenizer, question, asked.template)
    with sampling_from(asked, len(prompt) + max_response_tokens, rows=k) as sample:
        seeds = [request_seed(seed, "ask")]
        rollouts = sample([prompt], seeds, n=k, temperature=temperature, max_tokens=max_response_tokens)
    (group,) = read_groups(decode(rollouts, asked.tokenizer), k, "math")
    said = enumerate(zip(group.boxed, group.finished, strict=True), 1)
    headings = [f"{i}. {answer}{'' if finished else ' (cut)'}" for i, (answer, finished) in said]
    print(side_by_side(headings, group.texts))
    print(Text(f"vote: {group.vote.label} ({group.vote.share:.0%} of {group.vote.answered} answers)"))


if __name__ == "__main__":
    with told_in_a_sentence():
        tyro.cli(ask, description=__doc__)
