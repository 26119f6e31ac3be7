"""Who answers what, with which seeds.

Every rollout has a seed of its own, so what is sampled does not depend on what else is in the batch, and a run can be
repeated or resumed. The engine that samples is one of lm/engine.py, and holds the weights that the model has now.
"""

from collections.abc import Sequence
from hashlib import blake2b

from transformers import PreTrainedTokenizerBase

from config import Config
from data import PromptedPair
from lm import ranks
from lm.decoding import Sampler
from lm.packing import Rollout
from lm.scoring import PackedLM
from rewards import Response, View, Voter


def ask(
    sampler: Sampler,
    model: PackedLM,
    who: Voter,
    views: Sequence[View],
    questions: Sequence[PromptedPair],
    step: int,
    config: Config,
) -> dict[tuple[Voter, View], list[Rollout]]:
    """V rollouts of `model` on every view of every question, in one call of the sampler: Q * V a view, by question."""
    if not views:
        return {}
    asked = [(view, question) for view in views for question in questions]
    with sampler.holding(model.lm) as sample:  # with the weights that the model has now
        rollouts = ranks.shared_out(sample)(
            prompts=[question.prompts[view] for view, question in asked],
            seeds=[request_seed(config.run.seed, step, question.pair.id, view, who) for view, question in asked],
            n=config.votes,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_response_tokens,
        )
    per_view = len(questions) * config.votes
    return {(who, view): rollouts[i * per_view : (i + 1) * per_view] for i, view in enumerate(views)}


def request_seed(*key: str | int) -> int:
    """A seed below 2^62 for one prompt's rollouts, from (run seed, step, question id, view, who); rollout g of the
    group adds g. A hash, so that no two requests of a run share a stream whatever the ids look like."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def decode(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[Response]:
    texts = tokenizer.batch_decode([rollout.response_ids for rollout in rollouts], skip_special_tokens=True)
    return [Response(text, len(each.response_ids), each.finished) for text, each in zip(texts, rollouts, strict=True)]
