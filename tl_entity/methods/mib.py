"""A mechanism in the circuit format of MIB, the Mechanistic Interpretability Benchmark (Mueller et
al. 2025, arXiv 2504.13151): the JSON file that EAP-IG's graphs are written to, and that MIB reads.

The format knows heads, MLPs, the input and the logits, each at all tokens at once, and the direct
edges between them. So of a mechanism it can't say

- at which tokens a node acts: a head that is kept at one role is kept everywhere;
- through which MLPs an edge leads: an edge between two heads includes all ways through MLPs between
  them, so MLPs, and all edges of theirs, are kept;
- what is left of the nodes that are ablated, and on which prompts it was found.

A circuit read back therefore has heads and edges without roles.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head, Node
from tl_entity.hooks.edges import Edge
from tl_entity.methods.edges import Edges, HasNodes, check_nodes
from tl_entity.methods.node_profiles import clear_edges
from tl_entity.methods.stability import nodes_of
from tl_entity.output import write_atomically
from tl_entity.reading import read_json

INPUT, LOGITS = "input", "logits"

MIBEdge = tuple[str, str]
"""An edge by the names of its ends; of a head's input such as `a10.h3<q>`."""


@dataclass(frozen=True)
class MIBCircuit:
    """A circuit as MIB's files have it.

    Attributes:
        n_layers: of the model.
        n_heads: of each layer.
        d_model: of the model.
        nodes: the nodes in the circuit, by name, with their scores.
        edges: the edges in the circuit, with their scores.
    """

    n_layers: int
    n_heads: int
    d_model: int
    nodes: dict[str, float]
    edges: dict[MIBEdge, float]

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads in the circuit."""
        return tuple(
            Head(layer, head)
            for layer in range(self.n_layers)
            for head in range(self.n_heads)
            if _head_name(layer, head) in self.nodes
        )

    @property
    def all_nodes(self) -> list[str]:
        """Every node that there is, in the order of the residual stream."""
        names = [INPUT]
        for layer in range(self.n_layers):
            names += [_head_name(layer, head) for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return [*names, LOGITS]

    def all_edges(self) -> Iterator[MIBEdge]:
        """Every direct edge that there is."""
        before = [INPUT]
        for layer in range(self.n_layers):
            heads = [_head_name(layer, head) for head in range(self.n_heads)]
            for sender in before:
                yield from ((sender, f"{head}<{into}>") for head in heads for into in "qkv")
            before += heads
            yield from ((sender, f"m{layer}") for sender in before)
            before.append(f"m{layer}")
        yield from ((sender, LOGITS) for sender in before)

    def to_json(self) -> dict[str, Any]:
        """What the file holds: the sizes, and every node and edge with its score and whether it is
        in the circuit."""
        kept = {*self.nodes, LOGITS}
        return {
            "cfg": {
                "n_layers": self.n_layers,
                "n_heads": self.n_heads,
                "parallel_attn_mlp": False,
                "d_model": self.d_model,
            },
            "nodes": {
                name: {"in_graph": name in kept}
                | ({} if name == LOGITS else {"score": self.nodes.get(name, 0.0)})
                for name in self.all_nodes
            },
            "edges": {
                f"{edge[0]}->{edge[1]}": {
                    "score": self.edges.get(edge, 0.0),
                    "in_graph": edge in self.edges,
                }
                for edge in self.all_edges()
            },
        }

    def save(self, path: str | Path) -> None:
        """Write the JSON file.

        Raises:
            InputError: if it can't be written there.
        """
        write_atomically(path, json.dumps(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "MIBCircuit":
        """Read a circuit's JSON file, of this package or of EAP-IG.

        Raises:
            InputError: if the file is missing, is none of MIB's, is of a model with attention and
                MLP side by side, or names a node or edge that there is not.
        """
        path = Path(path)
        content = read_json(path, what="circuit file", holds="an object with cfg, nodes and edges")
        try:
            cfg = content["cfg"]
            sizes = [_size(cfg[name]) for name in ("n_layers", "n_heads", "d_model")]
            side_by_side = bool(cfg["parallel_attn_mlp"])
            nodes = {n: _score(v) for n, v in content["nodes"].items() if _kept(v)}
            edges = {_ends(n): _score(v) for n, v in content["edges"].items() if _kept(v)}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{path} is no circuit of MIB: it needs cfg with whole sizes, nodes and edges, "
                "each of these with in_graph and, if it has a score, a finite one."
            ) from None
        if side_by_side:
            raise InputError(f"{path} is of a model with attention and MLP side by side.")
        found = cls(sizes[0], sizes[1], sizes[2], nodes, edges)
        for name in nodes:
            if found.place(name) is None:
                raise InputError(f"{path} has {name}, which is not in such a model.")
        for edge in edges:
            if not found.has_edge(edge):
                raise InputError(f"{path} has {'->'.join(edge)}, which is not in such a model.")
        nodes.pop(LOGITS, None)
        return found

    def place(self, name: str) -> int | None:
        """How far up the residual stream a node is, the heads of a layer at one place and its MLP
        at the next; None if there is no such node."""
        if name in (INPUT, LOGITS):
            return -1 if name == INPUT else 2 * self.n_layers
        match = re.fullmatch(r"a(\d{1,9})\.h(\d{1,9})|m(\d{1,9})", name)
        if match is None:
            return None
        layer, head = int(match[3] or match[1] or 0), int(match[2] or 0)
        if layer >= self.n_layers or head >= self.n_heads:
            return None
        return 2 * layer + (match[3] is not None)

    def has_edge(self, edge: MIBEdge) -> bool:
        """Whether such a model has a direct edge of this name."""
        match = re.fullmatch(r"([^<>]+)(<[qkv]>)?", edge[1])
        if match is None or (match[2] is not None) != match[1].startswith("a"):
            return False
        below, above = self.place(edge[0]), self.place(match[1])
        return below is not None and above is not None and below < above


@checked
def mib_circuit(
    model: Model, mechanism: HasNodes | Sequence[Node], edges: Edges | None = None
) -> MIBCircuit:
    """A mechanism as a circuit of MIB. What it can't say is said at the head of this module.

    A node's score is its strength, where the mechanism knows it, or 1; over its roles the largest
    counts. An edge's is its size, summed over the roles of its ends.

    Args:
        model: the model, for its sizes.
        mechanism: its nodes, or anything that has `nodes`.
        edges: its edges. In the circuit are those that are exact and clear of zero, and all that
            lead from or to the input or an MLP; without edges, all between the mechanism's nodes.

    Raises:
        InputError: if the model has no such node, or attention and MLP side by side.
    """
    cfg = model.cfg
    if getattr(cfg, "parallel_attn_mlp", False):
        raise InputError("The model has attention and MLP side by side, which is not written.")
    strength = _strengths(mechanism)
    nodes: dict[str, float] = {INPUT: 1.0}
    check_nodes(model, nodes_of(mechanism))
    for node in nodes_of(mechanism):
        name = _name(node)
        nodes[name] = max(nodes.get(name, 0.0), strength.get(node, 1.0))
    if not getattr(mechanism, "with_mlps", any(n.head is None for n in nodes_of(mechanism))):
        # They are always themselves, so they are in the circuit.
        nodes |= {f"m{layer}": 1.0 for layer in range(cfg.n_layers)}
    found = MIBCircuit(cfg.n_layers, cfg.n_heads, cfg.d_model, nodes, {})
    scores = None if edges is None else _summed(clear_edges(edges))
    for edge in found.all_edges():
        sender, receiver = edge[0], edge[1].partition("<")[0]
        if sender not in nodes or receiver not in (*nodes, LOGITS):
            continue
        known = scores is not None and sender[0] == "a" and receiver[0] != "m"
        if not known:
            found.edges[edge] = 1.0
        elif scores is not None and edge in scores:
            found.edges[edge] = scores[edge]
    return found


def _strengths(mechanism: Any) -> dict[Node, float]:
    if not hasattr(mechanism, "strength") or not hasattr(mechanism, "gates"):
        return {}
    return dict(zip(mechanism.gates.all_nodes, mechanism.strength.tolist(), strict=True))


def _summed(scores: dict[Edge, float]) -> dict[MIBEdge, float]:
    total: dict[MIBEdge, float] = {}
    for edge, score in scores.items():
        to = LOGITS if edge.receiver is None else f"{_name(edge.receiver)}<{edge.input}>"
        ends = (_name(edge.sender), to)
        total[ends] = total.get(ends, 0.0) + abs(score)
    return total


def _name(node: Node) -> str:
    return f"m{node.layer}" if node.head is None else _head_name(node.layer, node.head)


def _head_name(layer: int, head: int) -> str:
    return f"a{layer}.h{head}"


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no size")
    return value


def _score(entry: dict[str, Any]) -> float:
    score = float(entry.get("score", 1))
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}")
    return score


def _kept(entry: dict[str, Any]) -> bool:
    if not isinstance(entry["in_graph"], bool):
        raise ValueError("in_graph is no truth value")
    return entry["in_graph"]


def _ends(name: str) -> MIBEdge:
    sender, arrow, receiver = name.partition("->")
    if not arrow:
        raise ValueError(f"{name!r} is no edge")
    return sender, receiver
