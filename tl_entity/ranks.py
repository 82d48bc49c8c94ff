"""Several processes on one job (`torchrun`): prompts are shared out, results gathered by all."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
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


class Together:
    """Several things that have an entry for each prompt, such as pairs and tensors, as one: they
    are sliced together.

    Attributes:
        parts: the things.

    Raises:
        ValueError: if they have not equally many entries.
    """

    def __init__(self, *parts: Rows) -> None:
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"{[len(part) for part in parts]} entries can't go together.")
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: slice, /) -> "Together":
        return Together(*(part[rows] for part in self.parts))


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


@dataclass(frozen=True)
class Share:
    """What this process takes of rows that are shared out.

    Attributes:
        rows: those it computes.
        n: how many of them count; a process without a share computes one row, which does not, so
            that it takes part in what all processes do together.
        lengths: how many count in each process.
    """

    rows: slice
    n: int
    lengths: tuple[int, ...]

    @property
    def n_all(self) -> int:
        """How many rows there are in all."""
        return sum(self.lengths)


def share_of(n_rows: int) -> Share:
    """This process's share of so many rows; all of them outside a process group."""
    n = n_ranks()
    bounds = [n_rows * rank // n for rank in range(n + 1)]
    lengths = tuple(stop - start for start, stop in pairwise(bounds))
    rank = dist.get_rank() if n > 1 else 0
    start, stop = bounds[rank], bounds[rank + 1]
    return Share(slice(start, stop) if stop > start else slice(0, 1), stop - start, lengths)


def shared_out(
    rows: SomeRows, compute: Callable[[SomeRows], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`compute` on all rows, each process taking a share; every process gets the whole result.

    Args:
        rows: prompts or pairs, the same in every process.
        compute: gives tensors whose last axis is that of the rows.
    """
    if n_ranks() == 1:
        return compute(rows)
    share = share_of(len(rows))
    return tuple(gathered(found, share) for found in compute(rows[share.rows]))


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


def summed(mine: Tensor) -> Tensor:
    """The sum of what all processes have, in each of them."""
    if n_ranks() == 1:
        return mine
    total = mine.detach().clone()
    dist.all_reduce(total)
    return total


def gathered(mine: Tensor, share: Share) -> Tensor:
    """What all processes found for their shares, one after another along the last axis, in each of
    them."""
    if n_ranks() == 1:
        return mine
    width = max(share.lengths)
    # Booleans have no place in every backend's collectives.
    sent = mine.to(torch.uint8) if mine.dtype == torch.bool else mine
    padded = sent.new_zeros(*sent.shape[:-1], width)
    padded[..., : sent.shape[-1]] = sent[..., :width]
    parts = [torch.empty_like(padded) for _ in share.lengths]
    dist.all_gather(parts, padded)
    kept = [part[..., :length] for part, length in zip(parts, share.lengths, strict=True)]
    return torch.cat(kept, -1).to(mine.dtype)
