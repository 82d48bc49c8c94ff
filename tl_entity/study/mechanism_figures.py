"""Figures of what the circuit's heads do: what they carry, where it passes, what they bring."""

import plotly.graph_objects as go

from tl_entity.methods.activation_patching import UNPATCHED
from tl_entity.studies.entity_tracking import NAME, WORDS, example
from tl_entity.study.results import ModelFindings, StudiedTask, Study
from tl_entity.study.settings import GROUPS
from tl_entity.tasks.desiderata import MAIN_DESIDERATA

EXAMPLE = example()
"""The prompt that the paper's circuits are drawn over."""


def mechanism_figures(study: Study) -> dict[str, go.Figure]:
    """All figures of these experiments, by file name."""
    figures: dict[str, go.Figure] = {}
    for role, model in study.with_circuit.items():
        figures |= {
            f"{role}_{name}": figure for name, figure in _of_model(model, study.task).items()
        }
    if study.same_circuit is not None:
        base, tuned = (model.label for model in study.models.values())
        figures["comparison"] = study.same_circuit.plot(
            title=f"{base} and {tuned}", label=study.task.words.group
        )
    for name, transfer in study.cmap.items():
        into, source = (study.labels[r] for r in (transfer.into_role, transfer.from_role))
        figures[f"cmap_{name}"] = transfer.found.plot(
            title=f"{into} with heads of {source} (CMAP)",
            label=study.task.words.group,
            names=(into, source),
        )
    return figures


def group_words(group: str) -> str:
    """`A value_fetcher`; other names as they are."""
    return WORDS.group(group)


def information_words(desideratum: str) -> str:
    """A desideratum in words."""
    return WORDS.kind(desideratum)


def main_information(model: ModelFindings, heads: str = "own") -> dict[str, str]:
    """For each group the kind of information that its heads carry, if one stands out: its interval
    lies above those of every other kind, and above that of the run with nothing patched."""
    entries = {
        (entry.group, entry.desideratum): entry.interval
        for entry in (model.information.found[heads].entries if model.information else ())
        if entry.desideratum in MAIN_DESIDERATA
    }
    found: dict[str, str] = {}
    for group in GROUPS:
        kinds = {kind: interval for (of, kind), interval in entries.items() if of == group}
        for kind, (low, _) in kinds.items():
            # Without the unpatched run nothing says that the patch brought it.
            if (UNPATCHED, kind) not in entries:
                continue
            rivals = [entries[UNPATCHED, kind]]
            rivals += [interval for other, interval in kinds.items() if other != kind]
            if all(low > high for _, high in rivals):
                found[group] = kind
    return found


def _of_model(model: ModelFindings, task: StudiedTask) -> dict[str, go.Figure]:
    label, figures = model.label, dict[str, go.Figure]()
    words = task.words
    if model.discovery is not None:
        carried = {g: words.kind(kind) for g, kind in main_information(model).items()}
        figures["circuit"] = model.discovery.diagram(
            *_example(task), title=f"{label}: the circuit", label=words.group, carried=carried
        )
    for heads, found in (model.information.found if model.information else {}).items():
        whose = "its own heads" if heads == "own" else f"the {heads} model's heads"
        figures[f"carries_{heads}_heads"] = found.plot(
            title=f"{label}: answers with the target, {whose} patched",
            label=lambda name: words.group(name) if name in task.groups else words.kind(name),
        )
    if model.completeness is not None:
        figures["completeness"] = model.completeness.plot(
            title=f"{label}: what circuit and model lose by the same heads", label=words.group
        )
    if model.minimality is not None:
        figures["minimality"] = model.minimality.asked.plot(
            title=f"{label}: what the circuit loses with each head", label=words.group
        )
    if model.knockout is not None:
        figures["knockout"] = model.knockout.plot(
            title=f"{label}: attention knocked out from a layer up", label=words.position
        )
    return figures


def _example(task: StudiedTask) -> tuple[list[str], dict[str, int]]:
    """The prompt that circuits are drawn over, in words, and where the named positions are."""
    if task.name != NAME:
        return [word.strip() for word in task.example], dict(task.positions)
    words = EXAMPLE.text.replace(",", " ,").replace(".", " .").split()
    at = {
        "last": len(words) - 1,
        "query_label": len(words) - 1 - words[::-1].index("Q"),
        "previous_query_label": words.index("Q"),
    }
    return words, at
