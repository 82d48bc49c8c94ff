"""Chunks that shrink when the memory runs out, and precision that is put back."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import HookedTransformer

from tests.random_models import random_model, random_pairs, random_prompts
from tl_entity import (
    Evaluation,
    Head,
    PairBatch,
    PromptBatch,
    evaluate_circuits,
    evaluate_removals,
    knockout_curve,
    path_patch,
)
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.exact.precision import float32_matmul_precision
from tl_entity.exact.suffix import CleanRun
from tl_entity.hooks.run import answer_logits
from tl_entity.methods.activation_patching import activation_patch_each
from tl_entity.methods.cmap import cmap_each


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ],
    ids=["torch's", "CPU", "cuBLAS", "CUDA", "Python's"],
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


@contextmanager
def room_for(norm: nn.Module, vectors: int) -> Generator[list[int], None, None]:
    """A norm that runs out of memory, as a GPU would, when it gets more vectors than these at once;
    gives how many it got."""
    got: list[int] = []

    forward = norm.forward

    def check(given: torch.Tensor) -> torch.Tensor:
        count = given.shape[:-1].numel()
        got.append(count)
        if count > vectors:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(given)

    norm.forward = check
    try:
        yield got
    finally:
        norm.forward = forward


def test_slices_of_senders_are_halved() -> None:
    model, pairs = random_model(), random_pairs(2, 6)
    how = {"receivers": [Head(1, 1)], "receiver_input": "v", "position": "early"}
    expected = path_patch(model, pairs, **how)
    # Both recorded runs have 12 tokens; 8 senders would be 96 at once.
    with room_for(model.blocks[2].ln1, 30) as got:
        found = path_patch(model, pairs, **how)
    assert max(got) > 30 and expected.per_example.abs().max() > 1e-3
    torch.testing.assert_close(found.per_example, expected.per_example, atol=1e-11, rtol=1e-11)


def many_circuits(model: HookedTransformer, prompts: PromptBatch, **how: Any) -> list[Evaluation]:
    heads = [{"place": [Head(0, head)], "early": [Head(2, head)]} for head in range(4)]
    return evaluate_circuits(model, prompts, heads, mean_outputs=VALUES, **how)


def many_removals(model: HookedTransformer, prompts: PromptBatch, **how: Any) -> list[Evaluation]:
    heads = [{"place": [Head(0, head)], "early": [Head(2, head)]} for head in range(4)]
    return evaluate_removals(model, prompts, heads, mean_outputs=VALUES, **how)


def many_knockouts(model: HookedTransformer, prompts: PromptBatch, **how: Any) -> list[Evaluation]:
    prompts = replace(
        prompts, positions={**prompts.positions, "second": prompts.position("early") + 1}
    )
    curve = knockout_curve(model, prompts, from_position="second", to_position="early", **how)
    return [curve.whole, *curve.evaluations]


def many_patches(model: HookedTransformer, prompts: PromptBatch, **how: Any) -> list[Evaluation]:
    other = random_model(seed=1)
    choices = [
        ({"early": [Head(0, head)]}, patch) for head in range(4) for patch in ("output", "v")
    ]
    return cmap_each(model, other, prompts, choices, **how)


def many_pairs(model: HookedTransformer, prompts: PromptBatch, **how: Any) -> list[Evaluation]:
    pairs = PairBatch(prompts, random_prompts(len(prompts), 6, seed=5), prompts.answers)
    return activation_patch_each(model, pairs, [{"early": [Head(0, h)]} for h in range(4)], **how)


VALUES = torch.randn(3, 6, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "answer", [many_circuits, many_removals, many_knockouts, many_patches, many_pairs]
)
@pytest.mark.parametrize("room", [38, 20])
def test_every_method_goes_on_in_smaller_chunks(answer: Any, room: int) -> None:
    """With room for 38 vectors slices of edits are halved, with room for 20 the prompts too."""
    model, prompts = random_model(), random_prompts(6, 6)
    expected = answer(model, prompts)
    runs: list[int] = []
    with room_for(model.blocks[2].ln1, room) as got:
        found = answer(model, prompts, progress=runs.append)
    assert max(got) > room
    # What had to be done again is counted once.
    assert sum(runs) == len(found) * len(prompts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.answer_log_probability, other.answer_log_probability, atol=1e-11, rtol=1e-11
        )
    # A setting this small is the same as no memory at all: one prompt, one edit at a time.
    smallest = answer(model, prompts, memory=1)
    torch.testing.assert_close(
        smallest[1].answer_log_probability,
        expected[1].answer_log_probability,
        atol=1e-11,
        rtol=1e-11,
    )


def test_a_kept_run_holds_what_edits_can_change() -> None:
    model, prompts = random_model(), random_prompts(4, 9)
    run = CleanRun.record(model, prompts, first_layer=0, positions=["last"], begins=range(3))
    later = 9 - int(prompts.position("last").min())
    assert 0 < later < 9
    for name, activation in run.points.items():
        whole = name.endswith(("rot_k", "hook_v"))
        assert activation.shape[1] == (9 if whole else later), name
        assert activation.untyped_storage().nbytes() == activation.numel() * 8, name


def test_senders_that_reach_no_logits_cost_one_run() -> None:
    model, pairs = random_model(), random_pairs(3)
    with FlopCounterMode(display=False) as counter:
        found = path_patch(model, pairs, position="early")
    with FlopCounterMode(display=False) as run:
        answer_logits(model, pairs.clean)
    assert counter.get_total_flops() <= 1.05 * run.get_total_flops()
    assert bool((found.per_example == 0).all())


def test_the_budget_is_that_of_the_machine_not_of_the_moment() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    before = memory_budget("cpu")
    filled = torch.ones(2**27)
    assert memory_budget("cpu") == before == min(2**31, total // 4)
    del filled


def test_precision_is_put_back_whatever_happens() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), float32_matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
