"""The main job: from two models to their circuits, figures and a report."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tl_entity._typing import checked
from tl_entity.devices import check_device
from tl_entity.errors import InputError
from tl_entity.output import check_writable, sole_worker
from tl_entity.ranks import from_first, is_first
from tl_entity.studies.design import StudyDesign
from tl_entity.study.bench import Progress, silent
from tl_entity.study.folder import check_same_study, has_circuits, joined, note_settings
from tl_entity.study.models import Models, check_fits
from tl_entity.study.models import model_fingerprint as model_fingerprint
from tl_entity.study.nodes import gate_training
from tl_entity.study.run import Run
from tl_entity.study.settings import OF_TWO_MODELS, Settings
from tl_entity.study.store import Record, Store
from tl_entity.study.task_settings import design_of
from tl_entity.study.writing import write_study


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
    design: StudyDesign | None = None,
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
        design: a study of another task, from Python; if left out, what the settings say: the
            paper's study, or with `TaskSettings` that of any task.

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
    gate_training(settings)
    with ExitStack() as held:
        # Of several processes the first one has the folder, and tells the others if it can't.
        from_first(lambda: held.enter_context(sole_worker(out, wait=wait, say=say)))
        models = Models(settings)
        facts = {role: models.facts(role) for role in settings.sources}
        head_counts = [facts[role].n_layers * facts[role].n_heads for role in settings.models]
        whole = design_of(settings, min(head_counts)) if design is None else design
        for role in settings.sources:
            check_fits(models[role], settings.sources[role], whole, settings.seed)
        apart = _check_comparable(settings, models)
        prints = {role: found.fingerprint for role, found in facts.items()}
        from_first(lambda: check_same_study(out, settings, whole, prints))
        if join:
            settings = from_first(lambda: joined(out, settings))
        wanted = replace(whole, experiments=settings.only if design is None else whole.experiments)
        if not (wanted.needs_circuits() or from_first(lambda: has_circuits(out))):
            wanted = wanted.without_recipe()
        store = Store(out, log)
        note_settings(store, settings, whole, prints)
        study = Run(settings, wanted, models, facts, store, progress).study(apart)
        if is_first():
            write_study(store, study, say)
        return study.to_json()


def _check_comparable(settings: Settings, models: Models) -> str | None:
    """Why the models can't be compared; None if they can.

    Raises:
        InputError: if they must be, for what is asked for.
    """
    apart = models.why_apart("tuned")
    if settings.control is not None and (reason := models.why_apart("control")) is not None:
        raise InputError(f"{settings.control} can be no control: {reason}")
    asked = OF_TWO_MODELS & set(settings.only or ())
    if apart is not None and asked:
        raise InputError(f"There can be no {' and no '.join(sorted(asked))}: {apart}")
    return apart
