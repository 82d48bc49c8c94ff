"""On a model made by hand, the mechanism that is known is found, where other ways are fooled."""

import pytest

from tests.methods.planted import (
    COPY,
    HINDER,
    IDLE,
    NOTE,
    TWIN,
    by_role,
    crowded_model,
    planted_model,
    planted_pairs,
)
from tl_entity import (
    Edge,
    Mechanism,
    Node,
    PairBatch,
    evaluate,
    find_mechanism,
    mechanism_edges,
    pooled_ablation,
)
from tl_entity.hooks.gates import Gates
from tl_entity.methods.gate_training import node_scores
from tl_entity.methods.gated_forward import GatedForward
from tl_entity.metrics import LOG_PROBABILITY

MODEL = crowded_model()
ABLATION = pooled_ablation(MODEL, by_role(planted_pairs(100, seed=2).clean))
ROLES = ("start", "label", "value", "last")
ANSWERS, HINDERS = Node(*COPY, "last"), Node(*HINDER, "last")
STAND_INS = [Node(*NOTE, "value"), Node(*TWIN, "value")]


@pytest.fixture(scope="module", params=[0, 1])
def found(request) -> Mechanism:
    prompts = by_role(planted_pairs(240, seed=1).clean)
    return find_mechanism(MODEL, prompts, ablation=ABLATION, seed=request.param)


def alone(nodes) -> float:
    """Accuracy with all others ablated, by plain runs, on other prompts."""
    keep: dict[str, list] = {}
    for node in nodes:
        keep.setdefault(node.role, []).append((node.layer, node.head))
    prompts = by_role(planted_pairs(100, seed=4).clean)
    return evaluate(MODEL, prompts, keep=keep, ablation=ABLATION, engine="hooks").accuracy


def test_one_of_two_that_do_the_same_is_kept_and_nothing_idle_or_hindering(found) -> None:
    assert len(found) == 2 and ANSWERS in found.nodes
    assert sum(node in found.nodes for node in STAND_INS) == 1
    assert found.found.faithfulness.value == 1.0
    assert alone(found.nodes) == 1.0


def test_neither_node_will_do_alone() -> None:
    """So it is the known answer: two nodes, and either of the stand-ins."""
    assert alone([ANSWERS, STAND_INS[0]]) == alone([ANSWERS, STAND_INS[1]]) == 1.0
    assert alone([ANSWERS]) < 0.6 and alone(STAND_INS) < 0.3
    assert alone([ANSWERS, HINDERS]) < 0.6


def test_gradients_and_single_ablations_are_fooled_by_the_pair() -> None:
    """What a search by them alone would miss: each stand-in by itself can go."""
    forward = GatedForward.of(MODEL, ABLATION, metric=LOG_PROBABILITY)
    recorded = forward.record(by_role(planted_pairs(60, seed=3).clean))
    ones = Gates.filled(MODEL.cfg, ROLES, 1)
    scores = node_scores(forward, recorded, ones)
    ranked = [ones.all_nodes[i] for i in scores.argsort(descending=True).tolist()]
    assert ranked[0] == ANSWERS and not {*ranked[:4]} & {*STAND_INS}
    without = [
        Gates.keeping([n for n in ones.all_nodes if n not in gone], MODEL.cfg, ROLES)
        for gone in ([STAND_INS[0]], [STAND_INS[1]], STAND_INS, [Node(*IDLE, "value")])
    ]
    one, other, both, idle = (
        answers.alone.accuracy for answers in forward.evaluate(recorded, without)
    )
    assert one == other == idle == 1.0 and both < 0.5


def test_the_way_through_another_token_is_an_edge() -> None:
    """What is noted at a value is read by the copier at the last token, as a key. Beside a twin
    that notes the same the edge is hardly seen, for it is patched by itself."""
    some = planted_pairs(40, seed=5)
    pairs = PairBatch(by_role(some.clean), by_role(some.corrupt), some.targets)
    key = Edge(STAND_INS[0], ANSWERS, "k")
    edges = mechanism_edges(planted_model(), pairs, [ANSWERS, STAND_INS[0]])
    assert {edges.edges[i] for i in edges.order[:2]} == {key, Edge(ANSWERS, None, "logits")}
    assert edges.score_of(key) < -0.5
    beside = mechanism_edges(MODEL, pairs, [ANSWERS, STAND_INS[0]])
    assert abs(beside.score_of(key)) < 0.1
