"""The models of a study: loaded, looked at before any work, and told apart."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformer_lens import HookedTransformer

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.cross_model import check_same_architecture
from tl_entity.methods.stages import check_sizes, check_stages
from tl_entity.models.load import load_model
from tl_entity.models.registry import REGISTRY, public_name
from tl_entity.studies.design import StudyDesign
from tl_entity.study.bench import own_tokenizer
from tl_entity.study.results import About
from tl_entity.study.settings import Settings
from tl_entity.study.store import fingerprint

MANY = 10**9
"""More texts than a file has."""


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


class Models:
    """The models of a study by role, each loaded once.

    Args:
        settings: of the study.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loaded: dict[str, HookedTransformer] = {}

    def __getitem__(self, role: str) -> HookedTransformer:
        """The model of a role.

        Raises:
            InputError: if it can't be loaded.
        """
        if role not in self._loaded:
            self._loaded[role] = load(self.settings, role)
        return self._loaded[role]

    def facts(self, role: str) -> Facts:
        """What is known of a model before any work is done.

        Raises:
            InputError: if it can't be loaded.
        """
        model = self[role]
        return Facts(model.cfg.n_layers, model.cfg.n_heads, model_fingerprint(model))

    def why_apart(self, role: str) -> str | None:
        """Why nothing of the other model can be put into the base; None if it can."""
        if role not in self.settings.sources:
            return "there is one model alone."
        try:
            check_same_architecture(self["base"], self[role])
        except InputError as error:
            return str(error)
        return None


@checked
def check_fits(model: HookedTransformer, name: str, design: StudyDesign, seed: int) -> None:
    """Make sure that a model can take a study's prompts.

    Args:
        model: the model.
        name: what it is called.
        design: the study.
        seed: of the prompts.

    Raises:
        InputError: if it can't, its tokenizer can't write them, or they lack a position of the
            recipe.
    """
    task, recipe = design.task, design.recipe
    try:
        pairs = task.pairs(
            own_tokenizer(model), 1 if task.n_pairs is None else MANY, seed, "finding"
        )
        if recipe is not None:
            check_stages(model, recipe.stages, pairs)
            check_sizes(model, recipe.stages, recipe.sizes)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    length = pairs.clean.tokens.shape[1]
    if length > model.cfg.n_ctx:
        of, fewer = (
            (f"{max(task.by_size)} boxes", " Ask for fewer boxes.")
            if task.by_size
            else (f"those of {task.name}", "")
        )
        raise InputError(
            f"{name} takes prompts of {model.cfg.n_ctx} tokens; {of} need {length}.{fewer}"
        )


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


def about(settings: Settings, role: str, label: str, facts: Facts) -> About:
    """What a model is."""
    name, adapter = settings.sources[role], settings.adapters[role]
    note = next((m.note for m in REGISTRY if m.name == name and not adapter), None)
    shown = None if adapter is None else public_name(adapter)
    return About(
        public_name(name), label, shown, note, facts.n_layers, facts.n_heads, facts.fingerprint
    )


def load(settings: Settings, role: str) -> HookedTransformer:
    """The model of a role."""
    return load_model(
        settings.sources[role],
        adapter=settings.adapters[role],
        dtype=settings.dtype,
        device=settings.device,
    )


def labels(settings: Settings) -> dict[str, str]:
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
