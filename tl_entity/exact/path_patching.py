"""Path patching that recomputes only what a sender can change (same numbers as plain hooks).

With attention outputs held clean, a changed sender travels through the residual stream and the MLPs
of its own token only. So each sender is one vector for each prompt, and the senders of all layers
pass the remaining MLPs as one growing batch: the *held* pass. If receivers are overwritten
afterwards, only tokens from theirs on and layers from theirs up can change: the *suffix* pass
recomputes just these, against the clean run's keys and values.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._pieces import CHAIN, Alike, piece
from tl_entity._typing import checked
from tl_entity.exact.blocks import (
    add_mlp,
    check_supported,
    device_of,
    project,
    rows_within,
)
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.exact.path_runs import LOGITS_CHUNK_BYTES as LOGITS_CHUNK_BYTES
from tl_entity.exact.path_runs import ByLayer as ByLayer
from tl_entity.exact.path_runs import Inputs as Inputs
from tl_entity.exact.path_runs import Runs as Runs
from tl_entity.exact.path_runs import metric_values as metric_values
from tl_entity.exact.path_runs import sizes_of as sizes_of
from tl_entity.exact.path_suffix import Suffix as Suffix
from tl_entity.exact.window import (
    Window,
)
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.path_patching import Path
from tl_entity.hooks.points import n_kv_heads
from tl_entity.hooks.watch import located
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch

ROWS_ENOUGH = 4096
"""A matrix product with so many rows runs at full speed."""


@checked
@torch.no_grad()
def patched_values(
    model: Model,
    pairs: PairBatch,
    path: Path,
    *,
    metric: Metric = RELATIVE_PROBABILITY,
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "layer sender batch"]]:
    """The metric in the clean run, and with each sender patched in turn.

    The same function as `tl_entity.hooks.path_patching.patched_values`, which defines it, up to
    float rounding; a sender that gets its own clean value changes exactly nothing.

    Args:
        model: the model.
        pairs: clean and corrupt prompts.
        path: what is patched, and into what.
        metric: how runs are scored.
        batch_size: pairs recomputed together; from the memory bound if left out.
        memory: bytes that intermediate results may take; found from the device if left out. A
            chunk that runs out of memory all the same is halved.
        progress: called with the number of runs done since the last call, one for each sender and
            pair.

    Raises:
        InputError: if the model is of an architecture that this engine does not recompute.
        NotFiniteError: if weights or activations are NaN or infinite, naming where.
    """
    check_supported(model)
    memory = memory_budget(model.cfg.device) if memory is None else memory
    by_layer, top = path.by_layer, path.top(model.cfg.n_layers)
    n_senders = model.cfg.n_heads if path.senders == "heads" else 1

    @piece(alike=lambda chunk: _alike(chunk, path, metric, memory))
    def compute(chunk: PairBatch) -> tuple[Tensor, Tensor]:
        reached_from = top if by_layer or any_at_answer(chunk, path.position) else 0
        runs = Runs.record(model, chunk, path, reached_from, metric)
        values = runs.clean.expand(model.cfg.n_layers, n_senders, -1).clone()
        if reached_from:
            if path.receivers is None:
                reached = _through_mlps(model, runs)
            else:
                reached = _through_receivers(model, runs, memory)
            # A sender that keeps its value changes nothing, whatever rounding says.
            values[:top] = reached.where(runs.moved, runs.clean).unflatten(0, (top, n_senders))
        return runs.clean, values

    def compute_located(chunk: PairBatch) -> tuple[Tensor, Tensor]:
        found = located(lambda: compute(chunk))
        progress(found[1].numel())
        return found

    if batch_size is None:
        batch_size = pairs_within(model, pairs, memory)
    with guarded(model):
        found = [values for _, values in halving(pairs, batch_size, compute_located)]
    return torch.cat([clean for clean, _ in found]), torch.cat([p for _, p in found], -1)


def _alike(chunk: PairBatch, path: Path, metric: Metric, memory: int) -> Alike:
    at, last = (chunk.clean.position(name) for name in (path.position, ANSWER_POSITION))
    shapes = chunk.clean.tokens.shape, chunk.corrupt.tokens.shape
    masks = chunk.clean.attention_mask is None, chunk.corrupt.attention_mask is None
    windows = tuple(sorted(zip((last - at).tolist(), at.tolist(), strict=True)))
    patched = (path.receivers is None, sizes_of(path.by_layer))
    family = shapes, masks, path.senders, patched, metric, memory
    return Alike((windows, family), family, sum(length for length, _ in windows))


@piece(CHAIN)
def _through_mlps(model: Model, runs: Runs) -> Float[Tensor, "senders batch"]:
    """The metric when the senders' changes reach the logits."""
    *_, (_, rows) = _held_pass(model, runs)
    patched = metric_values(model, rows, runs.pairs, runs.metric)
    # With attention held, the scored token feels only senders at that very token.
    return patched.where((runs.at == runs.last).to(patched.device), runs.clean)


def _held_pass(
    model: Model, runs: Runs
) -> Iterator[tuple[int, Float[Tensor, "senders batch d_model"]]]:
    """For each layer up to `top`, `resid_pre` at the senders' token, for all senders below it.

    Senders are in order of layer, then head. The rows are changed in place afterwards.
    """
    n = runs.per_layer
    rows = runs.deltas[0].new_empty(runs.top * n, len(runs.pairs), model.cfg.d_model)
    for layer in range(runs.top):
        below = slice(layer * n)
        here = slice(layer * n, (layer + 1) * n)
        rows = rows.to(device_of(model, layer))
        yield layer, rows[below]
        rows[below] += runs.at_senders("attn_out", layer)
        if runs.path.senders == "heads":
            # Each head's change through its own slice of the output projection.
            w_o = model.blocks[layer].attn.W_O
            change = torch.bmm(runs.deltas[layer].transpose(0, 1), w_o)
            rows[here] = runs.at_senders("resid_mid", layer) + change
            add_mlp(model, layer, rows[: here.stop])
        else:
            add_mlp(model, layer, rows[below])
            corrupt_output = runs.at_senders("mlp_out", layer) + runs.deltas[layer]
            rows[here] = runs.at_senders("resid_mid", layer) + corrupt_output
    yield runs.top, rows


@piece(CHAIN)
def _through_receivers(
    model: Model,
    runs: Runs,
    memory: int,
) -> Float[Tensor, "senders batch"]:
    """The metric when the senders' changes reach the receivers' inputs, and nothing else."""
    receivers = runs.path.by_layer
    inputs: Inputs = {}
    for layer, rows in _held_pass(model, runs):
        if layer in receivers:
            normalized = model.blocks[layer].ln1(rows)
            inputs[layer] = {
                which: project(model, layer, which, normalized, heads)
                for which, heads in receivers[layer].items()
            }
    n_senders = runs.top * runs.per_layer
    patched = runs.clean.expand(n_senders, -1).clone()
    for window in Window.each_length(runs.pairs.clean, runs.at):
        members = window.members.to(patched.device)
        theirs: Inputs = {
            layer: {
                which: vectors[:, window.members.to(vectors.device)]
                for which, vectors in of_layer.items()
            }
            for layer, of_layer in inputs.items()
        }
        suffix = Suffix(model, runs, window, receivers, theirs)
        scored = runs.pairs[window.members]

        def compute(
            senders: range, suffix: "Suffix" = suffix, scored: PairBatch = scored
        ) -> Tensor:
            return metric_values(model, suffix.run(senders), scored, runs.metric)

        size = rows_within(window.bytes_per_variant(model), memory // 2)
        for senders, values in halving(range(n_senders), size, compute):
            patched[senders, members] = values
    return patched


def any_at_answer(pairs: PairBatch, position: str) -> bool:
    """Whether senders at this position are at the scored token of any pair: with attention held,
    all others reach no logits."""
    return bool((pairs.clean.position(position) == pairs.clean.position(ANSWER_POSITION)).any())


def pairs_within(model: Model, pairs: PairBatch, memory: int) -> int:
    """How many pairs' caches and held rows take at most half the memory.

    No more than make the matrix products large: beyond that, only progress would be seen later.
    """
    cfg = model.cfg
    caches = 2 * pairs.clean.tokens.shape[1] * n_kv_heads(cfg) * cfg.d_head
    rows = cfg.n_heads * cfg.d_model
    each = cfg.n_layers * (caches + 2 * rows) * (torch.finfo(cfg.dtype).bits // 8)
    enough = max(4, ROWS_ENOUGH // (cfg.n_layers * cfg.n_heads))
    return max(1, min(enough, memory // 2 // each))
