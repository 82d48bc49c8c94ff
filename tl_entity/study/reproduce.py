"""The main job: from two models to their circuits, figures and a report."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
from transformer_lens import HookedTransformer

from tl_entity._typing import checked
from tl_entity.devices import check_device
from tl_entity.errors import InputError
from tl_entity.heads import Circuit
from tl_entity.hooks.cross_model import check_same_architecture
from tl_entity.methods.discovery import Discovery
from tl_entity.models.load import load_model
from tl_entity.models.registry import REGISTRY, public_name
from tl_entity.output import check_writable
from tl_entity.plots.render import PngRenderer, plotly_script
from tl_entity.ranks import is_first
from tl_entity.study.experiments import (
    Bench,
    Progress,
    compare_with_planted,
    draw_pairs,
    find_circuit,
    find_circuit_again,
    groups_record,
    look_at_attention,
    measure_accuracy,
    measure_faithfulness,
    own_tokenizer,
    silent,
    why_no_circuit,
)
from tl_entity.study.figures import figures_of
from tl_entity.study.flow import knock_out_flow
from tl_entity.study.information import learn_what_groups_carry, patch_what_groups_carry
from tl_entity.study.mechanism_figures import mechanism_figures
from tl_entity.study.necessity import measure_completeness, measure_minimality
from tl_entity.study.report import figure_page, render_report
from tl_entity.study.settings import GROUPS, OF_TWO_MODELS, Settings, resolve_sizes
from tl_entity.study.store import (
    REPORT,
    RESULTS,
    Record,
    Store,
    fingerprint,
    to_json,
)
from tl_entity.study.tables import AS_PUBLISHED, tables_of, to_markdown
from tl_entity.study.transfer import compare_discoveries, patch_as_published, patch_from_other
from tl_entity.study.verdict import verdict
from tl_entity.tasks.batches import PairBatch
from tl_entity.tasks.pairs import discovery_pairs

COMPUTING = ("tl_entity", "torch", "transformer_lens", "transformers")
PACKAGES = (*COMPUTING, "plotly")


@dataclass(frozen=True)
class Facts:
    """What is known of a model before any work is done.

    Attributes:
        n_layers: its layers.
        n_heads: its heads a layer.
        fingerprint: hash of its weights, sizes and vocabulary.
    """

    n_layers: int
    n_heads: int
    fingerprint: str


@checked
def reproduce(
    settings: Settings,
    out: str | Path,
    *,
    progress: Progress = silent,
    say: Callable[[str], object] = lambda message: None,
    log: Callable[[str], object] = lambda message: None,
    join: bool = False,
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
        join: bring what the folder's results.json already has into the new one too, if it was made
            with the same settings; those steps are found finished.

    Returns:
        What results.json holds.

    Raises:
        InputError: if the folder can't be written to, a model can't be had, or the settings don't
            fit the models.
    """
    out = Path(out)
    check_writable(out)
    check_device(settings.device)
    facts = {role: inspect(settings, role) for role in settings.sources}
    head_counts = [facts[role].n_layers * facts[role].n_heads for role in settings.models]
    sizes, receiver_sizes = resolve_sizes(settings, min(head_counts))
    apart = _why_apart(settings, "tuned")
    if settings.control is not None and (reason := _why_apart(settings, "control")) is not None:
        raise InputError(f"{settings.control} can be no control: {reason}")
    asked = OF_TWO_MODELS & set(settings.only or ())
    if apart is not None and asked:
        raise InputError(f"There can be no {' and no '.join(sorted(asked))}: {apart}")
    store = Store(out, log)
    versions = _versions()
    code = _code_fingerprint()
    if join:
        resolved = {"sizes": sizes, "receiver_sizes": receiver_sizes}
        settings = _joined(settings, resolved, out / RESULTS, {"code": code, **versions})
    labels = _labels(settings)
    benches: dict[str, Bench] = {}
    discoveries: dict[str, Discovery] = {}
    drawn: dict[str, PairBatch] = {}
    seeds: dict[str, int] = {}
    models: Record = {}
    shown = settings.public()
    for role, name in settings.models.items():
        model = _load(settings, role)
        inputs = {
            "model": facts[role].fingerprint,
            "code": code,
            "versions": {package: versions[package] for package in COMPUTING},
            "batch_size": settings.batch_size,
            "memory": settings.memory,
            "matmul_precision": settings.matmul_precision,
            "engine": settings.engine,
            "device": torch.device(model.cfg.device or "cpu").type,
        }
        bench = Bench(role, model, settings, sizes, receiver_sizes, inputs, store, progress, seeds)
        others = {r: (d.circuit, models[r]) for r, d in discoveries.items() if apart is None}
        models[role], found = _study_model(bench, others)
        benches[role] = bench
        models[role] |= {
            "name": public_name(name),
            "label": labels[role],
            "adapter": shown[f"{role}_adapter"],
            "note": next(
                (m.note for m in REGISTRY if m.name == name and not settings.adapters[role]), None
            ),
            "n_layers": facts[role].n_layers,
            "n_heads": facts[role].n_heads,
            "fingerprint": facts[role].fingerprint,
        }
        if found is not None:
            discoveries[role], drawn[role] = found
            store.write(f"{role}_circuit.json", discoveries[role].circuit.to_json())
        elif apart is None:
            apart = f"no circuit was found in {labels[role]}."
    results: Record = {
        "settings": {
            **shown,
            "sizes": {group: sizes[group] for group in GROUPS},
            "receiver_sizes": receiver_sizes,
        },
        "seeds": seeds,
        "versions": {**versions, "code": code, "python": platform.python_version()},
        "models": models,
        "not_compared": apart,
        "same_circuit": None,
        "control": None
        if settings.control is None
        else {
            "name": shown["control"],
            "label": labels["control"],
            "adapter": shown["control_adapter"],
            "fingerprint": facts["control"].fingerprint,
        },
        "cmap": {},
    }
    if apart is None:
        base, tuned = benches["base"], benches["tuned"]
        if settings.wants("comparison"):
            results["same_circuit"] = compare_discoveries(
                discoveries["base"],
                discoveries["tuned"],
                # Where each model has its own that it answers right, they differ.
                paired=drawn["base"].same_as(drawn["tuned"]),
                again=find_circuit_again(base) if settings.ceiling else None,
            )
        if settings.wants("cmap"):
            sources = [(base, "tuned", tuned.model), (tuned, "base", base.model)]
            if settings.control is not None:
                sources.append((base, "control", _load(settings, "control")))
            for into, role, model in sources:
                record = patch_from_other(
                    into, model, role, facts[role].fingerprint, discoveries["base"].circuit
                )
                results["cmap"][f"{role}_into_{into.role}"] = record
            if "dcm" in models["tuned"]:
                results["cmap"][AS_PUBLISHED] = patch_as_published(
                    base,
                    tuned.model,
                    "tuned",
                    facts["tuned"].fingerprint,
                    discoveries["tuned"].circuit,
                    models["tuned"]["dcm"],
                )
    results["verdict"] = verdict(results)
    if is_first():
        _write(store, results, say)
    return results


@checked
def inspect(settings: Settings, role: str) -> Facts:
    """Load a model once to see that it is whole and fits the settings.

    Raises:
        InputError: if it can't be loaded, or can't take prompts of so many boxes.
    """
    model, name = _load(settings, role), settings.sources[role]
    try:
        pairs = discovery_pairs(own_tokenizer(model), 1, n_boxes=settings.boxes, seed=settings.seed)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    length = pairs.clean.tokens.shape[1]
    if length > model.cfg.n_ctx:
        raise InputError(
            f"{name} takes prompts of {model.cfg.n_ctx} tokens; {settings.boxes} boxes need "
            f"{length}. Ask for fewer boxes."
        )
    return Facts(model.cfg.n_layers, model.cfg.n_heads, model_fingerprint(model))


def _why_apart(settings: Settings, role: str) -> str | None:
    """Why nothing of the other model can be put into the base; None if it can."""
    if role not in settings.sources:
        return "there is one model alone."
    try:
        check_same_architecture(_load(settings, "base"), _load(settings, role))
    except InputError as error:
        return str(error)
    return None


@checked
def model_fingerprint(model: HookedTransformer) -> str:
    """Hash of all that makes a model compute what it does: weights, configuration, vocabulary."""
    found = hashlib.sha256()
    config = {k: str(v) for k, v in model.cfg.to_dict().items() if k != "device"}
    vocabulary = own_tokenizer(model).get_vocab()
    found.update(fingerprint({"config": config, "vocabulary": vocabulary}).encode())
    for name, parameter in sorted(model.named_parameters()):
        found.update(name.encode())
        data = parameter.detach().cpu().contiguous().reshape(-1)
        found.update(data.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _joined(
    settings: Settings, resolved: Record, before: Path, versions: dict[str, str]
) -> Settings:
    """The settings, asking also for what earlier results of the same settings hold."""
    try:
        earlier = json.loads(before.read_text(encoding="utf-8"))
        theirs, their_versions = dict(earlier["settings"]), earlier["versions"]
        their_only = theirs["only"]
    except (OSError, ValueError, KeyError, TypeError):
        return settings
    ours = json.loads(to_json({**settings.public(), **resolved}))
    for shown in ("only", "png"):
        ours.pop(shown)
        theirs.pop(shown, None)
    same_code = all(their_versions.get(name) == version for name, version in versions.items())
    if ours != theirs or not same_code or settings.only is None:
        return settings
    both = None if their_only is None else tuple(dict.fromkeys([*their_only, *settings.only]))
    return dataclasses.replace(settings, only=both)


def _load(settings: Settings, role: str) -> HookedTransformer:
    return load_model(
        settings.sources[role],
        adapter=settings.adapters[role],
        dtype=settings.dtype,
        device=settings.device,
    )


def _labels(settings: Settings) -> dict[str, str]:
    """Names to show: the last part of a path, with the role where that does not tell the models
    apart."""
    labels = {
        role: " + ".join(Path(part).name or part for part in (name, adapter) if part)
        for role, name in settings.sources.items()
        for adapter in (settings.adapters[role],)
    }
    if len(set(labels.values())) == len(labels):
        return labels
    return {role: f"{label} ({role})" for role, label in labels.items()}


def _study_model(
    bench: Bench, others: dict[str, tuple[Circuit, Record]]
) -> tuple[Record, tuple[Discovery, PairBatch] | None]:
    """All experiments on one model, in order; accuracy alone if there is no ability to explain.
    Also its circuit, and the pairs it was found from.

    Args:
        bench: the model.
        others: circuits and records of models studied before it, with the same heads.
    """
    wants = bench.settings.wants
    record: Record = {"accuracy": measure_accuracy(bench), "planted": None}
    record["no_circuit"] = why_no_circuit(bench, record["accuracy"])
    if record["no_circuit"] is not None:
        return record, None
    pairs, record["pairs"] = draw_pairs(bench)
    discovery, record["discovery"] = find_circuit(bench, pairs, record["pairs"])
    circuit = discovery.circuit
    record["circuit"] = groups_record(circuit)
    if wants("faithfulness"):
        same_form = {role: other for role, (other, _) in others.items()}
        record["faithfulness"] = measure_faithfulness(bench, circuit, same_form)
    if wants("completeness"):
        record["completeness"] = measure_completeness(bench, circuit)
    if wants("minimality"):
        record["minimality"] = measure_minimality(bench, circuit)
    if wants("attention"):
        record["attention"] = look_at_attention(bench, circuit)
    if wants("dcm") or wants("information"):
        record["dcm"] = learn_what_groups_carry(bench, circuit)
    if wants("information"):
        carried = {"own": patch_what_groups_carry(bench, circuit, record["dcm"], bench.role)}
        for role, (other, known) in others.items():
            carried[role] = patch_what_groups_carry(bench, other, known["dcm"], role)
        record["information"] = carried
    if wants("knockout"):
        record["knockout"] = knock_out_flow(bench)
    known = bench.settings.planted(bench.role)
    record["planted"] = None if known is None else compare_with_planted(circuit, known)
    return record, (discovery, pairs)


def _write(store: Store, results: Record, say: Callable[[str], object]) -> None:
    figures = {**figures_of(results), **mechanism_figures(results)}
    for name, table in tables_of(results).items():
        store.write(f"tables/{name}.csv", table.to_csv(index=False))
        store.write(f"tables/{name}.md", to_markdown(table))
    store.write(f"figures/{plotly_script().name}", plotly_script().read_bytes())
    for name, figure in figures.items():
        store.write(f"figures/{name}.html", figure_page(figure, name))
    problem = _draw(store, figures) if results["settings"]["png"] else None
    if problem is not None:
        say(problem)
    text = to_json(results)
    # From the text, so that the page shows exactly what the file holds.
    store.write(REPORT, render_report(text, figures, problem))
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


def _code_fingerprint() -> str:
    """Hash of this package's sources: no outcome of other code is taken for this code's."""
    package = Path(__file__).parent.parent
    # How results are shown and models are trained changes no outcome.
    shown = {package / "__main__.py"}
    shown |= {package / "study" / name for name in ("figures.py", "published.py")}
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path not in shown and path.parent.name not in ("training", "plots", "cli", "report"):
            found.update(path.relative_to(package).as_posix().encode())
            found.update(path.read_bytes())
    return found.hexdigest()
