"""Path patching that recomputes only what a sender can change (same numbers as plain hooks).

With attention outputs held clean, a changed sender travels through the residual stream and the MLPs
of its own token only. So each sender is one vector for each prompt, and the senders of all layers
pass the remaining MLPs as one growing batch: the *held* pass. If receivers are overwritten
afterwards, only tokens from theirs on and layers from theirs up can change: the *suffix* pass
recomputes just these, against the clean run's keys and values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._pieces import CHAIN, RECORDED, SUFFIX, Alike, piece
from tl_entity._typing import checked
from tl_entity.exact.blocks import (
    add_mlp,
    check_supported,
    device_of,
    head_outputs,
    log_normalizer,
    project,
    row_slices,
    rows_within,
    unembed,
)
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.exact.window import (
    ANSWER_TOKEN,
    EVERY_TOKEN,
    KeysAndValues,
    Window,
    WindowEdit,
)
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.path_patching import Path
from tl_entity.hooks.points import HeadInput, hook_point, n_kv_heads
from tl_entity.hooks.run import record
from tl_entity.hooks.watch import assure_finite, located
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch

ByLayer = Mapping[int, Mapping[HeadInput, Sequence[int]]]
"""Head indices by layer and by which of their inputs is patched."""

Inputs = dict[int, dict[HeadInput, Float[Tensor, "senders member receivers d_head"]]]
"""What receivers get from each sender below them."""

ROWS_ENOUGH = 4096
"""A matrix product with so many rows runs at full speed."""

LOGITS_CHUNK_BYTES = 64 * 2**20
"""Rows are unembedded in slices whose logits take about this much memory."""


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
        runs = _Runs.record(model, chunk, path, reached_from, metric)
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
    patched = (path.receivers is None, _sizes(path.by_layer))
    family = shapes, masks, path.senders, patched, metric, memory
    return Alike((windows, family), family, sum(length for length, _ in windows))


def _sizes(by_layer: ByLayer) -> tuple[object, ...]:
    return tuple(
        (layer, which, len(heads))
        for layer, inputs in by_layer.items()
        for which, heads in inputs.items()
    )


@dataclass(frozen=True)
class _Runs:
    """What the passes need of the clean and the corrupt run, and nothing more.

    Attributes:
        pairs: the pairs that were run.
        at: token index of the senders in each clean prompt.
        last: token index of the answer in each clean prompt.
        metric: how runs are scored.
        clean: the metric in the clean run.
        deltas: corrupt minus clean outputs of each layer's senders: `z` of heads, or `mlp_out`.
        points: the recorded activations of the clean run by hook point name.
        path: what is patched, and into what.
        top: layers from here up hold no sender that can reach a receiver.
    """

    pairs: PairBatch
    at: Int[Tensor, " batch"]
    last: Int[Tensor, " batch"]
    metric: Metric
    clean: Float[Tensor, " batch"]
    deltas: list[Float[Tensor, "batch *sender width"]]
    points: dict[str, Tensor]
    path: Path
    top: int

    @classmethod
    @piece(RECORDED)
    def record(
        cls,
        model: Model,
        pairs: PairBatch,
        path: Path,
        top: int,
        metric: Metric,
    ) -> "_Runs":
        position, receivers = path.position, path.by_layer
        n_layers = model.cfg.n_layers
        sent = [hook_point("z" if path.senders == "heads" else "mlp_out", n) for n in range(top)]
        points: dict[str, str | None] = dict.fromkeys(sent, position)
        for layer in range(top):
            points |= {hook_point(name, layer): position for name in ("attn_out", "resid_mid")}
        for layer in range(min(receivers, default=n_layers), n_layers):
            points |= {hook_point(name, layer): None for name in ("rot_k", "v")}
            if layer in receivers:
                points |= {hook_point(name, layer): None for name in ("resid_pre", "resid_mid")}
        final = hook_point("resid_post", n_layers - 1)
        seen = record(model, pairs.clean, {**points, final: ANSWER_POSITION})
        corrupt = record(model, pairs.corrupt, dict.fromkeys(sent, position)) if top else {}
        return cls(
            pairs=pairs,
            at=pairs.clean.position(position),
            last=pairs.clean.position(ANSWER_POSITION),
            metric=metric,
            clean=metric_values(model, seen.pop(final)[None], pairs, metric)[0],
            deltas=[corrupt[name] - seen[name] for name in sent],
            points=seen,
            path=path,
            top=top,
        )

    def __getitem__(self, point: tuple[str, int]) -> Tensor:
        return self.points[hook_point(*point)]

    def keys_and_values(self, layer: int) -> KeysAndValues:
        """The clean run's, of every token."""
        return self["rot_k", layer], self["v", layer]

    def at_senders(self, name: str, layer: int) -> Float[Tensor, "batch d_model"]:
        """The clean activation at the senders' token."""
        activation = self[name, layer]
        if activation.ndim == 2:
            return activation
        rows = torch.arange(len(activation), device=activation.device)
        return activation[rows, self.at.to(activation.device)]

    @property
    def moved(self) -> Bool[Tensor, "senders batch"]:
        """Where a sender's corrupt value differs from its clean one at all."""
        moved = [(delta != 0).any(-1).view(len(delta), -1).T for delta in self.deltas]
        return torch.cat([some.to(self.clean.device) for some in moved])

    @property
    def per_layer(self) -> int:
        """Senders in a layer."""
        return self.deltas[0].shape[1] if self.path.senders == "heads" else 1


@piece(CHAIN)
def _through_mlps(model: Model, runs: _Runs) -> Float[Tensor, "senders batch"]:
    """The metric when the senders' changes reach the logits."""
    *_, (_, rows) = _held_pass(model, runs)
    patched = metric_values(model, rows, runs.pairs, runs.metric)
    # With attention held, the scored token feels only senders at that very token.
    return patched.where((runs.at == runs.last).to(patched.device), runs.clean)


def _held_pass(
    model: Model, runs: _Runs
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
    runs: _Runs,
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
        suffix = _Suffix(model, runs, window, receivers, theirs)
        scored = runs.pairs[window.members]

        def compute(
            senders: range, suffix: "_Suffix" = suffix, scored: PairBatch = scored
        ) -> Tensor:
            return metric_values(model, suffix.run(senders), scored, runs.metric)

        size = rows_within(window.bytes_per_variant(model), memory // 2)
        for senders, values in halving(range(n_senders), size, compute):
            patched[senders, members] = values
    return patched


@dataclass(frozen=True)
class _Suffix:
    """A window whose tokens, from the receivers' to the answer's, are recomputed for many senders.

    Attributes:
        model: the model.
        runs: the recorded clean and corrupt runs.
        window: the prompts and tokens concerned.
        receivers: receiver heads by layer and by what of them is overwritten.
        inputs: what they get from each sender below, in the same order.
    """

    model: Model
    runs: _Runs
    window: Window
    receivers: ByLayer
    inputs: Inputs

    def starts(self, senders: range) -> tuple[int, ...]:
        """The first receiver layer above its own is where a sender's change begins."""
        n = self.runs.per_layer
        first = {
            layer: min(r for r in self.receivers if r > layer)
            for layer in range(senders.start // n, (senders.stop - 1) // n + 1)
        }
        return tuple(first[sender // n] for sender in senders)

    @piece(
        SUFFIX,
        alike=lambda self, senders: (
            self.window.sizes,
            self.starts(senders),
            _sizes(self.receivers),
        ),
    )
    def run(self, senders: range) -> Float[Tensor, "sender member d_model"]:
        """The final residual stream at the answer's token, for neighbouring senders."""
        cfg = self.model.cfg
        starts = self.starts(senders)
        rows = self.runs.deltas[0].new_empty(len(starts), *self.window.tokens.shape, cfg.d_model)
        for layer in range(starts[0], cfg.n_layers):
            begun = sum(start < layer for start in starts)
            now = sum(start <= layer for start in starts)
            rows = rows.to(device_of(self.model, layer))
            self._pass(layer, rows, slice(senders.start, senders.start + begun), now - begun)
        return rows[:, :, -1]

    @piece(
        alike=lambda self, layer, rows, begun, fresh: (
            self.window.sizes,
            rows.shape,
            begun.stop - begun.start,
            fresh,
            tuple((which, len(some)) for which, some in self.receivers.get(layer, {}).items()),
            layer == self.model.cfg.n_layers - 1,
        )
    )
    def _pass(
        self,
        layer: int,
        rows: Float[Tensor, "sender member window d_model"],
        begun: slice,
        fresh: int,
    ) -> None:
        """Take the rows through a layer, in place: of the senders whose change began below it, and
        of those after them, so many, whose change begins here."""
        old = begun.stop - begun.start
        now = old + fresh
        queries = ANSWER_TOKEN if layer == self.model.cfg.n_layers - 1 else EVERY_TOKEN
        if old:
            rows[:old, :, queries] += self.window.attention_output(
                self.model,
                layer,
                rows[:old],
                self.runs.keys_and_values(layer),
                edits=self._overwrite(layer, begun, queries),
                queries=queries,
            )
        if fresh:
            here = slice(begun.stop, begun.stop + fresh)
            rows[old:now, :, queries] = self._first_changed(layer, here, queries)
        rows[:now, :, queries] = add_mlp(self.model, layer, rows[:now, :, queries])

    def _overwrite(self, layer: int, senders: slice, queries: slice) -> dict[str, WindowEdit]:
        """What gives the receivers of a layer their input, at the first token of the window."""
        return {
            which: self._give(layer, which, senders)
            for which in self.receivers.get(layer, {})
            if which != "q" or not self._is_past(queries)
        }

    def _give(self, layer: int, which: HeadInput, senders: slice) -> WindowEdit:
        def give(vectors: Tensor) -> Tensor:
            vectors[:, :, 0, self.receivers[layer][which]] = self.inputs[layer][which][senders]
            return vectors

        return give

    def _is_past(self, queries: slice) -> bool:
        """Whether a query at the first token of the window has no effect any more."""
        return queries == ANSWER_TOKEN and len(self.window) > 1

    def _first_changed(
        self, layer: int, senders: slice, queries: slice
    ) -> Float[Tensor, "sender member query d_model"]:
        """`resid_mid` where the receivers' overwritten inputs are the only change so far.

        Only the receivers' own outputs are computed; all else is the clean run's.
        """
        model, window, given = self.model, self.window, self.receivers[layer]
        heads = sorted({head for some in given.values() for head in some})
        resid_mid = window.clean(self.runs["resid_mid", layer])[:, queries]
        resid_mid = resid_mid.expand(senders.stop - senders.start, -1, -1, -1).clone()
        touched = queries
        if set(given) == {"q"} and len(window) > 1:
            if self._is_past(queries):
                return resid_mid
            touched = slice(0, 1)
        normalized = model.blocks[layer].ln1(window.clean(self.runs["resid_pre", layer]))
        q = project(model, layer, "q", normalized[:, touched], heads)[None]
        k, v = (project(model, layer, which, normalized, heads)[None] for which in ("k", "v"))
        new: dict[HeadInput, Tensor] = {"q": q, "k": k, "v": v}
        for which, some in given.items():
            if which == "q" and self._is_past(queries):
                continue
            overwritten = new[which].expand(len(resid_mid), -1, -1, -1, -1).clone()
            index = [heads.index(head) for head in some]
            overwritten[:, :, 0, index] = self.inputs[layer][which][senders]
            new[which] = overwritten
        z_clean, z_new = (
            window.attend(
                model,
                layer,
                *vectors,
                self.runs.keys_and_values(layer),
                heads=heads,
                queries=touched,
            )
            for vectors in ((q, k, v), (new["q"], new["k"], new["v"]))
        )
        # Counted within resid_mid, which holds just the queries.
        rows = touched if queries == EVERY_TOKEN else EVERY_TOKEN
        resid_mid[:, :, rows] += head_outputs(model, layer, z_new - z_clean, heads)
        return resid_mid


@piece(alike=lambda model, resid, pairs, metric: (resid.shape, metric))
def metric_values(
    model: Model,
    resid: Float[Tensor, "senders batch d_model"],
    pairs: PairBatch,
    metric: Metric,
) -> Float[Tensor, "senders batch"]:
    """The metric from the final residual stream."""
    tokens = None if metric.tokens is None else metric.tokens(pairs)
    # Copies of the logits in float32, or the few columns of the unembedding that are needed.
    widths = 3 * model.cfg.d_vocab_out if tokens is None else tokens.shape[1] * model.cfg.d_model
    values = []
    assure_finite(resid)
    for some in row_slices(len(resid), 4 * widths * len(pairs), LOGITS_CHUNK_BYTES):
        rows = resid[some]
        wanted = None if tokens is None else tokens.expand(len(rows), -1, -1)
        logits = unembed(model, rows, wanted)
        if tokens is not None and metric.log_probabilities:
            normalizer = log_normalizer(model, rows)[..., None]
            logits = logits.to(normalizer.dtype) - normalizer
        values.append(metric.value(logits, pairs))
    return torch.cat(values)


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
