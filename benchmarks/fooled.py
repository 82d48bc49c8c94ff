"""Where a way to choose nodes is fooled: on a model made by hand whose mechanism is known.

    python -m benchmarks.fooled

Of the nodes of `tests.methods.planted.crowded_model`, COPY at the last token answers. It needs one
of NOTE and TWIN at the values, which do the same; IDLE writes more than any head where nothing
reads it, and HINDER speaks against the answer. So the truth is two nodes. Each way ranks the nodes
on the same prompts; the first of its ranking are left alone on others, all else ablated. One table
in Markdown.
"""

import sys

import torch

from benchmarks.rankings import RANKINGS, Given, PathStage
from tests.methods.planted import (
    COPY,
    HINDER,
    IDLE,
    NOTE,
    TWIN,
    by_role,
    crowded_model,
    planted_pairs,
)
from tl_entity import Head, Node, PairBatch, find_mechanism, pooled_ablation
from tl_entity.hooks.gates import Gates
from tl_entity.methods.gated_forward import GatedForward

STAGES = (
    PathStage("last", "last", n_receivers=1),
    PathStage("asked_value", "value", into=0, inputs="k"),
)
NAMES = {
    Node(*COPY, "last"): "COPY",
    Node(*NOTE, "value"): "NOTE",
    Node(*TWIN, "value"): "TWIN",
    Node(*HINDER, "last"): "HINDER",
}
ROLES = ("start", "label", "value", "last")
SHOWN = 4


def main() -> None:
    """Rank, leave alone, write the table."""
    model = crowded_model()
    prompts = by_role(planted_pairs(240, seed=1).clean)
    ablation = pooled_ablation(model, by_role(planted_pairs(100, seed=2).clean))
    mechanism = find_mechanism(model, prompts, ablation=ablation, seed=0)
    forward = GatedForward.of(model, ablation)
    some = planted_pairs(60, seed=3)
    pairs = PairBatch(with_value(some.clean), with_value(some.corrupt), some.targets)
    gates = Gates.filled(model.cfg, ROLES, 1)
    given = Given(forward, forward.record(pairs.clean), gates, pairs, STAGES)
    fresh = forward.record(by_role(planted_pairs(200, seed=4).clean))
    write("| way | its first four nodes | NOTE or TWIN comes | faithfulness of 2 | of 4 |")
    write("|---|---|---|---|---|")
    write(row("`find_mechanism`", list(mechanism.nodes), forward, fresh, gates))
    for name, rank in RANKINGS.items():
        order = rank(given).argsort(descending=True, stable=True)
        nodes = [gates.all_nodes[i] for i in order.tolist()]
        write(row(name, nodes, forward, fresh, gates))


def with_value(prompts):
    """With roles, and the positions that path patching looks at."""
    blind = by_role(prompts)
    positions = {name: prompts.position(name) for name in ("last", "label", "value")}
    # The label and value asked about are told apart from the roles of that name.
    return type(prompts)(
        blind.tokens,
        blind.answers,
        {"last": positions["last"], "asked_value": positions["value"]},
        roles=blind.roles,
        role_names=blind.role_names,
        knowing=("asked_value",),
    )


def row(name: str, nodes: list[Node], forward, fresh, gates: Gates) -> str:
    """What a ranking's first nodes are and do."""
    each = [Gates.keeping(nodes[:n], forward.model.cfg, gates.roles) for n in (2, SHOWN)]
    found = forward.evaluate(fresh, each)
    shown = ", ".join(called(node) for node in nodes[:SHOWN])
    stands_in = [i for i, node in enumerate(nodes, 1) if NAMES.get(node) in ("NOTE", "TWIN")]
    cells = [f"{point.faithfulness.value:.2f}" for point in found]
    if len(nodes) < SHOWN:
        cells[1] = f"{len(nodes)} in all"
    return f"| {name} | {shown} | {ordinal(stands_in[0])} | {cells[0]} | {cells[1]} |"


def ordinal(number: int) -> str:
    """`1st`, `2nd`, ..."""
    return f"{number}{({1: 'st', 2: 'nd', 3: 'rd'} if number < 10 else {}).get(number, 'th')}"


def called(node: Node) -> str:
    """A node by what it does, if that is known."""
    assert node.head is not None
    if Head(node.layer, node.head) == IDLE:
        return f"IDLE at {node.role}"
    return NAMES.get(node, str(node))


def write(line: str) -> None:
    """A line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
