"""Pairs of models that differ where a test wants them to."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.methods.planted import COPY, NOTE, planted_model


def changed(
    base: HookedTransformer, changes: Mapping[str, Tensor | Iterable[int] | None], seed: int = 7
) -> HookedTransformer:
    """A copy of a model, some parameters changed: by a tensor, or by noise, in all of their heads
    or in some."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for name, change in changes.items():
        parameter = tuned.get_parameter(name)
        if not isinstance(change, Tensor):
            rows = slice(None) if change is None else list(change)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            change = torch.zeros_like(parameter)
            change[rows] = 0.2 * noise.to(parameter.dtype)[rows]
        parameter.data += change
    return tuned


def fine_tuned(base: HookedTransformer, size: float = 0.1, seed: int = 7) -> HookedTransformer:
    """A copy with noise on every weight."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += size * noise.to(parameter.dtype)
    return tuned


def without_note_and_key() -> HookedTransformer:
    """The planted model before it learnt its task: the note taker writes nothing, and the copier
    does not look for notes. Neither helps without the other."""
    model = planted_model()
    model.blocks[NOTE.layer].attn.W_O.data[NOTE.head] = 0
    model.blocks[COPY.layer].attn.W_K.data[COPY.head] = 0
    return model
