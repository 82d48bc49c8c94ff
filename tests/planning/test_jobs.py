"""What is planned on a model without weights is what a real run takes: operations and memory."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.random_models import random_model, random_pairs
from tl_entity import Head, PairBatch, mean_head_outputs
from tl_entity.errors import InputError
from tl_entity.exact import counts as old_place
from tl_entity.heads import Circuit, Group
from tl_entity.hooks import path_patching as hooks_engine
from tl_entity.methods.activation_patching import activation_patch_each
from tl_entity.methods.circuits import evaluate, evaluate_circuits, evaluate_removals
from tl_entity.methods.cmap import cmap_each
from tl_entity.methods.completeness import completeness
from tl_entity.methods.dcm import learn_mask
from tl_entity.methods.knockout import knock_out_attention
from tl_entity.methods.minimality import minimality
from tl_entity.metrics import TARGET_LOGIT
from tl_entity.planning.counting import OperationCounter
from tl_entity.planning.jobs import (
    CircuitEvaluation,
    Count,
    Job,
    Method,
    PathPatching,
    cross_model_patching,
    knockouts,
    mask_steps,
)
from tl_entity.planning.machine import calibrate

MEMORY = 2**30
TIGHT = 2**15
"""So little memory that prompts, senders and edits go in several chunks."""

RECEIVERS = (Head(1, 0), Head(1, 1), Head(2, 0))
CIRCUITS = (
    {"last": [Head(1, 0), Head(2, 1)], "place": [Head(1, 1)]},
    {"early": [Head(0, 0), Head(2, 1)]},
)
CIRCUIT = Circuit(
    (
        Group("a", "last", (Head(1, 0), Head(2, 1))),
        Group("b", "place", (Head(0, 1), Head(1, 1))),
    )
)


@pytest.fixture(scope="module", params=[2, 1], ids=["own key-value heads", "shared ones"])
def model(request):
    return some_model(request.param)


def some_model(n_kv_heads: int, seed: int = 0):
    return random_model(3, n_heads=2, n_kv_heads=n_kv_heads, dtype=torch.float32, seed=seed)


@pytest.fixture(scope="module")
def pairs() -> PairBatch:
    return random_pairs(4, 9)


def operations(job: Job, like: Any, pairs: PairBatch, memory: int = MEMORY) -> int:
    return job.count(like, pairs, memory).tally.total_operations


def seen(work: Callable[[], Any]) -> int:
    """By torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measured(work: Callable[[], Any]) -> OperationCounter:
    """A real run under the counter that plans use."""
    with OperationCounter() as counter:
        work()
    return counter


JOBS: dict[str, Job] = {
    "logits at last": PathPatching("last"),
    "logits from elsewhere": PathPatching("place"),
    "q at last": PathPatching("last", RECEIVERS, "q"),
    "q at place": PathPatching("place", RECEIVERS, "q"),
    "k at place": PathPatching("place", RECEIVERS, "k"),
    "v at the first token": PathPatching("early", RECEIVERS, "v"),
    "v in batches": PathPatching("early", RECEIVERS, "v", batch_size=3),
    "q and v": PathPatching("place", {"q": RECEIVERS[:2], "v": RECEIVERS[1:]}),
    "of a logit": PathPatching("place", RECEIVERS, "v", metric=TARGET_LOGIT),
    "MLPs": PathPatching("last", senders="mlps"),
    "MLPs into q": PathPatching("place", RECEIVERS, "q", senders="mlps"),
    "circuits": CircuitEvaluation(CIRCUITS, batch_size=3),
    "a mask at last": mask_steps([Head(0, 0), Head(1, 1)], position="last", batch_size=3),
    "a mask at place": mask_steps([Head(1, 1), Head(2, 1)], position="place", batch_size=3),
    "knockout": knockouts(some_model(2).cfg, from_position="last", batch_size=3),
}


@pytest.mark.parametrize("memory", [MEMORY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", JOBS)
def test_a_plan_is_the_real_run(model, pairs, name, memory):
    job = JOBS[name]
    planned = job.count(model, pairs, memory)
    # A model's weights are looked at once, the first time: no part of the job.
    assert planned.tally.total_operations == seen(lambda: job.run(model, pairs, memory)) > 0
    real = measured(lambda: job.run(model, pairs, memory))
    assert planned.tally.operations == real.tally.operations
    # A few bytes of indices come again in a real run that a plan goes through once.
    assert planned.tally.moved == pytest.approx(real.tally.moved, rel=1e-3)
    # What a repeated step keeps for its backward pass is let go at once, not bit by bit.
    rel = 0.03 if "mask" in name else 0
    assert planned.cache_bytes == real.cache_peak > 0
    assert planned.cache_bytes + planned.chunk_bytes == pytest.approx(real.peak, rel=rel)


Call = Callable[[Any, PairBatch, "int | None"], Any]

CALLS: dict[str, tuple[Call, Job]] = {
    "circuits": (
        lambda m, p, memory: evaluate_circuits(
            m, p.clean, CIRCUITS, mean_outputs=means(m), batch_size=3, memory=memory
        ),
        JOBS["circuits"],
    ),
    "mask": (
        lambda m, p, memory: learn_mask(
            m, p, [Head(1, 1), Head(2, 1)], position="place", batch_size=3, memory=memory
        ),
        JOBS["a mask at place"],
    ),
    "knockout": (
        lambda m, p, memory: knock_out_attention(
            m, p.clean, from_position="last", to_position="place", batch_size=3, memory=memory
        ),
        JOBS["knockout"],
    ),
}


def means(model: Any) -> Tensor:
    return torch.randn(3, 9, 2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CALLS)
def test_a_job_is_the_call_it_stands_for(model, pairs, name):
    call, job = CALLS[name]
    assert operations(job, model, pairs) == seen(lambda: call(model, pairs, MEMORY))


@pytest.mark.parametrize("memory", [MEMORY, TIGHT], ids=["roomy", "tight"])
def test_patching_from_another_model(model, pairs, memory):
    other = some_model(model.cfg.n_key_value_heads or 2, seed=1)
    choices = [(heads, patch) for heads in CIRCUITS for patch in ("output", "q", "k", "v")]
    planned = cross_model_patching(choices, batch_size=3).count(model, pairs, memory)

    def work() -> object:
        return cmap_each(model, other, pairs.clean, choices, batch_size=3, memory=memory)

    real = measured(work)
    assert planned.tally.operations == real.tally.operations
    assert planned.tally.total_operations == seen(work)
    assert planned.cache_bytes + planned.chunk_bytes == pytest.approx(real.peak, rel=0.02)


METHODS: dict[str, Call] = {
    "mean outputs": lambda m, p, memory: mean_head_outputs(m, p.clean, batch_size=3),
    "the whole model": lambda m, p, memory: evaluate(m, p.clean, batch_size=3, memory=memory),
    "removals": lambda m, p, memory: evaluate_removals(
        m, p.clean, CIRCUITS, mean_outputs=like(m), batch_size=3, memory=memory
    ),
    "activation patching": lambda m, p, memory: activation_patch_each(
        m, p, CIRCUITS, batch_size=3, memory=memory
    ),
    "completeness": lambda m, p, memory: completeness(
        m, p.clean, CIRCUIT, mean_outputs=like(m), n_random=3, seed=0, memory=memory
    ),
    "minimality": lambda m, p, memory: minimality(
        m, p.clean, CIRCUIT, mean_outputs=like(m), seed=0, memory=memory
    ),
}


def like(model: Any) -> Tensor:
    return torch.zeros(3, 9, 2, 8, device=model.W_E.device)


@pytest.mark.parametrize("name", METHODS)
def test_any_method_can_be_planned(model, pairs, name):
    """In a plan every answer is token 0. So it is here of a model whose logits are all alike, and
    minimality, which goes by answers, takes the same way."""
    model = copy.deepcopy(model)
    model.unembed.W_U.zero_()
    call = METHODS[name]
    planned = Method(call).count(model, pairs, MEMORY)
    real = measured(lambda: call(model, pairs, MEMORY))
    assert planned.tally.operations == real.tally.operations
    assert planned.tally.total_operations > 0
    assert planned.cache_bytes + planned.chunk_bytes == pytest.approx(real.peak, rel=0.03)


def test_a_configuration_lies_in_memory_as_a_loaded_model_does(model, pairs):
    """Heads' weights are views of whole matrices there, so that no projection copies them."""
    job = PathPatching("place", RECEIVERS, "k")
    of_model, of_configuration = (job.count(m, pairs, MEMORY) for m in (model, model.cfg))
    assert of_model.tally.operations == of_configuration.tally.operations
    assert of_configuration.tally.moved < of_model.tally.moved


def test_chunks_that_are_alike_are_counted_all(model):
    """Twelve pairs that are three times the same four, in batches of four."""
    four = random_pairs(4, 9)
    order = torch.arange(12) % 4
    job = PathPatching("place", RECEIVERS, "v", batch_size=4)
    assert operations(job, model, four[order]) == 3 * operations(job, model, four)


def test_an_mlp_without_a_gate_has_two_products(pairs):
    plain = random_model(3, dtype=torch.float32, gated_mlp=False)
    job = PathPatching("last")
    assert operations(job, plain, pairs) == seen(lambda: job.run(plain, pairs, None))


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
            model,
            pairs,
            hooks_engine.Path(receivers=None if receivers is None else {"q": receivers}),
        )
    )
    count = job.count(model, pairs, MEMORY)
    assert count.hooks_operations == pytest.approx(real, rel=0.02)
    # Clean, corrupt and scored run, and for each sender one, or two if there are receivers.
    assert count.hooks_passes == 3 + (3 * 2 if receivers is None else 2 * 2 * 2)


def test_the_other_jobs_by_plain_hooks(model, pairs):
    def by_hooks(work: Callable[..., Any], *given: Any, **named: Any) -> int:
        return seen(lambda: work(*given, **named, engine="hooks", batch_size=4))

    circuits = by_hooks(evaluate_circuits, model, pairs.clean, CIRCUITS, mean_outputs=means(model))
    heads = [Head(0, 0), Head(1, 1)]
    mask = by_hooks(learn_mask, model, pairs, heads, position="place")
    at = {"from_position": "last", "to_position": "place"}
    knockout = by_hooks(knock_out_attention, model, pairs.clean, **at)
    found: Sequence[tuple[Count, int, int]] = [
        (CircuitEvaluation(CIRCUITS).count(model, pairs, MEMORY), 2, circuits),
        (mask_steps(heads, position="place").count(model, pairs, MEMORY), 5, mask),
        (knockouts(model.cfg, from_position="last").count(model, pairs, MEMORY), 4, knockout),
    ]
    for count, passes, real in found:
        assert count.hooks_passes == passes
        assert count.hooks_operations == pytest.approx(real, rel=0.02)


def test_more_of_anything_is_more_to_compute(model, pairs):
    fewer = PathPatching("place", RECEIVERS[:1], "v")
    more = PathPatching("place", RECEIVERS, "v")
    earlier = PathPatching("early", RECEIVERS, "v")
    assert operations(fewer, model, pairs[:3]) < operations(fewer, model, pairs)
    assert operations(fewer, model, pairs) < operations(more, model, pairs)
    assert operations(more, model, pairs) < operations(earlier, model, pairs)


def test_less_memory_is_less_at_a_time(model):
    job, pairs = PathPatching("early", RECEIVERS, "v"), random_pairs(20, 9)
    roomy, tight = (job.count(model, pairs, memory) for memory in (MEMORY, TIGHT))
    assert tight.chunk_bytes < roomy.chunk_bytes


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (PathPatching("nowhere"), "no position 'nowhere'"),
        (PathPatching("last", (Head(3, 0),), "q"), "no head L3H0"),
        (PathPatching("last", RECEIVERS), "go together"),
        (CircuitEvaluation(({"last": [Head(0, 9)]},)), "no head L0H9"),
        (cross_model_patching([(CIRCUITS[0], "mlp")]), "'mlp' can't be patched"),
    ],
)
def test_what_cannot_be_computed_is_not_counted(model, pairs, job, expected):
    with pytest.raises(InputError, match=expected):
        job.count(model, pairs, MEMORY)


def test_a_mask_needs_candidates():
    with pytest.raises(InputError, match="no candidate heads"):
        mask_steps([], position="last")


def test_seconds_grow_with_the_work(model, pairs):
    few = PathPatching("last").count(model, pairs[:1], MEMORY).tally
    many = PathPatching("last").count(model, random_pairs(60, 9), MEMORY).tally
    machine = calibrate([few, many], device="cpu", dtype=torch.float32)
    assert 0 < machine.product_seconds(few) < machine.seconds(few)
    assert machine.seconds(few) < machine.seconds(many)


def test_names_can_be_had_from_their_old_place():
    assert old_place.PathPatching is PathPatching
    assert old_place.mask_steps is mask_steps
