"""A search for the mechanism takes no more than its plan says, and that piece by piece."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.methods.planted import by_role, crowded_model, planted_pairs
from tl_entity import GateTraining, InputError, PairBatch, find_mechanism, zero_ablation
from tl_entity.hooks.gates import Gates
from tl_entity.methods.gated_forward import GatedForward
from tl_entity.methods.mechanism import split_prompts
from tl_entity.planning.mechanism_search import MechanismSearch
from tl_entity.planning.plan import plan

MODEL = crowded_model()
DRAWN = planted_pairs(240, seed=1)
PAIRS = PairBatch(by_role(DRAWN.clean), by_role(DRAWN.corrupt), DRAWN.targets)
MEMORY = 2**28
TRAINING = GateTraining(first_steps=4, steps=3, prompts_per_step=8, most_prices=2, prunings=1)
JOB = MechanismSearch(TRAINING, n_sizes=5, batch_size=16)


def seen(work) -> int:
    """Operations of real runs, by torch's own counter, which does not know fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_the_plan_is_the_sum_of_the_runs_that_a_search_is_made_of() -> None:
    forward = GatedForward.of(MODEL, zero_ablation(), batch_size=16, memory=MEMORY)
    gates = Gates.filled(MODEL.cfg, ("start", "label", "value", "last"), 0.5)
    training, choosing, reporting = split_prompts(PAIRS, 0)
    recorded = {id(some): forward.record(some) for some in (training, choosing, reporting)}

    def gradient(some) -> int:
        return seen(lambda: forward.gradient(forward.record(some), gates, "kl")) - seen(
            lambda: forward.record(some)
        )

    def evaluation(some, n: int) -> int:
        return seen(lambda: forward.evaluate(recorded[id(some)], [gates] * n))

    n_chosen = 1 + 2 + 5 * (1 + 2)  # of 32 nodes
    expected = sum(
        seen(lambda some=s: forward.record(some)) for s in (training, choosing, reporting)
    )
    expected += 4 * gradient(training[:64]) + (4 + 3) * gradient(training[:8])
    expected += 2 * gradient(training) + n_chosen * evaluation(choosing, 1)
    expected += evaluation(reporting, 5)
    assert JOB.count(MODEL, PAIRS, MEMORY).tally.total_operations == expected


def test_a_search_takes_no_more() -> None:
    took = seen(
        lambda: find_mechanism(
            MODEL,
            PAIRS,
            ablation=zero_ablation(),
            target=0.5,
            agreement=0.5,
            training=TRAINING,
            curve=(2.0,),
            n_random=2,
            batch_size=16,
            memory=MEMORY,
        )
    )
    planned = JOB.count(MODEL, PAIRS, MEMORY).tally.total_operations
    assert planned / 4 < took <= planned


def test_it_is_planned_like_any_other_job() -> None:
    found = plan(MODEL, PAIRS, {"mechanism": JOB}, timed=False)
    assert found["mechanism"].total_operations > 0 and found["mechanism"].hooks_passes > 10
    bare = PairBatch(DRAWN.clean, DRAWN.corrupt, DRAWN.targets)
    with pytest.raises(InputError, match="no roles"):
        plan(MODEL, bare, {"mechanism": JOB}, timed=False)
