"""Where a fine-tune's gain lies: shares of the weights, grafts that test them, four corners."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tl_entity.methods.corners import EFFECTS, FourCorners
from tl_entity.methods.grafts import GraftCurve, Grafted
from tl_entity.methods.shares_inside import SharesInside
from tl_entity.methods.weight_shares import WeightShares
from tl_entity.results import Result, plain

if TYPE_CHECKING:
    import pandas as pd

TOP_UNITS = 20
"""Units with the largest shares that results.json has."""


@dataclass(frozen=True)
class FoundShares(Result):
    """What sharing out the gain gave.

    Attributes:
        shares: each unit's.
        why_not: why there are none.
    """

    shares: WeightShares | None
    why_not: str | None = None

    def __str__(self) -> str:
        return str(self.shares or self.why_not)


@dataclass(frozen=True)
class Gain(Result):
    """Where a fine-tune's gain lies.

    Attributes:
        found: the share of each unit of the weights.
        inside: how much lies in the heads of each mechanism and circuit, by name.
        grafts: models with only some units' changes, on prompts that the shares are not from.
        corners: one model below a layer and the other above.
    """

    found: FoundShares
    inside: Mapping[str, SharesInside] = field(default_factory=dict[str, SharesInside])
    grafts: GraftCurve | None = None
    corners: FourCorners | None = None

    def __str__(self) -> str:
        return str(self.found)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each kind of unit."""
        import pandas as pd

        parts = {} if self.found.shares is None else self.found.shares.by_kind()
        return pd.DataFrame(
            [
                {
                    "kind": kind,
                    "n_units": part.n_units,
                    "share": part.share,
                    "low": part.interval.low,
                    "high": part.interval.high,
                    "of_gain": part.of_gain,
                }
                for kind, part in parts.items()
            ]
        )

    def inside_dataframe(self) -> "pd.DataFrame":
        """One row for each part of each set of heads."""
        import pandas as pd

        frames = [found.to_dataframe().assign(heads=name) for name, found in self.inside.items()]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def to_json(self) -> dict[str, Any]:
        """The gain and its shares, or why there are none."""
        shares = self.found.shares
        if shares is None:
            return {"why_not": self.found.why_not}
        return {
            "metric": shares.metric,
            "prompts": len(shares.gain_per_prompt),
            "gain": shares.gain,
            "interval": plain(shares.gain_interval),
            "sum_of_shares": shares.total,
            "integration_error": plain(shares.integration_error),
            "points": shares.n_points,
            "n_units": len(shares.units),
            "by_kind": _parts(self.to_dataframe().set_index("kind")),
            "top": [
                {"unit": str(unit), "share": shares.share(unit)} for unit in shares.top(TOP_UNITS)
            ],
            "inside": {
                name: {
                    "parts": _parts(found.to_dataframe().set_index("part")),
                    "at_random_as_much": found.at_least,
                }
                for name, found in self.inside.items()
            },
            "grafts": None if self.grafts is None else _grafts(self.grafts),
            "corners": None if self.corners is None else _corners(self.corners),
        }


def _parts(frame: "pd.DataFrame") -> dict[str, Any]:
    rows: Any = frame.to_dict("index")
    return {
        name: {
            "n_units": row["n_units"],
            "share": plain(row["share"]),
            "interval": plain([row["low"], row["high"]]),
            "of_gain": plain(row["of_gain"]),
        }
        for name, row in rows.items()
    }


def _grafts(curve: GraftCurve) -> dict[str, Any]:
    def entry(found: Grafted) -> dict[str, Any]:
        return {
            "order": found.order,
            "n_units": len(found.units),
            "of_gain": plain(found.share),
            "alone": found.grafted.to_json(),
            "recovered": plain(found.recovered.recovered),
            "recovered_interval": plain(found.recovered.recovered_interval),
            "without": found.removed.to_json(),
            "remaining": plain(found.remaining.recovered),
            "remaining_interval": plain(found.remaining.recovered_interval),
        }

    return {
        "base": curve.base.to_json(),
        "tuned": curve.tuned.to_json(),
        "entries": [entry(found) for found in curve.entries],
    }


def _corners(found: FourCorners) -> list[dict[str, Any]]:
    effects, bounds = found.effects.mean(-1).tolist(), found.effect_intervals
    return [
        {
            "layer": layer,
            **{
                name: {"effect": effects[layer][i], "interval": plain(bounds[layer, i])}
                for i, name in enumerate(EFFECTS)
            },
        }
        for layer in range(len(effects))
    ]
