"""Is it the same circuit? The heads found in a base model and in its fine-tune, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Group, Head
from tl_entity.methods.circuits import Faithfulness
from tl_entity.methods.discovery import Discovery
from tl_entity.methods.overlap import (
    NO_OVERLAP_INTERVAL,
    WHOLE_CIRCUIT,
    Overlap,
    group_overlap,
    whole_overlap,
)
from tl_entity.results import Label, Result
from tl_entity.stats import Interval

__all__ = [
    "NO_OVERLAP_INTERVAL",
    "WHOLE_CIRCUIT",
    "ComparedHead",
    "Comparison",
    "Overlap",
    "compare",
]

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class ComparedHead:
    """A head's place in two score maps of one group.

    Attributes:
        group: the group.
        position: its named position.
        head: the head.
        base_score: mean score in the base; NaN if it can't reach a receiver there.
        tuned_score: the same in the tuned model.
        base_rank: rank among the heads that can reach, 1 the most important; None as above.
        tuned_rank: the same in the tuned model.
        in_base: whether the base's circuit has it in this group.
        in_tuned: whether the tuned model's has.
    """

    group: str
    position: str
    head: Head
    base_score: float
    tuned_score: float
    base_rank: int | None
    tuned_rank: int | None
    in_base: bool
    in_tuned: bool


@dataclass(frozen=True)
class Comparison(Result):
    """Two discoveries compared.

    Attributes:
        groups: each group's overlap.
        whole: that of both circuits, heads told apart by position, not by group.
        heads: every head that is in a group of either, with its place in both maps.
        faithfulness: what was measured of circuits in models, by name, such as the base's circuit
            inside the tuned model.
        paired: whether both discoveries were on the same pairs.
        ceiling: what the base's circuit shares with the base's circuit found again from other
            prompts, group by group, the whole circuit last; empty if it was not found again. Two
            circuits can't be told apart that share as much.
    """

    groups: tuple[Overlap, ...]
    whole: Overlap
    heads: tuple[ComparedHead, ...]
    faithfulness: Mapping[str, Faithfulness]
    paired: bool
    ceiling: tuple[Overlap, ...] = ()

    def __str__(self) -> str:
        if not self.ceiling:
            return str(self.whole)
        again = self.ceiling[-1]
        return (
            f"{self.whole}; the base found again shares {len(again.shared)}, Jaccard "
            f"{again.jaccard:.2f}"
        )

    def __getitem__(self, name: str) -> Overlap:
        """The overlap of a group, or of `WHOLE_CIRCUIT`.

        Raises:
            KeyError: if there is none.
        """
        for overlap in (*self.groups, self.whole):
            if overlap.name == name:
                return overlap
        raise KeyError(name)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a group, the whole circuit last: counts, measures, chance levels, and the ceiling
        if there is one."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "group": overlap.name,
                    "base_heads": len(overlap.shared) + len(overlap.lost),
                    "tuned_heads": len(overlap.shared) + len(overlap.new),
                    "shared": len(overlap.shared),
                    "new": " ".join(f"{head}" for _, head in overlap.new),
                    "lost": " ".join(f"{head}" for _, head in overlap.lost),
                    "precision": overlap.precision,
                    "recall": overlap.recall,
                    "jaccard": overlap.jaccard,
                    **self._ceiling_columns(overlap.name),
                    "population": overlap.population,
                    "chance_shared": overlap.chance.expected,
                    "chance_low": overlap.chance.low,
                    "chance_high": overlap.chance.high,
                    **_with_interval(
                        "chance_jaccard", overlap.chance_jaccard, overlap.chance_interval
                    ),
                    "p_value": overlap.p_value,
                    "correlation": overlap.correlation,
                }
                for overlap in (*self.groups, self.whole)
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Each group's overlap and that of the whole circuits, and the same of the ceiling."""

        def parts(overlaps: Sequence[Overlap]) -> dict[str, Any]:
            *groups, whole = overlaps
            return {"groups": {o.name: o.to_json() for o in groups}, "whole": whole.to_json()}

        return {
            **parts((*self.groups, self.whole)),
            "paired": self.paired,
            "ceiling": parts(self.ceiling) if self.ceiling else None,
        }

    def plot(self, *, title: str | None = None, label: Label = str) -> "go.Figure":
        """Jaccard index of each group's heads, beside what chance would give, the mean and the
        range of 95 % of random choices, and beside the ceiling if there is one.

        Args:
            title: above the figure; said ahead of how many heads are shared.
            label: what the groups are called in it.
        """
        from tl_entity.plots.bars import Bar, overlap_bars

        overlaps = {label(overlap.name): overlap for overlap in (*self.groups, self.whole)}
        found = (
            f"{len(self.whole.shared)} heads in both circuits, "
            f"{self.whole.chance.expected:.1f} by chance"
        )
        return overlap_bars(
            {name: o.jaccard for name, o in overlaps.items()},
            {name: Bar(o.chance_jaccard, *o.chance_interval) for name, o in overlaps.items()},
            ceiling={label(o.name): o.jaccard for o in self.ceiling},
            title=found if title is None else f"{title}: {found}",
        )

    def _ceiling_columns(self, name: str) -> dict[str, float]:
        return {
            column: value
            for again in self.ceiling
            if again.name == name
            for column, value in (
                ("ceiling_shared", len(again.shared)),
                ("ceiling_jaccard", again.jaccard),
            )
        }

    def heads_dataframe(self) -> "pd.DataFrame":
        """One row for each head that is in a group of either circuit: scores and ranks in both."""
        import pandas as pd

        rows = [{**vars(compared), "head": str(compared.head)} for compared in self.heads]
        columns = list(ComparedHead.__dataclass_fields__)
        return pd.DataFrame(rows, columns=columns).astype(
            {"base_rank": "Int64", "tuned_rank": "Int64"}
        )

    def faithfulness_dataframe(self) -> "pd.DataFrame":
        """One row for each circuit in a model: accuracies, their ratio and its interval."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "circuit": name,
                    "circuit_accuracy": found.of_circuit.accuracy,
                    "model_accuracy": found.of_model.accuracy,
                    "n_prompts": len(found.of_model),
                    **_with_interval("faithfulness", found.value, found.interval),
                }
                for name, found in self.faithfulness.items()
            ]
        )


@checked
def compare(
    found_base: Discovery,
    found_tuned: Discovery,
    *,
    again: Discovery | None = None,
    paired: bool = False,
    faithfulness: Mapping[str, Faithfulness] | None = None,
    seed: int | None = None,
    sizes: Mapping[str, int] | None = None,
    draws: int | None = None,
) -> Comparison:
    """Compare the circuits found in a base model and in its fine-tune, group by group and whole.

    The chance level is drawn layer by layer: each circuit keeps as many heads at a position in each
    layer as it has, and which ones is left to chance (`layered_overlap_by_chance`). Circuits that
    have nothing in common but where in depth important heads lie share as many as that. For the
    whole circuit, heads are told apart by position, whatever their group.

    There is a ceiling too: not even the same model's circuit is found twice alike. `again` is the
    base's, found from other prompts.

    What is shared has no intervals: `NO_OVERLAP_INTERVAL` says why. So nothing is drawn, and
    `seed`, `sizes` and `draws` are taken only so that calls from before still run.

    Args:
        found_base: the discovery in the base.
        found_tuned: the discovery in the tuned model.
        again: a second discovery in the base, from other prompts.
        paired: whether both discoveries were on the same pairs, in the same order; they don't know.
        faithfulness: circuits measured in models, by name, to be shown with the rest.
        seed: not used.
        sizes: not used.
        draws: not used.

    Raises:
        InputError: if the discoveries have other groups, positions or model sizes, a circuit has
            heads that can't reach a receiver in its score maps, or they are called paired and are
            on different numbers of pairs.
    """
    others = [found_tuned] if again is None else [found_tuned, again]
    for other in others:
        _check_alike(found_base, other)
    for found in (found_base, *others):
        _check_reach(found)
    n_base, n_tuned = (
        len(next(iter(found.scores.values())).clean_values) for found in (found_base, found_tuned)
    )
    if paired and n_base != n_tuned:
        raise InputError(f"{n_base} and {n_tuned} pairs are not the same pairs.")
    return Comparison(
        groups=_group_overlaps(found_base, found_tuned),
        whole=whole_overlap(found_base, found_tuned),
        heads=tuple(
            compared
            for group in found_base.circuit
            for compared in _compared(group, found_base, found_tuned)
        ),
        faithfulness=dict(faithfulness or {}),
        paired=paired,
        ceiling=()
        if again is None
        else (*_group_overlaps(found_base, again), whole_overlap(found_base, again)),
    )


def _group_overlaps(base: Discovery, tuned: Discovery) -> tuple[Overlap, ...]:
    return tuple(group_overlap(group.name, base, tuned) for group in base.circuit)


def _check_reach(found: Discovery) -> None:
    for group in found.circuit:
        top = found.scores[group.name].top_layer
        for head in group.heads:
            if head.layer >= top:
                raise InputError(
                    f"{head} of {group.name} can't reach a receiver; compare discoveries as they "
                    "were made."
                )


def _compared(group: Group, found_base: Discovery, found_tuned: Discovery) -> list[ComparedHead]:
    name = group.name
    base, tuned = found_base.circuit[name], found_tuned.circuit[name]
    places = [
        {head: rank for rank, head in enumerate(found.scores[name].ranked(), start=1)}
        for found in (found_base, found_tuned)
    ]
    scores = [found.scores[name].scores.tolist() for found in (found_base, found_tuned)]

    def score(which: int, head: Head) -> float:
        return scores[which][head.layer][head.head] if head in places[which] else float("nan")

    return [
        ComparedHead(
            group=name,
            position=group.position,
            head=head,
            base_score=score(0, head),
            tuned_score=score(1, head),
            base_rank=places[0].get(head),
            tuned_rank=places[1].get(head),
            in_base=head in base,
            in_tuned=head in tuned,
        )
        for head in dict.fromkeys((*base, *tuned))
    ]


def _check_alike(found_base: Discovery, found_tuned: Discovery) -> None:
    base, tuned = (
        [(group.name, group.position) for group in found.circuit]
        for found in (found_base, found_tuned)
    )
    if base != tuned or not base:
        raise InputError(f"The circuits must have the same groups, not {base} and {tuned}.")
    for name, _ in base:
        ours, theirs = (
            tuple(found.scores[name].per_example.shape[:2]) for found in (found_base, found_tuned)
        )
        if ours != theirs:
            raise InputError(
                f"The score maps of {name} are of {ours} and {theirs} layers and heads."
            )


def _with_interval(name: str, value: float, interval: Interval) -> dict[str, float]:
    return {name: value, f"{name}_low": interval.low, f"{name}_high": interval.high}
