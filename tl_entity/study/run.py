"""A study, step by step: from the models to all that is found."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch

from tl_entity.errors import InputError
from tl_entity.heads import Circuit
from tl_entity.methods.compare import Comparison, compare
from tl_entity.methods.mechanism_result import Mechanism
from tl_entity.ranks import n_ranks
from tl_entity.studies.design import StudyDesign
from tl_entity.studies.entity_tracking import NAME
from tl_entity.study.bench import Bench, Progress, own_tokenizer
from tl_entity.study.experiment_results import CarriedByCircuit, Transfer
from tl_entity.study.experiments import (
    draw_pairs,
    find_circuit,
    find_circuit_again,
    look_at_attention,
    measure_accuracy,
    measure_faithfulness,
    why_no_circuit,
)
from tl_entity.study.flow import knock_out_flow
from tl_entity.study.gain import find_gain
from tl_entity.study.gain_results import Gain
from tl_entity.study.information import learn_what_groups_carry, patch_what_groups_carry
from tl_entity.study.mechanism_results import (
    CIRCUIT,
    FoundEdges,
    MechanismOfModel,
    SameMechanism,
)
from tl_entity.study.models import Facts, Models, about, labels
from tl_entity.study.necessity import measure_completeness, measure_minimality
from tl_entity.study.nodes import (
    AGAIN,
    compare_nodes,
    find_nodes,
    leave_alone,
    leave_circuit_alone,
    score_edges,
)
from tl_entity.study.results import ModelFindings, StudiedTask, Study
from tl_entity.study.settings import Settings
from tl_entity.study.store import Store
from tl_entity.study.tables import AS_PUBLISHED
from tl_entity.study.transfer import patch_as_published, patch_from_other
from tl_entity.study.verdict import verdict
from tl_entity.tasks.batches import PairBatch
from tl_entity.tasks.shown import token_texts

COMPUTING = ("torch", "transformer_lens", "transformers")
"""Software whose releases may give other numbers."""

PACKAGES = ("tl_entity", *COMPUTING, "plotly")


class Run:
    """One run of a study.

    Args:
        settings: how it is done.
        design: what is done.
        models: the models.
        facts: of each model, by role.
        store: keeps the steps.
        progress: shows what goes on.
    """

    def __init__(
        self,
        settings: Settings,
        design: StudyDesign,
        models: Models,
        facts: Mapping[str, Facts],
        store: Store,
        progress: Progress,
    ) -> None:
        self.settings, self.design, self.store, self.progress = settings, design, store, progress
        self.loaded, self.facts = models, facts
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
        alike = apart is None
        for role in settings.models:
            self.benches[role] = self._bench(role)
            others = self.models if apart is None else {}
            found = self._study_model(role, names[role], others)
            if found.discovery is not None:
                self.store.write(f"{role}_circuit.json", found.circuit.to_json())
            elif apart is None and self.design.recipe is not None:
                apart = f"no circuit was found in {names[role]}."
            self.models[role] = found
        self._put_beside_mechanisms(alike)
        recipe = self.design.recipe
        study = Study(
            settings=settings,
            sizes={} if recipe is None else recipe.sizes,
            receiver_sizes={} if recipe is None else recipe.receiver_sizes,
            seeds=self.seeds,
            versions={**self.versions, "python": platform.python_version()},
            models=self.models,
            not_compared=apart,
            same_circuit=self._compare() if apart is None else None,
            control=None
            if settings.control is None
            else about(settings, "control", names["control"], self.facts["control"]),
            cmap=self._transfers() if apart is None else {},
            task=self._task(),
            same_mechanism=self._compare_mechanisms() if alike else None,
            gain=self._gain() if alike else None,
        )
        return dataclasses.replace(study, verdict=verdict(study))

    def _bench(self, role: str) -> Bench:
        settings = self.settings
        model = self.loaded[role]
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
            self.design,
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
        found: dict[str, Any] = {}
        circuit = Circuit(())
        if self.design.recipe is not None:
            self.pairs[role], found["pairs"] = draw_pairs(bench)
            found["discovery"] = find_circuit(bench, self.pairs[role], found["pairs"])
            circuit = found["discovery"].circuit
            if self.design.task.name == NAME:
                found["planted"] = settings.planted(role)
        if self.design.wants("mechanism"):
            found["mechanism"] = MechanismOfModel(find_nodes(bench))
        return ModelFindings(known, accuracy, None, **found, **_experiments(bench, circuit, others))

    def _task(self) -> StudiedTask:
        """What the study is of, with a prompt as an example."""
        task, groups, recipe = self.design.task, self.design.groups, self.design.recipe
        if task.name == NAME:
            return StudiedTask(task.name, task.says, groups)
        tokenizer = own_tokenizer(self.loaded["base"])
        prompts = task.draw(tokenizer, 1, seed=self.settings.seed, part="testing")
        start, end = int(prompts.mask[0].int().argmax()), int(prompts.position("last")[0])
        special: set[int] = set(tokenizer.all_special_ids)
        kept = [i for i in range(start, end + 1) if int(prompts.tokens[0, i]) not in special]
        texts = token_texts(prompts, 0)
        return StudiedTask(
            task.name,
            task.says,
            groups,
            **({} if recipe is None else {"metric": recipe.metric}),
            example=tuple(texts[i - start] for i in kept),
            positions={
                name: kept.index(int(at[0]))
                for name, at in prompts.positions.items()
                if int(at[0]) in kept
            },
            from_python=self.design.from_python,
            answer=str(tokenizer.decode(prompts.answers[:1].tolist())).strip(),
        )

    def _put_beside_mechanisms(self, alike: bool) -> None:
        """See what else is left alone on the prompts of each model's mechanism, and its edges.

        Args:
            alike: whether the models can be compared.
        """
        mechanisms = {
            role: model.mechanism.found.mechanism
            for role, model in self.models.items()
            if model.mechanism is not None
        }
        for role, mechanism in mechanisms.items():
            bench, model = self.benches[role], self.models[role]
            if mechanism is None or model.mechanism is None:
                continue
            others = {
                other: leave_alone(bench, theirs, other)
                for other, theirs in mechanisms.items()
                if other != role and theirs is not None and alike
            }
            if model.discovery is not None:
                others[CIRCUIT] = leave_circuit_alone(bench, model.circuit)
            wants_again = self.settings.ceiling and role == "base"
            found = dataclasses.replace(
                model.mechanism,
                beside=others,
                again=find_nodes(bench, which=AGAIN) if wants_again else None,
                edges=self._edges(role, mechanism) if self.settings.edges else None,
            )
            self.models[role] = dataclasses.replace(model, mechanism=found)

    def _edges(self, role: str, mechanism: Mechanism) -> FoundEdges:
        if role not in self.pairs:
            try:
                self.pairs[role], _ = draw_pairs(self.benches[role])
            except InputError as reason:
                return FoundEdges(None, str(reason))
        return score_edges(self.benches[role], mechanism, self.pairs[role])

    def _compare_mechanisms(self) -> SameMechanism | None:
        found = {role: m.mechanism for role, m in self.models.items() if m.mechanism is not None}
        return compare_nodes(found) if len(found) == 2 else None

    def _compare(self) -> Comparison | None:
        """Heads that both circuits have, beside what the base's shares with itself, found again."""
        base, tuned = (self.models[role].discovery for role in ("base", "tuned"))
        if not self.design.wants("comparison") or base is None or tuned is None:
            return None
        return compare(
            base,
            tuned,
            # Where each model has its own that it answers right, they differ.
            paired=self.pairs["base"].same_as(self.pairs["tuned"]),
            again=find_circuit_again(self.benches["base"]) if self.settings.ceiling else None,
        )

    def _gain(self) -> Gain | None:
        """Where the fine-tune's gain over the base lies."""
        if not self.design.wants("gain"):
            return None
        fingerprint = self.facts["tuned"].fingerprint
        return find_gain(self.benches["base"], self.loaded["tuned"], fingerprint, self.models)

    def _transfers(self) -> dict[str, Transfer]:
        """Heads of each model in the other, and those of the control in the base, by name."""
        if not self.design.wants("cmap"):
            return {}
        base, tuned = self.benches["base"], self.benches["tuned"]
        sources = [(base, "tuned", tuned.model), (tuned, "base", base.model)]
        if self.settings.control is not None:
            sources.append((base, "control", self.loaded["control"]))
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
    wants = bench.design.wants
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


def _versions() -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {package: version(package) for package in PACKAGES}
