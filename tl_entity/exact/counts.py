"""What the exact engine computes for a job, counted from shapes: operations, bytes, calls.

Counted as it is computed, piece by piece, so that no weights are needed; a test holds every count
against the operations that torch sees.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformer_lens import HookedTransformerConfig

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.blocks import row_slices
from tl_entity.exact.memory import prompts_within
from tl_entity.exact.path_patching import any_at_answer, pairs_within
from tl_entity.exact.tally import CHAIN, RECORDED, SUFFIX, ShapeCounter, Tally
from tl_entity.exact.window import QUERY_POINTS, Window
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.path_patching import Senders
from tl_entity.hooks.points import HeadInput, kv_head
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch

BATCH_SIZE = 32
"""Prompts run together where nothing else is said, as in the methods."""


class Count(NamedTuple):
    """What a job takes on the exact engine, and how much plain hooks would run.

    Attributes:
        tally: what is computed.
        cache_bytes: recorded activations, at most at a time.
        chunk_bytes: intermediate results, at most at a time.
        hooks_passes: runs of all prompts that plain hooks need for the same numbers; a backward
            pass counts as one more.
        hooks_operations: what these compute.
    """

    tally: Tally
    cache_bytes: int
    chunk_bytes: int
    hooks_passes: int
    hooks_operations: int


class Job(ABC):
    """Something that the exact engine is asked for."""

    @abstractmethod
    def count(self, cfg: HookedTransformerConfig, pairs: PairBatch, memory: int) -> Count:
        """What it takes for these prompts, within this much memory for intermediate results."""


@dataclass(frozen=True)
class PathPatching(Job):
    """Path patching of every sender, as `tl_entity.exact.path_patching.patched_values` does it.

    Attributes:
        position: where senders and receivers are.
        receivers: heads whose input is patched; None for the logits.
        receiver_input: q, k or v of these; None for the logits.
        senders: every head, or every layer's MLP.
        metric: how runs are scored.
        batch_size: pairs run together; what the engine would choose if left out.
    """

    position: str
    receivers: tuple[Head, ...] | None = None
    receiver_input: HeadInput | None = None
    senders: Senders = "heads"
    metric: Metric = RELATIVE_PROBABILITY
    batch_size: int | None = None

    def count(self, cfg: HookedTransformerConfig, pairs: PairBatch, memory: int) -> Count:
        if (self.receivers is None) != (self.receiver_input is None):
            raise InputError("Receivers and receiver_input go together: give both or neither.")
        _check_heads(cfg, self.receivers or ())
        by_layer = _by_layer(self.receivers or ())
        top = cfg.n_layers if self.receivers is None else max(by_layer, default=0)
        shapes = ShapeCounter(cfg)
        size = self.batch_size or pairs_within(shapes.model, pairs, memory)
        cache = chunk = 0
        counted: dict[tuple[int, ...], tuple[Tally, int]] = {}
        for some in pairs.chunks(size):
            reached = top if self.receivers or any_at_answer(some, self.position) else 0
            cache = max(cache, self._cache_bytes(shapes, some, by_layer, reached))
            chunk = max(chunk, self._recorded_and_held(shapes, some, by_layer, reached))
            if self.receivers is None or not top:
                continue
            for window in Window.each_length(some.clean, some.clean.position(self.position)):
                key = (*window.tokens.shape, window.before.shape[1])
                if key not in counted:
                    counted[key] = self._suffix(cfg, some, window, by_layer, top, memory)
                tally, needed = counted[key]
                shapes.tally.add(tally)
                chunk = max(chunk, needed)
        return Count(shapes.tally, cache, chunk, *self._hooks(cfg, pairs, top))

    def _per_layer(self, cfg: HookedTransformerConfig) -> int:
        return cfg.n_heads if self.senders == "heads" else 1

    def _recorded_and_held(
        self, shapes: ShapeCounter, pairs: PairBatch, by_layer: Mapping[int, list[int]], top: int
    ) -> int:
        """Counts both recorded runs and the held pass; returns the most bytes these take."""
        cfg, n, batch = shapes.cfg, self._per_layer(shapes.cfg), len(pairs)
        shapes.part = RECORDED
        shapes.whole_run(pairs.clean)
        if top:
            shapes.whole_run(pairs.corrupt, top)
        shapes.score(batch, pairs, self.metric)
        needed = max(shapes.run_bytes(pairs.clean), shapes.run_bytes(pairs.corrupt))
        shapes.part = CHAIN
        for layer, heads in by_layer.items():
            shapes.project("v", layer * n * batch, len(heads))
            shapes.move(7 * layer * n * batch * cfg.d_model)
        for layer in range(top):
            if self.senders == "heads":
                shapes.product(batch, cfg.d_head, cfg.d_model, batch=cfg.n_heads)
                shapes.move(4 * cfg.n_heads * batch * cfg.d_model)
                shapes.mlp((layer + 1) * n * batch)
            else:
                shapes.mlp(layer * n * batch)
            shapes.move(3 * layer * n * batch * cfg.d_model)
        held = top * n * batch
        rows_bytes = held * cfg.d_model * shapes.itemsize
        inputs = sum(layer * n * batch * len(heads) for layer, heads in by_layer.items())
        rows_bytes += inputs * cfg.d_head * shapes.itemsize
        needed = max(needed, rows_bytes + shapes.mlp_bytes(held))
        if self.receivers is None and top:
            shapes.score(held, pairs, self.metric)
            needed = max(needed, rows_bytes + shapes.logits_bytes(held, self.metric))
        return needed

    def _suffix(
        self,
        cfg: HookedTransformerConfig,
        pairs: PairBatch,
        window: Window,
        by_layer: Mapping[int, list[int]],
        top: int,
        memory: int,
    ) -> tuple[Tally, int]:
        """The recomputation of a window for all senders, and the most bytes it takes."""
        shapes = ShapeCounter(cfg)
        shapes.part = SUFFIX
        n = self._per_layer(cfg)
        members, length = window.tokens.shape
        starts = [min(r for r in by_layer if r > sender // n) for sender in range(top * n)]
        each = window.bytes_per_variant(shapes.model)
        needed = 0
        for some in row_slices(len(starts), each, memory // 2):
            chosen = starts[some]
            for layer in range(chosen[0], cfg.n_layers):
                begun = sum(start < layer for start in chosen)
                now = sum(start <= layer for start in chosen)
                queries = 1 if layer == cfg.n_layers - 1 else length
                if begun:
                    shapes.window_attention(window, begun, queries)
                if now > begun:
                    self._first_changed(shapes, window, layer, now - begun, len(by_layer[layer]))
                shapes.mlp(now * members * queries)
            shapes.score(len(chosen) * members, pairs, self.metric)
            inputs = sum(map(len, by_layer.values())) * len(starts) * members * cfg.d_head
            needed = max(needed, each * len(chosen) + inputs * shapes.itemsize)
        return shapes.tally, needed

    def _first_changed(
        self, shapes: ShapeCounter, window: Window, layer: int, senders: int, heads: int
    ) -> None:
        members, length = window.tokens.shape
        last = layer == shapes.cfg.n_layers - 1
        touched = 1 if last else length
        shapes.move(2 * senders * members * touched * shapes.cfg.d_model)
        if self.receiver_input == "q" and length > 1:
            if last:
                return
            touched = 1
        shapes.project("q", members * touched, heads)
        shapes.project("k", members * length, heads)
        shapes.project("v", members * length, heads)
        before = window.before.shape[1]
        for variants in (1, senders):
            shapes.attend(variants, members, touched, heads, before, length)
        shapes.head_outputs(senders * members * touched, heads)
        shapes.call("attention", 2)

    def _cache_bytes(
        self, shapes: ShapeCounter, pairs: PairBatch, by_layer: Mapping[int, list[int]], top: int
    ) -> int:
        cfg = shapes.cfg
        batch, pos = pairs.clean.tokens.shape
        sent = shapes.width if self.senders == "heads" else cfg.d_model
        # Of each sender the clean output and the difference, and for a moment the corrupt one.
        at_senders = top * batch * (3 * sent + 2 * cfg.d_model)
        lowest = min(by_layer, default=cfg.n_layers)
        whole = (cfg.n_layers - lowest) * 2 * shapes.kv_width + len(by_layer) * 2 * cfg.d_model
        return (at_senders + batch * pos * whole) * shapes.itemsize

    def _hooks(self, cfg: HookedTransformerConfig, pairs: PairBatch, top: int) -> tuple[int, int]:
        if self.receivers is None and not any_at_answer(pairs, self.position):
            top = 0
        shapes = ShapeCounter(cfg)
        senders = top * self._per_layer(cfg)
        shapes.whole_run(pairs.clean)  # the run that outputs are held at
        shapes.whole_run(pairs.corrupt)
        runs = ShapeCounter(cfg)
        runs.whole_run(pairs.clean)
        runs.unembed(len(pairs))
        shapes.tally.add(runs.tally, 1 + senders)
        passes = 3 + senders
        if self.receivers is not None and top:
            # To read the receivers' input; with every layer's heads held, all layers are run.
            reading = ShapeCounter(cfg)
            reading.whole_run(pairs.clean)
            shapes.tally.add(reading.tally, senders)
            passes += senders
        return passes, _total(shapes.tally)


@dataclass(frozen=True)
class CircuitEvaluation(Job):
    """F(C) of many circuits, as `tl_entity.exact.ablation.AblatedRun` does it.

    Attributes:
        circuits: heads kept, by named position.
        batch_size: prompts run together.
    """

    circuits: tuple[Circuit | HeadsAt, ...]
    batch_size: int = BATCH_SIZE

    def count(self, cfg: HookedTransformerConfig, pairs: PairBatch, memory: int) -> Count:
        kept = []
        for circuit in self.circuits:
            by_position = {at: heads for at, heads in heads_by_position(circuit).items() if heads}
            _check_heads(cfg, [head for heads in by_position.values() for head in heads])
            if by_position:
                kept.append([head for heads in by_position.values() for head in heads])
        names = {at for c in self.circuits for at, heads in heads_by_position(c).items() if heads}
        n_tokens = len(names | {ANSWER_POSITION})
        kept.sort(key=lambda heads: min(head.layer for head in heads))
        shapes = ShapeCounter(cfg)
        chunk = 0
        pos = pairs.clean.tokens.shape[1]
        together = min(self.batch_size, prompts_within(cfg, pos, memory))
        for some in pairs.clean.chunks(together):
            batch = len(some)
            shapes.part = RECORDED
            for _ in range(cfg.n_layers):
                shapes.head_outputs(pos, cfg.n_heads)
                shapes.mlp(batch * pos)
                shapes.move(6 * batch * pos * cfg.d_model)
            shapes.call("run")
            chunk = max(chunk, shapes.mlp_bytes(batch * pos))
            floats = 6 * cfg.d_model + cfg.n_heads * (6 * cfg.d_head + 3 * (pos + n_tokens))
            each = batch * n_tokens * floats * shapes.itemsize
            shapes.part = SUFFIX
            for chosen in row_slices(len(kept), each, memory // 2):
                self._kept(shapes, kept[chosen], batch, pos, n_tokens)
                chunk = max(chunk, each * (chosen.stop - chosen.start))
            for _ in self.circuits:
                shapes.unembed(batch)
        size = min(together, len(pairs))
        cache = cfg.n_layers * size * pos * cfg.d_model + len(kept) * size * cfg.d_model
        hooks = ShapeCounter(cfg)
        hooks.whole_run(pairs.clean)
        hooks.unembed(len(pairs))
        passes = len(self.circuits)
        return Count(
            shapes.tally, cache * shapes.itemsize, chunk, passes, passes * _total(hooks.tally)
        )

    def _kept(
        self,
        shapes: ShapeCounter,
        kept: Sequence[Sequence[Head]],
        batch: int,
        pos: int,
        n_tokens: int,
    ) -> None:
        cfg = shapes.cfg
        top = max(head.layer for heads in kept for head in heads)
        begins = [min(head.layer for head in heads) for heads in kept]
        for layer in range(begins[0], cfg.n_layers):
            here = sum(begin <= layer for begin in begins)
            rows = here * batch * n_tokens
            shapes.head_outputs(pos, cfg.n_heads)
            heads = {h.head for some in kept[:here] for h in some if h.layer == layer}
            if heads:
                own_kv = len({kv_head(cfg, head) for head in heads})
                shapes.move(7 * (batch * pos + rows) * cfg.d_model)
                shapes.project("q", rows, len(heads))
                for which in ("k", "v"):
                    shapes.project(which, batch * pos, own_kv)
                    shapes.project(which, rows, own_kv)
                shapes.attend(here, batch, n_tokens, len(heads), pos, n_tokens)
                shapes.head_outputs(rows, len(heads))
                shapes.call("attention")
            shapes.mlp(here * batch * (n_tokens if layer < top else 1))


class Variant(NamedTuple):
    """A list of edits, as far as it matters to what it costs.

    Attributes:
        positions: the named positions edited.
        points: the hook points edited (q, k, v, attn_scores, z), by layer.
    """

    positions: tuple[str, ...]
    points: Mapping[int, frozenset[str]]

    @property
    def lowest(self) -> int:
        """The lowest layer edited."""
        return min(self.points)


@dataclass(frozen=True)
class EditedRuns(Job):
    """Edits to a recorded run, as `tl_entity.exact.suffix.CleanRun` does them.

    `mask_steps`, `cross_model_patching` and `knockouts` make them for the methods.

    Attributes:
        variants: the lists of edits; those at the same positions are recomputed together, from the
            earliest of these on.
        times: how often the variants are run on the same recorded prompts.
        trained: whether gradients are wanted.
        wanted: logits that are needed of each run; None for the whole vocabulary.
        others: layers of each further recorded run that the edits take their values from.
        batch_size: prompts run together.
    """

    variants: tuple[Variant, ...]
    times: int = 1
    trained: bool = False
    wanted: int | None = None
    others: tuple[int, ...] = ()
    batch_size: int = BATCH_SIZE

    def count(self, cfg: HookedTransformerConfig, pairs: PairBatch, memory: int) -> Count:
        edited = sorted((some for some in self.variants if some.points), key=lambda v: v.lowest)
        for variant in edited:
            _check_heads(cfg, [Head(layer, 0) for layer in variant.points])
        together = {
            at: [variant for variant in edited if variant.positions == at]
            for at in dict.fromkeys(variant.positions for variant in edited)
        }
        recorded, runs = ShapeCounter(cfg), ShapeCounter(cfg, trained=self.trained)
        runs.part = SUFFIX
        lowest = min((variant.lowest for variant in edited), default=cfg.n_layers - 1)
        cache = chunk = 0
        pos = pairs.clean.tokens.shape[1]
        size = self.batch_size
        if not self.trained:  # a step's batch is part of what a mask is learned with
            size = min(size, prompts_within(cfg, pos, memory))
        for some in pairs.chunks(size):
            recorded.whole_run(some.clean)
            for layers in self.others:
                recorded.whole_run(some.corrupt, layers)
            named = {name for at in together for name in at}
            starts = [int(some.clean.position(name).min()) for name in named]
            later = pos - min(starts, default=pos)
            begins = len({variant.lowest for variant in edited})
            kept = self._cache_bytes(recorded, len(some), pos, later, lowest, begins)
            # A mask's training keeps the recorded runs of all its batches.
            cache = cache + kept if self.trained else max(cache, kept)
            chunk = max(chunk, recorded.run_bytes(some.clean))
            for positions, variants in together.items():
                start = torch.stack([some.clean.position(name) for name in positions]).amin(0)
                for window in Window.each_length(some.clean, start):
                    each = window.bytes_per_variant(runs.model)
                    for chosen in row_slices(len(variants), each, memory // 2):
                        here = variants[chosen]
                        _recompute(runs, window, here)
                        chunk = max(chunk, self._variants_bytes(runs, window, here))
            runs.unembed(len(some) * len(self.variants), self.wanted)
        tally = recorded.tally
        tally.add(runs.tally, self.times)
        return Count(tally, cache, chunk, *self._hooks(cfg, pairs, lowest))

    def _cache_bytes(
        self, shapes: ShapeCounter, batch: int, pos: int, later: int, lowest: int, begins: int
    ) -> int:
        """Keys and values of all tokens, and of the `later` ones what recomputations begin with."""
        cfg = shapes.cfg
        each = pos * (cfg.n_layers - lowest) * 2 * shapes.kv_width
        each += later * begins * (2 * cfg.d_model + shapes.width)
        return batch * (each + cfg.d_model) * shapes.itemsize

    def _variants_bytes(self, shapes: ShapeCounter, window: Window, here: Sequence[Variant]) -> int:
        each = window.bytes_per_variant(shapes.model)
        rows = len(here) * window.tokens.numel()
        if not self.trained:
            return len(here) * each + shapes.mlp_bytes(rows)
        # Every layer's activations stay for the backward pass.
        layers = shapes.cfg.n_layers - here[0].lowest
        return layers * (len(here) * each + rows * 5 * shapes.d_mlp * shapes.itemsize)

    def _hooks(
        self, cfg: HookedTransformerConfig, pairs: PairBatch, lowest: int
    ) -> tuple[int, int]:
        forward, backward, others = ShapeCounter(cfg), ShapeCounter(cfg), ShapeCounter(cfg)
        forward.whole_run(pairs.clean)
        forward.unembed(len(pairs))
        backward.whole_run(pairs.clean, cfg.n_layers - lowest)
        for layers in self.others:
            others.whole_run(pairs.corrupt, layers)
        n = self.times * len(self.variants)
        operations = n * _total(forward.tally) + _total(others.tally)
        if self.trained:
            operations += n * _total(backward.tally)
        return n * (2 if self.trained else 1) + len(self.others), operations


def _recompute(shapes: ShapeCounter, window: Window, variants: Sequence[Variant]) -> None:
    """Counts a window's recomputation for variants in order of where they begin."""
    cfg = shapes.cfg
    members, length = window.tokens.shape
    begins = [variant.lowest for variant in variants]
    for layer in range(begins[0], cfg.n_layers):
        begun = sum(begin < layer for begin in begins)
        now = sum(begin <= layer for begin in begins)
        last = layer == cfg.n_layers - 1
        here = [variant.points.get(layer, frozenset()) for variant in variants[:now]]
        touches_queries = any(QUERY_POINTS & points for points in here)
        queries = 1 if last and not touches_queries else length
        shapes.call("edit", sum(map(len, here)))
        if begun:
            shapes.window_attention(window, begun, queries)
        if now > begun:
            fresh = now - begun
            if all(points <= {"z"} for points in here[begun:]):
                shapes.head_outputs(fresh * members * queries, cfg.n_heads)
            else:
                shapes.window_attention(window, fresh, queries)
        shapes.mlp(now * members * (1 if last else length))


@checked
def mask_steps(
    candidates: Sequence[Head],
    *,
    position: str,
    epochs: int = 2,
    batch_size: int = BATCH_SIZE,
) -> EditedRuns:
    """Training a mask on `candidates` (DCM): both recorded runs, and all steps.

    Raises:
        InputError: if there are no candidates.
    """
    if not candidates:
        raise InputError("There are no candidate heads to learn a mask for.")
    layers = sorted({head.layer for head in candidates})
    variant = Variant((position,), dict.fromkeys(layers, frozenset({"z"})))
    return EditedRuns(
        variants=(variant,),
        times=epochs,
        trained=True,
        wanted=1,
        others=(layers[-1] + 1,),
        batch_size=batch_size,
    )


_POINTS_OF_PATCH = {
    "output": {"z"},
    "q": {"q"},
    "k": {"rot_q", "attn_scores"},
    "v": {"attn_scores", "z"},
}
"""The hook points at which heads' outputs or inputs are patched from another model."""


@checked
def cross_model_patching(
    choices: Sequence[tuple[Circuit | HeadsAt, str]], *, batch_size: int = BATCH_SIZE
) -> EditedRuns:
    """Patching heads from another model of the same sizes (CMAP), each choice by itself.

    Args:
        choices: heads, and what of them is patched: "output", or letters of q, k and v.
        batch_size: prompts run together.

    Raises:
        InputError: if something else is to be patched.
    """
    variants = []
    for heads, patch in choices:
        by_position = {at: some for at, some in heads_by_position(heads).items() if some}
        parts = (patch,) if patch == "output" else tuple(patch)
        if not set(parts) <= set(_POINTS_OF_PATCH):
            raise InputError(f"{patch!r} can't be patched: say 'output', or letters of q, k, v.")
        points = frozenset().union(*(_POINTS_OF_PATCH[part] for part in parts))
        layers = sorted({head.layer for some in by_position.values() for head in some})
        variants.append(Variant(tuple(sorted(by_position)), dict.fromkeys(layers, points)))
    highest = max((max(variant.points, default=-1) for variant in variants), default=-1)
    return EditedRuns(tuple(variants), others=(highest + 1,), batch_size=batch_size)


@checked
def knockouts(
    cfg: HookedTransformerConfig, *, from_position: str, batch_size: int = BATCH_SIZE
) -> EditedRuns:
    """Attention from a position taken away, from each layer of the model up in turn."""
    points = frozenset({"attn_scores"})
    return EditedRuns(
        # The first is the run with nothing knocked out.
        variants=tuple(
            Variant((from_position,), dict.fromkeys(layers, points))
            for layers in (range(0), *(range(n, cfg.n_layers) for n in range(cfg.n_layers)))
        ),
        batch_size=batch_size,
    )


def _by_layer(receivers: Sequence[Head]) -> dict[int, list[int]]:
    by_layer: dict[int, list[int]] = {}
    for receiver in sorted(set(receivers)):
        by_layer.setdefault(receiver.layer, []).append(receiver.head)
    return by_layer


def _check_heads(cfg: HookedTransformerConfig, heads: Sequence[Head]) -> None:
    for head in heads:
        if not (0 <= head.layer < cfg.n_layers and 0 <= head.head < cfg.n_heads):
            raise InputError(
                f"The model has no head {head}; it has {cfg.n_layers} layers "
                f"of {cfg.n_heads} heads."
            )


def _total(tally: Tally) -> int:
    return sum(tally.operations.values())
