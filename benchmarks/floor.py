"""The floor of a training step: its matrix products with the weights alone, measured on the machine at hand.

No attention, no normalisation, no softmax, no optimizer. Three products for each weight and trained token, one for each
reference token, and for generation one for each prompt once and each sampled token, all rows of a step at a time.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Clock = Callable[[], float]


def products(weights: Sequence[Tensor], tokens: int, backward: bool, clock: Clock) -> float:
    """Seconds of the product of `tokens` tokens with each weight (with `backward`, of three); one weight of each shape
    is measured."""
    seconds = 0.0
    for weight in {weight.shape: weight for weight in weights}.values():
        x, grad = torch.ones(tokens, weight.shape[1]), torch.ones(tokens if backward else 0, len(weight))
        begin = clock()
        x @ weight.T
        if backward:
            grad @ weight
            grad.T @ x
        seconds += (clock() - begin) * sum(other.shape == weight.shape for other in weights)
    return seconds


def floor(
    lm: PreTrainedModel, prompts: Sequence[int], group: int, lengths: Sequence[int], clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Seconds by phase of a step with `group` responses to each prompt; `prompts` and `lengths` are their tokens."""
    head = [lm.get_output_embeddings().weight.detach()]
    body = [module.weight.detach() for module in lm.base_model.modules() if isinstance(module, nn.Linear)]
    sampled, tokens = sum(lengths), sum(prompts) * group + sum(lengths)

    def many(weights: Sequence[Tensor], tokens: int, backward: bool, at_once: int = 2048) -> float:
        """In equal parts that a cache and a memory can hold: one part measured, times their number."""
        parts = max(1, round(tokens / at_once))
        return products(weights, tokens // parts, backward, clock) * parts

    active = [sum(length > position for length in lengths) for position in range(max(lengths))]
    decoding = [products([*body, *head], rows, False, clock) for rows in active[:: max(1, len(active) // 4)]]
    seconds = {
        "generation": many(body, sum(prompts), False) + sum(decoding) / len(decoding) * len(active),
        "reference": many(body, tokens, False) + many(head, sampled, False, 512),
        "training": many(body, tokens, True) + many(head, sampled, True, 512),
    }
    return seconds | {"whole": sum(seconds.values())}
