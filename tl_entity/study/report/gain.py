"""Where the fine-tune's gain lies."""

from collections.abc import Mapping
from typing import Any

from tl_entity.results import read_number
from tl_entity.study.report.cells import Table, frame_table, share_text, signed, table, unbroken
from tl_entity.study.report.story import Values

_UNIT_COLUMNS = {
    "rank": "rank",
    "unit": "unit",
    "share": "share",
    "low": "low",
    "high": "high",
    "of_gain": "of the gain",
}

_CORNER_COLUMNS = {
    "layer": "layer",
    "below": "fine-tune below",
    "below_low": "low",
    "below_high": "high",
    "above": "fine-tune above",
    "above_low": "low",
    "above_high": "high",
    "interaction": "interaction",
    "interaction_low": "low",
    "interaction_high": "high",
}

UNITS_SHOWN = 20
"""Units in the page's table; all are in the file."""


LEAST_TOLD = 0.01
"""Kinds of weights with a smaller part of the gain are not told of in words."""

_PARTS = ("inside", "shared", "other heads", "MLPs", "other", "random")
"""In the order in which they are shown."""


def gain_sections(content: dict[str, Any], tables: Mapping[str, Any]) -> list[Values]:
    """The section on the gain, if it was looked for."""
    gain = content["gain"]
    if gain is None:
        return []
    base, tuned = (model["label"] for model in content["models"].values())
    values: dict[str, Any] = {"base": base, "tuned": tuned, "why_not": gain.get("why_not")}
    if "gain" in gain:
        units = frame_table(tables["gain_units"].head(UNITS_SHOWN), _UNIT_COLUMNS)
        values |= {
            "metric": gain["metric"],
            "is_loss": gain["gain"] < 0,
            "prompts": gain["prompts"],
            "n_units": gain["n_units"],
            "gain": unbroken(_with_interval(gain["gain"], gain["interval"])),
            "sum": signed(f"{gain['sum_of_shares']:+.3f}"),
            "points": gain["points"],
            "most": _most(gain["by_kind"]),
            "units": units,
            "inside": _inside(gain["inside"]),
            "grafts": None if gain["grafts"] is None else _grafts(gain["grafts"]),
            "held_out": None if gain["grafts"] is None else gain["grafts"]["base"]["prompts"],
            "corners": None
            if gain["corners"] is None
            else frame_table(tables["gain_corners"], _CORNER_COLUMNS),
        }
    return [("gain", "Where the gain lies", values)]


def _with_interval(value: float, interval: list[Any]) -> str:
    low, high = map(read_number, interval)
    return signed(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]")


def _of_gain(part: Mapping[str, Any]) -> str:
    return signed(f"{read_number(part['of_gain']):.0%}")


def _most(by_kind: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The kinds of weights that have a part of the gain worth telling, the largest first."""
    told = {kind: part for kind, part in by_kind.items() if _is_told(part)}
    ranked = sorted(told.items(), key=lambda item: -read_number(item[1]["of_gain"]))
    return [f"{_of_gain(part)} in {kind}" for kind, part in ranked]


def _is_told(part: Mapping[str, Any]) -> bool:
    return abs(read_number(part["of_gain"])) >= LEAST_TOLD


def _inside(inside: Mapping[str, Mapping[str, Any]]) -> Table | None:
    if not inside:
        return None
    there = next(iter(inside.values()))["parts"]
    names = [name for name in _PARTS if name in there]
    rows = [
        [
            of,
            *(_of_gain(found["parts"][name]) for name in names),
            f"{found['at_random_as_much']:.2g}",
        ]
        for of, found in inside.items()
    ]
    said = {"inside": "in its heads", "shared": "in k and v read inside and outside"}
    said["other"] = "elsewhere"
    said["random"] = "as many units at random"
    header = ["heads of", *(said.get(name, f"in {name}") for name in names)]
    return table([*header, "draws with as much"], rows)


def _grafts(grafts: Mapping[str, Any]) -> Table:
    rows = [["none", "0", share_text(grafts["base"]), share_text(grafts["tuned"])]]
    rows += [
        [
            f"random, draw {entry['order'].removeprefix('random ')}"
            if entry["order"].startswith("random")
            else f"by {entry['order']}",
            str(entry["n_units"]),
            share_text(entry["alone"]),
            share_text(entry["without"]),
        ]
        for entry in grafts["entries"]
    ]
    header = ["units taken", "how many", "base with their changes", "fine-tune without them"]
    return table(header, rows)
