"""Activation patching: what some heads carry, seen in what the model answers with theirs replaced.

Heads' outputs in the base run are replaced by those of a counterfactual run; how often the model
then answers with the target tells whether they carry what the two prompts differ in (Prakash et al.
2024, §4.2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.edits import patch_heads
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import record
from tl_entity.hooks.vocabulary import check_pairs
from tl_entity.methods.circuits import Evaluation, evaluate_each
from tl_entity.metrics import Metric
from tl_entity.results import Label, Result, plain
from tl_entity.runs.runner import Runner, RunSettings
from tl_entity.runs.variants import Edits
from tl_entity.stats import Interval, wilson_interval
from tl_entity.tasks.batches import PairBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

UNPATCHED = "unpatched"
"""Names the run with nothing patched: how often it gives the target by itself."""


@checked
def activation_patch(
    model: Model,
    pairs: PairBatch,
    heads: Circuit | HeadsAt,
    *,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> Evaluation:
    """Answer the base prompts with heads' outputs taken from the counterfactuals.

    The `hook_z` of every given head, at its position in the base prompt, takes its value from the
    counterfactual run at that prompt's own position; everything after is recomputed. An answer is
    right if the pair's target is the most likely token of the whole vocabulary.

    Args:
        model: the model.
        pairs: base prompts (clean), counterfactuals (corrupt) and targets.
        heads: a circuit, or heads by named position, all patched at once.
        metric: what is read off the answers besides, as in `evaluate`.
        how: engine, batch_size, memory, progress, ranks or runner: see `Runner`. "exact" recomputes
            only what the patch can change; "hooks" runs the whole model.

    Raises:
        InputError: if the prompts lack a position, the model a head or a token of the pairs, hooks
            are attached to it, or the exact engine does not fit the model.
        NotFiniteError: if weights, activations or logits are NaN or infinite, naming where.
    """
    (found,) = activation_patch_each(model, pairs, [heads], metric=metric, **how)
    return found


@checked
@torch.no_grad()
def activation_patch_each(
    model: Model,
    pairs: PairBatch,
    choices: Sequence[Circuit | HeadsAt],
    *,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> list[Evaluation]:
    """`activation_patch` of several choices of heads, one after another.

    The counterfactual run is shared by all, and on the exact engine the base run too.

    Args:
        model: as in `activation_patch`.
        pairs: as in `activation_patch`.
        choices: circuits, or heads by named position; each is patched by itself.
        metric: as in `activation_patch`.
        how: as in `activation_patch`. One choice on one pair is a run.

    Raises:
        InputError: as `activation_patch`; or if there are no pairs.
    """
    check_pairs(model, pairs)
    chosen = [
        {position: at for position, at in heads_by_position(heads).items() if at}
        for heads in choices
    ]
    check_heads(
        model, [head for by_position in chosen for at in by_position.values() for head in at]
    )
    layers = sorted({head.layer for heads in chosen for at in heads.values() for head in at})
    points: dict[str, str | None] = {hook_point("z", layer): None for layer in layers}

    def edits_of(chunk: PairBatch) -> list[Edits]:
        cache = record(model, chunk.corrupt, points) if points else {}
        return [
            patch_heads(cache, heads, into=chunk.clean, source=chunk.corrupt) for heads in chosen
        ]

    return evaluate_each(model, pairs, edits_of, Runner.of(**how), metric)


@dataclass(frozen=True)
class Carried:
    """How often a group's outputs, taken from the counterfactual, bring the target.

    Attributes:
        group: name of the group, or `UNPATCHED`.
        position: its named position; empty if nothing is patched.
        heads: its heads.
        desideratum: what kind of pairs.
        seeds: of the draws.
        correct: pairs of each draw answered with the target.
        n_pairs: pairs in each draw.
    """

    group: str
    position: str
    heads: tuple[Head, ...]
    desideratum: str
    seeds: tuple[int, ...]
    correct: tuple[int, ...]
    n_pairs: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.group}, {self.desideratum}: {self.accuracy:.3f} {self.interval} "
            f"of {sum(self.n_pairs)} pairs"
        )

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Accuracy in each draw."""
        return tuple(right / n for right, n in zip(self.correct, self.n_pairs, strict=True))

    @property
    def accuracy(self) -> float:
        """Share of all pairs, the draws together, answered with the target."""
        return sum(self.correct) / sum(self.n_pairs)

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of that share; it takes the draws for independent."""
        return wilson_interval(sum(self.correct), sum(self.n_pairs))

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy between draws; NaN for a single draw."""
        if len(self.correct) < 2:
            return float("nan")
        return float(np.std(self.accuracies, ddof=1))

    def to_json(self) -> dict[str, Any]:
        """What was patched and how often it brought the target."""
        return {
            "group": self.group,
            "position": self.position,
            "heads": plain(self.heads),
            "desideratum": self.desideratum,
            "correct": sum(self.correct),
            "prompts": sum(self.n_pairs),
            "accuracy": self.accuracy,
            "interval": plain(self.interval),
            "draws": plain(self.accuracies),
        }


@dataclass(frozen=True)
class CarriedInformation(Result):
    """What each group carries: one entry for each group and desideratum.

    Attributes:
        entries: by desideratum, then by group, `UNPATCHED` first.
    """

    entries: tuple[Carried, ...]

    def __str__(self) -> str:
        kinds = dict.fromkeys(entry.desideratum for entry in self.entries)
        groups = dict.fromkeys(e.group for e in self.entries if e.group != UNPATCHED)
        best = max(
            (entry for entry in self.entries if entry.group in groups),
            key=lambda entry: entry.accuracy,
            default=None,
        )
        text = f"{len(groups)} groups, {len(kinds)} desiderata"
        return text if best is None else f"{text}; highest: {best}"

    def __getitem__(self, key: tuple[str, str]) -> Carried:
        """The entry of a group and a desideratum.

        Raises:
            KeyError: if there is none.
        """
        for entry in self.entries:
            if (entry.group, entry.desideratum) == key:
                return entry
        raise KeyError(key)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a group and desideratum, with the pooled accuracy, its interval, the spread
        between draws and each draw's accuracy."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "group": entry.group,
                    "position": entry.position,
                    "heads": " ".join(map(str, entry.heads)),
                    "n_heads": len(entry.heads),
                    "desideratum": entry.desideratum,
                    "correct": sum(entry.correct),
                    "n_pairs": sum(entry.n_pairs),
                    "accuracy": entry.accuracy,
                    "low": entry.interval.low,
                    "high": entry.interval.high,
                    "draws": len(entry.seeds),
                    "spread": entry.spread,
                    "accuracies": entry.accuracies,
                }
                for entry in self.entries
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """One entry a group and desideratum: its heads, the counts and the accuracy of all draws
        together, and the accuracy of each draw."""
        return {"entries": [entry.to_json() for entry in self.entries]}

    def plot(self, *, title: str | None = None, label: Label = str) -> "go.Figure":
        """How often each group (rows) brings the target of each desideratum (columns).

        Args:
            title: above the figure.
            label: what groups and desiderata are called in it.
        """
        from tl_entity.plots.heatmaps import share_heatmap

        groups = list(dict.fromkeys(entry.group for entry in self.entries))
        kinds = list(dict.fromkeys(entry.desideratum for entry in self.entries))
        shares = np.full((len(groups), len(kinds)), np.nan)
        for entry in self.entries:
            shares[groups.index(entry.group), kinds.index(entry.desideratum)] = entry.accuracy
        title = "Answers with the target, by group patched" if title is None else title
        rows, columns = [label(group) for group in groups], [label(kind) for kind in kinds]
        return share_heatmap(rows, columns, shares, title=title, name="accuracy")


@checked
def carries(
    model: Model,
    draws: Mapping[str, Callable[[int], PairBatch]],
    circuit: Circuit | Mapping[str, Circuit],
    *,
    seeds: Sequence[int],
    **how: Unpack[RunSettings],
) -> CarriedInformation:
    """Patch every group by itself, for every desideratum, on several draws of pairs.

    Args:
        model: the model; a fine-tune can be given with its base's circuit.
        draws: for each desideratum a function from a seed to pairs, as `desideratum_draws` makes.
        circuit: the groups; or for each desideratum its own, such as the heads that DCM selected.
        seeds: one for each draw.
        how: as in `activation_patch`. One group, or none, on one pair is a run.

    Raises:
        InputError: as `activation_patch`; if there are no seeds, or a desideratum has no circuit.
    """
    if not seeds:
        raise InputError("Give at least one seed.")
    entries: list[Carried] = []
    for desideratum, draw in draws.items():
        if not isinstance(circuit, Circuit) and desideratum not in circuit:
            raise InputError(f"There is no circuit for the desideratum {desideratum!r}.")
        groups = list(circuit if isinstance(circuit, Circuit) else circuit[desideratum])
        choices: list[HeadsAt] = [{}, *({group.position: group.heads} for group in groups)]
        correct, n_pairs = [], []
        for seed in seeds:
            pairs = draw(seed)
            found = activation_patch_each(model, pairs, choices, **how)
            correct.append([int(evaluation.correct.sum()) for evaluation in found])
            n_pairs.append(len(pairs))
        for i, (name, position, heads) in enumerate([(UNPATCHED, "", ()), *groups]):
            entries.append(
                Carried(
                    group=name,
                    position=position,
                    heads=heads,
                    desideratum=desideratum,
                    seeds=tuple(seeds),
                    correct=tuple(counts[i] for counts in correct),
                    n_pairs=tuple(n_pairs),
                )
            )
    return CarriedInformation(tuple(entries))
