"""Activations patched at one token of one layer after another, recomputed from there on only.

What is patched at a token changes this token and those after it, in its own layer and those above.
So for every token the patches of all layers climb the model as one growing batch, over the keys and
values of the run without a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.exact.blocks import add_mlp, check_supported, device_of, rows_within
from tl_entity.exact.memory import halving
from tl_entity.exact.window import ANSWER_TOKEN, EVERY_TOKEN, Window
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.hooks.watch import assure_finite, located
from tl_entity.tasks.batches import ANSWER_POSITION, PromptBatch

Over = Literal["resid_pre", "attn_out", "mlp_out", "z"]
"""What is patched: the residual stream ahead of a layer, what its attention or its MLP writes, or
one head's output."""

BEHIND: Mapping[Over, str] = {"attn_out": "resid_mid", "z": "resid_mid", "mlp_out": "resid_post"}
"""Where in the residual stream a patch is first felt."""


@checked
@torch.no_grad()
def patched_resid(
    model: Model,
    prompts: PromptBatch,
    over: Over,
    source: Mapping[str, Tensor],
    tokens: tuple[Int[Tensor, "token batch"], Int[Tensor, "token batch"]],
    *,
    memory: int,
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, "layer part token batch d_model"]]:
    """The final residual stream at `"last"`: of the run as it is, and with each patch.

    Args:
        model: the model.
        prompts: the prompts that are run.
        over: what is patched; `z` has a part for each head, all else one.
        source: the activations that are put in, by hook point, of whole prompts.
        tokens: where each patch lies in these prompts, and where its values lie in the source.
        memory: bytes that intermediate results may take.

    Raises:
        InputError: if the exact engine does not fit the model.
        NotFiniteError: if weights or activations are NaN or infinite, naming where.
    """
    check_supported(model)
    with guarded(model):
        return located(lambda: _patched(_Grid.record(model, prompts, over, source), tokens, memory))


def _patched(grid: "_Grid", tokens: tuple[Tensor, Tensor], memory: int) -> tuple[Tensor, Tensor]:
    n_layers, parts = grid.model.cfg.n_layers, grid.parts
    found = grid.final.expand(n_layers * parts, len(tokens[0]), -1, -1).clone()
    for index, (here, there) in enumerate(zip(*tokens, strict=True)):
        change = grid.change(here, there)
        # What gets its own value changes nothing, whatever rounding says.
        moved = torch.cat([(some != 0).any(-1).to(found.device) for some in change])
        if not bool(moved.any()):
            continue
        for window in Window.each_length(grid.prompts, here):
            members = window.members.to(found.device)
            theirs = [some[:, window.members.to(some.device)] for some in change]

            def compute(
                patches: range, window: Window = window, theirs: list[Tensor] = theirs
            ) -> Tensor:
                return assure_finite(grid.climb(window, theirs, patches))

            size = rows_within(window.bytes_per_variant(grid.model), memory // 2)
            for patches, resid in halving(range(n_layers * parts), size, compute):
                found[patches, index, members] = resid.to(found.device)
        found[:, index] = found[:, index].where(moved[..., None], grid.final)
    return grid.final, found.unflatten(0, (n_layers, parts))


@dataclass(frozen=True)
class _Grid:
    """The run without a patch, and what patches are made of.

    Attributes:
        model: the model.
        prompts: the prompts.
        over: what is patched.
        source: the activations that are put in, by hook point.
        points: recorded activations of the run without a patch.
        final: its final residual stream at the answer's token.
    """

    model: Model
    prompts: PromptBatch
    over: Over
    source: Mapping[str, Tensor]
    points: Mapping[str, Tensor]
    final: Float[Tensor, "batch d_model"]

    @classmethod
    def record(
        cls, model: Model, prompts: PromptBatch, over: Over, source: Mapping[str, Tensor]
    ) -> "_Grid":
        names = dict.fromkeys((over, BEHIND.get(over, over), "rot_k", "v"))
        layers = range(model.cfg.n_layers)
        points: dict[str, str | None] = {hook_point(n, at): None for at in layers for n in names}
        final = hook_point("resid_post", layers[-1])
        seen = record(model, prompts, {**points, final: points.get(final, ANSWER_POSITION)})
        at_answer = seen[final]
        if at_answer.ndim == 3:
            every = torch.arange(len(prompts), device=at_answer.device)
            at_answer = at_answer[every, prompts.position(ANSWER_POSITION).to(at_answer.device)]
        return cls(model, prompts, over, source, seen, at_answer)

    @property
    def parts(self) -> int:
        """Patches in a layer."""
        return self.model.cfg.n_heads if self.over == "z" else 1

    def change(
        self, here: Int[Tensor, " batch"], there: Int[Tensor, " batch"]
    ) -> list[Float[Tensor, "part batch d_model"]]:
        """What each layer's patches change in the residual stream of a token."""
        changes = []
        for layer in range(self.model.cfg.n_layers):
            ours = self.points[hook_point(self.over, layer)]
            theirs = self.source[hook_point(self.over, layer)].to(ours.device)
            rows = torch.arange(len(ours), device=ours.device)
            delta = theirs[rows, there.to(ours.device)] - ours[rows, here.to(ours.device)]
            if self.over == "z":
                w_o = self.model.blocks[layer].attn.W_O
                changes.append(torch.bmm(delta.transpose(0, 1), w_o))
            else:
                changes.append(delta[None])
        return changes

    def climb(
        self, window: Window, change: list[Float[Tensor, "part member d_model"]], patches: range
    ) -> Float[Tensor, "patch member d_model"]:
        """The final residual stream at the answer's token, for patches next to each other in order
        of layer and part."""
        model, n_layers = self.model, self.model.cfg.n_layers
        rows: Tensor | None = None
        for layer in range(patches.start // self.parts, n_layers):
            first = layer * self.parts
            mine = range(max(patches.start, first), min(patches.stop, first + self.parts))
            some = change[layer][mine.start - first : max(mine.stop, mine.start) - first]
            queries = ANSWER_TOKEN if layer == n_layers - 1 else EVERY_TOKEN
            rows = None if rows is None else rows.to(device_of(model, layer))
            if self.over == "resid_pre":
                rows = _joined(rows, self._patched("resid_pre", layer, window, some, EVERY_TOKEN))
            mid = None
            if rows is not None:
                attention = window.attention_output(
                    model, layer, rows, self._keys_and_values(layer), edits={}, queries=queries
                )
                mid = rows[:, :, queries] + attention
            if BEHIND.get(self.over) == "resid_mid":
                mid = _joined(mid, self._patched("resid_mid", layer, window, some, queries))
            rows = None if mid is None else add_mlp(model, layer, mid)
            if self.over == "mlp_out":
                rows = _joined(rows, self._patched("resid_post", layer, window, some, queries))
        assert rows is not None
        return rows[:, :, -1]

    def _patched(
        self, name: str, layer: int, window: Window, change: Tensor, queries: slice
    ) -> Float[Tensor, "part member query d_model"] | None:
        """The stream of the window's tokens with each change in its first token; None if there is
        none."""
        if not len(change):
            return None
        resid = window.clean(self.points[hook_point(name, layer)])
        resid = resid.expand(len(change), -1, -1, -1).clone()
        resid[:, :, 0] += change
        return resid[:, :, queries]

    def _keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.points[hook_point("rot_k", layer)], self.points[hook_point("v", layer)]


def _joined(begun: Tensor | None, fresh: Tensor | None) -> Tensor | None:
    both = [some for some in (begun, fresh) if some is not None]
    return torch.cat(both) if both else None
