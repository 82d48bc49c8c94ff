"""Edges between nodes, by plain hooks: two runs an edge. The slow truth that `exact` must agree
with."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Node
from tl_entity.hooks.edits import Hook, ReplaceWhere, freeze_heads
from tl_entity.hooks.points import hook_point, separate_kv_heads
from tl_entity.hooks.run import HookFunction, answer_logits, record
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.tasks.aligned import AlignedPairs
from tl_entity.tasks.batches import PromptBatch

EdgeInput = Literal["q", "k", "v", "logits"]
"""What an edge goes into: an input of a head, or the logits."""


class Edge(NamedTuple):
    """A sender's way into a receiver's input, or into the logits, with no head between them.

    Attributes:
        sender: a head or an MLP at a role.
        receiver: a head at a role; None for the logits.
        input: which input of the receiver.
    """

    sender: Node
    receiver: Node | None
    input: EdgeInput

    def __str__(self) -> str:
        into = "logits" if self.receiver is None else f"{self.input} of {self.receiver}"
        return f"{self.sender} -> {into}"

    __repr__ = __str__


def has_siblings(receiver: Node, nodes: Sequence[Node]) -> bool:
    """Whether a node's head is another of the nodes too."""
    return any(node[:2] == receiver[:2] and node.role != receiver.role for node in nodes)


@checked
def readers(
    receiver: Node, nodes: Sequence[Node], prompts: PromptBatch
) -> Bool[Tensor, "batch pos"]:
    """The tokens at which a receiver reads a changed key or value: all, as in path patching; but
    where its head is several of the nodes, its own tokens alone, so that each of them has edges of
    its own."""
    if has_siblings(receiver, nodes):
        return prompts.where(receiver.role).cpu()
    return prompts.mask.cpu()


@checked
@dataclass(frozen=True)
class ReplaceTokensWhere:
    """Give every chosen token another vector.

    Works at every hook point with axes batch, pos, d_model.

    Attributes:
        where: the (prompt, token) entries replaced.
        values: what they get.
    """

    where: Bool[Tensor, "batch pos"]
    values: Float[Tensor, "batch pos d_model"]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        if activation.shape != self.values.shape:
            raise InputError(
                f"{hook.name} has shape {tuple(activation.shape)}; the edit is made for "
                f"{tuple(self.values.shape)}."
            )
        where = self.where.to(activation.device)[..., None]
        return torch.where(where, self.values.to(activation), activation)


@checked
@torch.no_grad()
def edge_values(
    model: Model,
    pairs: AlignedPairs,
    edges: Sequence[Edge],
    *,
    nodes: Sequence[Node],
    metric: Metric = RELATIVE_PROBABILITY,
    progress: Callable[[int], object] = lambda runs: None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "edge batch"]]:
    """The metric in the clean run, and with each edge patched in turn.

    The definition is that of `tl_entity.methods.edges.mechanism_edges`.

    Args:
        model: the model.
        pairs: clean and corrupt prompts.
        edges: the edges.
        nodes: the nodes that the edges are between.
        metric: how runs are scored.
        progress: called with the number of runs done since the last call, one for each edge and
            pair.
    """
    # The clean run too, so that an edit that changes nothing leaves no trace of rounding.
    with separate_kv_heads(model) if any(e.input in "kv" for e in edges) else nullcontext():
        layers = range(model.cfg.n_layers)
        clean_z = record(model, pairs.clean, {hook_point("z", layer): None for layer in layers})
        frozen = freeze_heads(clean_z, pairs.clean, layers=layers)

        def scored(hooks: Sequence[tuple[str, HookFunction]]) -> Tensor:
            return metric.of_logits(answer_logits(model, pairs.clean, hooks), pairs.pairs)

        clean = scored([])
        patched = clean.expand(len(edges), -1).clone()
        for sender in dict.fromkeys(edge.sender for edge in edges):
            held = [*frozen, *corrupt_senders(model, pairs, [sender])]
            mine = [index for index, edge in enumerate(edges) if edge.sender == sender]
            points = {
                hook_point(edges[i].input, edges[i].receiver.layer): None  # type: ignore[union-attr]
                for i in mine
                if edges[i].receiver is not None
            }
            seen = record(model, pairs.clean, points, hooks=held) if points else {}
            for index in mine:
                edge = edges[index]
                hooks: Sequence[tuple[str, HookFunction]] = held
                if edge.receiver is not None:
                    hooks = _overwritten(pairs, edge, nodes, seen, clean_z)
                patched[index] = scored(hooks)
                progress(len(pairs))
    return clean, patched


@torch.no_grad()
def corrupt_senders(
    model: Model, pairs: AlignedPairs, senders: Sequence[Node]
) -> list[tuple[str, HookFunction]]:
    """Hooks that give all of these senders their corrupt outputs, at every token of their roles."""
    by_point: dict[str, list[Node]] = {}
    for sender in senders:
        by_point.setdefault(_output_point(sender), []).append(sender)
    corrupt = record(model, pairs.corrupt, dict.fromkeys(by_point)) if by_point else {}
    shape = pairs.clean.tokens.shape
    hooks: list[tuple[str, HookFunction]] = []
    for name, mine in by_point.items():
        output = corrupt[name]
        values = output.new_zeros(*shape, *output.shape[2:])
        where = torch.zeros(values.shape[:-1], dtype=torch.bool)
        for sender in mine:
            tokens = pairs.tokens(sender.role)
            at = (tokens.rows, tokens.clean, *(() if sender.head is None else (sender.head,)))
            twins = (tokens.rows, tokens.corrupt, *at[2:])
            values[at] = output[twins]
            where[at] = True
        edit = ReplaceTokensWhere if mine[0].head is None else ReplaceWhere
        hooks.append((name, edit(where, values)))
    return hooks


def _output_point(sender: Node) -> str:
    return hook_point("mlp_out" if sender.head is None else "z", sender.layer)


def _overwritten(
    pairs: AlignedPairs,
    edge: Edge,
    nodes: Sequence[Node],
    seen: dict[str, Tensor],
    clean_z: dict[str, Tensor],
) -> list[Hook]:
    """The receiver's input, at the sender's tokens, as it was seen with the sender patched."""
    receiver = edge.receiver
    assert receiver is not None and receiver.head is not None
    where = pairs.clean.where(edge.sender.role).cpu()
    if edge.input == "q":
        where = where & pairs.clean.where(receiver.role).cpu()
    name, z = hook_point(edge.input, receiver.layer), hook_point("z", receiver.layer)
    n_heads = clean_z[z].shape[2]
    hooks: list[Hook] = [
        (name, ReplaceWhere(_of_head(where, receiver.head, seen[name].shape[2]), seen[name]))
    ]
    others = ~readers(receiver, nodes, pairs.clean)
    if edge.input != "q" and bool(others.any()):
        # All others read the clean vector: their output is the clean one.
        hooks.append((z, ReplaceWhere(_of_head(others, receiver.head, n_heads), clean_z[z])))
    return hooks


def _of_head(where: Tensor, head: int, n_heads: int) -> Bool[Tensor, "batch pos head"]:
    of_head = torch.arange(n_heads, device=where.device) == head
    return where[..., None] & of_head
