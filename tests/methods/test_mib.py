"""Mechanisms in MIB's circuit format, whose names are written out here once more."""

import json
from itertools import product

import pytest

from tests.random_models import random_model
from tests.with_roles import role_pairs
from tl_entity import Head, InputError, MIBCircuit, Node, mechanism_edges, mib_circuit

MODEL = random_model()  # three layers of four heads
N_LAYERS, N_HEADS = MODEL.cfg.n_layers, MODEL.cfg.n_heads
NODES = [Node(0, 1, "odd"), Node(0, 1, "last"), Node(1, 2, "last"), Node(2, 0, "last")]


def every_edge() -> set[str]:
    """From the format: a head reads what layers below wrote, an MLP its layer's heads too."""
    found = set()
    for layer, head in product(range(N_LAYERS), range(N_HEADS)):
        below = ["input", *(f"m{low}" for low in range(layer))]
        below += [f"a{low}.h{h}" for low, h in product(range(layer), range(N_HEADS))]
        found |= {f"{s}->a{layer}.h{head}<{i}>" for s, i in product(below, "qkv")}
        found |= {f"{s}->m{layer}" for s in [*below, f"a{layer}.h{head}"]}
    senders = ["input", *(f"m{layer}" for layer in range(N_LAYERS))]
    senders += [f"a{layer}.h{head}" for layer, head in product(range(N_LAYERS), range(N_HEADS))]
    return found | {f"{sender}->logits" for sender in senders}


@pytest.fixture(scope="module")
def edges():
    return mechanism_edges(MODEL, role_pairs(12), NODES)


def test_the_file_has_every_node_and_edge_of_such_a_model(tmp_path) -> None:
    mib_circuit(MODEL, NODES).save(tmp_path / "circuit.json")
    content = json.loads((tmp_path / "circuit.json").read_text())
    assert content["cfg"] == {
        "n_layers": N_LAYERS,
        "n_heads": N_HEADS,
        "parallel_attn_mlp": False,
        "d_model": MODEL.cfg.d_model,
    }
    assert set(content["edges"]) == every_edge()
    heads = {f"a{layer}.h{head}" for layer, head in product(range(N_LAYERS), range(N_HEADS))}
    mlps = {f"m{layer}" for layer in range(N_LAYERS)}
    assert set(content["nodes"]) == heads | mlps | {"input", "logits"}
    kept = {name for name, node in content["nodes"].items() if node["in_graph"]}
    # MLPs are always themselves; a head at two roles is one.
    assert kept == {"a0.h1", "a1.h2", "a2.h0", "input", "logits"} | mlps
    ends = {name: name.split("<")[0].split("->") for name in content["edges"]}
    for name, edge in content["edges"].items():
        assert edge["in_graph"] == (set(ends[name]) <= kept), name


def test_what_is_read_back_is_what_was_written(edges, tmp_path) -> None:
    for circuit in (mib_circuit(MODEL, NODES), mib_circuit(MODEL, NODES, edges)):
        circuit.save(tmp_path / "circuit.json")
        assert MIBCircuit.load(tmp_path / "circuit.json") == circuit
        assert circuit.heads == (Head(0, 1), Head(1, 2), Head(2, 0))


def test_edges_are_those_that_are_clear_and_all_of_mlps(edges) -> None:
    circuit = mib_circuit(MODEL, NODES, edges)
    low, high = edges.intervals.T
    between = {edge for edge in circuit.edges if edge[0][0] == "a" and edge[1][0] != "m"}
    expected: dict[tuple[str, str], float] = {}
    for i, (sender, receiver, into) in enumerate(edges.edges):
        if bool(edges.exact[i]) and (low[i] > 0 or high[i] < 0):
            to = "logits" if receiver is None else f"a{receiver.layer}.h{receiver.head}<{into}>"
            ends = (f"a{sender.layer}.h{sender.head}", to)
            expected[ends] = expected.get(ends, 0.0) + abs(edges.score[i].item())
    assert between == set(expected) != set()
    assert {edge: circuit.edges[edge] for edge in between} == pytest.approx(expected)
    assert ("m0", "a1.h2<q>") in circuit.edges and ("a0.h1", "m1") in circuit.edges
    assert ("m0", "a1.h1<q>") not in circuit.edges


def test_mlps_that_are_nodes_are_not_always_kept() -> None:
    circuit = mib_circuit(MODEL, [*NODES, Node(1, None, "last")])
    assert "m1" in circuit.nodes and "m0" not in circuit.nodes
    assert ("input", "m1") in circuit.edges and ("input", "m0") not in circuit.edges


def test_files_of_others_are_read_or_refused(tmp_path) -> None:
    path = tmp_path / "circuit.json"
    content = mib_circuit(MODEL, NODES).to_json()
    # Scores may be left out, and edges that are not in the circuit.
    kept = {name: {"in_graph": True} for name, edge in content["edges"].items() if edge["in_graph"]}
    nodes = {name: {"in_graph": node["in_graph"]} for name, node in content["nodes"].items()}
    path.write_text(json.dumps({**content, "edges": kept, "nodes": nodes}))
    assert MIBCircuit.load(path).edges == mib_circuit(MODEL, NODES).edges
    path.write_text(json.dumps({**content, "edges": {"m2->m1": {"in_graph": True}}}))
    with pytest.raises(InputError, match="which is not in such a model"):
        MIBCircuit.load(path)
    path.write_text(json.dumps({**content, "cfg": {**content["cfg"], "parallel_attn_mlp": True}}))
    with pytest.raises(InputError, match="side by side"):
        MIBCircuit.load(path)
    for strange in ("a0.h1->a0.h2<q>", "a0.h1->a1.h2", "m0->m9", "input->a0.h0<z>", "logits->m1"):
        path.write_text(json.dumps({**content, "edges": {strange: {"in_graph": True}}}))
        with pytest.raises(InputError, match="which is not in such a model"):
            MIBCircuit.load(path)
    huge = {**content["cfg"], "n_layers": 1e9}
    unscored = {"m0": {"in_graph": True, "score": "high"}}
    for broken in (
        {**content, "cfg": huge},
        {**content, "nodes": unscored},
        {},
        {**content, "edges": 3},
        {**content, "nodes": {"m0": {"in_graph": "yes"}}},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match="no circuit of MIB"):
            MIBCircuit.load(path)
    with pytest.raises(InputError, match="L9H0"):
        mib_circuit(MODEL, [Node(9, 0, "last")])
