"""Write the page on the mechanism of Qwen2.5-Coder-0.5B-Instruct and of its fine-tunes, and on
where their gain lies, from the files that are kept beside it.

python docs/studies/qwen_mechanism.py
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from qwen_tables import GROUPS, share, table

from tl_entity import compare_mechanisms
from tl_entity.methods.mechanism_result import Mechanism

HERE = Path(__file__).parent
KEPT = HERE / "qwen"

MECHANISMS = {
    "base": "the base",
    "base_again": "the base, searched again",
    "tuned": "the fine-tune",
    "tuned_again": "the fine-tune, searched again",
}
GAINS = {
    "shipped": "all three, seed 0 (ships)",
    "mixture1": "all three, seed 1",
    "mixture2": "all three, seed 2",
    "lookup0": "look-up, seed 0",
    "lookup1": "look-up, seed 1",
}
ROLES = {
    "value_fetcher": "last",
    "pos_transmitter": "last",
    "pos_detector": "query_label",
    "struct_reader": "label",
}
"""The role of each group's tokens, blind to what is asked."""

TOP_EDGES = 12
"""Edges of each model that are shown."""

TOP = 80
"""Units of two fine-tunes that are compared."""


def read(name: str) -> Any:
    """A kept file."""
    return json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))


def numbers(found: Sequence[float]) -> str:
    """`.95 [.92, .97]`"""
    value, low, high = found
    return f"{share(value)} [{share(low)}, {share(high)}]"


def found_table(records: dict[str, Any]) -> str:
    """The mechanisms found, on prompts that had no part in the search."""
    rows = []
    for name, title in MECHANISMS.items():
        record = records[name]
        own, random = record["mechanism"], record["random"][0]
        rows.append(
            [
                title,
                f"{own['nodes']} ({own['nodes'] / record['all_nodes']:.1%})",
                numbers(own["faithfulness"]),
                numbers(own["agreement"]),
                numbers(own["KL"]),
                share(record["accuracy_of_the_model"]),
                numbers(random["faithfulness"]),
                f"{record['wall_seconds']}",
            ]
        )
    header = [
        "mechanism of",
        "nodes",
        "faithfulness",
        "agreement",
        "KL, nats",
        "the model's accuracy",
    ]
    return table([*header, "as many random nodes", "seconds"], rows)


def inside_table(found: dict[str, Any]) -> str:
    """Each mechanism in each model."""
    rows = [
        [
            name.replace("tuned", "the fine-tune").replace("base", "the base"),
            str(record["nodes"]),
            f"{share(record['accuracy'])} of {share(record['of_model'])}",
            numbers(record["faithfulness"]),
            numbers(record["agreement"]),
        ]
        for name, record in found.items()
    ]
    return table(["mechanism, in", "nodes", "accuracy", "faithfulness", "agreement"], rows)


def overlap_table(mechanisms: dict[str, Mechanism]) -> str:
    """Which nodes are shared."""
    rows = []
    for one, other in (
        ("base", "tuned"),
        ("base_again", "tuned_again"),
        ("base", "base_again"),
        ("tuned", "tuned_again"),
    ):
        nodes = compare_mechanisms(mechanisms[one], mechanisms[other]).nodes
        rows.append(
            [
                f"{MECHANISMS[one]} and {MECHANISMS[other]}",
                str(len(nodes.shared)),
                f"{nodes.chance.expected:.0f}",
                f"{nodes.chance_in_roles.expected:.0f}",
                share(nodes.jaccard),
            ]
        )
    header = [
        "mechanisms",
        "shared nodes",
        "by chance, in layers",
        "in layers and roles",
        "Jaccard",
    ]
    return table(header, rows)


def role_table(mechanisms: dict[str, Mechanism]) -> str:
    """Where the nodes are."""
    counts = {
        name: Counter(node.role for node in found.nodes) for name, found in mechanisms.items()
    }
    roles = sorted(mechanisms["base"].roles, key=lambda role: -counts["base"][role])
    rows = [
        [f"`{role}`", *(str(counts[name][role]) for name in MECHANISMS)]
        for role in roles
        if any(counts[name][role] for name in MECHANISMS)
    ]
    return table(["role", *MECHANISMS.values()], rows)


def group_table(circuits: dict[str, Any], mechanisms: dict[str, Mechanism]) -> str:
    """How many heads of each group of path patching are nodes at the group's tokens."""
    rows = []
    for group, title in GROUPS.items():
        row = [title]
        for role in ("base", "tuned"):
            nodes, heads = mechanisms[role].nodes, circuits[role][group]
            there = {(n.layer, n.head) for n in nodes if n.role == ROLES[group]}
            chance = sum(
                sum(layer == at for at, _ in there) / mechanisms[role].n_heads for layer, _ in heads
            )
            inside = sum(tuple(head) in there for head in heads)
            row.append(f"{inside} of {len(heads)} ({chance:.1f})")
        rows.append(row)
    return table(["group", "the base (by chance)", "the fine-tune (by chance)"], rows)


def edge_table(found: dict[str, Any], n: int) -> str:
    """The strongest edges of both."""
    rows = []
    for one, other in zip(found["base"]["top"][:n], found["tuned"]["top"][:n], strict=True):
        row: list[str] = []
        for edge in (one, other):
            to = (
                edge["receiver"]
                if edge["input"] == "logits"
                else f"{edge['input']} of {edge['receiver']}"
            )
            row += [
                f"{edge['sender']} to {to}",
                numbers([edge["score"], edge["low"], edge["high"]]),
            ]
        rows.append(row)
    return table(["the base", "score", "the fine-tune", "score"], rows)


def same_edges(found: dict[str, Any], n: int) -> int:
    """How many of the strongest edges are strongest in both."""
    keys = ("sender", "receiver", "input")
    first = [
        {tuple(e[k] for k in keys) for e in found[role]["top"][:n]} for role in ("base", "tuned")
    ]
    return len(first[0] & first[1])


def clear(found: dict[str, Any], n: int) -> int:
    """How many of a model's strongest edges have an interval without zero."""
    return sum(edge["low"] > 0 or edge["high"] < 0 for edge in found["top"][:n])


def gain_table(records: dict[str, Any]) -> str:
    """The gain of each fine-tune, and the kinds of weights that it lies in."""
    rows = []
    for name, title in GAINS.items():
        record = records[name]
        kinds = [share(record["by_kind"][kind]["of_gain"]) for kind in "qkvo"]
        error = f"{record['integration_error']:+.2%}"
        rows.append([title, numbers(record["gain"]), f"{record['sum']:.3f}", error, *kinds])
    header = ["fine-tune", "gain in log probability", "sum of shares", "error", "q", "k", "v", "o"]
    return table(header, rows)


def graft_table(record: dict[str, Any], orders: Sequence[str]) -> str:
    """Accuracy with some units' changes alone, and with all but these."""
    entries = {(e["order"], e["units"]): e for e in record["grafts"]["entries"]}
    sizes = sorted({units for _, units in entries})
    rows = []
    for units in sizes:
        cells = []
        for order in orders:
            entry = entries[order, units]
            cells += [numbers(entry["base_with_them"]), numbers(entry["tuned_without_them"])]
        rows.append([f"{units} ({units / record['units']:.0%})", *cells])
    header = [f"{order}: {way}" for order in orders for way in ("base with", "fine-tune without")]
    return table(["units", *header], rows)


def shared_units(records: dict[str, Any]) -> str:
    """How many of the first units two fine-tunes share."""
    first = {name: {unit for unit, _ in records[name]["ranked"][:TOP]} for name in GAINS}
    shared = [len(first[one] & first[other]) for one, other in combinations(GAINS, 2)]
    by_chance = TOP**2 / records["shipped"]["units"]
    return (
        f"Of the {TOP} units with the highest shares two of these fine-tunes have {min(shared)} to "
        f"{max(shared)} in common; {by_chance:.0f} if they were drawn at random."
    )


def corner_table(corners: Sequence[dict[str, Any]]) -> str:
    """Base or fine-tune below a layer and above it."""
    rows = [
        [
            str(row["layer"]),
            share(row["tuned, base: accuracy"]),
            share(row["base, tuned: accuracy"]),
            *(
                numbers([row[effect], row[f"{effect}_low"], row[f"{effect}_high"]])
                for effect in ("below", "above", "interaction")
            ),
        ]
        for row in corners
        if row["layer"] % 2 == 0
    ]
    header = ["layer", "fine-tune below", "fine-tune above", "effect of below", "of above"]
    return table([*header, "interaction"], rows)


def tuning_table(runs: dict[str, Any]) -> str:
    """Accuracy of the nine fine-tunes."""
    rows = []
    for name, run in runs.items():
        by_step = {found["step"]: found for found in run["evaluations"]}
        cells = [
            numbers([by_step[step]["accuracy"], *by_step[step]["interval"]]) for step in (0, 40, 80)
        ]
        among = by_step[80]
        cells.append(numbers([among["accuracy_among_objects"], *among["interval_among_objects"]]))
        rows.append([name.rstrip("012"), name[-1], *cells])
    return table(["texts", "seed", "step 0", "step 40", "step 80", "among the objects"], rows)


def page() -> str:
    """The page."""
    records = {name: read(f"mechanism_{name}") for name in MECHANISMS}
    lower = {name: read(f"mechanism_{name}_lower_price")["mechanism"] for name in ("base", "tuned")}
    mechanisms = {
        name: Mechanism.load(KEPT / f"mechanism_{name}.safetensors") for name in MECHANISMS
    }
    gains = {name: read(f"gain_{name}") for name in GAINS}
    shipped = gains["shipped"]
    inside, edges = read("inside"), read("edges")
    circuits = {role: read("results")["models"][role]["circuit"] for role in ("base", "tuned")}
    template = (HERE / "qwen_mechanism.template").read_text(encoding="utf-8")
    each = compare_mechanisms(mechanisms["base"], mechanisms["tuned"]).nodes
    grafts = {
        e["units"]: e for e in shipped["grafts"]["entries"] if e["order"] == "share of the gain"
    }
    random = {e["units"]: e for e in shipped["grafts"]["entries"] if e["order"] == "random 0"}
    return template.format(
        reporting=records["base"]["prompts"]["reporting"],
        training=records["base"]["prompts"]["training"],
        choosing=records["base"]["prompts"]["choosing"],
        all_nodes=records["base"]["all_nodes"],
        base_nodes=records["base"]["mechanism"]["nodes"],
        tuned_nodes=records["tuned"]["mechanism"]["nodes"],
        base_in_tuned=numbers(inside["base in tuned"]["faithfulness"]),
        tuned_in_base=numbers(inside["tuned in base"]["faithfulness"]),
        tuned_in_base_accuracy=share(inside["tuned in base"]["accuracy"]),
        base_accuracy=share(inside["tuned in base"]["of_model"]),
        tuned_in_base_agreement=numbers(inside["tuned in base"]["agreement"]),
        jaccard=share(each.jaccard),
        found=found_table(records),
        inside=inside_table(inside),
        inside_prompts=inside["base in base"]["prompts"],
        overlap=overlap_table(mechanisms),
        roles=role_table(mechanisms),
        groups=group_table(circuits, mechanisms),
        edges=edge_table(edges, TOP_EDGES),
        n_top=TOP_EDGES,
        edge_pairs=edges["base"]["pairs"],
        base_edges=edges["base"]["edges"],
        tuned_edges=edges["tuned"]["edges"],
        base_edge_seconds=round(edges["base"]["seconds"]),
        tuned_edge_seconds=round(edges["tuned"]["seconds"]),
        base_edge_ratio=f"{edges['base']['seconds'] / edges['base']['stage_seconds']:.1f}",
        both_top=same_edges(edges, TOP_EDGES),
        clear_base=clear(edges["base"], 20),
        clear_tuned=clear(edges["tuned"], 20),
        lower_base=lower["base"]["nodes"],
        lower_base_faithfulness=numbers(lower["base"]["faithfulness"]),
        lower_tuned=lower["tuned"]["nodes"],
        lower_tuned_faithfulness=numbers(lower["tuned"]["faithfulness"]),
        tunings=tuning_table(read("finetunes_card")),
        gains=gain_table(gains),
        grafts=graft_table(shipped, ("share of the gain", "size of the change", "random 0")),
        grafts_lookup=graft_table(gains["lookup0"], ("share of the gain", "random 0")),
        shared_units=shared_units(gains),
        corners=corner_table(shipped["corners"]),
        units=shipped["units"],
        graft_80=numbers(grafts[80]["base_with_them"]),
        graft_without_160=numbers(grafts[160]["tuned_without_them"]),
        random_80=numbers(random[80]["base_with_them"]),
        of_base=numbers(shipped["grafts"]["base"]),
        of_tuned=numbers(shipped["grafts"]["tuned"]),
        prompts=shipped["prompts"],
        seconds=shipped["seconds"]["shares"],
    )


def main() -> None:
    """Write it."""
    (HERE / "qwen_mechanism.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
