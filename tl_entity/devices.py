"""Which devices can be computed on. Imports torch only to ask it."""

import re

from tl_entity.errors import InputError

_FORM = re.compile(r"[a-z]+(:\d+)?")


def check_device(device: str | None) -> None:
    """Make sure that a device is there.

    Args:
        device: such as "cpu" or "cuda:1"; None for the best there is.

    Raises:
        InputError: saying why it can't be used.
    """
    if device is None:
        return
    if not _FORM.fullmatch(device):
        raise InputError(f"The device {device!r} is none; write it like cpu, cuda or cuda:1.")
    kind, _, index = device.partition(":")
    if kind == "cpu" and index.strip("0"):
        raise InputError(f"The device {device!r} can't be used: there is one CPU; write cpu.")
    if kind == "meta":
        raise InputError("The device 'meta' holds no numbers; give one that does.")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"The device {device!r} can't be used: {why}.") from None
