"""Are the shares of the gain right? Models with only some of a fine-tune's changes, and accuracy by
how many of them there are."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.methods.circuits import Evaluation, evaluate
from tl_entity.methods.gains import Recovered, recovered_gain
from tl_entity.methods.weight_shares import WeightShares
from tl_entity.methods.weight_units import (
    Unit,
    check_same_weights,
    expanded,
    random_units,
    set_parameter,
    units_of,
)
from tl_entity.results import Result
from tl_entity.tasks.batches import PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_entity.plots.bars import Bar

BY_SHARE = "share of the gain"
"""The order of the units by their shares, the largest first."""

BY_SIZE = "size of the change"
"""The order of the units by how much their weights changed."""

RANDOM = "random"
"""Units drawn at random, as many of each layer and kind as the first by share."""

TARGET = 0.9
"""The part of the gain that a graft must have, where nothing else is said."""


@checked
@torch.inference_mode(False)  # whose weights no gradient could ever pass
def graft(base: Model, tuned: Model, units: Collection[Unit]) -> HookedTransformer:
    """Another model: the base with only these units' weights from the tuned model.

    It shares every weight that no unit, or all units, of a parameter touch with the one model or
    the other; the rest is copied. With all units it is the tuned model, with none the base; with
    the two models swapped, it is the fine-tune without these units' changes. Neither model is
    changed.

    Args:
        base: the model grafted into.
        tuned: the model that weights are taken from.
        units: the units, as those of `WeightShares`; of the kind "mlp" for all parts of a layer's
            MLP.

    Raises:
        InputError: if the models differ in architecture, tokenizer or the shape of a weight; one is
            a TransformerBridge; or a unit does not exist.
    """
    check_same_weights(base, tuned)
    chosen = expanded(base, units)
    assert isinstance(base, HookedTransformer)
    grafted = _shell(base)
    for name, ours in base.named_parameters():
        units_here = units_of(name, ours)
        taken = [index for index, unit in enumerate(units_here) if unit in chosen]
        if taken:
            theirs = tuned.get_parameter(name).detach().to(ours.device, ours.dtype)
            set_parameter(grafted, name, _mixed(ours.detach(), theirs, taken, len(units_here)))
    return grafted


def _shell(model: HookedTransformer) -> HookedTransformer:
    """A model with modules of its own around the same weights and tokenizer."""
    shared: list[Any] = [*model.parameters(), *model.buffers(), model.tokenizer]
    return copy.deepcopy(model, {id(held): held for held in shared})


def _mixed(ours: Tensor, theirs: Tensor, taken: list[int], n_units: int) -> Tensor:
    if len(taken) == n_units:
        return theirs
    mixed = ours.clone()
    mixed[taken] = theirs[taken]
    return mixed


@dataclass(frozen=True)
class Grafted:
    """Some units' changes alone, and the fine-tune without them.

    Attributes:
        order: how the units were chosen: `BY_SHARE`, `BY_SIZE`, `RANDOM` with the seed, or an order
            of one's own.
        units: the units.
        share: the sum of their shares, relative to the gain.
        grafted: the base with these changes alone.
        recovered: its part of the gain in accuracy.
        removed: the fine-tune without these changes.
        remaining: its part of the gain in accuracy.
    """

    order: str
    units: tuple[Unit, ...]
    share: float
    grafted: Evaluation
    recovered: Recovered
    removed: Evaluation
    remaining: Recovered

    def __str__(self) -> str:
        return (
            f"{len(self.units)} units by {self.order}: alone {self.grafted.accuracy:.3f} "
            f"{self.grafted.interval}, without them {self.removed.accuracy:.3f} "
            f"{self.removed.interval}"
        )


@dataclass(frozen=True)
class GraftCurve(Result):
    """Accuracy with a growing number of units' changes.

    Attributes:
        base: the base model.
        tuned: the tuned model.
        entries: by order, then by number of units.
        n_units: how many units changed.
    """

    base: Evaluation
    tuned: Evaluation
    entries: tuple[Grafted, ...]
    n_units: int

    def __str__(self) -> str:
        smallest = self.smallest()
        found = "no graft tried has" if smallest is None else f"{len(smallest.units)} units have"
        return (
            f"base {self.base.accuracy:.3f}, tuned {self.tuned.accuracy:.3f} of {len(self.base)} "
            f"prompts; of {self.n_units} units {found} {TARGET} of the gain"
        )

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders in which units were taken."""
        return tuple(dict.fromkeys(entry.order for entry in self.entries))

    def of(self, order: str) -> tuple[Grafted, ...]:
        """The entries of one order, by number of units.

        Raises:
            KeyError: if there is no such order.
        """
        if order not in self.orders:
            raise KeyError(order)
        return tuple(entry for entry in self.entries if entry.order == order)

    def smallest(
        self, target: float = TARGET, *, order: str = BY_SHARE, removed: bool = False
    ) -> Grafted | None:
        """The fewest units tried that have so much of the gain, if any have; None too where the
        tuned model gains nothing.

        Args:
            target: the part of the gain in accuracy.
            order: how units were chosen.
            removed: ask instead that the fine-tune without them has lost so much of it.
        """
        whole = int(self.tuned.correct.sum()) - int(self.base.correct.sum())
        if whole <= 0:
            return None
        for entry in self.of(order):
            lost = 1 - entry.remaining.recovered
            # Counts over a count: rounding must not decide at the target itself.
            if (lost if removed else entry.recovered.recovered) >= target - 1e-9:
                return entry
        return None

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an order and number of units: accuracies and parts of the gain both ways round,
        with their intervals."""
        import pandas as pd

        rows: list[dict[str, object]] = []
        for entry in self.entries:
            row: dict[str, object] = {
                "order": entry.order,
                "n_units": len(entry.units),
                "share": entry.share,
            }
            for name, found, part in (
                ("alone", entry.grafted, entry.recovered),
                ("without", entry.removed, entry.remaining),
            ):
                row |= {
                    f"{name}_accuracy": found.accuracy,
                    f"{name}_low": found.interval.low,
                    f"{name}_high": found.interval.high,
                    f"{name}_of_gain": part.recovered,
                    f"{name}_of_gain_low": part.recovered_interval.low,
                    f"{name}_of_gain_high": part.recovered_interval.high,
                }
            rows.append(row)
        return pd.DataFrame(rows)

    def table(self, n: int | None = None) -> "pd.DataFrame":
        """Accuracies alone and without, one row an order and number of units."""
        rows = self.to_dataframe()
        rows = rows.loc[:, ["order", "n_units", "share", "alone_accuracy", "without_accuracy"]]
        return rows if n is None else rows.head(n)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Accuracy by number of units: solid with their changes alone, dashed without them."""
        from tl_entity.plots.gain import Line, lines

        found: list[Line] = []
        for order in self.orders:
            entries = self.of(order)
            x = tuple(float(len(entry.units)) for entry in entries)
            faint = order.startswith(RANDOM)
            for name, removed in (("alone", False), ("the rest", True)):
                bars = tuple(_bar(e.removed if removed else e.grafted) for e in entries)
                found.append(Line(f"{order}, {name}", x, bars, removed, faint, order))
        return lines(
            found,
            title="Changes of the first units, and all but these" if title is None else title,
            x_axis="units",
            y_axis="accuracy",
            levels={"base": _bar(self.base), "tuned": _bar(self.tuned)},
            proportion=True,
            logarithmic=True,
        )


def _bar(found: Evaluation) -> "Bar":
    from tl_entity.plots.bars import Bar

    return Bar(found.accuracy, *found.interval)


@checked
def graft_curve(
    base: Model,
    tuned: Model,
    prompts: PromptBatch,
    shares: WeightShares,
    *,
    sizes: Sequence[int] | None = None,
    orders: Mapping[str, Sequence[Unit]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[int], object] = lambda runs: None,
) -> GraftCurve:
    """Answer held-out prompts with the changes of the first units alone, and with all but these.

    Units are taken by their share of the gain, by the size of their change, at random (as many of
    each layer and kind as the first by share), and in orders of one's own.

    Args:
        base: the base model.
        tuned: the tuned model.
        prompts: prompts that the shares are not from.
        shares: the shares of the two models' gain.
        sizes: how many units are taken; powers of two, short of all units, if left out.
        orders: further rankings of units by name, such as `shares.units_of(heads)` of heads in the
            order of their activations' effect; sizes beyond a ranking's length are left out.
        seeds: of random units; for each there is one draw of every size.
        progress: called with the number of runs done since the last call, where one model on one
            prompt is a run.

    Raises:
        InputError: as `graft` and `evaluate`; or if the shares are from some of these prompts or of
            other units than the models', or a size is not among 1 to the number of units.
    """
    _check_held_out(prompts, shares)
    n = len(shares.units)
    if sizes is None:
        sizes = [2**power for power in range(n.bit_length()) if 2**power < n] or [n]
    if not all(0 < size <= n for size in sizes):
        raise InputError(f"{n} units changed; sizes must be from 1 to {n}, not {list(sizes)}.")
    tried = _Tried(base, tuned, prompts, shares, progress)
    by_share = shares.ranked()
    rankings = {BY_SHARE: by_share, BY_SIZE: shares.ranked(by_size=True), **(orders or {})}
    growing = sorted(set(sizes))
    entries = [
        tried.entry(order, tuple(ranking[:size]))
        for order, ranking in rankings.items()
        for size in growing
        if size <= len(ranking)
    ]
    for seed in seeds:
        for size in growing:
            (drawn,) = random_units(shares.units, by_share[:size], draws=1, seed=seed)
            entries.append(tried.entry(f"{RANDOM} {seed}", drawn))
    return GraftCurve(tried.alone, tried.whole, tuple(entries), n)


class _Tried:
    """Two models' answers to some prompts, and those of their grafts."""

    def __init__(
        self,
        base: Model,
        tuned: Model,
        prompts: PromptBatch,
        shares: WeightShares,
        progress: Callable[[int], object],
    ) -> None:
        self.base, self.tuned, self.prompts = base, tuned, prompts
        self.shares, self.progress = shares, progress
        self.alone, self.whole = self._answers(base), self._answers(tuned)

    def entry(self, order: str, units: tuple[Unit, ...]) -> Grafted:
        """The units' changes alone, and all but these."""
        grafted = self._answers(graft(self.base, self.tuned, units))
        removed = self._answers(graft(self.tuned, self.base, units))
        return Grafted(
            order=order,
            units=units,
            share=self.shares.part(units).of_gain,
            grafted=grafted,
            recovered=recovered_gain(grafted, self.alone, self.whole),
            removed=removed,
            remaining=recovered_gain(removed, self.alone, self.whole),
        )

    def _answers(self, model: Model) -> Evaluation:
        found = evaluate(model, self.prompts)
        self.progress(len(self.prompts))
        return found


def _check_held_out(prompts: PromptBatch, shares: WeightShares) -> None:
    def texts(tokens: Tensor, mask: Tensor) -> set[tuple[int, ...]]:
        rows = zip(tokens.tolist(), mask.tolist(), strict=True)
        return {tuple(t for t, m in zip(row, there, strict=True) if m) for row, there in rows}

    held_out = texts(prompts.tokens, prompts.mask)
    both = held_out & texts(shares.tokens, shares.tokens >= 0)
    if both:
        raise InputError(
            f"{len(both)} of the prompts are among those that the shares are from; "
            "grafts are judged on other prompts."
        )
