"""Edges by the exact engine against plain hooks, path patching and finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_models import VOCABULARY, random_model
from tests.with_roles import ROLES, role_pairs
from tl_entity import Head, Metric, Node, PairBatch, path_patch, path_patch_mlps
from tl_entity.exact.edge_estimates import estimated_values
from tl_entity.exact.edges import edge_values
from tl_entity.hooks import edges as hooks_engine
from tl_entity.hooks.edges import Edge
from tl_entity.methods.edges import possible_edges
from tl_entity.metrics import LOG_PROBABILITY, TARGET_LOGIT
from tl_entity.tasks.aligned import AlignedPairs


@st.composite
def cases(draw: st.DrawFn) -> dict:
    n_kv_heads = draw(st.sampled_from([1, 2]))
    n_heads = n_kv_heads * draw(st.integers(1, 2))
    n_layers = draw(st.integers(2, 4))
    nodes = st.builds(
        Node,
        st.integers(0, n_layers - 1),
        st.none() | st.integers(0, n_heads - 1),
        st.sampled_from(ROLES),
    )
    return {
        "model": {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "seed": draw(st.integers(0, 3)),
        },
        "pairs": {"left": draw(st.booleans()), "seed": draw(st.integers(0, 5))},
        "nodes": draw(st.lists(nodes, min_size=1, max_size=6, unique=True)),
        "shift": draw(st.none() | st.integers(0, 3)),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_engines_agree_in_float64(case: dict) -> None:
    model = random_model(**case["model"])
    pairs = AlignedPairs.draw(role_pairs(**case["pairs"]), seed=case["shift"])
    nodes = case["nodes"]
    edges = possible_edges(nodes, pairs.clean)
    clean, exact = edge_values(model, pairs, edges, nodes=nodes)
    clean_by_hooks, by_hooks = hooks_engine.edge_values(model, pairs, edges, nodes=nodes)
    torch.testing.assert_close(clean, clean_by_hooks, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(exact, by_hooks, atol=1e-9, rtol=1e-9)


NODES = [
    Node(0, 0, "even"),
    Node(0, 3, "last"),
    Node(0, None, "odd"),
    Node(1, None, "last"),
    Node(1, 1, "last"),
    Node(2, 2, "last"),
    Node(2, 0, "even"),
    Node(2, 0, "last"),
]
"""L2H0 is two of them."""


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_chunks_do_not_matter(n_kv_heads: int) -> None:
    model, pairs = random_model(n_kv_heads=n_kv_heads), AlignedPairs.draw(role_pairs(5), seed=0)
    edges = possible_edges(NODES, pairs.clean)
    for values in (edge_values, estimated_values):
        _, whole = values(model, pairs, edges, nodes=NODES)
        _, parts = values(model, pairs, edges, nodes=NODES, memory=1)
        torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("receiver_input", ["q", "k", "v"])
def test_an_edge_at_one_token_is_a_patched_path(receiver_input: str) -> None:
    model, pairs = random_model(n_kv_heads=2), role_pairs()
    nodes = [Node(0, 0, "last"), Node(0, 3, "last"), Node(1, None, "last"), Node(2, 1, "last")]
    edges = [Edge(node, nodes[-1], receiver_input) for node in nodes[:-1]]
    clean, values = edge_values(model, AlignedPairs(pairs), edges, nodes=nodes)
    how = {"receivers": [Head(2, 1)], "receiver_input": receiver_input, "engine": "hooks"}
    heads = path_patch(model, pairs, position="last", **how).per_example
    mlps = path_patch_mlps(model, pairs, position="last", **how).per_example
    expected = torch.stack([heads[0, 0], heads[0, 3], mlps[1]])
    torch.testing.assert_close((values - clean).expm1(), expected, atol=1e-9, rtol=1e-9)


def test_an_edge_into_the_logits_is_a_patched_path() -> None:
    model, pairs = random_model(), role_pairs()
    nodes = [Node(1, 2, "last"), Node(2, None, "last")]
    edges = possible_edges(nodes, pairs.clean)
    assert [edge.input for edge in edges] == ["logits", "logits"]
    for values in (edge_values, estimated_values):
        clean, patched = values(model, AlignedPairs(pairs), edges, nodes=nodes)
        scores = (patched - clean).expm1()
        heads = path_patch(model, pairs, engine="hooks").per_example
        mlps = path_patch_mlps(model, pairs, engine="hooks").per_example
        torch.testing.assert_close(
            scores, torch.stack([heads[1, 2], mlps[2]]), atol=1e-9, rtol=1e-9
        )


@pytest.mark.parametrize("metric", [LOG_PROBABILITY, TARGET_LOGIT])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_estimates_are_the_derivatives_of_exact_values(n_kv_heads: int, metric: Metric) -> None:
    """Every token has a twin whose embedding is a hair from its own: with twins as the corrupt
    prompt every sender's change is tiny, and its first order is all there is."""
    model = random_model(n_kv_heads=n_kv_heads, d_vocab=2 * VOCABULARY)
    step = 1e-6
    embedding = model.embed.W_E.data
    embedding[VOCABULARY:] = embedding[:VOCABULARY] + step * embedding[VOCABULARY:]
    pairs = role_pairs()
    twins = replace(pairs.clean, tokens=pairs.clean.tokens + VOCABULARY)
    near = AlignedPairs(PairBatch(pairs.clean, twins, pairs.targets))
    edges = possible_edges(NODES, pairs.clean)
    clean, exact = edge_values(model, near, edges, nodes=NODES, metric=metric)
    _, estimated = estimated_values(model, near, edges, nodes=NODES, metric=metric)
    slopes, expected = (estimated - clean) / step, (exact - clean) / step
    assert (expected.abs().amax(-1) > 1e-3).sum() > len(edges) / 2
    torch.testing.assert_close(slopes, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("engine", [edge_values, hooks_engine.edge_values])
def test_a_run_patched_with_itself_changes_exactly_nothing(engine) -> None:
    clean = role_pairs().clean
    pairs = AlignedPairs(PairBatch(clean, clean, clean.answers))
    edges = possible_edges(NODES, clean)
    before, after = engine(random_model(n_kv_heads=2), pairs, edges, nodes=NODES)
    assert torch.equal(after, before.expand_as(after))


def test_a_head_that_is_two_nodes_is_read_by_each_node_alone() -> None:
    model, pairs = random_model(), AlignedPairs.draw(role_pairs(), seed=0)
    sender, one, other = Node(0, 0, "even"), Node(1, 1, "odd"), Node(1, 1, "last")
    edge = Edge(sender, one, "v")
    values = [
        edge_values(model, pairs, [edge], nodes=nodes)[1]
        for nodes in ([sender, one], [sender, one, other])
    ]
    assert (values[0] - values[1]).abs().max() > 1e-3


def test_shifted_twins_are_of_the_same_role_and_another_place() -> None:
    pairs = role_pairs(6)
    plain, drawn = (AlignedPairs.draw(pairs, seed=seed) for seed in (None, 4))
    for role in ROLES:
        kept, moved = plain.tokens(role), drawn.tokens(role)
        assert torch.equal(kept.clean, moved.clean)
        for row in range(len(pairs)):
            mine = kept.rows == row
            assert sorted(kept.corrupt[mine].tolist()) == sorted(moved.corrupt[mine].tolist())
            if int(mine.sum()) > 1:
                assert not bool((kept.corrupt[mine] == moved.corrupt[mine]).any())
    half = drawn[3:].tokens("even")
    whole = drawn.tokens("even")
    assert torch.equal(half.corrupt, whole.corrupt[whole.rows >= 3])
