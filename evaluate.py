"""Accuracy on questions with gold answers, greedy and sampled."""

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rewards import are_equal, extract_boxed
from rollout import Rollout, Sample, request_seed


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k answers, drawn without replacement from n of which `correct` are right, is
    right: the unbiased estimate of pass@k (arXiv 2107.03374)."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {correct} correct answers out of {n}: needs 1 <= k <= n and 0 <= correct <= n")
    return 1 - math.prod((n - correct - i) / (n - i) for i in range(k))


def decode(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.batch_decode([rollout.response_ids for rollout in rollouts], skip_special_tokens=True)


def accuracies(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    golds: Sequence[str],
    samples: int,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> dict[str, float]:
    """Mean accuracy of `samples` sampled answers a question (avg@k) and of one greedy answer.

    The seeds do not depend on the training step, so that two evaluations differ by the model alone.
    """
    seeds = [request_seed(seed, "evaluation", i) for i in range(len(prompts))]

    def accuracy(n: int, temperature: float) -> float:
        rollouts = sample(prompts, seeds, n=n, temperature=temperature, max_tokens=max_tokens)
        repeated = [gold for gold in golds for _ in range(n)]
        correct = are_equal(repeated, [extract_boxed(text) for text in decode(rollouts, tokenizer)])
        return sum(correct) / len(correct)

    return {"eval_accuracy": accuracy(samples, temperature), "eval_accuracy/greedy": accuracy(1, 0.0)}
