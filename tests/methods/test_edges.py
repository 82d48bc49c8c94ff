"""Edges between the nodes of a mechanism: known ones are found, and the strongest are exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.methods.planted import COPY, NOTE, planted_model, planted_pairs
from tests.random_models import random_model
from tests.with_roles import role_pairs
from tl_entity import (
    Circuit,
    Edge,
    Edges,
    InputError,
    Metric,
    Node,
    PairBatch,
    PromptBatch,
    discovery_pairs,
    evaluate,
    load_model,
    mechanism_edges,
)
from tl_entity.hooks.edges import edge_values as values_by_hooks
from tl_entity.methods.edges import possible_edges
from tl_entity.models.registry import planted_circuit
from tl_entity.tasks.aligned import AlignedPairs

BASE = load_model("default-base")


def right_pairs(n: int, seed: int = 3) -> PairBatch:
    pairs = discovery_pairs(BASE.tokenizer, 2 * n, n_boxes=7, seed=seed)
    return pairs[evaluate(BASE, pairs.clean).correct.nonzero().squeeze(1)[:n]]


def planted_nodes() -> tuple[list[Node], list[Edge]]:
    """The heads planted in the shipped base at blind roles, and the edges between their groups."""
    path = planted_circuit("default-base")
    assert path is not None
    circuit = Circuit.load(path)
    at = {
        "struct_reader": "label",
        "pos_detector": "query_label",
        "pos_transmitter": "last",
        "value_fetcher": "last",
    }
    nodes = {group: [Node(*head, role) for head in circuit[group]] for group, role in at.items()}
    ways = (
        ("struct_reader", "pos_detector", "v"),
        ("pos_detector", "pos_transmitter", "v"),
        ("pos_transmitter", "value_fetcher", "q"),
    )
    edges = [Edge(a, b, into) for one, two, into in ways for a in nodes[one] for b in nodes[two]]
    edges += [Edge(node, None, "logits") for node in nodes["value_fetcher"]]
    return [node for group in nodes.values() for node in group], edges


def with_roles(prompts: PromptBatch) -> PromptBatch:
    """`<s> a 1 b 2 c 3 b`: a start, labels, values, and the label asked about."""
    place = torch.arange(prompts.tokens.shape[1]).expand_as(prompts.tokens)
    roles = torch.where(place == 0, 0, torch.where(place % 2 == 1, 1, 2))
    roles = torch.where(prompts.where("last"), 3, roles)
    return replace(prompts, roles=roles, role_names=("start", "labels", "values", "last"))


def test_the_edge_through_another_token_of_a_hand_made_model_is_found() -> None:
    pairs = planted_pairs(60, seed=1)
    pairs = replace(pairs, clean=with_roles(pairs.clean), corrupt=with_roles(pairs.corrupt))
    nodes = [
        Node(layer, head, role)
        for layer in (0, 1)
        for head in (*range(4), None)
        for role in ("labels", "values", "last")
    ]
    found = mechanism_edges(planted_model(), pairs, nodes)
    note, copy = Node(*NOTE, "values"), Node(*COPY, "last")
    known = {Edge(note, copy, "k"), Edge(copy, None, "logits")}
    assert set(found.top(2, clear=True)) == known
    assert max(found.score_of(edge) for edge in known) < -0.5
    others = [found.score_of(edge) for edge in found.edges if edge not in known]
    assert max(map(abs, others)) < 0.1


def test_the_strongest_edges_of_the_shipped_base_are_those_planted() -> None:
    nodes, planted = planted_nodes()
    found = mechanism_edges(BASE, right_pairs(60), nodes)
    helping = [edge for edge in found.top(20, clear=True) if found.score_of(edge) < -0.03]
    assert len(helping) >= 14 and set(helping) <= set(planted)


@pytest.mark.parametrize("seed", [None, 0])
def test_the_top_is_exact_and_that_of_plain_hooks(seed: int | None) -> None:
    nodes, _ = planted_nodes()
    pairs = right_pairs(6)
    found = mechanism_edges(BASE, pairs, nodes, seed=seed)
    assert bool(found.exact[found.order[:20]].all()) and not bool(found.exact.all())
    strongest = list(found.top(20))
    clean, values = values_by_hooks(
        BASE, AlignedPairs.draw(pairs, seed=seed), strongest, nodes=nodes
    )
    torch.testing.assert_close(
        found.per_example[found.order[:20]], (values - clean).expm1(), atol=1e-4, rtol=1e-3
    )


def test_both_engines_give_the_same_edges() -> None:
    model, pairs = random_model(n_kv_heads=2), role_pairs()
    nodes = [Node(0, 1, "odd"), Node(0, None, "even"), Node(1, 2, "last"), Node(2, 0, "last")]
    exact, hooks = (
        mechanism_edges(model, pairs, nodes, top_n=50, engine=engine)
        for engine in ("exact", "hooks")
    )
    assert exact.edges == hooks.edges and bool(exact.exact.all()) and bool(hooks.exact.all())
    torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-9, rtol=1e-9)


def test_edges_are_those_that_attention_allows() -> None:
    prompts = role_pairs(4).clean
    nodes = [Node(0, 0, "even"), Node(0, None, "last"), Node(1, 1, "even"), Node(1, None, "odd")]
    even, mlp, reader, _ = nodes
    assert set(possible_edges(nodes, prompts)) == {
        Edge(even, reader, "q"),
        Edge(even, reader, "k"),
        Edge(even, reader, "v"),
        Edge(mlp, None, "logits"),
    }


def test_a_mechanism_is_anything_with_nodes() -> None:
    model, pairs = random_model(), role_pairs()

    class Found:
        nodes = (Node(0, 1, "last"), Node(1, 2, "last"))

    assert mechanism_edges(model, pairs, Found()).edges == tuple(
        possible_edges(Found.nodes, pairs.clean)
    )


def test_edges_show_themselves_and_are_kept(tmp_path: Path) -> None:
    model, pairs = random_model(), role_pairs()
    nodes = [Node(0, 1, "odd"), Node(0, None, "last"), Node(1, 2, "last"), Node(2, 0, "last")]
    found = mechanism_edges(model, pairs, nodes, top_n=3)
    table = found.to_dataframe()
    assert table["score"].abs().is_monotonic_decreasing and len(table) == len(found.edges)
    assert set(table.loc[table["receiver"] == "logits", "input"]) == {"logits"}
    assert table["exact"].head(3).all()
    found.save(tmp_path / "edges.safetensors")
    again = Edges.load(tmp_path / "edges.safetensors")
    assert again.edges == found.edges and torch.equal(again.per_example, found.per_example)
    assert torch.equal(again.exact, found.exact) and again.sender[0] == found.sender[0]
    # One strong pair of four has no interval without zero.
    noisy = replace(found, per_example=torch.zeros_like(found.per_example))
    noisy.per_example[0, 0] = 5.0
    assert noisy.top(1) == (found.edges[0],) and noisy.top(1, clear=True) == ()


def test_what_can_not_be_matched_or_is_not_there_is_refused() -> None:
    model, pairs = random_model(), role_pairs()
    nodes = [Node(0, 1, "even"), Node(1, 2, "last")]
    uneven = PairBatch(pairs.clean, pairs.corrupt[torch.tensor([1, 0, 2, 3])], pairs.targets)
    with pytest.raises(InputError, match=r"Pair 0 has \d clean and \d corrupt tokens of 'even'"):
        mechanism_edges(model, uneven, nodes)
    with pytest.raises(InputError, match="no head L1H9"):
        mechanism_edges(model, pairs, [Node(1, 9, "last")])
    with pytest.raises(InputError, match="no MLP7@last; it has 3 layers"):
        mechanism_edges(model, pairs, [Node(7, None, "last")])
    with pytest.raises(InputError, match="no position 'nowhere'"):
        mechanism_edges(model, pairs, [Node(0, 1, "nowhere")])
    with pytest.raises(InputError, match="no target"):
        mechanism_edges(model, replace(pairs, targets=pairs.targets - 50), nodes)
    nothing = Metric("nothing", lambda logits, pairs: logits[..., 0] / 0 * 0)
    with pytest.raises(InputError, match="is not finite"):
        mechanism_edges(model, pairs, nodes, metric=nothing)
