"""Which layers a list of edits changes, and the edits of many lists as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from tl_entity.exact.window import (
    Window,
    WindowEdit,
)
from tl_entity.exact.windowed import within
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import HookFunction

LayerEdits = Mapping[str, Sequence[HookFunction]]
"""The edits of a layer by point, in the order they are made."""


@dataclass(frozen=True)
class Plan:
    """A list of edits by layer and point, and the layer at which recomputation begins."""

    begin: int
    layers: Mapping[int, LayerEdits]

    @property
    def sizes(self) -> tuple[object, ...]:
        """What it costs depends on where the edits are, and on their kinds and sizes."""
        return self.begin, tuple((layer, sizes_of(at)) for layer, at in self.layers.items())


def sizes_of(edits: LayerEdits) -> tuple[object, ...]:
    return tuple(
        (point, type(edit), *(v.shape for v in vars(edit).values() if isinstance(v, Tensor)))
        for point, some in edits.items()
        for edit in some
    )


def gathered(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What was computed window by window, in the order of the prompts."""
    members = torch.cat([members for members, _ in parts])
    resid = torch.cat([resid for _, resid in parts])
    return resid[members.argsort().to(resid.device)]


def apply(point: str, here: Sequence[LayerEdits], layer: int) -> WindowEdit:
    """The edits of every variant at a point, as one function of all variants' activations."""
    hook = SimpleNamespace(name=hook_point(point, layer))
    axis = 2 if point == "attn_scores" else 0

    def edit(activation: Tensor) -> Tensor:
        edited = []
        for variant, edits in zip(activation.unbind(axis), here, strict=True):
            for function in edits.get(point, ()):
                variant = function(variant, hook)
            edited.append(variant)
        return torch.stack(edited, axis)

    return edit


def edits_within(edits: LayerEdits, window: Window) -> LayerEdits:
    return {point: [within(edit, window) for edit in some] for point, some in edits.items()}
