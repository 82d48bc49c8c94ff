"""A discovery's recipe: stages of several paths, chosen senders or MLPs, kept in the result."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.random_models import random_model, random_pairs
from tl_entity import (
    Discovery,
    Head,
    InputError,
    PairBatch,
    PromptBatch,
    Stage,
    discover_circuit,
    path_patch,
)
from tl_entity.methods.discovery import fingerprint
from tl_entity.methods.path_patching import path_patch_mlps
from tl_entity.metrics import LOG_PROBABILITY, LOGIT_DIFFERENCE

MODEL = random_model(n_layers=4, n_heads=4, n_kv_heads=2)
RANDOM = random_pairs(5)
PAIRS = replace(RANDOM, foils=(RANDOM.targets + 1) % 20)
"""`early` is each prompt's first token, ahead of `place` and `last`."""

A, B = Stage("a", "last"), Stage("b", "last", into="a", receiver_input="q")


def mapped(found: Discovery, *edges: tuple[str, str]) -> dict[str, list[Head]]:
    inputs: dict[str, list[Head]] = {}
    for group, which in edges:
        inputs.setdefault(which, []).extend(found.receivers[group])
    return inputs


@pytest.mark.parametrize("position", ["last", "place"])
@pytest.mark.parametrize("inputs", [("q", "k", "v"), ("q", "v"), ("k", "v")])
def test_both_engines_patch_several_inputs_together(inputs, position):
    heads = {"q": [Head(2, 1), Head(3, 0)], "k": [Head(2, 1), Head(2, 2)], "v": [Head(3, 3)]}
    receivers = {which: heads[which] for which in inputs}
    exact, hooks = (
        path_patch(MODEL, PAIRS, position=position, receivers=receivers, engine=engine)
        for engine in ("exact", "hooks")
    )
    torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-10, rtol=1e-8)
    assert exact.inputs == tuple((which, tuple(some)) for which, some in receivers.items())
    assert exact.top_layer == 3
    assert all(f"{which} of " in str(exact) for which in inputs)
    # Together they do another thing than each by itself.
    for which, some in receivers.items():
        alone = path_patch(
            MODEL, PAIRS, position=position, receivers=some, receiver_input=which
        ).per_example
        assert (alone - exact.per_example).abs().max() > 1e-6
        same = path_patch(MODEL, PAIRS, position=position, receivers={which: some})
        assert torch.equal(same.per_example, alone)
        assert (same.receivers, same.receiver_input) == (tuple(some), which)


def test_receivers_by_input_need_no_other_input():
    with pytest.raises(InputError, match="go without a receiver_input"):
        path_patch(MODEL, PAIRS, receivers={"q": [Head(2, 0)]}, receiver_input="q")


def test_a_stage_patches_into_several_groups_at_once():
    stages = (A, B, Stage("c", "place", "a", "v", edges=(("b", "v"), ("b", "k"))))
    sizes = {"a": 5, "b": 5, "c": 3}
    found = discover_circuit(MODEL, PAIRS, sizes=sizes, stages=stages)
    assert found.receivers["a"]
    assert found.receivers["b"]
    inputs = mapped(found, ("a", "v"), ("b", "v"), ("b", "k"))
    expected = path_patch(MODEL, PAIRS, position="place", receivers=inputs)
    assert torch.equal(found.scores["c"].per_example, expected.per_example)
    titles = [note.text for note in found.plot().layout.annotations]
    assert any("place into v of a and v of b and k of b" in str(text) for text in titles)
    assert found.stage("c").into_inputs == (("a", "v"), ("b", "v"), ("b", "k"))


def test_a_group_can_be_of_chosen_heads():
    senders = (Head(0, 1), Head(1, 2), Head(2, 0), Head(3, 3))
    stages = (replace(A, senders=senders), B)
    found = discover_circuit(MODEL, PAIRS, sizes={"a": 2, "b": 2}, stages=stages)
    scores = path_patch(MODEL, PAIRS)
    best = [head for head in scores.ranked() if head in senders][:2]
    expected = tuple(head for head in best if scores.intervals[head.layer, head.head, 1] < 0)
    assert found.receivers["a"] == expected
    assert expected
    with pytest.raises(InputError, match="can't have 5 heads: its stage names 4"):
        discover_circuit(MODEL, PAIRS, sizes={"a": 5, "b": 2}, stages=stages)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_a_group_can_be_of_mlps(engine):
    stages = (A, Stage("m", "place", "a", "v", mlps=True), Stage("n", "last", mlps=True))
    sizes = {"a": 4, "m": 2, "n": 3}
    found = discover_circuit(MODEL, PAIRS, sizes=sizes, stages=stages, engine=engine)
    expected = path_patch_mlps(MODEL, PAIRS, engine=engine)
    assert torch.equal(found.mlp_scores["n"].per_example, expected.per_example)
    order = expected.scores.argsort().tolist()[:3]
    below = [layer for layer in order if expected.intervals[layer, 1] < 0]
    assert found.mlps["n"] == tuple(below)
    assert found.mlp_scores["m"].receivers == found.receivers["a"]
    assert [group.name for group in found.circuit] == ["a"]
    assert f"n: MLPs of layers {below}" in str(found)


def test_a_discovery_keeps_its_recipe(tmp_path):
    stages = (A, Stage("b", "last", "a", "q", edges=(("a", "v"),)), Stage("m", "last", mlps=True))
    sizes = {"a": 3, "b": 2, "m": 1}
    found = discover_circuit(
        MODEL,
        PAIRS,
        sizes=sizes,
        receiver_sizes={"a": 1},
        stages=stages,
        overlaps="later",
        metric=LOGIT_DIFFERENCE,
    )
    found.save(tmp_path / "found.safetensors")
    for kept in (found, Discovery.load(tmp_path / "found.safetensors")):
        assert kept.stages == stages
        assert (kept.sizes, kept.receiver_sizes) == (sizes, {"a": 1})
        assert (kept.overlaps, kept.metric) == ("later", "logit difference")
        assert kept.pairs == fingerprint(PAIRS)
        assert kept.mlps == found.mlps


def test_a_fingerprint_is_of_all_that_counts():
    clean = PAIRS.clean
    moved = replace(clean, positions={**clean.positions, "place": clean.position("early")})
    others = [
        PAIRS[:4],
        PAIRS[torch.tensor([1, 0, 2, 3, 4])],
        replace(PAIRS, targets=(PAIRS.targets + 1) % 20),
        replace(PAIRS, foils=None),
        replace(PAIRS, clean=moved),
        PairBatch(PAIRS.corrupt, PAIRS.clean, PAIRS.targets, PAIRS.foils),
    ]
    assert len({fingerprint(pairs) for pairs in (PAIRS, *others)}) == 1 + len(others)
    # Padding may be any number, and anywhere: it is not read.
    wider = PromptBatch(
        torch.nn.functional.pad(torch.where(clean.mask, clean.tokens, 7), (3, 2), value=5),
        clean.answers,
        {name: at + 3 for name, at in clean.positions.items()},
        torch.nn.functional.pad(clean.mask.long(), (3, 2)),
    )
    assert fingerprint(replace(PAIRS, clean=wider)) == fingerprint(PAIRS[:])
    assert fingerprint(wider) == fingerprint(clean)
    answered = replace(clean, answers=(clean.answers + 1) % 20)
    assert len({fingerprint(some) for some in (clean, clean[:4], moved, answered)}) == 4


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("metric", [LOG_PROBABILITY, LOGIT_DIFFERENCE])
def test_a_circuit_is_found_by_any_metric(metric, engine):
    found = discover_circuit(
        MODEL, PAIRS, sizes={"a": 4, "b": 3}, stages=(A, B), metric=metric, engine=engine
    )
    first = path_patch(MODEL, PAIRS, metric=metric, engine=engine)
    assert torch.equal(found.scores["a"].per_example, first.per_example)
    assert found.receivers["a"] == first.found(4)
    assert {scores.metric for scores in found.scores.values()} == {metric.name}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((A, Stage("b", "early", "a", "q")), "nothing at 'early' reaches the q of a at 'last'"),
        ((Stage("a", "early"),), "nothing at 'early' reaches the logits"),
        (
            (A, Stage("b", "early", "a", "v"), Stage("c", "last", "b", "v")),
            "v of b at 'early' never see 'last', which comes later",
        ),
        (
            (A, Stage("m", "last", mlps=True), Stage("b", "last", "m", "v")),
            "patches into m, a group of MLPs",
        ),
        ((A, Stage("b", "last", "a", "q", edges=(("z", "v"),))), "patches into z, which no stage"),
        ((replace(A, senders=(Head(9, 0),)),), "no head L9H0"),
    ],
)
def test_paths_that_are_not_there_are_refused(stages: tuple[Stage, ...], message: str):
    sizes: dict[str, Any] = dict.fromkeys([stage.group for stage in stages], 1)
    with pytest.raises(InputError, match=message):
        discover_circuit(MODEL, PAIRS, sizes=sizes, stages=stages)


def test_stages_that_say_half_are_refused():
    with pytest.raises(InputError, match="into and receiver_input go together"):
        Stage("b", "last", into="a")
    with pytest.raises(InputError, match="so it has no heads as senders"):
        Stage("m", "last", mlps=True, senders=(Head(0, 0),))
