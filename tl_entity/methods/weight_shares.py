"""Which weights bring what fine-tuning gained: a share of the gain for every unit that changed.

With base weights W and the fine-tune's W + D, the gradient of the metric with respect to a unit's
weights, times the unit's D, integrated over W + a D from a = 0 to 1, is the unit's share. All
shares sum to the gain, up to the error of the integration (integrated gradients, Sundararajan et
al. 2017, with weights in place of inputs).

The integral is taken by Clenshaw and Curtis's rule, whose points are used again as they are
doubled: 5, 9, 17, ... until the shares sum to the measured gain within 2 %, and prompt by prompt
within 5 % in the mean. What is reached is the result's `integration_error` and `prompt_error`.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._model import Model, check_takes_gradients
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.memory import memory_budget
from tl_entity.heads import Circuit, Head, HeadsAt
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import n_kv_heads
from tl_entity.methods.circuits import BATCH_SIZE
from tl_entity.methods.gains import scored_pairs
from tl_entity.methods.masked_forward import outside_inference
from tl_entity.methods.shares_inside import Part, SharesInside, relative_to
from tl_entity.methods.weight_integral import MAX_POINTS, Integration
from tl_entity.methods.weight_path import WeightPath, bytes_per_prompt
from tl_entity.methods.weight_units import (
    KINDS,
    MLP_KINDS,
    SHARED_KINDS,
    Unit,
    changed_parameters,
    random_units,
    sizes_of_change,
)
from tl_entity.metrics import LOG_PROBABILITY, Metric
from tl_entity.results import ROWS_SHOWN, Result
from tl_entity.stats import Interval, mean_intervals
from tl_entity.tasks.batches import PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

UNITS_IN_A_LINE = 3
"""Units that a line of text names."""

Key = TypeVar("Key", bound=Hashable)


@checked
@dataclass(frozen=True)
class WeightShares(Result):
    """What each unit of the weights brings of the gain.

    Attributes:
        units: the units whose weights differ; those of equal weights have no share.
        per_prompt: each unit's share of each prompt's gain.
        gain_per_prompt: the metric in the tuned model less that in the base.
        sizes: the Euclidean norm of each unit's change.
        n_points: points of the integration.
        sum_by_points: what the mean shares summed to with fewer points, and with all.
        metric: the metric's name.
        n_layers: layers of the models.
        n_heads: query heads of a layer.
        n_kv_heads: key-value heads of a layer.
        tokens: the prompts, -1 at padding.
    """

    units: tuple[Unit, ...]
    per_prompt: Float[Tensor, "unit batch"]
    gain_per_prompt: Float[Tensor, " batch"]
    sizes: Float[Tensor, " unit"]
    n_points: int
    sum_by_points: Mapping[int, float]
    metric: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    tokens: Int[Tensor, "batch pos"]

    def __str__(self) -> str:
        most = ", ".join(f"{unit} {self.share(unit):+.3f}" for unit in self.top(UNITS_IN_A_LINE))
        return (
            f"gain {self.gain:+.3f} {self.gain_interval} in {self.metric} of "
            f"{len(self.gain_per_prompt)} prompts; {len(self.units)} shares sum to "
            f"{self.total:+.3f} (error {self.integration_error:+.2%}, {self.n_points} points); "
            f"most: {most}"
        )

    @property
    def total(self) -> float:
        """The sum of all shares: the gain, but for the integration's error."""
        return float(self.shares.sum())

    @property
    def shares(self) -> Float[Tensor, " unit"]:
        """Each unit's share of the gain: the mean over the prompts."""
        return self.per_prompt.mean(-1)

    @property
    def intervals(self) -> Float64[np.ndarray, "unit 2"]:
        """95 % interval of each share, over prompts."""
        return mean_intervals(self.per_prompt.double().cpu().numpy())

    @property
    def gain(self) -> float:
        """The metric's change from base to tuned model: the mean over the prompts."""
        return float(self.gain_per_prompt.mean())

    @property
    def gain_interval(self) -> Interval:
        """95 % interval of the gain, over prompts."""
        return Interval(*mean_intervals(self.gain_per_prompt.double().cpu().numpy()).tolist())

    @property
    def integration_error(self) -> float:
        """The sum of the shares less the gain, relative to the gain; infinite if there is none."""
        return relative_to(self.total - self.gain, self.gain)

    @property
    def prompt_error(self) -> float:
        """The same prompt by prompt: the mean size of the errors relative to that of the gains."""
        errors = self.per_prompt.sum(0) - self.gain_per_prompt
        return relative_to(float(errors.abs().mean()), float(self.gain_per_prompt.abs().mean()))

    def share(self, unit: Unit) -> float:
        """The share of one unit; 0 for one whose weights are equal."""
        unit = Unit(*unit)
        return float(self.shares[self.units.index(unit)]) if unit in self.units else 0.0

    def ranked(self, *, by_size: bool = False) -> tuple[Unit, ...]:
        """All units, the largest share first (or the largest change); ties in the units' order."""
        values = (self.sizes if by_size else self.shares).tolist()
        order = sorted(range(len(values)), key=lambda index: (-values[index], index))
        return tuple(self.units[index] for index in order)

    def top(self, k: int) -> tuple[Unit, ...]:
        """The `k` units with the largest shares, the largest first."""
        return self.ranked()[:k]

    def readers(self, unit: Unit) -> tuple[Head, ...]:
        """The query heads that a unit belongs to: one for q and o; all that read a key-value head's
        k and v; none for a unit of no head."""
        kind, layer, head = unit
        if layer is None or head is None:
            return ()
        if kind not in SHARED_KINDS:
            return (Head(layer, head),)
        group = self.n_heads // self.n_kv_heads
        return tuple(Head(layer, head * group + index) for index in range(group))

    def units_of(self, heads: Circuit | HeadsAt | Iterable[Head]) -> tuple[Unit, ...]:
        """The changed units of heads, in the order of the heads: q, k, v, o and biases, each once.

        A k or v is taken with the first head that reads it.
        """
        by_head: dict[Head, list[Unit]] = {}
        for unit in self.units:
            for head in self.readers(unit):
                by_head.setdefault(head, []).append(unit)
        chosen = [unit for head in _heads(heads) for unit in by_head.get(head, ())]
        return tuple(dict.fromkeys(chosen))

    def part(self, units: Collection[Unit]) -> Part:
        """What some units have together; those of equal weights have nothing."""
        chosen = set(units)
        rows = [index for index, unit in enumerate(self.units) if unit in chosen]
        together = self.per_prompt[rows].double().sum(0)
        interval = Interval(*mean_intervals(together.cpu().numpy()).tolist())
        share = float(together.mean())
        return Part(len(rows), share, interval, relative_to(share, self.gain))

    def by_kind(self) -> dict[str, Part]:
        """Units of each kind together: q, k, v, o, gate, in, out, norms, embeddings, biases."""
        return self._parts(lambda unit: unit.kind, KINDS)

    def by_layer(self) -> dict[int | None, Part]:
        """Units of each layer together; under None those of no layer."""
        return self._parts(lambda unit: unit.layer, (*range(self.n_layers), None))

    def by_head(self) -> dict[Head, Part]:
        """Each query head's q and o together, with biases of q; k and v are not a head's own unless
        it alone reads them."""
        alone = {unit: readers[0] for unit in self.units if len(readers := self.readers(unit)) == 1}
        return self._parts(lambda unit: alone.get(unit), sorted(set(alone.values())))

    def mlps(self) -> dict[int, Part]:
        """All parts of each layer's MLP together."""
        return self._parts(
            lambda unit: unit.layer if unit.kind in MLP_KINDS else None, range(self.n_layers)
        )

    def _parts(self, key: Callable[[Unit], Key | None], keys: Iterable[Key]) -> dict[Key, Part]:
        groups: dict[Key | None, list[Unit]] = {}
        for unit in self.units:
            groups.setdefault(key(unit), []).append(unit)
        return {name: self.part(groups[name]) for name in keys if name in groups}

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a unit: its share, the 95 % interval, the share of the gain, the size of its
        change, its rank, and which query heads read a k or v."""
        import pandas as pd

        ranks = {unit: rank for rank, unit in enumerate(self.ranked(), start=1)}
        shares, bounds = self.shares.double().cpu().numpy(), self.intervals
        return pd.DataFrame(
            {
                "unit": [str(unit) for unit in self.units],
                "kind": [unit.kind for unit in self.units],
                "layer": pd.array([unit.layer for unit in self.units], dtype="Int64"),
                "head": pd.array([unit.head for unit in self.units], dtype="Int64"),
                "share": shares,
                "low": bounds[:, 0],
                "high": bounds[:, 1],
                "of_gain": [relative_to(float(share), self.gain) for share in shares],
                "size": self.sizes.tolist(),
                "rank": [ranks[unit] for unit in self.units],
                "read_by": [
                    " ".join(map(str, self.readers(unit))) if unit.kind in SHARED_KINDS else ""
                    for unit in self.units
                ],
            }
        )

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The `n` units with the largest shares, the largest first; None for all."""
        rows = self.to_dataframe().sort_values(by="rank")
        rows = rows.loc[:, ["rank", "unit", "share", "low", "high", "of_gain", "size"]]
        rows = rows.reset_index(drop=True)
        return rows if n is None else rows.head(n)

    def inside(
        self,
        heads: Circuit | HeadsAt | Iterable[Head],
        *,
        draws: int = 1000,
        seed: int = 0,
    ) -> SharesInside:
        """How much of the gain lies in some heads, in other heads, and elsewhere.

        A unit is inside if all query heads that it belongs to are; a k or v that heads inside and
        outside read together is in a part of its own. Heads act at all tokens here: positions are
        not looked at.

        Args:
            heads: a circuit, heads by position, or heads.
            draws: random sets of units to compare with, as many of each layer and kind as inside.
            seed: of these draws.

        Raises:
            InputError: if a head does not exist.
        """
        chosen = set(_heads(heads))
        for head in chosen:
            if not (0 <= head.layer < self.n_layers and 0 <= head.head < self.n_heads):
                raise InputError(
                    f"The models have no head {head}; they have {self.n_layers} layers of "
                    f"{self.n_heads} heads."
                )
        names = ("inside", "shared", "other heads", "MLPs", "other")
        groups: dict[str, list[Unit]] = {name: [] for name in names}
        for unit in self.units:
            readers = self.readers(unit)
            within = chosen.intersection(readers)
            if within:
                groups["inside" if len(within) == len(readers) else "shared"].append(unit)
            elif readers:
                groups["other heads"].append(unit)
            else:
                groups["MLPs" if unit.kind in MLP_KINDS else "other"].append(unit)
        values = dict(zip(self.units, self.shares.double().tolist(), strict=True))
        alike = random_units(self.units, groups["inside"], draws=draws, seed=seed)
        return SharesInside(
            heads=tuple(sorted(chosen)),
            parts={name: self.part(units) for name, units in groups.items()},
            random=np.array([math.fsum(values[unit] for unit in drawn) for drawn in alike]),
            gain=self.gain,
            gain_interval=self.gain_interval,
            metric=self.metric,
        )

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Maps of shares, layer by head, for q, k, v and o, and layer by part for the MLPs."""
        from tl_entity.plots.gain import ShareMap, share_maps

        def values(units: list[list[Unit]]) -> np.ndarray:
            return np.array([[found.get(unit, math.nan) for unit in row] for row in units])

        width = {"k": self.n_kv_heads, "v": self.n_kv_heads}
        found = dict(zip(self.units, self.shares.double().cpu().tolist(), strict=True))
        maps: list[ShareMap] = []
        for kind in ("q", "k", "v", "o"):
            if any(unit.kind == kind for unit in self.units):
                columns = range(width.get(kind, self.n_heads))
                units = [[Unit(kind, layer, h) for h in columns] for layer in range(self.n_layers)]
                title_of = f"{kind} (KV)" if kind in SHARED_KINDS else kind
                maps.append(ShareMap(title_of, tuple(map(str, columns)), values(units)))
        parts = [kind for kind in MLP_KINDS if any(unit.kind == kind for unit in self.units)]
        if parts:
            units = [[Unit(kind, layer) for kind in parts] for layer in range(self.n_layers)]
            maps.append(ShareMap("MLP", tuple(parts), values(units)))
        if title is None:
            title = f"Shares of the gain ({self.metric} {self.gain:+.3f})"
        return share_maps(maps, title=title)

    def plot_bars(self, *, title: str | None = None) -> "go.Figure":
        """What each kind of unit brings, one upon the other up to the gain."""
        from tl_entity.plots.bars import Bar
        from tl_entity.plots.gain import adding_bars

        parts = {kind: Bar(p.share, *p.interval) for kind, p in self.by_kind().items()}
        gain = Bar(self.gain, *self.gain_interval)
        if title is None:
            title = f"The gain by kind of weight; {len(self.gain_per_prompt)} prompts"
        return adding_bars(parts, gain, title=title, axis=self.metric)


@checked
@torch.inference_mode(False)
def weight_shares(
    base: Model,
    tuned: Model,
    prompts: PromptBatch | PairBatch,
    *,
    metric: Metric = LOG_PROBABILITY,
    max_points: int = MAX_POINTS,
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> WeightShares:
    """The share of the gain that each unit's change of weights brings; all shares sum to the gain.

    Only what differs is differentiated. Everything is computed in float32 at least, whatever the
    models' dtype. Neither model is changed, and no third one is held: the weights on the way are
    made for one layer at a time.

    Args:
        base: the model before.
        tuned: the model after: a full fine-tune, or the base with an adapter merged.
        prompts: prompts, whose answers are scored; or pairs, for metrics that need more: the clean
            prompts are run, and their targets and foils scored.
        metric: how runs are scored; the gain is its change from the base to the tuned model.
        max_points: at most so many points, whatever the error.
        batch_size: prompts run together, at most.
        memory: bytes that intermediate results may take; found from the device if left out.
        progress: called with the number of runs done since the last call, where one prompt at one
            point is a run.

    Raises:
        InputError: if the models differ in architecture, tokenizer or the shape of a weight, naming
            it, or have the same weights; a weight differs that has no place in a Llama; a prompt
            has no answer or a token that the models don't know; or the metric is not finite.
    """
    changed = changed_parameters(base, tuned)
    pairs = outside_inference(scored_pairs(base, prompts))
    assert isinstance(base, HookedTransformer) and isinstance(tuned, HookedTransformer)
    for model in (base, tuned):
        check_takes_gradients(model)
    memory = memory_budget(base.cfg.device) if memory is None else memory
    size = max(1, min(batch_size, memory // bytes_per_prompt(base, pairs.clean.tokens.shape[1])))
    with guarded(base, tuned):
        path = WeightPath(base, tuned, changed)
        found = Integration(path, pairs, metric, size, max_points, progress)
        shares, sums = found.until_exact()
    sizes = torch.tensor(sizes_of_change(base, tuned, changed), dtype=torch.float64)
    kept = (sizes > 0).nonzero().squeeze(1)
    return WeightShares(
        units=tuple(path.units[index] for index in kept.tolist()),
        per_prompt=shares[kept.to(shares.device)],
        gain_per_prompt=found.gain,
        sizes=sizes[kept],
        n_points=max(sums),
        sum_by_points=sums,
        metric=metric.name,
        n_layers=base.cfg.n_layers,
        n_heads=base.cfg.n_heads,
        n_kv_heads=n_kv_heads(base.cfg),
        tokens=pairs.clean.tokens.masked_fill(~pairs.clean.mask, -1),
    )


def _heads(heads: Circuit | HeadsAt | Iterable[Head]) -> tuple[Head, ...]:
    if isinstance(heads, Circuit):
        heads = heads.heads_at()
    if isinstance(heads, Mapping):
        heads = [head for at in heads.values() for head in at]
    return tuple(dict.fromkeys(Head(*head) for head in heads))
