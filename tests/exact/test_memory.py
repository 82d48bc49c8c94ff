"""Chunks that shrink when the memory runs out, and precision that is put back."""

import pytest
import torch

from tests.random_models import random_model, random_pairs
from tl_entity import Head, path_patch
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.exact.precision import float32_matmul_precision


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_chunk_without_memory_is_halved_and_the_work_goes_on(error: Exception) -> None:
    tried = []

    def sum_of(rows: list[int]) -> int:
        tried.append(len(rows))
        if len(rows) > 3:
            raise error
        return sum(rows)

    found = list(halving(list(range(10)), 8, sum_of))
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert [total for _, total in found] == [1, 5, 9, 13, 17]
    assert [some.start for some, _ in found] == [0, 2, 4, 6, 8]


def test_what_cannot_be_halved_or_is_another_error_is_raised() -> None:
    def never(rows: list[int]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        list(halving([1, 2, 3], 3, never))

    def wrong(rows: list[int]) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(halving([1, 2, 3], 3, wrong))


def test_the_memory_setting_changes_nothing_but_the_chunks() -> None:
    model, pairs = random_model(n_kv_heads=2), random_pairs(5)
    how = {"receivers": [Head(2, 1)], "receiver_input": "v", "position": "place"}
    steps: list[int] = []
    small = path_patch(model, pairs, **how, memory=1, progress=steps.append)
    assert len(steps) == len(pairs)
    large = path_patch(model, pairs, **how)
    assert large.per_example.abs().max() > 1e-3
    torch.testing.assert_close(small.per_example, large.per_example, atol=1e-11, rtol=1e-11)


def test_a_budget_is_positive() -> None:
    assert memory_budget("cpu") > 2**20


def test_precision_is_put_back_whatever_happens() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), float32_matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
