"""The groups planted in the pair that ships come out as groups, with what they carry."""

from itertools import product

import pytest
import torch

from tl_entity import (
    Circuit,
    InputError,
    MechanismGroups,
    Node,
    activation_patch,
    box_prompts,
    desideratum_pairs,
    discovery_pairs,
    evaluate,
    load_model,
    mechanism_edges,
    mechanism_groups,
)
from tl_entity.hooks.edges import Edge
from tl_entity.methods.group_information import attention_by_role, patch_nodes, selected_nodes
from tl_entity.methods.node_profiles import alike_nodes, likeness
from tl_entity.models.registry import planted_circuit

MODEL = load_model("default-base")
TOKENIZER = MODEL.tokenizer
PLANTED = Circuit.load(planted_circuit("default-base"))
BLIND = {"previous_query_label": "label"}
DRAWS = {
    name: desideratum_pairs(TOKENIZER, name, 200, seed=7)
    for name in ("object_value", "box_label_value", "position")
}
NODES = [
    Node(*head, BLIND.get(group.position, group.position))
    for group in PLANTED
    for head in group.heads
]
# A way that nobody planted, and heads beside the planted ones.
NODES += [Node(2, 0, "object"), Node(2, 7, "object"), Node(1, 5, "label")]
NODES += [Node(3, head, "last") for head in (0, 1, 4)] + [Node(1, 4, "the")]


@pytest.fixture(scope="module")
def groups() -> MechanismGroups:
    pairs = discovery_pairs(TOKENIZER, 120, n_boxes=7, seed=1)
    pairs = pairs[evaluate(MODEL, pairs.clean).correct.nonzero().squeeze(1)[:60]]
    edges = mechanism_edges(MODEL, pairs, NODES, top_n=100)
    prompts = box_prompts(TOKENIZER, 10, seed=3)
    return mechanism_groups(MODEL, prompts, NODES, edges, draws=DRAWS)


def test_the_planted_groups_come_out(groups) -> None:
    found = groups.beside(PLANTED, BLIND).set_index("known")
    assert found["missed"].tolist() == found["more"].tolist() == [""] * 4
    assert found["group"].to_dict() == {
        "value_fetcher": "last into the logits",
        "pos_transmitter": "last into q of last",
        "pos_detector": "query_label into v of last",
        "struct_reader": "label into v of query_label",
    }
    assert found["carries"].to_dict() == {
        "value_fetcher": "object value",
        "pos_transmitter": "position",
        "pos_detector": "position",
        "struct_reader": "position",
    }
    assert groups["last into q of last"].looks_at == "query_label"


def test_another_group_is_seen_by_which_objects_are_found(groups) -> None:
    keys = groups["object into k of last"]
    assert keys.nodes == (Node(2, 0, "object"), Node(2, 7, "object"))
    share = {(found.desideratum, found.way): found for found in keys.patched}
    by_itself = {found.desideratum: found for found in groups.unpatched}["position"]
    assert share["position", "found"].interval.low > by_itself.interval.high
    assert share["position", "found"].interval.low > share["position", "read"].interval.high
    assert keys.writes[0][:2] == ("last into the logits", "k")
    assert Node(1, 4, "the") in groups.others


def test_it_is_kept_and_read(groups, tmp_path) -> None:
    groups.save(tmp_path / "groups.safetensors")
    again = MechanismGroups.load(tmp_path / "groups.safetensors")
    assert again == groups
    assert len(again.to_dataframe()) == len(groups.groups)


def test_nodes_of_one_token_are_patched_as_heads_at_a_position() -> None:
    pairs = DRAWS["position"]
    nodes = [Node(1, 2, "query_label"), Node(1, 5, "query_label")]
    (found,) = patch_nodes(MODEL, {"position": pairs}, nodes)
    expected = activation_patch(MODEL, pairs, {"query_label": [(1, 2), (1, 5)]}, engine="hooks")
    assert (found.way, found.correct) == ("read", int(expected.correct.sum())) != ("read", 0)


def test_nodes_of_several_tokens_are_moved_by_what_is_asked() -> None:
    """By a run of each pair by itself, its tokens found in the text's order."""
    pairs, heads = DRAWS["position"][:20], [(0, 1), (0, 3), (0, 4), (0, 6)]
    correct = {"read": 0, "found": 0}
    for (row, pair), way in product(enumerate(pairs.chunks(1)), correct):
        sides = (pair.clean, pair.corrupt)
        labels = [side.where("label")[0].nonzero().squeeze(1).tolist() for side in sides]
        asked = [
            at.index(int(side.position("previous_query_label")[0]))
            for at, side in zip(labels, sides, strict=True)
        ]
        moved = (asked[1] - asked[0]) * (1 if way == "read" else -1)
        z = MODEL.run_with_cache(pair.corrupt.tokens)[1]["blocks.0.attn.hook_z"]

        def edit(value, hook, z=z, labels=labels, moved=moved):
            for place, at in enumerate(labels[0]):
                source = labels[1][(place + moved) % len(labels[1])]
                for _, head in heads:
                    value[0, at, head] = z[0, source, head]
            return value

        logits = MODEL.run_with_hooks(pair.clean.tokens, fwd_hooks=[("blocks.0.attn.hook_z", edit)])
        correct[way] += int(logits[0, -1].argmax() == pairs.targets[row])
    found = patch_nodes(MODEL, {"position": pairs}, [Node(*head, "label") for head in heads])
    assert {some.way: some.correct for some in found} == correct
    assert correct["read"] > correct["found"]


def test_attention_is_the_patterns_mean() -> None:
    prompts = box_prompts(TOKENIZER, 4, seed=3)
    found = attention_by_role(MODEL, prompts, [Node(3, 3, "last"), Node(3, 0, "last")])
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    pattern = MODEL.run_with_cache(prompts.tokens)[1]["blocks.3.attn.hook_pattern"]
    last, objects = prompts.position("last"), prompts.where("object")
    weights = [pattern[i, h, last[i]][objects[i]].sum().item() for i in range(4) for h in (0, 3)]
    assert found["object"] == pytest.approx(sum(weights) / 8, abs=1e-5)
    assert attention_by_role(MODEL, prompts, [Node(1, None, "last")]) == {}


def test_a_mask_selects_the_planted_heads() -> None:
    nodes = [Node(3, head, "last") for head in range(8)] + [Node(1, 4, "the")]
    found = selected_nodes(MODEL, {"object_value": DRAWS["object_value"]}, nodes)
    assert {Node(3, 3, "last"), Node(3, 6, "last")} <= set(found["object_value"])
    assert Node(1, 4, "the") not in found["object_value"]


A, B, C, WEAK = (Node(1, head, "last") for head in range(4))
LOW = [Node(0, head, "label") for head in range(4)]


def test_nodes_are_put_together_by_role_direction_and_strength() -> None:
    # A and B alike; C reads the other way; WEAK does as A, at a hundredth of the strength.
    scores = {Edge(node, None, "logits"): -0.3 for node in (A, B, C)}
    scores[Edge(WEAK, None, "logits")] = -0.003
    scores |= {Edge(LOW[i], node, "q"): -0.3 for i, node in enumerate((A, B))}
    scores[Edge(LOW[2], C, "v")] = 0.4
    scores[Edge(LOW[0], WEAK, "q")] = -0.003
    groups = alike_nodes([A, B, C, WEAK, *LOW], scores)
    assert groups == [(A, B), (C,), (WEAK,), (LOW[0], LOW[1]), (LOW[2],)]
    # By hand: the same direction, a quarter as long.
    assert likeness({"x": 4.0, "y": 4.0}, {"x": 1.0, "y": 1.0}) == pytest.approx(0.5)
    assert likeness({"x": 1.0}, {"x": -1.0}) == -1.0
    assert likeness({"x": 1.0}, {"y": 1.0}) == likeness({"x": 0.0}, {"x": 1.0}) == 0.0


def test_groups_differ_by_the_groups_that_they_write_into() -> None:
    """All of one role, into the same input of one role: only the second round tells them apart."""
    scores = {Edge(A, None, "logits"): -0.3, Edge(LOW[3], C, "q"): -0.3}
    scores |= {Edge(LOW[0], A, "v"): -0.2, Edge(LOW[1], C, "v"): -0.2}
    groups = alike_nodes([A, C, *LOW], scores)
    assert (LOW[0],) in groups and (LOW[1],) in groups


def test_what_does_not_go_together_is_refused() -> None:
    edges = mechanism_edges(MODEL, discovery_pairs(TOKENIZER, 4, seed=1), NODES[:4])
    prompts = box_prompts(TOKENIZER, 4, seed=3)
    with pytest.raises(InputError, match="which the mechanism lacks"):
        mechanism_groups(MODEL, prompts, NODES[1:4], edges)
    with pytest.raises(InputError, match=r"in \(0, 1\]"):
        mechanism_groups(MODEL, prompts, NODES, edges, like=0.0)
    none = mechanism_groups(MODEL, prompts, NODES, edges, smallest=5.0)
    assert none.groups == () and set(none.others) == set(NODES)
    with pytest.raises(InputError, match="No nodes were put together"):
        none.beside(PLANTED)
    assert torch.is_grad_enabled()
