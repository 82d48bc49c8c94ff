"""Completeness where the answer is known, and removal by removal."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.methods.planted import COPY, NOTE, planted_model, planted_pairs
from tests.random_models import random_model, random_prompts
from tl_entity import Circuit, Group, Head, InputError, evaluate, mean_head_outputs
from tl_entity.methods.completeness import completeness, random_parts

MODEL = planted_model()
PROMPTS = planted_pairs(40).clean
MEANS = mean_head_outputs(MODEL, planted_pairs(200, seed=1).clean)
PLANTED = Circuit((Group("copier", "last", (COPY,)), Group("note_taker", "value", (NOTE,))))
BACKUP = Head(1, 0)


def model_with_a_backup():
    """The planted model, in which a second head copies as the first does."""
    model = planted_model()
    attn = model.blocks[COPY.layer].attn
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
        weights = getattr(attn, name).data
        weights[BACKUP.head] = weights[COPY.head]
    return model


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_the_planted_circuit_is_complete_but_for_notes_at_other_tokens(engine: str) -> None:
    found = completeness(
        MODEL, PROMPTS, PLANTED, mean_outputs=MEANS, seed=0, n_random=0, engine=engine
    )
    assert found.whole.of_circuit.accuracy == found.whole.of_model.accuracy == 1.0
    assert found.whole.incompleteness == 0
    copier, note_taker = found.groups
    assert (copier.name, note_taker.name) == ("copier", "note_taker")
    assert max(copier.of_model.accuracy, copier.of_circuit.accuracy) < 0.5
    assert copier.incompleteness < 0.2
    # The note-taker is in the circuit at the right value only. Without that note, the model still
    # has the notes at the other values, by which it rules them out; the circuit has none.
    assert note_taker.of_model.accuracy == 1.0
    assert note_taker.of_circuit.accuracy < 0.5


def test_a_circuit_that_lacks_the_backup_is_not_complete() -> None:
    model = model_with_a_backup()
    means = mean_head_outputs(model, planted_pairs(200, seed=1).clean)
    found = completeness(model, PROMPTS, PLANTED, mean_outputs=means, seed=0, n_random=0)
    copier = found.groups[0]
    # The model still has its backup, the circuit nothing.
    assert copier.of_model.accuracy == 1.0
    assert copier.of_circuit.accuracy < 0.5
    assert copier.model_loss == 0
    assert copier.difference == copier.circuit_loss == 1 - copier.of_circuit.accuracy
    assert copier.incompleteness == copier.published_incompleteness == copier.difference
    assert 0 < copier.interval.low < copier.difference < copier.interval.high
    whole = Circuit((Group("copier", "last", (COPY, BACKUP)), PLANTED.groups[1]))
    mended = completeness(model, PROMPTS, whole, mean_outputs=means, seed=0, n_random=0)
    assert mended.groups[0].incompleteness < 0.2


def test_what_a_circuit_lacks_from_the_start_is_not_counted_again() -> None:
    """A circuit of the copier alone answers little, so its removal costs it less than the model;
    that it answers little is its faithfulness, not a loss by what is removed."""
    copier = Circuit((Group("copier", "last", (COPY,)), Group("idle", "last", (Head(0, 1),))))
    found = completeness(MODEL, PROMPTS, copier, mean_outputs=MEANS, seed=0, n_random=0)
    whole, of_model = found.whole.of_circuit.accuracy, found.whole.of_model.accuracy
    assert whole < 0.5 < of_model
    assert found.whole.difference == 0 and found.whole.published_incompleteness > 0.5
    idle = found.groups[1]
    assert idle.of_model.accuracy == of_model and idle.of_circuit.accuracy == whole
    assert idle.difference == 0 and idle.interval.low < 0 < idle.interval.high
    assert idle.published_incompleteness > 0.5


def test_an_empty_group_is_no_removal() -> None:
    circuit = Circuit((*PLANTED.groups, Group("nobody", "last", ())))
    found = completeness(MODEL, PROMPTS, circuit, mean_outputs=MEANS, seed=0, n_random=0)
    assert [group.name for group in found.groups] == ["copier", "note_taker"]


def test_a_head_is_removed_by_its_token_whatever_the_name() -> None:
    """`answer` is the last token under another name: taking the copier away there takes it away."""
    named = replace(PROMPTS, positions={**PROMPTS.positions, "answer": PROMPTS.position("last")})
    how = {"mean_outputs": MEANS}
    for engine in ("exact", "hooks"):
        by_name, by_other = (
            evaluate(
                MODEL, named, keep=PLANTED, remove={at: [COPY]}, engine=engine, **how
            ).answer_log_probability
            for at in ("last", "answer")
        )
        torch.testing.assert_close(by_name, by_other)
    circuit = Circuit((Group("copier", "answer", (COPY,)), Group("again", "last", (COPY,))))
    found = completeness(MODEL, named, circuit, mean_outputs=MEANS, seed=0, n_random=0)
    neither = evaluate(MODEL, named, keep={}, mean_outputs=MEANS)
    for group in found.groups:
        torch.testing.assert_close(
            group.of_circuit.answer_log_probability, neither.answer_log_probability
        )


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_every_point_is_the_two_accuracies_of_the_definition(engine: str) -> None:
    model, prompts = random_model(n_layers=3, n_kv_heads=2), random_prompts(7, 8)
    circuit = Circuit(
        (
            Group("a", "last", (Head(2, 0), Head(1, 1))),
            Group("b", "last", (Head(0, 3),)),
            Group("c", "place", (Head(1, 1), Head(0, 0))),
        )
    )
    means = mean_head_outputs(model, random_prompts(20, 8, seed=1))
    done: list[int] = []
    found = completeness(
        model,
        prompts,
        circuit,
        mean_outputs=means,
        seed=3,
        n_random=4,
        engine=engine,
        batch_size=3,
        progress=done.append,
    )
    removals = (found.whole, *found.groups, *found.random)
    assert sum(done) == 2 * len(removals) * 7
    parts = random_parts(circuit, 4, seed=3)
    assert [removal.heads for removal in removals] == [
        {},
        {"last": (Head(2, 0), Head(1, 1))},
        {"last": (Head(0, 3),)},
        {"place": (Head(1, 1), Head(0, 0))},
        *parts,
    ]
    for removal in removals:
        for keep, evaluation in ((circuit, removal.of_circuit), (None, removal.of_model)):
            alone = evaluate(
                model,
                prompts,
                keep=keep,
                remove=removal.heads,
                mean_outputs=means,
                engine="hooks",
            )
            torch.testing.assert_close(
                evaluation.answer_log_probability,
                alone.answer_log_probability,
                atol=1e-10,
                rtol=0,
            )
            assert torch.equal(evaluation.correct, alone.correct)


def test_points_are_told_as_a_table() -> None:
    found = completeness(MODEL, PROMPTS, PLANTED, mean_outputs=MEANS, seed=0, n_random=2)
    table = found.to_dataframe()
    assert table["kind"].tolist() == ["whole", "group", "group", "random", "random"]
    assert table["n_heads"].tolist() == [0, 1, 1, 1, 1]
    np.testing.assert_allclose(table["circuit_correct"] / 40, table["circuit_accuracy"])
    np.testing.assert_allclose(table["model_correct"] / 40, table["model_accuracy"])
    assert (table["circuit_low"] <= table["circuit_accuracy"]).all()
    assert (table["difference"].abs() == table["incompleteness"]).all()
    mean = table["incompleteness"][1:3].mean()
    assert f"incompleteness {mean:.3f} over 2 groups" in str(found)
    assert "without copier: circuit" in str(found.groups[0])
    assert "without nothing" in str(found.whole)


LARGE = Circuit(
    (
        Group("a", "last", tuple(Head(2, head) for head in range(6))),
        Group("b", "last", (Head(1, 0),)),
        Group("c", "place", tuple(Head(2, head) for head in range(3))),
    )
)


def test_random_parts_are_drawn_without_replacement() -> None:
    parts = random_parts(LARGE, 200, seed=0)
    members = {(name, head) for name, heads in LARGE.heads_at().items() for head in heads}
    drawn = [[(name, head) for name, heads in part.items() for head in heads] for part in parts]
    for part in drawn:
        assert len(set(part)) == len(part)
        assert set(part) <= members
    assert len({frozenset(part) for part in drawn}) == 200
    sizes = [len(part) for part in drawn]
    # Never all ten; every other size comes up.
    assert set(sizes) == set(range(1, 10))
    assert parts == random_parts(LARGE, 200, seed=0)
    assert parts != random_parts(LARGE, 200, seed=1)
    assert [sum(map(len, part.values())) for part in random_parts(LARGE, 9, size=4, seed=0)] == [
        4
    ] * 9


def test_small_circuits_have_few_parts() -> None:
    parts = random_parts(PLANTED, 4, seed=0)
    assert len(parts) == 4
    assert {tuple(part) for part in parts} == {("last",), ("value",)}
    lonely = Circuit((Group("a", "last", (Head(0, 0),)),))
    assert random_parts(lonely, 1, seed=0) == [{"last": (Head(0, 0),)}]


def test_parts_that_cannot_be_drawn_are_refused() -> None:
    for size in (0, 11):
        with pytest.raises(InputError, match=f"{size} heads can't be drawn of a circuit of 10"):
            random_parts(LARGE, 1, size=size, seed=0)
    empty = Circuit.entity_tracking()
    with pytest.raises(InputError, match="of a circuit of 0"):
        random_parts(empty, 1, seed=0)
    assert random_parts(empty, 0, seed=0) == []
    with pytest.raises(InputError, match="no head L2H0"):
        completeness(MODEL, PROMPTS, LARGE, mean_outputs=MEANS, seed=0)
