"""Several processes as one: `torchrun --nproc-per-node N train.py ...` starts them, and here they share the work out.

Sampling is shared out by prompts, training by micro-batches, memory by FSDP (policy.shard). What is small is known to
every rank: rollouts, votes, rewards, metrics. So the code of a step reads as if it ran alone, and gives the same
numbers. With one process every function here does nothing, or what its argument says.

A rank is one process, usually one GPU; rank 0, the first, alone prints and writes.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # how far one rank may fall behind the others, in sampling say, before the job ends


def start() -> torch.device:
    """Join the other processes of torchrun, if it started this one; returns the device to work on."""
    has_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if has_gpu else "cpu")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if has_gpu else "cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it lasts as long as the process
    return device


def stop() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def launched() -> bool:
    """Whether torchrun started this process, perhaps as its only one."""
    return "RANK" in os.environ and distributed.is_initialized()


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def on_first(task: Callable[[], T]) -> T:
    """Rank 0 does it; every rank gets what it returned, or raises what it raised."""
    if count() == 1:
        return task()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = task()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def everyones(mine: list[T]) -> list[T]:
    """The lists of all ranks, joined in their order."""
    if count() == 1:
        return mine
    lists: list[list[T]] = [[] for _ in range(count())]
    distributed.all_gather_object(lists, mine)
    return [item for each in lists for item in each]


def total(mine: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if count() > 1:
        distributed.all_reduce(mine)
    return mine


def mean(mine: Tensor) -> float:
    """Of the values of all ranks, however many each has."""
    sum_and_count = torch.stack([mine.sum(dtype=torch.float64), mine.new_tensor(mine.numel(), dtype=torch.float64)])
    return float(torch.div(*total(sum_and_count)))


def largest(mine: float) -> float:
    return max(everyones([mine]))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every rank; any other as it is. All ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """The part of a tensor, which every rank has whole, that falls to this rank if `pattern` is sharded."""
    if not isinstance(pattern, DTensor):
        return tensor
    on_device = tensor.to(pattern.device)
    return distribute_tensor(on_device, pattern.device_mesh, pattern.placements, src_data_rank=None)


def shared_out(sample: Callable[..., list[T]]) -> Callable[..., list[T]]:
    """`sample` done by all ranks, each a share of the prompts that differs by at most one from the others'; a prompt's
    rollouts stay together, and every rank gets all rollouts, in the order of the prompts."""

    def sample_share(prompts: Sequence[list[int]], seeds: Sequence[int], **settings: Any) -> list[T]:
        share = slice(len(prompts) * rank() // count(), len(prompts) * (rank() + 1) // count())
        return everyones(sample(prompts=prompts[share], seeds=seeds[share], **settings))

    return sample_share
