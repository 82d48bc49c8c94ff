"""One object says how runs are made, and every method reads what it is asked to off them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.random_models import random_model, random_pairs
from tl_entity import (
    Circuit,
    Group,
    Head,
    PairBatch,
    Runner,
    activation_patch,
    cmap,
    evaluate,
    evaluate_circuits,
    evaluate_removals,
    path_patch,
    zero_ablation,
)
from tl_entity.errors import InputError
from tl_entity.finite import NotFiniteError
from tl_entity.hooks import ablate_heads, answer_logits, knock_out, patch_from_model, patch_heads
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.methods.knockout import knockout_curve
from tl_entity.metrics import (
    ACCURACY,
    ANSWER_BEATS_FOIL,
    LOG_PROBABILITY,
    LOGIT_DIFFERENCE,
    PROBABILITY,
    TARGET_LOGIT,
    Metric,
)
from tl_entity.ranks import Together

HEADS = (Head(1, 0), Head(2, 3))
CIRCUIT = Circuit((Group("a", "last", HEADS), Group("b", "place", (Head(0, 1),))))
METRICS = (ACCURACY, ANSWER_BEATS_FOIL, LOG_PROBABILITY, LOGIT_DIFFERENCE, PROBABILITY)
MODEL = random_model(n_kv_heads=2)
OTHER = random_model(n_kv_heads=2, seed=1)


@pytest.fixture(scope="module")
def pairs() -> PairBatch:
    """The model answers some with their target, and some targets beat their foil."""
    pairs = random_pairs(6)
    logits = answer_logits(MODEL, pairs.clean)
    best, worst = logits.argmax(-1), logits.argmin(-1)
    targets = torch.where(torch.arange(6) < 2, best, pairs.targets)
    foils = torch.where(torch.arange(6) % 2 == 0, worst, best.roll(1))
    return PairBatch(pairs.clean, pairs.corrupt, targets, foils)


def by_hand(metric: Metric, logits: torch.Tensor, pairs: PairBatch) -> torch.Tensor:
    assert pairs.foils is not None
    rows = torch.arange(len(logits))
    target, foil = logits[rows, pairs.targets], logits[rows, pairs.foils]
    return {
        "accuracy": (target == logits.amax(-1)).double(),
        "answer beats foil": (target > foil).double(),
        "log probability": logits.log_softmax(-1)[rows, pairs.targets],
        "logit difference": target - foil,
        "probability": logits.softmax(-1)[rows, pairs.targets],
    }[metric.name]


def ablated(pairs: PairBatch, **which: Any) -> torch.Tensor:
    hooks = ablate_heads(zero_ablation().of_model(MODEL.cfg), pairs.clean, **which)
    return answer_logits(MODEL, pairs.clean, hooks)


def patched(pairs: PairBatch) -> torch.Tensor:
    cache = record(MODEL, pairs.corrupt, {hook_point("z", layer): None for layer in range(3)})
    hooks = patch_heads(cache, CIRCUIT, into=pairs.clean, source=pairs.corrupt)
    return answer_logits(MODEL, pairs.clean, hooks)


def blinded(pairs: PairBatch) -> torch.Tensor:
    hooks = knock_out(pairs.clean, from_position="last", to_position="early", layers=range(1, 3))
    return answer_logits(MODEL, pairs.clean, hooks)


Call = Callable[..., Any]

CALLS: dict[str, tuple[Call, Callable[[PairBatch], torch.Tensor]]] = {
    "evaluate": (lambda p, **how: evaluate(MODEL, p, **how), lambda p: ablated(p, remove={})),
    "keep": (
        lambda p, **how: evaluate_circuits(MODEL, p, [CIRCUIT], ablation=zero_ablation(), **how)[0],
        lambda p: ablated(p, keep=CIRCUIT),
    ),
    "remove": (
        lambda p, **how: evaluate_removals(MODEL, p, [CIRCUIT], ablation=zero_ablation(), **how)[0],
        lambda p: ablated(p, remove=CIRCUIT),
    ),
    "activation_patch": (lambda p, **how: activation_patch(MODEL, p, CIRCUIT, **how), patched),
}
"""Each method, and the logits of the same runs by plain hooks."""


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@pytest.mark.parametrize("name", CALLS)
def test_every_metric_is_read_off_the_same_runs(pairs, name, metric, engine):
    call, logits_of = CALLS[name]
    found = call(pairs, metric=metric, engine=engine, batch_size=4)
    logits = logits_of(pairs)
    expected = by_hand(metric, logits, pairs)
    torch.testing.assert_close(found.values.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.metric == metric.name
    assert found.predicted.tolist() == logits.argmax(-1).tolist()
    assert found.correct.tolist() == (logits.argmax(-1) == pairs.targets).tolist()
    assert found.to_dataframe()[metric.name].tolist() == found.values.tolist()


def test_the_answers_are_read_off_too_where_no_foils_are_needed(pairs):
    prompts = pairs.clean
    answered = PairBatch(prompts, prompts, prompts.answers, pairs.foils)
    moved = cmap(MODEL, OTHER, prompts, CIRCUIT, metric=PROBABILITY)
    logits = answer_logits(MODEL, prompts, patch_from_model(OTHER, MODEL, prompts, CIRCUIT))
    expected = by_hand(PROBABILITY, logits, answered)
    torch.testing.assert_close(moved.values, expected, atol=1e-6, rtol=1e-6)
    curve = knockout_curve(
        MODEL, prompts, from_position="last", to_position="early", metric=LOG_PROBABILITY
    )
    expected = by_hand(LOG_PROBABILITY, blinded(pairs), answered)
    torch.testing.assert_close(curve.evaluations[1].values, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_path_patching_by_any_metric(pairs, metric, engine):
    found = path_patch(MODEL, pairs, metric=metric, engine=engine)
    expected = by_hand(metric, answer_logits(MODEL, pairs.clean), pairs)
    torch.testing.assert_close(found.clean_values.double(), expected, atol=1e-5, rtol=1e-5)
    other = path_patch(MODEL, pairs, metric=metric, engine="hooks")
    torch.testing.assert_close(found.per_example, other.per_example, atol=1e-5, rtol=1e-5)


def test_a_metric_that_compares_needs_foils(pairs):
    for call, _ in CALLS.values():
        with pytest.raises(InputError, match="give PairBatch its foils"):
            call(replace(pairs, foils=None), metric=LOGIT_DIFFERENCE)


def test_a_metric_that_is_not_finite_is_an_error(pairs):
    broken = Metric("root", lambda logits, pairs: -logits.abs().log().abs()[..., 0] / 0)
    with pytest.raises(NotFiniteError, match="The metric 'root' is not finite"):
        evaluate(MODEL, pairs, metric=broken)


def test_settings_make_a_runner():
    said: list[int] = []
    runner = Runner("hooks", batch_size=3, progress=said.append)
    assert Runner.of() == Runner("exact")
    assert Runner.of(engine="hooks", memory=7) == Runner("hooks", memory=7)
    assert Runner.of(runner=runner) is not None
    assert Runner.of(runner=runner, batch_size=2) == replace(runner, batch_size=2)
    with pytest.raises(TypeError, match="batchsize"):
        Runner.of(batchsize=3)  # pyright: ignore[reportCallIssue]


def test_a_runner_is_the_same_as_its_settings(pairs):
    said: list[int] = []
    runner = Runner("hooks", batch_size=4, progress=said.append)
    by_runner = path_patch(MODEL, pairs, runner=runner)
    assert by_runner.engine == "hooks"
    assert sum(said) == 3 * 4 * len(pairs)
    by_settings = path_patch(MODEL, pairs, engine="hooks", batch_size=4)
    assert torch.equal(by_runner.per_example, by_settings.per_example)
    with pytest.raises(TypeError, match="engin"):
        evaluate(MODEL, pairs, engin="hooks")  # pyright: ignore[reportCallIssue]


def test_edits_say_themselves_from_where_on_to_recompute(pairs):
    """Lists of edits that begin at different tokens and layers, in one call."""

    def edits_of(chunk: PairBatch) -> list[Any]:
        points = {hook_point("z", layer): None for layer in range(3)}
        cache = record(MODEL, chunk.corrupt, points)
        both = {"into": chunk.clean, "source": chunk.corrupt}
        values = zero_ablation().of_model(MODEL.cfg)
        return [
            patch_heads(cache, {"early": [Head(0, 1)]}, **both),
            (),
            patch_heads(cache, {"last": [Head(2, 0)], "place": [Head(1, 1)]}, **both),
            ablate_heads(values, chunk.clean, remove={"place": [Head(1, 2)]}),
            knock_out(chunk.clean, from_position="place", to_position="early", layers=[2]),
        ]

    def read(logits: torch.Tensor, chunk: PairBatch) -> tuple[torch.Tensor, ...]:
        return logits[:, 3], logits.argmax(-1)

    exact = Runner(batch_size=4).each(MODEL, pairs, edits_of, read)
    hooks = Runner("hooks").each(MODEL, pairs, edits_of, read)
    for found, expected in zip(exact, hooks, strict=True):
        assert found.shape == (5, len(pairs))
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert len({tuple(row) for row in hooks[0].tolist()}) == 5


def test_no_edits_at_all_give_nothing(pairs):
    assert Runner().each(MODEL, pairs, lambda chunk: [], lambda logits, chunk: (logits,)) == ()
    assert evaluate_removals(MODEL, pairs, [], ablation=zero_ablation()) == []


def test_an_edit_that_cannot_be_recomputed_is_refused(pairs):
    def edits_of(chunk: PairBatch) -> list[Any]:
        return [[(hook_point("z", 1), lambda z, hook: z)]]

    with pytest.raises(InputError, match='knows no edit like function; use engine="hooks"'):
        Runner().each(MODEL, pairs, edits_of, lambda logits, chunk: (logits.argmax(-1),))


def test_what_goes_together_is_sliced_together(pairs):
    both = Together(pairs, torch.arange(6))
    assert len(both) == 6
    some, numbers = both[2:5].parts
    assert len(some) == 3
    assert numbers.tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match=r"\[6, 5\]"):
        Together(pairs, torch.arange(5))
    sums = Runner().over(both, 4, lambda rows: (rows.parts[0].targets + rows.parts[1],), MODEL)
    assert torch.equal(sums[0], pairs.targets + torch.arange(6))


def test_target_logit_of_a_circuit_by_both_engines(pairs):
    exact, hooks = (
        evaluate(MODEL, pairs, keep=CIRCUIT, ablation=zero_ablation(), metric=TARGET_LOGIT, **how)
        for how in ({"engine": "exact"}, {"engine": "hooks"})
    )
    torch.testing.assert_close(exact.values, hooks.values, atol=1e-5, rtol=1e-5)
