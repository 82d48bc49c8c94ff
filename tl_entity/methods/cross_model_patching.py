"""What patching from another model finds, group by group."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tl_entity.heads import Head
from tl_entity.methods.circuits import Evaluation
from tl_entity.results import Label, Result, plain
from tl_entity.stats import Interval, paired_difference_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


OUTPUT = "output"
"""Patches what heads put out; the other choices are letters of q, k and v."""


WHOLE_CIRCUIT = "whole circuit"
"""Names the patch of all groups together."""


PATCHES: tuple[str, ...] = (OUTPUT, "q", "k", "v")
"""What `cmap_by_group` patches if nothing else is said."""


NO_SHARE = "no share of the gain, which may be nothing on these prompts"
"""Stands in place of a share of a gain that is not beyond doubt: any share would do."""


@dataclass(frozen=True)
class Patched:
    """The base model with some heads patched from the tuned one.

    Attributes:
        group: name of the group, or `WHOLE_CIRCUIT`.
        patch: what of its heads is patched.
        heads: the heads by named position.
        evaluation: how the patched model answers.
        gain: its accuracy less the base model's.
        gain_interval: 95 % interval, prompts compared in pairs.
        recovered: the gain as a share of what the tuned model gains. NaN where that may be nothing
            for all these prompts say: any share would do then, and none is given.
        recovered_interval: 95 % score interval, prompts compared in threes
            (`paired_share_interval`); NaN with the share.
    """

    group: str
    patch: str
    heads: Mapping[str, tuple[Head, ...]]
    evaluation: Evaluation
    gain: float
    gain_interval: Interval
    recovered: float
    recovered_interval: Interval

    def __str__(self) -> str:
        share = f"{self.recovered:.2f} {self.recovered_interval} of the gain"
        return (
            f"{self.patch} of {self.group}: {self.evaluation}, "
            f"{NO_SHARE if math.isnan(self.recovered) else share}"
        )

    def to_json(self) -> dict[str, Any]:
        """What was patched, the accuracy, the gain and its share, with their intervals."""
        return {
            "group": self.group,
            "patch": self.patch,
            **self.evaluation.to_json(),
            "gain": self.gain,
            "gain_interval": plain(self.gain_interval),
            "recovered": plain(self.recovered),
            "recovered_interval": plain(self.recovered_interval),
        }


@dataclass(frozen=True)
class CrossModelPatching(Result):
    """Cross-model patching of every group and of the whole circuit.

    Attributes:
        base: the base model alone.
        tuned: the tuned model alone.
        entries: by what is patched, then by group, the whole circuit last.
    """

    base: Evaluation
    tuned: Evaluation
    entries: tuple[Patched, ...]

    def __str__(self) -> str:
        best = max(self.entries, key=lambda entry: entry.evaluation.accuracy, default=None)
        return (
            f"base {self.base.accuracy:.3f}, tuned {self.tuned.accuracy:.3f} "
            f"of {len(self.base)} prompts; highest: {best}"
        )

    def __getitem__(self, key: tuple[str, str]) -> Patched:
        """The entry of a group and of what is patched, such as `["value_fetcher", "output"]`.

        Raises:
            KeyError: if there is none.
        """
        for entry in self.entries:
            if (entry.group, entry.patch) == key:
                return entry
        raise KeyError(key)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a group and patch, with counts, accuracy, gain, share recovered and their
        intervals; ahead of them the base and the tuned model alone."""
        import pandas as pd

        alone = [("base", self.base), ("tuned", self.tuned)]
        rows = [{"group": name, "patch": "", **_counts(found)} for name, found in alone]
        for entry in self.entries:
            heads = [head for some in entry.heads.values() for head in some]
            rows.append(
                {
                    "group": entry.group,
                    "patch": entry.patch,
                    **_counts(entry.evaluation),
                    "gain": entry.gain,
                    "gain_low": entry.gain_interval.low,
                    "gain_high": entry.gain_interval.high,
                    "recovered": entry.recovered,
                    "recovered_low": entry.recovered_interval.low,
                    "recovered_high": entry.recovered_interval.high,
                    "n_heads": len(heads),
                    "heads": " ".join(map(str, heads)),
                }
            )
        return pd.DataFrame(rows)

    @property
    def gain(self) -> float:
        """Accuracy of the tuned model less the base model's."""
        return self.tuned.accuracy - self.base.accuracy

    @property
    def gain_interval(self) -> Interval:
        """95 % interval of that, prompts compared in pairs."""
        after, before = (of.correct.cpu().numpy() for of in (self.tuned, self.base))
        return paired_difference_interval(after, before)

    def to_json(self) -> dict[str, Any]:
        """Both models alone ("into" is the base, "from" the tuned), the gain, and one entry a group
        and patch."""
        return {
            "into": self.base.to_json(),
            "from": self.tuned.to_json(),
            "gain": self.gain,
            "gain_interval": plain(self.gain_interval),
            "entries": [entry.to_json() for entry in self.entries],
        }

    def plot(
        self,
        *,
        title: str | None = None,
        label: Label = str,
        names: tuple[str, str] = ("base", "tuned"),
    ) -> "go.Figure":
        """Accuracy with each group patched, one colour for each kind of patch, between the levels
        of both models alone.

        Args:
            title: above the figure.
            label: what the groups are called in it.
            names: of the two models.
        """
        from tl_entity.plots.bars import Bar, add_level, grouped_bars

        def bar(found: Evaluation) -> Bar:
            return Bar(found.accuracy, *found.interval)

        series: dict[str, dict[str, Bar]] = {}
        for entry in self.entries:
            what = "head outputs" if entry.patch == OUTPUT else f"{entry.patch} of the heads"
            series.setdefault(what, {})[label(entry.group)] = bar(entry.evaluation)
        if title is None:
            title = f"Heads patched from the {names[1]} model into the {names[0]} (CMAP)"
        figure = grouped_bars(series, title=title)
        for name, level in zip(names, (self.base, self.tuned), strict=True):
            add_level(figure, name, bar(level))
        order = list(dict.fromkeys(label(entry.group) for entry in self.entries))
        return figure.update_xaxes(categoryorder="array", categoryarray=order)


def _counts(found: Evaluation) -> dict[str, float]:
    return {
        "correct": int(found.correct.sum()),
        "n_prompts": len(found),
        "accuracy": found.accuracy,
        "low": found.interval.low,
        "high": found.interval.high,
    }
