"""How much memory intermediate results may take, and what is done when there is less."""

import gc
import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

from tl_entity._typing import checked

GIB = 2**30


@checked
def memory_budget(device: str | torch.device | None) -> int:
    """Bytes for intermediate results on this device: a quarter of the memory that is free now, and
    at most 2 GiB on a CPU, where larger chunks are no faster.
    """
    device = torch.device(device or "cpu")
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 4
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        free = 4 * GIB
    return min(2 * GIB, free // 4)


@checked
def block_bytes(device: str | torch.device | None) -> int:
    """Bytes of intermediate results at which a chain of operations runs fastest on this device:
    what a processor's cache holds, or what keeps all of a GPU busy."""
    return 8 * 2**20 if torch.device(device or "cpu").type == "cpu" else 256 * 2**20


class Rows(Protocol):
    """What can be taken a slice at a time: prompts, pairs."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> "Rows": ...


SomeRows = TypeVar("SomeRows", bound=Rows)
Found = TypeVar("Found")


def halving(
    rows: SomeRows, size: int, compute: Callable[[SomeRows], Found]
) -> Iterator[tuple[slice, Found]]:
    """`compute` on the rows in order, at most `size` at a time, and half as many from where the
    memory runs out; a single row that finds none is an error.

    Yields:
        The rows that were taken, and what was found for them.
    """
    start = 0
    while start < len(rows):
        some = slice(start, min(start + size, len(rows)))
        try:
            found = compute(rows[some])  # type: ignore[arg-type]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or some.stop - some.start == 1:
                raise
            size = (some.stop - some.start) // 2
        else:
            yield some, found
            start = some.stop
            continue
        # Outside the handler, where the failed chunk's tensors are no longer held by the traceback.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    # Torch's CPU allocator has no exception of its own.
    return (
        not isinstance(error, RuntimeError)
        or isinstance(error, torch.OutOfMemoryError)
        or ("allocate memory" in str(error))
    )
