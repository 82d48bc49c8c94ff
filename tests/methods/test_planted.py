"""The whole way, on a model whose circuit is known because it was written into the weights."""

import pytest
import torch

from tests.methods.planted import COPY, NOTE, STAGES, planted_model, planted_pairs
from tl_entity import (
    Circuit,
    Faithfulness,
    Group,
    discover_circuit,
    evaluate,
    mean_head_outputs,
    path_patch,
    random_circuits,
    summarize_attention,
)

MODEL = planted_model()
PAIRS = planted_pairs(40)
PLANTED = Circuit((Group("copier", "last", (COPY,)), Group("note_taker", "value", (NOTE,))))
MEANS = mean_head_outputs(MODEL, planted_pairs(200, seed=1).clean)


def test_the_model_does_its_task() -> None:
    assert evaluate(MODEL, PAIRS.clean).accuracy == 1.0


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize(
    ("planted", "how"),
    [
        (COPY, {"position": "last"}),
        (NOTE, {"position": "value", "receivers": [COPY], "receiver_input": "k"}),
    ],
)
def test_path_patching_finds_each_head_by_a_wide_margin(
    engine: str, planted: tuple, how: dict
) -> None:
    found = path_patch(MODEL, PAIRS, **how, engine=engine)
    assert found.ranked()[0] == planted
    others = found.scores.clone()
    others[planted] = 0
    assert found.scores[planted] < -0.8
    assert others.abs().max() < 0.05


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_paths_that_carry_nothing_score_nothing(engine: str) -> None:
    # The copier's values come from the token itself, its queries from the last token itself.
    for position, receiver_input in (("value", "v"), ("last", "q"), ("label", "k")):
        found = path_patch(
            MODEL,
            PAIRS,
            position=position,
            receivers=[COPY],
            receiver_input=receiver_input,
            engine=engine,
        )
        assert found.scores[NOTE].abs() < 0.05


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_discovery_recovers_the_circuit(engine: str) -> None:
    found = discover_circuit(
        MODEL, PAIRS, sizes={"copier": 1, "note_taker": 1}, stages=STAGES, engine=engine
    )
    assert found.circuit == PLANTED


def test_the_circuit_is_enough_and_nothing_less_is() -> None:
    whole = evaluate(MODEL, PAIRS.clean)
    alone = evaluate(MODEL, PAIRS.clean, keep=PLANTED, mean_outputs=MEANS)
    assert Faithfulness.of(alone, whole, seed=0).value >= 0.95
    for head, position in ((COPY, "last"), (NOTE, "value")):
        gone = {position: [head]}
        lacking = evaluate(MODEL, PAIRS.clean, keep=PLANTED, remove=gone, mean_outputs=MEANS)
        assert lacking.accuracy < 0.6
    broken = evaluate(MODEL, PAIRS.clean, remove={"last": [COPY]}, mean_outputs=MEANS)
    assert broken.accuracy < 0.6
    chance = [
        evaluate(MODEL, PAIRS.clean, keep=circuit, mean_outputs=MEANS).accuracy
        for circuit in random_circuits(MODEL, PLANTED, 5, seed=0)
        if circuit != PLANTED
    ]
    assert max(chance) < 0.6


def test_the_heads_look_where_they_should() -> None:
    copier = summarize_attention(MODEL, PAIRS.clean, [COPY], from_position="last")
    assert copier.weights[0, copier.names.index("value")] > 0.95
    note_taker = summarize_attention(MODEL, PAIRS.clean, [NOTE], from_position="value")
    assert note_taker.weights[0, note_taker.names.index("label")] > 0.95
    assert note_taker.common_offset.tolist() == [1]
    assert note_taker.offset_share.tolist() == [1.0]
    # The copier's distance depends on the segment asked for.
    asked = PAIRS.clean.position("last") - PAIRS.clean.position("value")
    most = torch.bincount(asked).max() / len(asked)
    assert copier.offset_share[0] == pytest.approx(float(most))
    assert copier.common_offset[0] == asked.mode().values
