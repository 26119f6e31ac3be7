"""Ask a model: k samples of its answer and their vote, asked as in training.

python -m tools.ask runs/II-embedded-seed0 "Ann has 3 pens and buys 2 bags of 4 pens. How many pens now?"
python -m tools.ask Qwen/Qwen3-1.7B-Base "What is 7 * 8?" --k 4
"""

import tyro
from rich import print
from rich.text import Text
from tyro.conf import Positional

from config import UserError, exit_on_user_error
from lm.decoding import Capacity, request_seed
from lm.engine import load_inference_model, sampling_from
from lm.model import newest_policy
from lm.prompts import prompt_ids
from rewards import read_answers, vote_of
from tools.look import side_by_side


def ask(
    model: Positional[str],
    question: Positional[str],
    k: int = 8,
    temperature: float = 1.0,
    max_response_tokens: int = 256,
    chat_template: str | None = None,
) -> None:
    """Ask the model of a run, a folder or a hub name."""
    if k < 1:
        raise UserError(f"--k {k} must be at least 1")
    asked = load_inference_model(newest_policy(model), "auto", chat_template)
    prompt = prompt_ids(asked.tokenizer, question, asked.template)
    with sampling_from(asked, Capacity(len(prompt) + max_response_tokens, sequences=k)) as sample:
        rollouts = sample([prompt], [request_seed("ask")], n=k, temperature=temperature, max_tokens=max_response_tokens)
    read_answers(rollouts, asked.tokenizer)
    vote = vote_of(rollouts, "math")
    headings = [f"{i}. {each.answer}{'' if each.finished else ' (cut)'}" for i, each in enumerate(rollouts, 1)]
    print(side_by_side(headings, [rollout.text for rollout in rollouts]))
    print(Text(f"vote: {vote.label} ({vote.share:.0%} of {vote.answered} answers)"))


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(ask, description=__doc__, prog="python -m tools.ask")
