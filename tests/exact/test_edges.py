"""Edges by the exact engine against plain hooks, path patching and finite differences."""

from dataclasses import replace

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
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import answer_logits, record
from tl_entity.methods.edges import possible_edges
from tl_entity.metrics import LOG_PROBABILITY, TARGET_LOGIT, log_probability
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
        assert whole.shape[-1] == 5
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
    heads = path_patch(model, pairs, engine="hooks").per_example
    mlps = path_patch_mlps(model, pairs, engine="hooks").per_example
    expected = torch.stack([heads[1, 2], mlps[2]])
    clean, patched = edge_values(model, AlignedPairs(pairs), edges, nodes=nodes)
    torch.testing.assert_close((patched - clean).expm1(), expected, atol=1e-9, rtol=1e-9)
    clean, estimates = estimated_values(model, AlignedPairs(pairs), edges, nodes=nodes)
    for estimated in (estimates - clean).expm1():
        torch.testing.assert_close(estimated, expected, atol=1e-9, rtol=1e-9)


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
    slopes, expected = (estimated[0] - clean) / step, (exact - clean) / step
    assert (expected.abs().amax(-1) > 1e-3).sum() > len(edges) / 2
    torch.testing.assert_close(slopes, expected, atol=1e-4, rtol=1e-3)


def test_the_second_estimate_is_of_runs_on_the_way_to_corrupt_senders() -> None:
    model, pairs = random_model(), role_pairs()
    sender, receiver = Node(0, 0, "last"), Node(1, 1, "last")
    clean, estimates = estimated_values(
        model, AlignedPairs(pairs), [Edge(sender, receiver, "v")], nodes=[sender, receiver]
    )
    rows, last = torch.arange(len(pairs)), pairs.clean.position("last")
    twin = pairs.corrupt.position("last")
    z0, z1, v1 = (hook_point(name, layer) for name, layer in (("z", 0), ("z", 1), ("v", 1)))
    corrupt = record(model, pairs.corrupt, {z0: None})[z0][rows, twin, 0]

    def move_sender(share: float):
        def edit(z, hook):
            z = z.clone()
            z[rows, last, 0] = torch.lerp(z[rows, last, 0], corrupt, share)
            return z

        return z0, edit

    def move_receiver(change):
        def edit(z, hook):
            z = z.clone()
            z[rows, last, 1] += change
            return z

        return z1, edit

    seen = record(model, pairs.clean, {v1: None}, hooks=[move_sender(1.0)])[v1]

    def change_value(v, hook):
        v = v.clone()
        v[rows, last, 1] = seen[rows, last, 1]
        return v

    before = record(model, pairs.clean, {z1: None})[z1]
    after = record(model, pairs.clean, {z1: None}, hooks=[(v1, change_value)])[z1]
    change = (after - before)[rows, last, 1]

    def slope(share: float) -> torch.Tensor:
        step = 1e-5
        up, down = (
            log_probability(
                answer_logits(
                    model, pairs.clean, [move_sender(share), move_receiver(way * step * change)]
                ),
                pairs.targets,
            )
            for way in (1, -1)
        )
        return (up - down) / (2 * step)

    expected = torch.stack([slope(0.0), (slope(0.3) + slope(0.7)) / 2])
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close((estimates - clean)[:, 0], expected, atol=1e-6, rtol=1e-5)


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
