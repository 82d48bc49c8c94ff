"""All edges between nodes at once, to first order.

What a sender changes in a receiver's inputs is exact, one held pass brings it there, and so is what
that changes in the receiver's own output. What the output does to the metric is taken to be its
change times its gradient, of which one backward pass gives all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.exact.blocks import check_supported, device_of, project
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
from tl_entity.exact.held import HeldPass
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.exact.receivers import HEAD_INPUTS, Receivers
from tl_entity.exact.responses import Response
from tl_entity.heads import Node
from tl_entity.hooks.edges import Edge, corrupt_senders, readers
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import HookFunction, answer_logits
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.tasks.aligned import AlignedPairs

PARTS_OF_THE_WAY = (0.3, 0.7)
"""How far all senders are on the way to their corrupt outputs where gradients are taken besides."""


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
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "2 edge batch"]]:
    """The metric in the clean run, and two estimates of what it would be with each edge patched in
    turn: if it changed in proportion to the receiver's output as it does at the clean run, and as
    it does on the way to a run in which all senders are corrupt. The second sees what the first
    can't: a path that is shut where the clean run is, such as attention that is wholly on one
    token. Edges into the logits are exact in both.

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
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "2 edge batch"]]:
    by_layer = receivers_by_layer(edges)
    top = top_layer(model, edges)
    senders = list(dict.fromkeys(edge.sender for edge in edges))
    clean, of_z = _output_gradients(model, pairs, senders, list(by_layer), metric, memory)
    changed = clean.new_zeros(2, len(edges), len(pairs))
    with torch.no_grad():
        held = HeldPass.record(model, pairs, senders, top=top, inputs_of=by_layer)
        into = by_input(edges, held)
        for layer, _, resid in held.layers(top):
            if len(resid):
                for target, gains in _gains(
                    model, pairs, nodes, by_layer.get(layer, ()), held, of_z, resid
                ):
                    mine, of = into.get(target, ((), ()))
                    changed[:, list(mine)] = gains.to(changed)[:, list(of)]
            if layer == top and TO_LOGITS in into:
                mine, of = into[TO_LOGITS]
                values = to_logits_values(model, pairs, of, held, resid, metric)
                changed[:, list(mine)] = values.to(clean) - clean
        moved = moved_edges(pairs, held, into, nodes, len(edges)).to(clean.device)
    return clean, clean + changed.where(moved, 0)


def _gains(
    model: Model,
    pairs: AlignedPairs,
    nodes: Sequence[Node],
    receivers: Sequence[Node],
    held: HeldPass,
    of_z: Mapping[int, Tensor],
    resid: Float[Tensor, "row d_model"],
) -> "Iterator[tuple[Target, Float[Tensor, '2 sender batch']]]":
    """For every receiver in a layer, and each of its inputs: what the metric gains by each sender's
    change of the input, if it changes in proportion to the receiver's output."""
    if not receivers:
        return
    layer = receivers[0].layer
    normalized = model.blocks[layer].ln1(resid[None])[0]
    heads = sorted({head_of(node) for node in receivers})
    vectors = {which: project(model, layer, which, normalized, heads) for which in HEAD_INPUTS}
    groups = list(held.by_role(len(resid)))
    for node in receivers:
        head = head_of(node)
        here = Response.of(
            Receivers.of(model, pairs.clean, [node], held.points),
            of_z[layer][..., head, :],
            readers(node, nodes, pairs.clean),
        )
        for which in HEAD_INPUTS:
            gains = resid.new_zeros(2, len(held.senders), len(pairs))
            mine = vectors[which][:, heads.index(head)]
            for senders, tokens, rows in groups:
                gains[:, senders] = here.gain(which, mine[rows.to(mine.device)], tokens)
            yield (node, which), gains


@torch.enable_grad()
def _output_gradients(
    model: Model,
    pairs: AlignedPairs,
    senders: Sequence[Node],
    layers: Sequence[int],
    metric: Metric,
    memory: int,
) -> tuple[Float[Tensor, " batch"], dict[int, Float[Tensor, "2 batch pos head d_head"]]]:
    """The metric in the clean run, and its gradient at the outputs of all heads in some layers:
    that of the clean run, and the mean of those with all senders part of the way to their corrupt
    outputs."""

    def compute(chunk: AlignedPairs) -> tuple[Tensor, list[Tensor]]:
        mixed = corrupt_senders(model, chunk, senders)
        runs = [_run_with_probes(model, chunk, layers, metric, [])]
        for share in PARTS_OF_THE_WAY:
            mixing = [(name, _Towards(edit, share)) for name, edit in mixed]
            runs.append(_run_with_probes(model, chunk, layers, metric, mixing))
        clean = runs[0][1]
        means = [
            torch.stack(some).mean(0)
            for some in zip(*(gradients for _, gradients in runs[1:]), strict=True)
        ]
        return runs[0][0], [torch.stack(both) for both in zip(clean, means, strict=True)]

    size = max(1, memory // 2 // _bytes_of_gradients(model, pairs))
    parts = [found for _, found in halving(pairs, size, compute)]
    gradients = {
        layer: torch.cat([found[i] for _, found in parts], 1) for i, layer in enumerate(layers)
    }
    return torch.cat([values for values, _ in parts]), gradients


def _run_with_probes(
    model: Model,
    pairs: AlignedPairs,
    layers: Sequence[int],
    metric: Metric,
    hooks: Sequence[tuple[str, HookFunction]],
) -> tuple[Float[Tensor, " batch"], list[Float[Tensor, "batch pos head d_head"]]]:
    """The metric under some edits, and its gradient at the heads' outputs after them."""
    cfg = model.cfg
    shape = (*pairs.clean.tokens.shape, cfg.n_heads, cfg.d_head)
    probes = [
        torch.zeros(shape, dtype=cfg.dtype, device=device_of(model, n)).requires_grad_()
        for n in layers
    ]
    adding = [(hook_point("z", n), _Add(probe)) for n, probe in zip(layers, probes, strict=True)]
    values = metric.of_logits(answer_logits(model, pairs.clean, [*hooks, *adding]), pairs.pairs)
    gradients = torch.autograd.grad(values.sum(), probes) if probes else ()
    return values.detach(), list(gradients)


@dataclass(frozen=True)
class _Towards:
    """Part of an edit: the activation goes so far of the way to what the edit makes of it."""

    edit: HookFunction
    share: float

    def __call__(self, activation: Tensor, hook: object) -> Tensor:
        edited = self.edit(activation, hook)
        assert edited is not None
        return torch.lerp(activation, edited, self.share)


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
