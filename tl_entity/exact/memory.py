"""How much memory intermediate results may take, and what is done when there is less."""

import gc
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from tl_entity._typing import checked
from tl_entity.choices import GIB
from tl_entity.hooks.points import n_kv_heads
from tl_entity.ranks import SomeRows

STANDS_FOR: ContextVar[str] = ContextVar("STANDS_FOR", default="cpu")
"""The device that the meta device stands for, where a run is planned: chunks are of its sizes."""


@checked
def memory_budget(device: str | torch.device | None) -> int:
    """Bytes for intermediate results on this device: a quarter of its memory, and at most 2 GiB on
    a CPU, where larger chunks are no faster.

    Of all its memory, not of what is free: the size of a chunk decides how sums are rounded, and
    the same command should give the same bytes whatever else the machine does.
    """
    device = _real(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        total = 4 * GIB
    return min(2 * GIB, total // 4)


@checked
def prompts_within(cfg: Any, n_pos: int, memory: int) -> int:
    """How many prompts' kept runs (keys, values and residual stream of every token and layer) take
    at most half the memory; at least one."""
    each = cfg.n_layers * n_pos * (2 * n_kv_heads(cfg) * cfg.d_head + cfg.d_model)
    return max(1, memory // 2 // (each * (torch.finfo(cfg.dtype).bits // 8)))


@checked
def block_bytes(device: str | torch.device | None) -> int:
    """Bytes of intermediate results at which a chain of operations runs fastest on this device:
    what a processor's cache holds, or what keeps all of a GPU busy."""
    return 8 * 2**20 if _real(device).type == "cpu" else 256 * 2**20


def _real(device: str | torch.device | None) -> torch.device:
    device = torch.device(device or "cpu")
    return torch.device(STANDS_FOR.get()) if device.type == "meta" else device


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
            found = compute(rows[some])
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
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # Torch's CPU allocator has no exception of its own, nor have CUDA's libraries.
    said = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return any(words in str(error) for words in said)
