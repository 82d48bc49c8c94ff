"""The main job: from two models to their circuits, figures and a report."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

from tl_entity._typing import checked
from tl_entity.devices import check_device
from tl_entity.errors import InputError
from tl_entity.heads import Circuit
from tl_entity.methods.compare import Comparison, compare
from tl_entity.output import check_writable, sole_worker
from tl_entity.plots.render import PngRenderer, plotly_script
from tl_entity.ranks import from_first, is_first, n_ranks
from tl_entity.results import pack
from tl_entity.study.experiment_results import CarriedByCircuit, Transfer
from tl_entity.study.experiments import (
    Bench,
    Progress,
    draw_pairs,
    find_circuit,
    find_circuit_again,
    look_at_attention,
    measure_accuracy,
    measure_faithfulness,
    silent,
    why_no_circuit,
)
from tl_entity.study.figures import figures_of, single_heatmaps
from tl_entity.study.flow import knock_out_flow
from tl_entity.study.folder import STUDY, check_same_study, joined, note_settings
from tl_entity.study.information import learn_what_groups_carry, patch_what_groups_carry
from tl_entity.study.mechanism_figures import mechanism_figures
from tl_entity.study.models import (
    Facts,
    about,
    inspect,
    labels,
    load,
    why_apart,
)
from tl_entity.study.models import model_fingerprint as model_fingerprint
from tl_entity.study.necessity import measure_completeness, measure_minimality
from tl_entity.study.report import figure_page, render_report
from tl_entity.study.results import ModelFindings, Study
from tl_entity.study.settings import OF_TWO_MODELS, Settings, resolve_sizes
from tl_entity.study.store import REPORT, RESULTS, Record, Store, to_json
from tl_entity.study.tables import AS_PUBLISHED, tables_of, to_markdown
from tl_entity.study.transfer import patch_as_published, patch_from_other
from tl_entity.study.verdict import verdict
from tl_entity.tasks.batches import PairBatch

COMPUTING = ("torch", "transformer_lens", "transformers")
"""Software whose releases may give other numbers."""

PACKAGES = ("tl_entity", *COMPUTING, "plotly")


@checked
def reproduce(
    settings: Settings,
    out: str | Path,
    *,
    progress: Progress = silent,
    say: Callable[[str], object] = lambda message: None,
    log: Callable[[str], object] = lambda message: None,
    join: bool = True,
    wait: bool = False,
) -> Record:
    """Run every experiment that is not done yet, and write results, figures and report.

    Everything that can be refused is refused before the first experiment, and before the folder
    is made. Run again after an interruption, it skips what is finished and ends with the same
    bytes.

    Args:
        settings: what to do.
        out: folder for results.json, report.html, the circuits, figures and finished steps.
        progress: shows what goes on.
        say: told what else a person should know.
        log: told of each step, how long it took or that it was found finished.
        join: bring what the folder's results already have into the new ones too; those steps are
            found finished.
        wait: wait for another process that works in the folder, instead of giving up.

    Returns:
        What results.json holds.

    Raises:
        InputError: if the folder can't be written to, holds a study with other settings or is
            being worked in by another process, a model can't be had, or the settings don't fit the
            models.
    """
    out = Path(out)
    check_writable(out)
    check_device(settings.device)
    with ExitStack() as held:
        # Of several processes the first one has the folder, and tells the others if it can't.
        from_first(lambda: held.enter_context(sole_worker(out, wait=wait, say=say)))
        facts = {role: inspect(settings, role) for role in settings.sources}
        head_counts = [facts[role].n_layers * facts[role].n_heads for role in settings.models]
        sizes = resolve_sizes(settings, min(head_counts))
        apart = _check_comparable(settings)
        prints = {role: found.fingerprint for role, found in facts.items()}
        from_first(lambda: check_same_study(out, settings, sizes, prints))
        if join:
            settings = from_first(lambda: joined(out, settings))
        store = Store(out, log)
        note_settings(store, settings, sizes, prints)
        study = _Run(settings, facts, sizes, store, progress).study(apart)
        if is_first():
            _write(store, study, say)
        return study.to_json()


class _Run:
    """One run of the main job.

    Args:
        settings: what to do.
        facts: of each model, by role.
        sizes: of the groups and of what is patched into.
        store: keeps the steps.
        progress: shows what goes on.
    """

    def __init__(
        self,
        settings: Settings,
        facts: Mapping[str, Facts],
        sizes: tuple[dict[str, int], dict[str, int]],
        store: Store,
        progress: Progress,
    ) -> None:
        self.settings, self.facts, self.store, self.progress = settings, facts, store, progress
        self.sizes, self.receiver_sizes = sizes
        self.versions = _versions()
        self.seeds: dict[str, int] = {}
        self.benches: dict[str, Bench] = {}
        self.pairs: dict[str, PairBatch] = {}
        self.models: dict[str, ModelFindings] = {}

    def study(self, apart: str | None) -> Study:
        """All that is asked for.

        Args:
            apart: why the models can't be compared; None if they can.
        """
        settings, names = self.settings, labels(self.settings)
        for role in settings.models:
            self.benches[role] = self._bench(role)
            others = self.models if apart is None else {}
            found = self._study_model(role, names[role], others)
            if found.discovery is not None:
                self.store.write(f"{role}_circuit.json", found.circuit.to_json())
            elif apart is None:
                apart = f"no circuit was found in {names[role]}."
            self.models[role] = found
        study = Study(
            settings=settings,
            sizes=self.sizes,
            receiver_sizes=self.receiver_sizes,
            seeds=self.seeds,
            versions={**self.versions, "python": platform.python_version()},
            models=self.models,
            not_compared=apart,
            same_circuit=self._compare() if apart is None else None,
            control=None
            if settings.control is None
            else about(settings, "control", names["control"], self.facts["control"]),
            cmap=self._transfers() if apart is None else {},
        )
        return dataclasses.replace(study, verdict=verdict(study))

    def _bench(self, role: str) -> Bench:
        settings = self.settings
        model = load(settings, role)
        inputs = {
            "model": self.facts[role].fingerprint,
            "versions": {package: self.versions[package] for package in COMPUTING},
            "batch_size": settings.batch_size,
            "memory": settings.memory,
            "matmul_precision": settings.matmul_precision,
            "engine": settings.engine,
            "device": torch.device(model.cfg.device or "cpu").type,
            # Prompts are shared out among the processes, which changes what is run together.
            "processes": n_ranks(),
        }
        return Bench(
            role,
            model,
            settings,
            self.sizes,
            self.receiver_sizes,
            inputs,
            self.store,
            self.progress,
            self.seeds,
        )

    def _study_model(
        self, role: str, label: str, others: Mapping[str, ModelFindings]
    ) -> ModelFindings:
        """All experiments on one model, in order; accuracy alone if there is no ability to explain.

        Args:
            role: of the model.
            label: what it is called.
            others: what was found of models studied before it, with the same heads.
        """
        bench, settings = self.benches[role], self.settings
        known = about(settings, role, label, self.facts[role])
        accuracy = measure_accuracy(bench)
        no_circuit = why_no_circuit(bench, accuracy)
        if no_circuit is not None:
            return ModelFindings(known, accuracy, no_circuit)
        self.pairs[role], drawn = draw_pairs(bench)
        discovery = find_circuit(bench, self.pairs[role], drawn)
        return ModelFindings(
            known,
            accuracy,
            None,
            pairs=drawn,
            discovery=discovery,
            planted=settings.planted(role),
            **_experiments(bench, discovery.circuit, others),
        )

    def _compare(self) -> Comparison | None:
        """Heads that both circuits have, beside what the base's shares with itself, found again."""
        base, tuned = (self.models[role].discovery for role in ("base", "tuned"))
        if not self.settings.wants("comparison") or base is None or tuned is None:
            return None
        return compare(
            base,
            tuned,
            # Where each model has its own that it answers right, they differ.
            paired=self.pairs["base"].same_as(self.pairs["tuned"]),
            again=find_circuit_again(self.benches["base"]) if self.settings.ceiling else None,
        )

    def _transfers(self) -> dict[str, Transfer]:
        """Heads of each model in the other, and those of the control in the base, by name."""
        if not self.settings.wants("cmap"):
            return {}
        base, tuned = self.benches["base"], self.benches["tuned"]
        sources = [(base, "tuned", tuned.model), (tuned, "base", base.model)]
        if self.settings.control is not None:
            sources.append((base, "control", load(self.settings, "control")))
        circuit, found = self.models["base"].circuit, dict[str, Transfer]()
        for into, role, model in sources:
            found[f"{role}_into_{into.role}"] = patch_from_other(
                into, model, role, self.facts[role].fingerprint, circuit
            )
        theirs = self.models["tuned"]
        if theirs.dcm is not None:
            known = self.facts["tuned"].fingerprint
            found[AS_PUBLISHED] = patch_as_published(
                base, tuned.model, "tuned", known, theirs.circuit, theirs.dcm
            )
        return found


def _experiments(
    bench: Bench, circuit: Circuit, others: Mapping[str, ModelFindings]
) -> dict[str, Any]:
    """Those that are wanted on one model's circuit, by name."""
    wants = bench.settings.wants
    found: dict[str, Any] = {}
    if wants("faithfulness"):
        same_form = {role: other.circuit for role, other in others.items()}
        found["faithfulness"] = measure_faithfulness(bench, circuit, same_form)
    if wants("completeness"):
        found["completeness"] = measure_completeness(bench, circuit)
    if wants("minimality"):
        found["minimality"] = measure_minimality(bench, circuit)
    if wants("attention"):
        found["attention"] = look_at_attention(bench, circuit)
    if wants("dcm") or wants("information"):
        found["dcm"] = learn_what_groups_carry(bench, circuit)
    if wants("information"):
        carried = {"own": patch_what_groups_carry(bench, circuit, found["dcm"], bench.role)}
        for role, other in others.items():
            if other.dcm is not None:
                carried[role] = patch_what_groups_carry(bench, other.circuit, other.dcm, role)
        found["information"] = CarriedByCircuit(carried)
    if wants("knockout"):
        found["knockout"] = knock_out_flow(bench)
    return found


def _check_comparable(settings: Settings) -> str | None:
    """Why the models can't be compared; None if they can.

    Raises:
        InputError: if they must be, for what is asked for.
    """
    apart = why_apart(settings, "tuned")
    if settings.control is not None and (reason := why_apart(settings, "control")) is not None:
        raise InputError(f"{settings.control} can be no control: {reason}")
    asked = OF_TWO_MODELS & set(settings.only or ())
    if apart is not None and asked:
        raise InputError(f"There can be no {' and no '.join(sorted(asked))}: {apart}")
    return apart


def _write(store: Store, study: Study, say: Callable[[str], object]) -> None:
    figures = {**figures_of(study), **mechanism_figures(study)}
    tables = tables_of(study)
    for name, table in tables.items():
        store.write(f"tables/{name}.csv", table.to_csv(index=False))
        store.write(f"tables/{name}.md", to_markdown(table))
    store.write(f"figures/{plotly_script().name}", plotly_script().read_bytes())
    for name, figure in figures.items():
        store.write(f"figures/{name}.html", figure_page(figure, name))
    problem = _draw(store, figures) if study.settings.png else None
    if problem is not None:
        say(problem)
    stages = {
        f"{role}-{group}": figure
        for role in study.with_circuit
        for group, figure in single_heatmaps(study, role).items()
    }
    text = to_json(study.to_json())
    # From the text, so that the page shows exactly what the file holds.
    store.write(REPORT, render_report(text, {**figures, **stages}, problem, tables=tables))
    store.write(STUDY, pack(study))
    store.write(RESULTS, text)


def _draw(store: Store, figures: dict[str, go.Figure]) -> str | None:
    """Write every figure as PNG; what went wrong, if anything did."""
    with PngRenderer() as renderer:
        try:
            for name, figure in figures.items():
                store.write(f"figures/{name}.png", renderer(figure))
        except (OSError, ValueError) as error:
            return f"The PNG figures could not be drawn ({error}); the HTML ones are there."
    return None


def _versions() -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {package: version(package) for package in PACKAGES}
