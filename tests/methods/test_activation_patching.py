"""Activation patching against an independent forward, and on pairs whose circuit is known."""

import math

import pytest
import torch

from tests.independent import Forward
from tests.methods.planted import COPY, NOTE, planted_model, planted_pairs
from tests.random_models import random_model, random_pairs
from tl_entity import Circuit, Group, Head, InputError, PairBatch, evaluate, load_model
from tl_entity.methods.activation_patching import (
    UNPATCHED,
    Carried,
    activation_patch,
    activation_patch_each,
    carries,
)
from tl_entity.models.registry import planted_circuit
from tl_entity.stats import wilson_interval
from tl_entity.tasks.desiderata import desideratum_draws

ENGINES = pytest.mark.parametrize("engine", ["exact", "hooks"])
CHOICES = [
    {"last": [Head(2, 1), Head(0, 3)]},
    {},
    {"place": [Head(1, 0)], "last": [Head(1, 0), Head(2, 2)]},
    {"early": [Head(0, 0), Head(2, 3)]},
    {"last": []},
    {"last": [Head(2, 1)], "early": []},
]


@ENGINES
@pytest.mark.parametrize("left", [False, True])
def test_patching_is_what_an_independent_forward_computes(engine: str, left: bool) -> None:
    model = random_model(n_kv_heads=2)
    pairs = random_pairs(5, left=left)
    found = activation_patch_each(model, pairs, CHOICES, engine=engine, batch_size=3)
    forward = Forward(model)
    for heads, evaluation in zip(CHOICES, found, strict=True):
        for row in range(len(pairs)):
            target = int(pairs.targets[row])
            expected = independent(forward, pairs, row, heads)
            log_probability = evaluation.answer_log_probability[row]
            torch.testing.assert_close(log_probability, expected[target], atol=1e-9, rtol=1e-9)
            assert evaluation.predicted[row] == expected.argmax()
            assert bool(evaluation.correct[row]) == (int(expected.argmax()) == target)


def independent(forward: Forward, pairs: PairBatch, row: int, heads: dict) -> torch.Tensor:
    """Answer log probabilities of one base prompt, its padding cut off, every head and position
    replaced in turn."""

    def unpadded(batch: object) -> tuple[torch.Tensor, dict[str, int]]:
        start = int(batch.mask[row].int().argmax())
        positions = {name: int(at[row]) - start for name, at in batch.positions.items()}
        return batch.tokens[row][batch.mask[row]], positions

    base, at = unpadded(pairs.clean)
    other, read_at = unpadded(pairs.corrupt)
    _, other_z, _ = forward.run(other)

    def replace(layer: int, head: int, z: torch.Tensor) -> torch.Tensor:
        for position, chosen in heads.items():
            if (layer, head) in chosen:
                z[at[position]] = other_z[layer, head][read_at[position]]
        return z

    log_probabilities, _, _ = forward.run(base, edit_z=replace)
    return log_probabilities[-1]


@ENGINES
def test_one_choice_at_a_time_gives_the_same(engine: str) -> None:
    model, pairs = random_model(), random_pairs(7)
    together = activation_patch_each(model, pairs, CHOICES, engine=engine)
    for heads, evaluation in zip(CHOICES, together, strict=True):
        alone = activation_patch(model, pairs, heads, engine=engine, batch_size=2)
        assert torch.equal(alone.predicted, evaluation.predicted)
        torch.testing.assert_close(
            alone.answer_log_probability, evaluation.answer_log_probability, atol=1e-9, rtol=0
        )
    circuit = Circuit((Group("one", "last", (Head(2, 1),)), Group("two", "last", (Head(0, 3),))))
    of_circuit = activation_patch(model, pairs, circuit, engine=engine)
    assert torch.equal(of_circuit.predicted, together[0].predicted)


def test_all_choices_share_one_run_of_each_prompt() -> None:
    model, pairs = random_model(), random_pairs(7)
    runs: list[int] = []
    model.embed.register_forward_hook(lambda module, given, out: runs.append(len(out)))
    done: list[int] = []
    activation_patch_each(model, pairs, CHOICES, batch_size=3, progress=done.append)
    assert sum(runs) == 2 * 7
    assert sum(done) == len(CHOICES) * 7


@ENGINES
def test_nothing_patched_and_patched_from_itself_change_nothing(engine: str) -> None:
    model, clean = random_model(), random_pairs(6).clean
    pairs = PairBatch(clean, clean, clean.answers)
    unedited = evaluate(model, clean)
    every = {name: [Head(i, j) for i in range(3) for j in range(4)] for name in ("last", "place")}
    for heads in ({}, every):
        found = activation_patch(model, pairs, heads, engine=engine)
        assert torch.equal(found.predicted, unedited.predicted)
        torch.testing.assert_close(
            found.answer_log_probability, unedited.answer_log_probability, atol=1e-12, rtol=0
        )


@ENGINES
def test_a_circuit_written_by_hand_carries_what_it_should(engine: str) -> None:
    model = planted_model()
    base, other = planted_pairs(60, 0).clean, planted_pairs(60, 1).clean
    differ = base.answers != other.answers
    base, other = base[differ], other[differ]
    to_other = PairBatch(base, other, other.answers)
    to_base = PairBatch(base, other, base.answers)
    assert activation_patch(model, to_other, {"last": [COPY]}, engine=engine).accuracy == 1
    assert activation_patch(model, to_other, {}, engine=engine).accuracy == 0
    assert activation_patch(model, to_base, {"last": [NOTE]}, engine=engine).accuracy == 1
    # Where another label is noted, the copier no longer finds the one asked for.
    assert activation_patch(model, to_base, {"value": [NOTE]}, engine=engine).accuracy < 0.8


@ENGINES
def test_planted_groups_carry_value_and_position(engine: str) -> None:
    model = load_model("default-tuned")
    circuit = Circuit.load(planted_circuit("default-tuned"))
    kinds = ["object_value", "box_label_value", "position"]
    draws = desideratum_draws(model.tokenizer, kinds, 40)
    found = carries(model, draws, circuit, seeds=(0, 1), engine=engine)
    for group in circuit:
        shares = {kind: found[group.name, kind].accuracy for kind in kinds}
        carried = "object_value" if group.name == "value_fetcher" else "position"
        assert shares[carried] > 0.4, group.name
        assert all(share < 0.15 for kind, share in shares.items() if kind != carried), group.name
    assert all(found[UNPATCHED, kind].accuracy < 0.05 for kind in kinds)


def test_counts_of_all_draws_are_kept() -> None:
    model = random_model()
    circuit = Circuit((Group("one", "last", (Head(2, 1),)), Group("two", "place", (Head(0, 3),))))
    other = Circuit((Group("one", "early", (Head(1, 1),)),))
    answered = evaluate(model, random_pairs(9, seed=0).clean).predicted

    def draw(seed: int) -> PairBatch:
        pairs = random_pairs(9, seed=seed)
        return PairBatch(pairs.clean, pairs.corrupt, answered)

    found = carries(model, {"a": draw, "b": draw}, {"a": circuit, "b": other}, seeds=(0, 1, 2))
    names = [(entry.desideratum, entry.group) for entry in found.entries]
    assert names == [("a", UNPATCHED), ("a", "one"), ("a", "two"), ("b", UNPATCHED), ("b", "one")]
    for entry in found.entries:
        heads = {entry.position: entry.heads} if entry.heads else {}
        alone = [activation_patch(model, draw(seed), heads) for seed in (0, 1, 2)]
        assert entry.correct == tuple(int(one.correct.sum()) for one in alone)
        assert entry.n_pairs == (9, 9, 9)
    assert found[UNPATCHED, "a"].correct[0] == 9
    frame = found.to_dataframe()
    assert frame["correct"].tolist() == [sum(entry.correct) for entry in found.entries]
    assert frame["heads"].tolist() == ["", "L2H1", "L0H3", "", "L1H1"]
    with pytest.raises(KeyError):
        found["two", "b"]


def test_pooled_accuracy_interval_and_spread_by_hand() -> None:
    entry = Carried("one", "last", (Head(0, 0),), "position", (0, 1), (3, 9), (10, 20))
    assert entry.accuracy == 12 / 30
    assert entry.accuracies == (0.3, 0.45)
    assert entry.interval == wilson_interval(12, 30)
    # Two values 0.15 apart: half their distance from the mean, times the square root of two.
    assert entry.spread == pytest.approx(0.075 * math.sqrt(2))
    assert str(entry) == "one, position: 0.400 [0.246, 0.577] of 30 pairs"
    single = Carried("one", "last", (), "position", (0,), (3,), (10,))
    assert math.isnan(single.spread)


def test_bad_questions_are_refused() -> None:
    model, pairs = random_model(), random_pairs(3)
    circuit = Circuit((Group("one", "last", (Head(2, 1),)),))
    with pytest.raises(InputError, match="no head L3H0"):
        activation_patch(model, pairs, {"last": [Head(3, 0)]})
    with pytest.raises(InputError, match="no position 'nowhere'"):
        activation_patch(model, pairs, {"nowhere": [Head(0, 0)]})
    with pytest.raises(InputError, match="no pairs"):
        activation_patch(model, pairs[:0], circuit)
    with pytest.raises(InputError, match="at least one seed"):
        carries(model, {"a": lambda seed: pairs}, circuit, seeds=())
    with pytest.raises(InputError, match="no circuit for the desideratum 'a'"):
        carries(model, {"a": lambda seed: pairs}, {"b": circuit}, seeds=(0,))
    unfit = random_model(attn_scores_soft_cap=30.0, n_kv_heads=2)
    with pytest.raises(InputError, match='engine="hooks"'):
        activation_patch(unfit, pairs, circuit)
