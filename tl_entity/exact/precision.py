"""Faster, less exact matrix products, for as long as they are wanted."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium"]


@contextmanager
def float32_matmul_precision(precision: MatmulPrecision) -> Generator[None, None, None]:
    """Within this context float32 matrix products are computed as precisely as this.

    `highest` is float32. `high` allows TF32 and `medium` bfloat16 where the hardware has them
    (`torch.set_float32_matmul_precision`); elsewhere they change nothing.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
