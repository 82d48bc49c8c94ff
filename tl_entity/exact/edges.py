"""Edges between nodes, recomputing only what each can change (same numbers as plain hooks).

One held pass brings the senders' changes to the receivers' inputs. A changed query, key or value
changes its head's output, and nothing else in that layer; from there on only the tokens from the
first changed one on, and the layers above, are computed again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.exact.blocks import check_supported, project
from tl_entity.exact.held import HeldPass, Rows
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.exact.path_patching import metric_values
from tl_entity.exact.receivers import Receivers
from tl_entity.exact.suffix import CleanRun
from tl_entity.heads import Node
from tl_entity.hooks.edges import Edge, EdgeInput, has_siblings, readers
from tl_entity.hooks.edits import Hook, ReplaceWhere
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.tasks.aligned import AlignedPairs
from tl_entity.tasks.batches import ANSWER_POSITION

Target = tuple[Node | None, EdgeInput]
"""A receiver and which of its inputs; None for the logits."""

TO_LOGITS: Target = (None, "logits")


@checked
@torch.no_grad()
def edge_values(
    model: Model,
    pairs: AlignedPairs,
    edges: Sequence[Edge],
    *,
    nodes: Sequence[Node],
    metric: Metric = RELATIVE_PROBABILITY,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "edge batch"]]:
    """The metric in the clean run, and with each edge patched in turn.

    The same function as `tl_entity.hooks.edges.edge_values`, which defines it, up to float
    rounding; an edge whose sender gets its own clean value changes exactly nothing.

    Args:
        model: the model.
        pairs: clean and corrupt prompts.
        edges: the edges.
        nodes: the nodes that the edges are between.
        metric: how runs are scored.
        memory: bytes that intermediate results may take; found from the device if left out.
        progress: called with the number of runs done since the last call, one for each edge and
            pair.

    Raises:
        InputError: as `estimated_values`.
    """
    check_supported(model)
    memory = memory_budget(model.cfg.device) if memory is None else memory

    def compute(chunk: AlignedPairs) -> tuple[Tensor, Tensor]:
        found = _run_exactly(model, chunk, edges, nodes, metric, memory)
        progress(len(edges) * len(chunk))
        return found

    size = pairs_within(model, pairs, edges, memory)
    found = [values for _, values in halving(pairs, size, compute)]
    return torch.cat([clean for clean, _ in found]), torch.cat([e for _, e in found], -1)


def _run_exactly(
    model: Model,
    pairs: AlignedPairs,
    edges: Sequence[Edge],
    nodes: Sequence[Node],
    metric: Metric,
    memory: int,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "edge batch"]]:
    top = top_layer(model, edges)
    senders, layers = [edge.sender for edge in edges], receivers_by_layer(edges)
    held = HeldPass.record(model, pairs, senders, top=top, inputs_of=layers)
    into = by_input(edges, held)
    edits: dict[int, Hook] = {}
    to_logits = None
    for layer, rows, resid in held.layers(top):
        for i, edge in enumerate(edges):
            if edge.receiver is not None and edge.receiver.layer == layer:
                mine = rows.sender == held.senders.index(edge.sender)
                some = Rows(*(index[mine] for index in rows))
                edits[i] = _edit(
                    model, pairs, edge, nodes, held.points, some, resid[mine.to(resid.device)]
                )
        if layer == top and TO_LOGITS in into:
            senders = into[TO_LOGITS][1]
            to_logits = to_logits_values(model, pairs, senders, held, resid, metric)
    clean, found = _after_receivers(model, pairs, edges, nodes, edits, metric, memory)
    patched = clean.expand(len(edges), -1).clone()
    for i, values in found.items():
        patched[i] = values
    if to_logits is not None:
        patched[list(into[TO_LOGITS][0])] = to_logits.to(patched)
    # A sender that keeps its value changes nothing, whatever rounding says.
    moved = moved_edges(pairs, held, into, nodes, len(edges))
    return clean, patched.where(moved.to(patched.device), clean)


def _edit(
    model: Model,
    pairs: AlignedPairs,
    edge: Edge,
    nodes: Sequence[Node],
    points: Mapping[str, Tensor],
    rows: Rows,
    resid: Float[Tensor, "row d_model"],
) -> Hook:
    """The receiver's output where it reads the changed input, all else in its layer being clean."""
    receiver, which = edge.receiver, edge.input
    assert receiver is not None and receiver.head is not None and which != "logits"
    layer = receiver.layer
    here = Receivers.of(model, pairs.clean, [receiver], points)
    normalized = model.blocks[layer].ln1(resid[None])[0]
    changed = here.inputs[which].clone()
    changed[rows.prompt.to(changed.device), rows.token.to(changed.device)] = project(
        model, layer, which, normalized, [receiver.head]
    )
    z = here.z({**here.inputs, which: changed})
    where = readers(receiver, nodes, pairs.clean)
    if which == "q":
        where = pairs.clean.where(receiver.role).cpu()
    # No token reads what comes after it.
    first = pairs.clean.first_token(edge.sender.role).cpu()
    where = where & (torch.arange(where.shape[1]) >= first[:, None])
    of_head = torch.arange(model.cfg.n_heads) == receiver.head
    values = z.expand(-1, -1, model.cfg.n_heads, -1)
    return hook_point("z", layer), ReplaceWhere(where[..., None] & of_head, values)


def _after_receivers(
    model: Model,
    pairs: AlignedPairs,
    edges: Sequence[Edge],
    nodes: Sequence[Node],
    edits: Mapping[int, Hook],
    metric: Metric,
    memory: int,
) -> tuple[Float[Tensor, " batch"], dict[int, Float[Tensor, " batch"]]]:
    """The metric in the clean run, and under each of these edits by itself."""
    layers = {edges[i].receiver.layer for i in edits}  # type: ignore[union-attr]
    if not edits:
        name = hook_point("resid_post", model.cfg.n_layers - 1)
        final = record(model, pairs.clean, {name: ANSWER_POSITION})[name]
        return metric_values(model, final[None], pairs.pairs, metric)[0], {}
    names = [_begins_at(edges[i], nodes) for i in edits]
    run = CleanRun.record(
        model,
        pairs.clean,
        first_layer=min(layers),
        positions=[*dict.fromkeys(names), ANSWER_POSITION],
        begins=layers,
    )
    clean = metric_values(model, run.final[None], pairs.pairs, metric)[0]
    found: dict[int, Tensor] = {}
    last = pairs.clean.position(ANSWER_POSITION)
    # Those whose change begins at the same tokens are recomputed together.
    for name in dict.fromkeys(names):
        some = [i for i in edits if _begins_at(edges[i], nodes) == name]
        start = torch.minimum(pairs.clean.first_token(name), last)
        resid = replace(run, start=start).answer_resid_each(
            [[edits[i]] for i in some], memory=memory
        )
        values = metric_values(model, resid, pairs.pairs, metric)
        found |= dict(zip(some, values, strict=True))
    return clean, found


def _begins_at(edge: Edge, nodes: Sequence[Node]) -> str:
    """The name of the tokens at which the receiver's output first changes: its own, or, if all
    tokens of its head read the input, the sender's."""
    receiver = edge.receiver
    assert receiver is not None
    own_alone = edge.input == "q" or has_siblings(receiver, nodes)
    return receiver.role if own_alone else edge.sender.role


def to_logits_values(
    model: Model,
    pairs: AlignedPairs,
    senders: Sequence[int],
    held: HeldPass,
    resid: Float[Tensor, "row d_model"],
    metric: Metric,
) -> Float[Tensor, "sender batch"]:
    """The metric with each sender's change at the answer's token reaching the logits."""
    last = pairs.clean.position(ANSWER_POSITION).cpu()
    every = torch.full((len(held.senders), len(pairs)), -1)
    at_answer = (held.rows.token == last[held.rows.prompt]).nonzero().squeeze(1)
    every[held.rows.sender[at_answer], held.rows.prompt[at_answer]] = at_answer
    # Pairs in which a sender is not at that token get any row: they are not moved.
    rows = resid[every[list(senders)].clamp(min=0).to(resid.device)]
    return metric_values(model, rows, pairs.pairs, metric)


def moved_edges(
    pairs: AlignedPairs,
    held: HeldPass,
    into: "Mapping[Target, tuple[Sequence[int], Sequence[int]]]",
    nodes: Sequence[Node],
    n_edges: int,
) -> Bool[Tensor, "edge batch"]:
    """Where a sender's output differs at all, at a token from which the edge's input is read."""
    moved = torch.zeros(n_edges, len(pairs), dtype=torch.bool)
    for (receiver, which), (mine, senders) in into.items():
        if receiver is None:
            read = pairs.clean.where(ANSWER_POSITION).cpu()
        elif which == "q":
            read = pairs.clean.where(receiver.role).cpu()
        else:  # by a token that is not before it
            reads = readers(receiver, nodes, pairs.clean).int()
            read = reads.flip(1).cumsum(1).flip(1) > 0
        moved[list(mine)] = (held.moved[list(senders)] & read).any(-1)
    return moved


def by_input(edges: Sequence[Edge], held: HeldPass) -> "dict[Target, tuple[list[int], list[int]]]":
    """For each input the edges that go into it, and their senders, by index."""
    place = {sender: index for index, sender in enumerate(held.senders)}
    into: dict[Target, tuple[list[int], list[int]]] = {}
    for index, edge in enumerate(edges):
        mine, senders = into.setdefault((edge.receiver, edge.input), ([], []))
        mine.append(index)
        senders.append(place[edge.sender])
    return into


def receivers_by_layer(edges: Sequence[Edge]) -> dict[int, list[Node]]:
    receivers = dict.fromkeys(edge.receiver for edge in edges if edge.receiver is not None)
    by_layer: dict[int, list[Node]] = {}
    for node in sorted(receivers, key=lambda node: node.layer):
        by_layer.setdefault(node.layer, []).append(node)
    return by_layer


def top_layer(model: Model, edges: Sequence[Edge]) -> int:
    """The layer up to which senders are followed."""
    if any(edge.receiver is None for edge in edges):
        return model.cfg.n_layers
    return max((edge.receiver.layer for edge in edges if edge.receiver is not None), default=0)


def head_of(node: Node) -> int:
    assert node.head is not None
    return node.head


def pairs_within(model: Model, pairs: AlignedPairs, edges: Sequence[Edge], memory: int) -> int:
    """How many pairs' runs and rows take at most half the memory."""
    cfg, n_pos = model.cfg, pairs.clean.tokens.shape[1]
    senders = {edge.sender for edge in edges}
    tokens = {
        role: int(pairs.clean.where(role).sum(1).amax()) for role in {s.role for s in senders}
    }
    rows = sum(tokens[sender.role] for sender in senders)
    most = max(map(len, receivers_by_layer(edges).values()), default=0)
    width = cfg.n_heads * cfg.d_head
    numbers = (
        cfg.n_layers * n_pos * (4 * cfg.d_model + 7 * width)
        + rows * (2 * cfg.d_model + 3 * width)
        + most * n_pos * (5 * n_pos + 10 * cfg.d_head)
    )
    return max(1, memory // 2 // (numbers * (torch.finfo(cfg.dtype).bits // 8)))
