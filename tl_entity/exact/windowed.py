"""Edits as a recomputation needs them: where each begins, and itself in terms of a window."""

from dataclasses import replace
from functools import singledispatch

import torch
from jaxtyping import Int
from torch import Tensor

from tl_entity.errors import InputError
from tl_entity.exact.window import Window
from tl_entity.hooks.cross_model import ReplaceKeys, ReplaceValues
from tl_entity.hooks.edits import (
    AblateWhere,
    KnockOutAttention,
    MaskHeads,
    ReplaceHeads,
    ReplaceWhere,
)
from tl_entity.hooks.run import HookFunction


@singledispatch
def first_tokens(edit: HookFunction) -> Int[Tensor, " batch"] | None:
    """The first token of each prompt that an edit changes; of prompts that it leaves alone, one
    after all others. None if that can't be told of an edit of this kind."""
    return None


@first_tokens.register(ReplaceHeads)
@first_tokens.register(MaskHeads)
@first_tokens.register(ReplaceKeys)
@first_tokens.register(ReplaceValues)
def _(edit: ReplaceHeads | MaskHeads | ReplaceKeys | ReplaceValues) -> Tensor:
    return edit.positions


@first_tokens.register
def _(edit: KnockOutAttention) -> Tensor:
    return edit.from_positions


@first_tokens.register(ReplaceWhere)
@first_tokens.register(AblateWhere)
def _(edit: ReplaceWhere | AblateWhere) -> Tensor:
    where = edit.where.any(-1)
    return torch.where(where.any(-1), where.int().argmax(-1), where.shape[-1])


@singledispatch
def within(edit: HookFunction, window: Window) -> HookFunction:
    """The same edit for the prompts and tokens of a window, as the window counts them.

    Raises:
        InputError: if it lies outside the window, or is of an unknown kind.
    """
    raise unknown_edit(edit)


@within.register
def _(edit: ReplaceHeads, window: Window) -> ReplaceHeads:
    positions = _window_positions(edit.positions, window)
    return replace(edit, positions=positions, values=_of_members(edit.values, window))


@within.register
def _(edit: MaskHeads, window: Window) -> MaskHeads:
    positions = _window_positions(edit.positions, window)
    return replace(edit, positions=positions, other=_of_members(edit.other, window))


@within.register
def _(edit: ReplaceWhere, window: Window) -> ReplaceWhere:
    values = _of_members(edit.values, window)
    rows = torch.arange(len(values), device=values.device)[:, None]
    return ReplaceWhere(
        _where_in_window(edit.where, window), values[rows, window.tokens.to(values.device)]
    )


@within.register
def _(edit: AblateWhere, window: Window) -> AblateWhere:
    return AblateWhere(_where_in_window(edit.where, window), window.clean(edit.rows), edit.outputs)


@within.register
def _(edit: KnockOutAttention, window: Window) -> KnockOutAttention:
    seen = edit.to_positions.to(window.tokens.device)[window.members]
    ahead = window.before.shape[1]
    # Keys before the window come first, as many as the longest prefix has.
    own = seen - window.tokens[:, 0]
    return replace(
        edit,
        from_positions=_window_positions(edit.from_positions, window),
        to_positions=torch.where(own < 0, seen, ahead + own),
    )


@within.register
def _(edit: ReplaceKeys, window: Window) -> ReplaceKeys:
    positions = _window_positions(edit.positions, window)
    return replace(edit, positions=positions, keys=_as_scored(edit.keys, window))


@within.register
def _(edit: ReplaceValues, window: Window) -> ReplaceValues:
    positions = _window_positions(edit.positions, window)
    return replace(edit, positions=positions, values=_as_scored(edit.values, window))


def _where_in_window(where: Tensor, window: Window) -> Tensor:
    where = _of_members(where.to(window.tokens.device), window)
    inside = torch.zeros(where.shape[:2], dtype=torch.bool, device=where.device)
    rows = torch.arange(len(where), device=where.device)[:, None]
    inside[rows, window.tokens] = True
    if bool((where & ~inside[..., None]).any()):
        raise _outside(window)
    return where[rows, window.tokens]


def _as_scored(vectors: Tensor, window: Window) -> Tensor:
    """Vectors of whole prompts as the window's scores count tokens: those ahead of it first, as
    many as the longest prefix has, then its own."""
    ahead = vectors[window.members.to(vectors.device), : window.before.shape[1]]
    return torch.cat([ahead, window.clean(vectors)], 1)


def _window_positions(positions: Tensor, window: Window) -> Tensor:
    shifted = positions.to(window.tokens.device)[window.members] - window.tokens[:, 0]
    if bool((shifted < 0).any()):
        raise _outside(window)
    return shifted


def _of_members(values: Tensor, window: Window) -> Tensor:
    if len(values) == 1:
        return values.expand(len(window.members), *values.shape[1:])
    return values[window.members.to(values.device)]


def _outside(window: Window) -> InputError:
    return InputError(
        f"An edit lies before token {int(window.tokens[:, 0].min())}, the first that can be "
        "recomputed; record the run with the named position of the edit."
    )


def unknown_edit(edit: HookFunction) -> InputError:
    """What to raise about an edit of a kind that can't be recomputed."""
    return InputError(
        f'The exact engine knows no edit like {type(edit).__name__}; use engine="hooks".'
    )
