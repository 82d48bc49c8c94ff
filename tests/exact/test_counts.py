"""Counted operations are those that torch sees, stage by stage."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.random_models import random_model, random_pairs
from tl_entity import Head, PairBatch
from tl_entity.errors import InputError
from tl_entity.exact.counts import (
    CircuitEvaluation,
    Job,
    PathPatching,
    cross_model_patching,
    knockouts,
    mask_steps,
)
from tl_entity.exact.machine import calibrate
from tl_entity.exact.path_patching import patched_values
from tl_entity.hooks import path_patching as hooks_engine
from tl_entity.methods.circuits import evaluate_circuits
from tl_entity.methods.cmap import cmap_each
from tl_entity.methods.dcm import learn_mask
from tl_entity.methods.knockout import knock_out_attention

MEMORY = 2**30
RECEIVERS = (Head(1, 0), Head(1, 1), Head(2, 0))
CIRCUITS = (
    {"last": [Head(1, 0), Head(2, 1)], "place": [Head(1, 1)]},
    {"early": [Head(0, 0), Head(2, 1)]},
)


@pytest.fixture(scope="module", params=[2, 1], ids=["own key-value heads", "shared ones"])
def model(request):
    return some_model(request.param)


def some_model(n_kv_heads: int, seed: int = 0):
    return random_model(3, n_heads=2, n_kv_heads=n_kv_heads, dtype=torch.float32, seed=seed)


@pytest.fixture(scope="module")
def pairs() -> PairBatch:
    return random_pairs(4, 9)


def counted(job: Job, model, pairs: PairBatch, memory: int = MEMORY) -> int:
    return sum(job.count(model.cfg, pairs, memory).tally.operations.values())


def seen(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("position", "receiver_input", "senders", "memory"),
    [
        ("last", None, "heads", MEMORY),
        ("place", None, "heads", MEMORY),
        ("early", None, "heads", MEMORY),
        ("last", "q", "heads", MEMORY),
        ("place", "q", "heads", MEMORY),
        ("place", "k", "heads", MEMORY),
        ("early", "v", "heads", MEMORY),
        ("early", "v", "heads", 2**14),
        ("last", None, "mlps", MEMORY),
        ("place", "q", "mlps", MEMORY),
    ],
)
def test_path_patching(model, pairs, position, receiver_input, senders, memory):
    receivers = None if receiver_input is None else RECEIVERS
    job = PathPatching(position, receivers, receiver_input, senders)
    real = seen(
        lambda: patched_values(
            model,
            pairs,
            position=position,
            receivers=receivers,
            receiver_input=receiver_input,
            senders=senders,
            memory=memory,
        )
    )
    assert counted(job, model, pairs, memory) == pytest.approx(real, rel=0.02)


def test_an_mlp_without_a_gate_has_two_products(pairs):
    plain = random_model(3, dtype=torch.float32, gated_mlp=False)
    real = seen(lambda: patched_values(plain, pairs, position="last"))
    assert counted(PathPatching("last"), plain, pairs) == pytest.approx(real, rel=0.02)


def test_what_depends_on_the_prompts_is_not_counted(pairs):
    cfg = random_model(2, num_experts=3, experts_per_token=2).cfg
    with pytest.raises(InputError, match="mixture of experts"):
        PathPatching("last").count(cfg, pairs, MEMORY)


@pytest.mark.parametrize("receiver_input", [None, "q"])
def test_path_patching_by_plain_hooks(model, pairs, receiver_input):
    receivers = None if receiver_input is None else RECEIVERS
    job = PathPatching("last", receivers, receiver_input)
    real = seen(
        lambda: hooks_engine.patched_values(
            model, pairs, position="last", receivers=receivers, receiver_input=receiver_input
        )
    )
    count = job.count(model.cfg, pairs, MEMORY)
    assert count.hooks_operations == pytest.approx(real, rel=0.02)
    # Clean, corrupt and scored run, and for each sender one, or two if there are receivers.
    assert count.hooks_passes == 3 + (3 * 2 if receivers is None else 2 * 2 * 2)


def test_circuits(model, pairs):
    values = torch.randn(3, 9, 2, 8)
    job = CircuitEvaluation(CIRCUITS, batch_size=3)
    real = seen(
        lambda: evaluate_circuits(model, pairs.clean, CIRCUITS, mean_outputs=values, batch_size=3)
    )
    assert counted(job, model, pairs) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("position", "candidates", "epochs"),
    [
        ("last", [Head(0, 0), Head(1, 1)], 1),
        ("place", [Head(1, 1), Head(2, 1)], 1),
        ("place", [Head(1, 1)], 2),
    ],
)
def test_training_a_mask(model, pairs, position, candidates, epochs):
    job = mask_steps(candidates, position=position, epochs=epochs, batch_size=3)
    real = seen(
        lambda: learn_mask(model, pairs, candidates, position=position, epochs=epochs, batch_size=3)
    )
    assert counted(job, model, pairs) == pytest.approx(real, rel=0.02)


def test_patching_from_another_model(model, pairs):
    other = some_model(model.cfg.n_key_value_heads or 2, seed=1)
    choices = [(heads, patch) for heads in CIRCUITS for patch in ("output", "q", "k", "v")]
    job = cross_model_patching(choices, batch_size=3)
    real = seen(lambda: cmap_each(model, other, pairs.clean, choices, batch_size=3))
    same = PairBatch(pairs.clean, pairs.clean, pairs.targets)
    assert counted(job, model, same) == pytest.approx(real, rel=0.02)


def test_attention_knockout(model, pairs):
    job = knockouts(model.cfg, from_position="last", batch_size=3)
    real = seen(
        lambda: knock_out_attention(
            model, pairs.clean, from_position="last", to_position="place", batch_size=3
        )
    )
    assert counted(job, model, pairs) == pytest.approx(real, rel=0.02)


def test_more_of_anything_is_more_to_compute(model, pairs):
    fewer = PathPatching("place", RECEIVERS[:1], "v")
    more = PathPatching("place", RECEIVERS, "v")
    earlier = PathPatching("early", RECEIVERS, "v")
    assert counted(fewer, model, pairs[:3]) < counted(fewer, model, pairs)
    assert counted(fewer, model, pairs) < counted(more, model, pairs)
    assert counted(more, model, pairs) < counted(earlier, model, pairs)


def test_less_memory_is_less_at_a_time(model, pairs):
    job = PathPatching("early", RECEIVERS, "v")
    roomy, tight = (job.count(model.cfg, pairs, memory) for memory in (MEMORY, 2**14))
    assert tight.chunk_bytes < roomy.chunk_bytes


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (PathPatching("nowhere"), "no position 'nowhere'"),
        (PathPatching("last", (Head(3, 0),), "q"), "no head L3H0"),
        (PathPatching("last", RECEIVERS), "go together"),
        (CircuitEvaluation(({"last": [Head(0, 9)]},)), "no head L0H9"),
    ],
)
def test_what_cannot_be_computed_is_not_counted(model, pairs, job, expected):
    with pytest.raises(InputError, match=expected):
        job.count(model.cfg, pairs, MEMORY)


def test_patching_names_what_it_knows():
    with pytest.raises(InputError, match="'mlp' can't be patched"):
        cross_model_patching([(CIRCUITS[0], "mlp")])


def test_seconds_grow_with_the_work(model, pairs):
    few = PathPatching("last").count(model.cfg, pairs[:1], MEMORY).tally
    many = PathPatching("last").count(model.cfg, random_pairs(60, 9), MEMORY).tally
    machine = calibrate([few, many], device="cpu", dtype=torch.float32)
    assert 0 < machine.product_seconds(few) < machine.seconds(few, bytes_per_number=4)
    assert machine.seconds(few, bytes_per_number=4) < machine.seconds(many, bytes_per_number=4)
