"""All edges between nodes at once, to first order.

The senders' changes of every receiver's inputs are exact: one held pass brings them there. What
such a change does to the metric is taken to be its product with the input's gradient, of which one
backward pass of the clean run gives all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.exact.blocks import check_supported, project
from tl_entity.exact.edges import (
    TO_LOGITS,
    Target,
    by_input,
    head_of,
    moved_edges,
    pairs_within,
    receivers_by_layer,
    to_logits_values,
    top_layer,
)
from tl_entity.exact.held import HeldPass, Rows
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.exact.receivers import HEAD_INPUTS, Receivers
from tl_entity.heads import Node
from tl_entity.hooks.edges import Edge, readers
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import answer_logits
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.tasks.aligned import AlignedPairs


@checked
def estimated_values(
    model: Model,
    pairs: AlignedPairs,
    edges: Sequence[Edge],
    *,
    nodes: Sequence[Node],
    metric: Metric = RELATIVE_PROBABILITY,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "edge batch"]]:
    """The metric in the clean run, and what it would be with each edge patched in turn if it
    changed in proportion to the receiver's input. Edges into the logits are exact.

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
        InputError: if the exact engine does not fit the model, or the tokens of a sender's role
            can't be matched.
    """
    check_supported(model)
    memory = memory_budget(model.cfg.device) if memory is None else memory

    def compute(chunk: AlignedPairs) -> tuple[Tensor, Tensor]:
        found = _estimate(model, chunk, edges, nodes, metric, memory)
        progress(len(edges) * len(chunk))
        return found

    size = pairs_within(model, pairs, edges, memory)
    found = [values for _, values in halving(pairs, size, compute)]
    return torch.cat([clean for clean, _ in found]), torch.cat([e for _, e in found], -1)


def _estimate(
    model: Model,
    pairs: AlignedPairs,
    edges: Sequence[Edge],
    nodes: Sequence[Node],
    metric: Metric,
    memory: int,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "edge batch"]]:
    by_layer = receivers_by_layer(edges)
    top = top_layer(model, edges)
    clean, of_z = _output_gradients(model, pairs, list(by_layer), metric, memory)
    changed = clean.new_zeros(len(edges), len(pairs))
    with torch.no_grad():
        senders = [edge.sender for edge in edges]
        held = HeldPass.record(model, pairs, senders, top=top, inputs_of=by_layer)
        into = by_input(edges, held)
        for layer, rows, resid in held.layers(top):
            cell = (rows.sender * len(pairs) + rows.prompt).to(clean.device)
            found = _products(
                model, pairs, nodes, by_layer.get(layer, ()), held.points, of_z, rows, resid
            )
            for target, product in found:
                mine, of = into.get(target, ((), ()))
                sums = clean.new_zeros(len(held.senders) * len(pairs))
                sums.index_add_(0, cell, product.to(sums))
                changed[list(mine)] = sums.view(-1, len(pairs))[list(of)]
            if layer == top and TO_LOGITS in into:
                mine, of = into[TO_LOGITS]
                values = to_logits_values(model, pairs, of, held, resid, metric)
                changed[list(mine)] = values.to(clean) - clean
        moved = moved_edges(pairs, held, into, nodes, len(edges)).to(clean.device)
    return clean, clean + changed.where(moved, 0)


def _products(
    model: Model,
    pairs: AlignedPairs,
    nodes: Sequence[Node],
    receivers: Sequence[Node],
    points: Mapping[str, Tensor],
    of_z: Mapping[int, Tensor],
    rows: Rows,
    resid: Float[Tensor, "row d_model"],
) -> "Iterator[tuple[Target, Float[Tensor, ' row']]]":
    """For every receiver in a layer, and each of its inputs: the input's change in each row times
    its gradient there."""
    if not receivers or not len(resid):
        return
    layer = receivers[0].layer
    here = Receivers.of(model, pairs.clean, receivers, points)
    reads = torch.stack([readers(node, nodes, pairs.clean) for node in receivers], -1)
    gradients = here.gradients(of_z[layer][:, :, [head_of(node) for node in receivers]], reads)
    normalized = model.blocks[layer].ln1(resid[None])[0]
    heads = sorted({head_of(node) for node in receivers})
    for which in HEAD_INPUTS:
        vectors = project(model, layer, which, normalized, heads)
        for i, node in enumerate(receivers):
            change = vectors[:, heads.index(head_of(node))] - rows.at(here.inputs[which][:, :, i])
            product = (change * rows.at(gradients[which][:, :, i])).sum(-1)
            if which == "q":
                own = rows.at(pairs.clean.where(node.role).cpu())
                product = product.where(own.to(product.device), 0)
            yield (node, which), product


@torch.enable_grad()
def _output_gradients(
    model: Model, pairs: AlignedPairs, layers: Sequence[int], metric: Metric, memory: int
) -> tuple[Float[Tensor, " batch"], dict[int, Float[Tensor, "batch pos head d_head"]]]:
    """The metric in the clean run, and its gradient at the outputs of all heads in some layers."""

    def compute(chunk: AlignedPairs) -> tuple[Tensor, list[Tensor]]:
        cfg = model.cfg
        shape = (*chunk.clean.tokens.shape, cfg.n_heads, cfg.d_head)
        probes = {
            layer: torch.zeros(
                shape, dtype=cfg.dtype, device=model.blocks[layer].attn.W_O.device
            ).requires_grad_()
            for layer in layers
        }
        hooks = [(hook_point("z", layer), _Add(p)) for layer, p in probes.items()]
        values = metric.of_logits(answer_logits(model, chunk.clean, hooks), chunk.pairs)
        found = torch.autograd.grad(values.sum(), list(probes.values())) if probes else ()
        return values.detach(), list(found)

    size = max(1, memory // 2 // _bytes_of_gradients(model, pairs))
    parts = [found for _, found in halving(pairs, size, compute)]
    gradients = {
        layer: torch.cat([found[i] for _, found in parts]) for i, layer in enumerate(layers)
    }
    return torch.cat([values for values, _ in parts]), gradients


@dataclass(frozen=True)
class _Add:
    """Adds a tensor to an activation."""

    added: Tensor

    def __call__(self, activation: Tensor, hook: object) -> Tensor:
        return activation + self.added


def _bytes_of_gradients(model: Model, pairs: AlignedPairs) -> int:
    """About what a run of one prompt keeps for its backward pass."""
    cfg, n_pos = model.cfg, pairs.clean.tokens.shape[1]
    each = 6 * (cfg.d_mlp or 4 * cfg.d_model) + 12 * cfg.d_model + 4 * cfg.n_heads * n_pos
    numbers = cfg.n_layers * n_pos * each + 4 * cfg.d_vocab_out
    return numbers * (torch.finfo(cfg.dtype).bits // 8)
