"""How much memory intermediate results may take."""

import os

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
