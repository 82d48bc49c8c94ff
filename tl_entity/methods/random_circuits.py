"""Random circuits and nodes to hold found ones against."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Group, Head, Node
from tl_entity.hooks.gates import Gates

Match = Literal["size", "layer"]
"""What random circuits have in common with the one found."""


@checked
def random_circuits(
    model: Model, circuit: Circuit, n_circuits: int, *, seed: int, match: Match = "size"
) -> list[Circuit]:
    """Circuits of the same group sizes and positions, of heads drawn at random from the model.

    Heads are drawn without replacement: within a circuit, no head comes twice at one position.

    Args:
        model: the model.
        circuit: the circuit found.
        n_circuits: how many are drawn.
        seed: of the draws.
        match: "size" draws from all heads. "layer" draws for each head another one of its layer
            that the circuit does not have at that position: late layers act on the answer more than
            early ones do, so heads of all layers would be too easy a control.

    Raises:
        InputError: if there are not so many heads to draw at a position, or in a layer.
    """
    generator = np.random.default_rng(seed)
    draw = _of_the_same_layers if match == "layer" else _of_all_layers
    return [
        draw(model.cfg.n_layers, model.cfg.n_heads, circuit, generator) for _ in range(n_circuits)
    ]


def _of_all_layers(
    n_layers: int, n_heads: int, circuit: Circuit, generator: np.random.Generator
) -> Circuit:
    total = n_layers * n_heads
    order: dict[str, np.ndarray] = {}
    for position, heads in circuit.heads_at().items():
        if len(heads) > total:
            raise InputError(
                f"{len(heads)} different heads at {position!r} can't be drawn: "
                f"the model has {total}."
            )
        order[position] = generator.permutation(total)
    groups = []
    for group in circuit:
        drawn, order[group.position] = np.split(order[group.position], [len(group.heads)])
        heads = tuple(sorted(Head(*divmod(int(index), n_heads)) for index in drawn))
        groups.append(Group(group.name, group.position, heads))
    return Circuit(tuple(groups))


def _of_the_same_layers(
    n_layers: int, n_heads: int, circuit: Circuit, generator: np.random.Generator
) -> Circuit:
    left: dict[tuple[str, int], list[Head]] = {}
    for position, found in circuit.heads_at().items():
        for layer in range(n_layers):
            others = [Head(layer, index) for index in range(n_heads)]
            others = [head for head in others if head not in found]
            left[position, layer] = [others[i] for i in generator.permutation(len(others))]
    groups = []
    for group in circuit:
        heads: list[Head] = []
        for head in group.heads:
            others = left[group.position, head.layer]
            if not others:
                raise InputError(
                    f"The circuit has too many heads of layer {head.layer} at {group.position!r}: "
                    f"of the layer's {n_heads} heads there are not as many others to draw."
                )
            heads.append(others.pop())
        groups.append(Group(group.name, group.position, tuple(sorted(heads))))
    return Circuit(tuple(groups))


@checked
def random_nodes(
    gates: Gates, nodes: Sequence[Node], n_draws: int, *, seed: int
) -> list[Float[Tensor, " node"]]:
    """As many nodes drawn at random as are given, each draw as gates of 0 and 1: for every layer
    and role as many heads of that layer at that role, and as many of a layer's MLPs, at any roles.

    Args:
        gates: they say which nodes there are.
        nodes: the nodes to be compared with.
        n_draws: how many draws.
        seed: of the draws.
    """
    generator = np.random.default_rng([seed, 2])
    heads_at = Counter((n.layer, gates.roles.index(n.role)) for n in nodes if n.head is not None)
    mlps_in = Counter(node.layer for node in nodes if node.head is None)
    draws = []
    for _ in range(n_draws):
        drawn = gates.with_values(torch.zeros_like(gates.flat()))
        for (layer, role), n in sorted(heads_at.items()):
            some = generator.choice(gates.heads.shape[2], n, replace=False)
            drawn.heads[layer, role, some] = 1
        for layer, n in sorted(mlps_in.items()):
            assert drawn.mlps is not None
            drawn.mlps[layer, generator.choice(len(gates.roles), n, replace=False)] = 1
        draws.append(drawn.flat())
    return draws
