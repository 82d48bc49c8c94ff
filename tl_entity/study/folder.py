"""What a folder already holds of a study, so that nothing finished is lost to other settings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_entity.errors import InputError
from tl_entity.results import plain
from tl_entity.studies.design import StudyDesign
from tl_entity.studies.entity_tracking import GROUPS, NAME
from tl_entity.study.settings import EXPERIMENTS, Settings
from tl_entity.study.store import (
    RESULTS,
    STEPS,
    Record,
    Store,
    fingerprint,
    read_record,
    to_json,
)
from tl_entity.study.task_settings import PAPER

STUDY = "results.safetensors"
"""The study as one result, for `Study.load`."""

SETTINGS = f"{STEPS}/settings.json"
"""What the steps of a folder were begun with."""

SHOWN_OR_ADDED = ("only", "png", "ceiling", "edges")
"""Settings by which a study is shown, or has more or fewer experiments."""

OF_RECIPE = ("recipe", "sizes", "receiver_sizes")
"""What is noted of a recipe."""

MODEL_WORDS = {
    "base": "base model",
    "tuned": "fine-tuned model",
    "control": "control model",
}
"""The models are known by their fingerprints, wherever they lie."""


def check_same_study(
    out: Path,
    settings: Settings,
    design: StudyDesign,
    models: Mapping[str, str],
) -> None:
    """Make sure that a folder holds no study with other settings.

    Args:
        out: the folder.
        settings: what is asked for.
        design: the study.
        models: the fingerprint of each, by role.

    Raises:
        InputError: if it does; what differs is named.
    """
    there, here = _noted(out), _plain(settings, design, models)
    differing: list[str] = []
    for name, theirs in there.items():
        # A fine-tune, a control and a recipe may be added later; settings of other versions say
        # nothing.
        added = name in (*MODEL_WORDS, *OF_RECIPE) and theirs is None
        if name not in here or here[name] == theirs or added:
            continue
        said = MODEL_WORDS.get(name, name.replace("_", " "))
        if name not in MODEL_WORDS:
            differing.append(f"{said} {_shown(theirs)} and not {_shown(here[name])}")
        else:
            differing.append(f"{'a' if here[name] is None else 'another'} {said}")
    if differing:
        raise InputError(
            f"{out} holds a study with {', '.join(differing)}; give another folder for this one, "
            "or the same settings."
        )


def note_settings(
    store: Store,
    settings: Settings,
    design: StudyDesign,
    models: Mapping[str, str],
) -> None:
    """Note what the folder's steps are begun with, for `check_same_study`."""
    store.write(SETTINGS, to_json(_plain(settings, design, models)))


def joined(out: Path, settings: Settings) -> Settings:
    """The settings, asking also for what the folder's finished results hold."""
    earlier = read_record(out / RESULTS).get("settings")
    if not isinstance(earlier, dict) or "only" not in earlier:
        return settings
    theirs, both = earlier["only"], None
    if isinstance(theirs, list) and settings.only is not None:
        known = [name for name in theirs if name in EXPERIMENTS]
        both = tuple(dict.fromkeys([*known, *settings.only]))
    ceiling = settings.ceiling or earlier.get("ceiling") is True
    edges = settings.edges or earlier.get("edges") is True
    return dataclasses.replace(settings, only=both, ceiling=ceiling, edges=edges)


def has_circuits(out: Path) -> bool:
    """Whether the folder's finished results have circuits."""
    models = read_record(out / RESULTS).get("models")
    each = models.values() if isinstance(models, dict) else ()
    return any(isinstance(model, dict) and "discovery" in model for model in each)


def _noted(out: Path) -> Record:
    """What the folder's study was begun with; that of its results, for a folder of before."""
    # Before there were other tasks, all were the paper's.
    usual = {"task": NAME, "recipe": PAPER}
    noted = read_record(out / SETTINGS)
    if noted:
        return usual | noted
    results = read_record(out / RESULTS)
    settings, models = results.get("settings"), results.get("models")
    if not isinstance(settings, dict) or not isinstance(models, dict):
        return {}
    known = {
        role: model.get("fingerprint") for role, model in models.items() if isinstance(model, dict)
    }
    kept = {n: v for n, v in settings.items() if n not in _LEFT_OUT}
    return {**usual, **kept, **known}


def _plain(
    settings: Settings,
    design: StudyDesign,
    models: Mapping[str, str],
) -> dict[str, Any]:
    kept = {n: v for n, v in plain(settings).items() if n not in _LEFT_OUT}
    recipe, task = design.recipe, design.task
    resolved: dict[str, Any] = {"task": task.name, **dict.fromkeys(OF_RECIPE)}
    if task.n_pairs is not None:
        resolved["texts"] = fingerprint(task.inputs)[:8]
    if recipe is not None:
        resolved["sizes"] = dict(recipe.sizes)
        resolved["receiver_sizes"] = dict(recipe.receiver_sizes)
        how = [recipe.stages, recipe.metric, recipe.overlaps]
        is_paper = task.name == NAME and recipe.groups == GROUPS
        resolved["recipe"] = PAPER if is_paper else fingerprint(how)[:8]
    known = {role: models.get(role) for role in MODEL_WORDS}
    return {**kept, **resolved, **known}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(str(part) for part in value.values())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


_LEFT_OUT = {*SHOWN_OR_ADDED, *MODEL_WORDS, *(f"{role}_adapter" for role in MODEL_WORDS)}
