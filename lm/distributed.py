"""Share the work of several processes, which `torchrun --nproc-per-node N train.py ...` starts.

Prompts are divided for sampling, micro-batches for training, and FSDP divides the memory (model.shard). Every rank
knows what is small: rollouts, votes, rewards, metrics. So a step reads as if it ran alone, and gives the same numbers.
With one process, every function here does nothing, or what its argument says.

A rank is one process, usually one GPU; rank 0 alone prints and writes.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # how far one rank may fall behind the others, in sampling say, before the job ends


def start() -> torch.device:
    """Join the other processes of torchrun, if it started this one; return the device to work on.

    On a GPU a process by itself is a group of one, so that many GPUs and one run the same code. On a CPU it is no group
    at all: a laptop does not pay for what it does not need.
    """
    has_gpu = torch.cuda.is_available()
    launched = "RANK" in os.environ
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu else "cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if (has_gpu or launched) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
        alone: dict[str, Any] = {} if launched else {"store": dist.HashStore(), "world_size": 1, "rank": 0}  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=TIMEOUT, **alone)
    if not is_rank0() and sys.stdout.name != os.devnull:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it lasts as long as the process
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def in_group() -> bool:
    """Tell whether processes work together, be it a group of one: then models are sharded."""
    return dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank0() -> bool:
    """Tell whether this is rank 0, by torchrun's RANK: a vLLM engine that closes destroys the group."""
    return int(os.environ.get("RANK", 0)) == 0


def run_on_rank0(task: Callable[[], T]) -> T:
    """Run a task on rank 0; return its result on every rank, or raise there what it raised."""
    if world_size() == 1:
        return task()
    outcome: list[Any] = [None, None]
    if is_rank0():
        try:
            outcome[0] = task()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# Ctrl-C; kill and torchrun; a closed terminal; the warnings that Slurm sends before it kills.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
SECOND_STOPS = "TORCHELASTIC_RUN_ID" not in os.environ  # torchrun repeats signals that its processes have got already


@dataclass
class StopRequest:
    """A signal's request to stop: the first lets the run finish its step and save, the second ends it."""

    number: int = 0  # of the signal
    unsaved: str = ""  # the work that would be lost; empty: nothing

    def handle(self, number: int, _: object) -> None:
        """Remember the signal, or end the run at once."""
        asked_before = bool(self.number)
        self.number = number
        if not self.unsaved or (asked_before and SECOND_STOPS):
            raise KeyboardInterrupt
        if is_rank0() and not asked_before:
            hint = "; a second Ctrl-C stops at once" if SECOND_STOPS else ""
            print(f"\nfinishing {self.unsaved}, then saving{hint}", file=sys.stderr)


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Turn signals into a request to stop, and put the former handlers back; in a thread, signals are left alone."""
    request = StopRequest()
    can_catch = threading.current_thread() is threading.main_thread()
    former = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS if can_catch}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def progress_bar(work: Iterable[T], what: str, unit: str) -> Iterable[T]:
    return tqdm(work, what, unit=unit, leave=False, delay=5, disable=not is_rank0())


def all_gather(mine: list[T]) -> list[T]:
    if world_size() == 1:
        return mine
    lists: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, mine)
    return list(chain.from_iterable(lists))


def all_reduce_sum(mine: Tensor) -> Tensor:
    """Add up a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(mine)
    return mine


def all_reduce_mean(mine: Tensor) -> float:
    """Average the values of all ranks, however many each has."""
    sum_and_count = torch.stack([mine.sum(dtype=torch.float64), mine.new_tensor(mine.numel(), dtype=torch.float64)])
    return float(torch.div(*all_reduce_sum(sum_and_count)))


def all_reduce_max(mine: float) -> float:
    return max(all_gather([mine]))


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    return next((tensor.device_mesh for tensor in model.parameters() if isinstance(tensor, DTensor)), None)


def full_tensor(tensor: Tensor) -> Tensor:
    """Put a sharded tensor together, on every rank's own device; return any other as it is.

    All ranks must call it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    on_device: Any = tensor.to(tensor.device_mesh.device_type)
    return on_device.full_tensor()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, sharing its memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Free the weights that a model may have kept unsharded: after an update they would be the old ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters, a tied one once, and its buffers, those in no state dict included."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@torch.no_grad()
def fill_from_rank0(read: Callable[[str], Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded or not, with what `read` returns for their names on rank 0, where alone it is called.

    One tensor at a time: no rank needs memory for another unsharded model.
    """
    for name, mine in tensors.items():
        if isinstance(mine, DTensor):
            whole = torch.empty(mine.shape, dtype=mine.dtype, device=mine.device_mesh.device_type)
            if is_rank0():
                whole.copy_(read(name))
            local_shard(mine).copy_(local_shard(distribute_tensor(whole, mine.device_mesh, mine.placements)))
        else:
            if is_rank0():
                mine.copy_(read(name))
            if world_size() > 1:
                dist.broadcast(mine, src=0)


def shard_prompts(sample: Callable[..., list[T]]) -> Callable[..., list[T]]:
    """Divide the prompts of `sample` over the ranks, as evenly as whole prompts allow.

    The rollouts of a prompt stay together; every rank gets all rollouts, in the order of the prompts.
    """

    def sample_share(prompts: Sequence[list[int]], seeds: Sequence[int], **settings: Any) -> list[T]:
        share = slice(len(prompts) * rank() // world_size(), len(prompts) * (rank() + 1) // world_size())
        return all_gather(sample(prompts=prompts[share], seeds=seeds[share], **settings))

    return sample_share
