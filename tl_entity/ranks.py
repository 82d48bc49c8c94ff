"""Several processes on one job (`torchrun`): prompts are shared out, results gathered by all."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class Rows(Protocol):
    """What can be taken a slice at a time: prompts, pairs."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Any: ...


SomeRows = TypeVar("SomeRows", bound=Rows)


@contextmanager
def process_group() -> Generator[None, None, None]:
    """Within this context the processes that `torchrun` started work together; without `torchrun`
    nothing happens. On GPUs each process takes the device of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def n_ranks() -> int:
    """Processes that share the work; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and shows progress."""
    return n_ranks() == 1 or dist.get_rank() == 0


def shared_out(
    rows: SomeRows, compute: Callable[[SomeRows], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`compute` on all rows, each process taking a share; every process gets the whole result.

    Args:
        rows: prompts or pairs, the same in every process.
        compute: gives tensors whose last axis is that of the rows.
    """
    n = n_ranks()
    if n == 1:
        return compute(rows)
    bounds = [len(rows) * rank // n for rank in range(n + 1)]
    lengths = [stop - start for start, stop in pairwise(bounds)]
    start, stop = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    # A process without a share still takes part in the gathering, with a row that is dropped.
    mine = rows[start:stop] if stop > start else rows[:1]
    return tuple(_gathered(found, lengths) for found in compute(mine))


def from_first(make: Callable[[], Result]) -> Result:
    """What `make` gives in the first process, in all of them; it is called there alone.

    An error is raised in all of them too.
    """
    if n_ranks() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _gathered(mine: Tensor, lengths: list[int]) -> Tensor:
    width = max(lengths)
    # Booleans have no place in every backend's collectives.
    sent = mine.to(torch.uint8) if mine.dtype == torch.bool else mine
    padded = sent.new_zeros(*sent.shape[:-1], width)
    padded[..., : sent.shape[-1]] = sent[..., :width]
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    whole = torch.cat([part[..., :length] for part, length in zip(parts, lengths, strict=True)], -1)
    return whole.to(mine.dtype)
