"""The record that travels through a training step: one sampled response and what becomes of it."""

from dataclasses import dataclass, field
from math import nan


@dataclass
class Rollout:
    """A sampled response, filled in on its way: text and answer, reward, advantage, denominator.

    A number that is not known yet is NaN, so that training on it by mistake makes a loss that is not finite.
    """

    prompt_ids: list[int]
    response_ids: list[int]  # ends with the stop token if `finished`, else the response was cut at max_tokens
    logp: list[float]  # the sampler's log-prob of each response token, of the distribution that it was drawn from
    finished: bool
    text: str = field(default="", compare=False)
    answer: str | None = field(default=None, compare=False)  # the content of the text's last box
    token_stats: dict[str, float] = field(default_factory=dict, compare=False)  # means of lm.scoring.TokenStats
    reward: float = field(default=nan, compare=False)
    advantage: float = field(default=nan, compare=False)
    untrained: range = field(default=range(0), compare=False)  # places of response tokens without a loss
    denominator: float = field(default=nan, compare=False)  # what the losses of its tokens are divided by

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)
