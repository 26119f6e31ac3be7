"""Several processes as one: `torchrun --nproc-per-node N train.py ...` starts them, and here they share the work out.

Sampling is shared out by prompts, training by micro-batches, memory by FSDP (model.shard). What is small is known to
every rank: rollouts, votes, rewards, metrics. So the code of a step reads as if it ran alone, and gives the same
numbers. With one process every function here does nothing, or what its argument says.

A rank is one process, usually one GPU; rank 0, the first, alone prints and writes.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # how far one rank may fall behind the others, in sampling say, before the job ends


def start() -> torch.device:
    """Join the other processes of torchrun, if it started this one; returns the device to work on.

    On a GPU a process by itself is a group of one, so that what runs on many GPUs is what runs on one. On a CPU it is
    no group at all: the laptop pays nothing for what it does not need.
    """
    has_gpu, launched = torch.cuda.is_available(), "RANK" in os.environ
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_gpu else "cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if (has_gpu or launched) and not distributed.is_initialized():
        backend, alone = "cpu:gloo,cuda:nccl" if has_gpu else "gloo", not launched
        store = distributed.HashStore() if alone else None  # type: ignore[attr-defined]
        size, rank = (1, 0) if alone else (-1, -1)
        distributed.init_process_group(backend, timeout=TIMEOUT, store=store, world_size=size, rank=rank)
        if launched and is_first() and not gives_time_to_save():
            print(
                "note: torchrun kills 30 s after Ctrl-C; with --shutdown-timeout 900 a run finishes its step and saves"
            )
    if not is_first() and sys.stdout.name != os.devnull:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it lasts as long as the process
    return device


def gives_time_to_save() -> bool:
    """Whether torchrun, our parent, has been told to wait longer for its processes when it is asked to stop."""
    with suppress(OSError):  # no /proc on this system
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        return b"--shutdown" in command or "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ
    return True


def stop() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def in_group() -> bool:
    """Whether processes work together here, be it a group of one: then models are sharded."""
    return distributed.is_initialized()


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """By torchrun's own word: also after a vLLM engine has closed torch.distributed with itself."""
    return int(os.environ.get("RANK", 0)) == 0


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


AGAIN = "" if "TORCHELASTIC_RUN_ID" in os.environ else "; a second Ctrl-C stops at once"


@dataclass
class Watch:
    """For signals that ask the run to stop: at the first it finishes its step and saves, the second stops it at once.
    Under torchrun, which repeats to its processes what they may have got themselves, a second one says nothing new."""

    signal: int = 0
    at_work_on: str = ""  # what would be lost; empty: nothing

    def request(self, number: int, _: object) -> None:
        asked_before, self.signal = self.signal, number
        if not self.at_work_on or (asked_before and AGAIN):
            raise KeyboardInterrupt
        if is_first() and not asked_before:
            print(f"\nfinishing {self.at_work_on}, then saving{AGAIN}", file=sys.stderr)


def bar(work: Iterable[T], what: str, unit: str) -> Iterable[T]:
    """Of the first rank, and only where it takes longer than a person waits in silence."""
    shown: Iterable[T] = tqdm(work, what, unit=unit, leave=False, delay=5, disable=not is_first())
    return shown


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


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes over which a model is sharded, None if it is not."""
    return next((tensor.device_mesh for tensor in model.parameters() if isinstance(tensor, DTensor)), None)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every rank's own device; any other as it is. All ranks must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(on_device, DTensor)
    return on_device.full_tensor()


def local(tensor: Tensor) -> Tensor:
    """This rank's own shard of a sharded tensor, sharing its memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, a tied one once, and buffers, those that are in no state dict included."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@torch.no_grad()
def fill_from_first(read: Callable[[str], Tensor] | None, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded or not, with what `read` gives rank 0 for their names; on other ranks it is not called. One
    at a time: no rank needs memory for another whole model."""
    for name, mine in tensors.items():
        source = read(name) if read and is_first() else None
        if isinstance(mine, DTensor):
            device = torch.device(mine.device_mesh.device_type)
            empty = torch.empty(mine.shape, dtype=mine.dtype, device=device)
            whole = empty if source is None else source.to(empty)
            local(mine).copy_(local(distribute_tensor(whole, mine.device_mesh, mine.placements)))
        else:
            if source is not None:
                mine.copy_(source)
            if count() > 1:
                distributed.broadcast(mine, src=0)


def shared_out(sample: Callable[..., list[T]]) -> Callable[..., list[T]]:
    """`sample` done by all ranks, each a share of the prompts that differs by at most one from the others'; a prompt's
    rollouts stay together, and every rank gets all rollouts, in the order of the prompts."""

    def sample_share(prompts: Sequence[list[int]], seeds: Sequence[int], **settings: Any) -> list[T]:
        share = slice(len(prompts) * rank() // count(), len(prompts) * (rank() + 1) // count())
        return everyones(sample(prompts=prompts[share], seeds=seeds[share], **settings))

    return sample_share
