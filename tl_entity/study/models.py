"""The models of a study: loaded, looked at before any work, and told apart."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformer_lens import HookedTransformer

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.cross_model import check_same_architecture
from tl_entity.models.load import load_model
from tl_entity.models.registry import REGISTRY, public_name
from tl_entity.study.experiments import own_tokenizer
from tl_entity.study.results import About
from tl_entity.study.settings import Settings
from tl_entity.study.store import fingerprint
from tl_entity.tasks.pairs import discovery_pairs


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
def inspect(settings: Settings, role: str) -> Facts:
    """Load a model once to see that it is whole and fits the settings.

    Raises:
        InputError: if it can't be loaded, or can't take prompts of so many boxes.
    """
    model, name = load(settings, role), settings.sources[role]
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


def why_apart(settings: Settings, role: str) -> str | None:
    """Why nothing of the other model can be put into the base; None if it can."""
    if role not in settings.sources:
        return "there is one model alone."
    try:
        check_same_architecture(load(settings, "base"), load(settings, role))
    except InputError as error:
        return str(error)
    return None


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
