"""Every experiment as a table: the results' own data frames, for all models together."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tl_entity.results import INFINITE, Result
from tl_entity.study.experiment_results import Transfer
from tl_entity.study.gain_results import Gain
from tl_entity.study.mechanism_results import MechanismOfModel
from tl_entity.study.results import ModelFindings, Study

if TYPE_CHECKING:
    import pandas as pd

CONTROL = "control_into_base"
"""CMAP with the heads of the control, among the results."""

AS_PUBLISHED = "tuned_into_base_as_published"
"""CMAP with the heads that the paper patches, among the results."""

COLUMNS: Mapping[str, str] = {
    "accuracy": "boxes right correct prompts accuracy low high",
    "mechanism": "left=nodes nodes=n_nodes accuracy accuracy_low accuracy_high faithfulness "
    "faithfulness_low faithfulness_high agreement agreement_low agreement_high KL KL_low KL_high",
    "mechanism_nodes": "node layer head role strength score",
    "mechanisms": "what base=first tuned=second shared gained lost jaccard "
    "shared_by_chance=chance_shared chance_low chance_high p_value",
    "mechanism_edges": "sender receiver input score low high exact",
    "circuits": "group position head score",
    "faithfulness": "ablation kept correct prompts accuracy low high "
    "faithfulness faithfulness_low faithfulness_high",
    "masks": "group desideratum sparsity seed chosen candidates selected validation_accuracy "
    "correct prompts accuracy low high with_all_candidates with_none",
    "carries": "heads_of group desideratum heads correct prompts=n_pairs accuracy low high draws",
    "completeness": "removed heads circuit_without=circuit_accuracy circuit_loses=circuit_loss "
    "model_without=model_accuracy model_loses=model_loss "
    "difference low=difference_low high=difference_high",
    "minimality": "ablation group head removed_first=removed accuracy_then=without_removed "
    "and_without_the_head=without_head minimality=score low high kept",
    "knockout": "from=from_position to=to_position first_layer "
    "correct prompts=n_prompts accuracy low high control=control_accuracy",
    "cmap": "patch group correct prompts=n_prompts accuracy low high "
    "gain recovered recovered_low recovered_high",
    "gain": "kind n_units share low high of_gain",
    "gain_units": "rank unit kind layer head share low high of_gain size read_by",
    "gain_inside": "heads part n_units share low high of_gain",
    "gain_grafts": "units=order n_units of_gain=share alone_accuracy alone_low alone_high "
    "alone_of_gain alone_of_gain_low alone_of_gain_high without_accuracy without_low without_high "
    "without_of_gain without_of_gain_low without_of_gain_high",
    "gain_corners": "layer below below_low below_high above above_low above_high "
    "interaction interaction_low interaction_high",
    "comparison": "group base=base_heads tuned=tuned_heads shared shared_by_chance=chance_shared "
    "p_value precision recall jaccard jaccard_by_chance=chance_jaccard "
    "jaccard_by_chance_low=chance_jaccard_low jaccard_by_chance_high=chance_jaccard_high "
    "rank_correlation=correlation ceiling_shared ceiling_jaccard",
}
"""The columns of each table; behind =, the results' own name of one that has another."""


def tables_of(study: Study) -> dict[str, "pd.DataFrame"]:
    """All tables by file name; a table that would be empty is left out."""
    import pandas as pd

    frames: dict[str, list[pd.DataFrame]] = {}
    for model in study.models.values():
        for name, frame in _frames(model).items():
            frames.setdefault(name, []).append(_shown(name, frame, model=model.label))
    for name, transfer in study.cmap.items():
        table = f"cmap_{name}" if name in (CONTROL, AS_PUBLISHED) else "cmap"
        frames.setdefault(table, []).append(_transfer(study, transfer))
    if study.gain is not None:
        frames |= {name: [_shown(name, f)] for name, f in _of_gain(study.gain).items()}
    if study.same_mechanism is not None:
        frames["mechanisms"] = [_shown("mechanisms", study.same_mechanism.to_dataframe())]
    if study.same_circuit is not None:
        frames["comparison"] = [_shown("comparison", study.same_circuit.to_dataframe())]
    if study.verdict:
        rows = [{"question": f.question, "answer": f.answer, "text": f.text} for f in study.verdict]
        frames["verdict"] = [pd.DataFrame(rows)]
    order = [*COLUMNS, *(name for name in frames if name not in COLUMNS)]
    tables = {
        name: pd.concat(some, ignore_index=True)
        for name in order
        if (some := [frame for frame in frames.get(name, ()) if len(frame)])
    }
    return {name: _writable(table) for name, table in tables.items()}


def to_markdown(table: "pd.DataFrame") -> str:
    """A Markdown table; numbers to three places."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:.3f}"
        return "" if value is None else str(value).replace("|", "\\|")

    lines = [
        "| " + " | ".join(str(column).replace("_", " ") for column in table.columns) + " |",
        "|" + "---|" * len(table.columns),
    ]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def scores_by_ablation(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Of a model's faithfulness in results.json: each ablation, what is kept of the model, and its
    faithfulness."""
    return [
        (ablation, kept, score)
        for ablation, part in by_ablation(found).items()
        for kept, score in {
            "its circuit": part,
            "every head at its positions": part["every_head"],
            **{f"circuit of {role}": score for role, score in part["other_circuits"].items()},
        }.items()
    ]


def by_ablation(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of a model's faithfulness in results.json: what stands there of each ablation."""
    beside = {"index": found["by_index"]} if "by_index" in found else {}
    return {found["ablation"]: found, **beside}


def _frames(model: ModelFindings) -> dict[str, "pd.DataFrame"]:
    """The data frames of one model's results, by the table they go into."""
    results: dict[str, Result | None] = {
        "accuracy": model.accuracy,
        "faithfulness": model.faithfulness,
        "masks": model.dcm,
        "carries": model.information,
        "minimality": model.minimality,
    }
    frames = {name: found.to_dataframe() for name, found in results.items() if found is not None}
    if model.mechanism is not None:
        frames |= _of_mechanism(model.mechanism)
    if model.completeness is not None:
        rows = model.completeness.to_dataframe()
        frames["completeness"] = rows.replace({"removed": {"": "nothing"}})
    if model.discovery is not None:
        frames["circuits"] = model.discovery.table(None)
    if model.knockout is not None:
        # The whole model, in a row without a layer, is among the accuracies.
        frames["knockout"] = model.knockout.to_dataframe().dropna(subset="first_layer")
    return frames


def _of_mechanism(found: MechanismOfModel) -> dict[str, "pd.DataFrame"]:
    frames = {"mechanism": found.to_dataframe()}
    if found.found.mechanism is not None:
        frames["mechanism_nodes"] = found.found.mechanism.table(None)
    if found.edges is not None and found.edges.edges is not None:
        frames["mechanism_edges"] = found.edges.edges.to_dataframe()
    return frames


def _of_gain(gain: Gain) -> dict[str, "pd.DataFrame"]:
    shares = gain.found.shares
    if shares is None:
        return {}
    units = shares.to_dataframe().sort_values(by="rank").reset_index(drop=True)
    frames = {"gain": gain.to_dataframe(), "gain_units": units}
    if gain.inside:
        frames["gain_inside"] = gain.inside_dataframe()
    if gain.grafts is not None:
        frames["gain_grafts"] = gain.grafts.to_dataframe()
    if gain.corners is not None:
        frames["gain_corners"] = gain.corners.to_dataframe()
    return frames


def _transfer(study: Study, transfer: Transfer) -> "pd.DataFrame":
    # Both models alone come first, and are among the accuracies.
    patched = transfer.to_dataframe().iloc[2:]
    labels = study.labels
    of = {"into": labels[transfer.into_role], "from": labels[transfer.from_role]}
    return _shown("cmap", patched, **of)


def _shown(name: str, frame: "pd.DataFrame", **first: str) -> "pd.DataFrame":
    """The columns that a table has, those that say whose it is first."""
    named = [column.partition("=") for column in COLUMNS[name].split()]
    columns = {own: theirs or own for own, _, theirs in named if (theirs or own) in frame}
    shown = frame.loc[:, list(columns.values())].set_axis(list(columns), axis=1)
    for place, (column, value) in enumerate(first.items()):
        shown.insert(place, column, value)
    return shown


def _writable(table: "pd.DataFrame") -> "pd.DataFrame":
    """Infinity by its name, which every program reads."""
    for column in table.select_dtypes("float").columns:
        if (table[column] == math.inf).any():
            table[column] = table[column].astype(object).where(table[column] != math.inf, INFINITE)
    return table
