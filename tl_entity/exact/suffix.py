"""Any edits from one token on and one layer up, without a full run: the clean run is kept, and only
what lies after the edits, in tokens and in layers, is computed again. Differentiable in the edits.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._pieces import SUFFIX, piece
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.blocks import (
    add_mlp,
    check_supported,
    device_of,
    head_outputs,
    rows_within,
    unembed,
)
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.exact.suffix_plan import LayerEdits as LayerEdits
from tl_entity.exact.suffix_plan import Plan as Plan
from tl_entity.exact.suffix_plan import apply as apply
from tl_entity.exact.suffix_plan import edits_within as edits_within
from tl_entity.exact.suffix_plan import gathered as gathered
from tl_entity.exact.suffix_plan import sizes_of as sizes_of
from tl_entity.exact.window import (
    ANSWER_TOKEN,
    EVERY_TOKEN,
    QUERY_POINTS,
    KeysAndValues,
    Window,
)
from tl_entity.exact.windowed import first_tokens, unknown_edit
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import hook_point, point_and_layer
from tl_entity.hooks.run import HookFunction, record
from tl_entity.hooks.vocabulary import check_tokens
from tl_entity.hooks.watch import assure_finite, located
from tl_entity.tasks.batches import ANSWER_POSITION, PromptBatch

EDITABLE = ("q", "k", "v", "rot_q", "attn_scores", "z")
"""Where this engine takes edits."""


@dataclass(frozen=True)
class CleanRun:
    """A run of some prompts, kept so that edits to it cost only what they change.

    Made by `record`. The numbers are those of `tl_entity.hooks.run.answer_logits` under the same
    edits, up to float rounding.

    Attributes:
        model: the model.
        prompts: the prompts.
        first_layer: edits may be made from this layer up.
        start: the first token of each prompt at which edits may be made.
        begins: layers from which recomputation can start.
        first_token: the lowest `start`.
        points: recorded activations by hook point name: keys and values of all tokens, and what a
            recomputation begins with, of those from `first_token` on.
        final: the final residual stream at the answer's token.
    """

    model: Model
    prompts: PromptBatch
    first_layer: int
    start: Int[Tensor, " batch"]
    begins: tuple[int, ...]
    first_token: int
    points: Mapping[str, Tensor]
    final: Float[Tensor, "batch d_model"]

    @classmethod
    def record(
        cls,
        model: Model,
        prompts: PromptBatch,
        *,
        first_layer: int,
        positions: Sequence[str],
        begins: Collection[int] | None = None,
    ) -> "CleanRun":
        """Run the prompts once and keep what edits from a token and a layer on will need.

        Args:
            model: the model.
            prompts: the prompts.
            first_layer: the lowest layer that will be edited.
            positions: named positions or roles; edits may lie at the earliest token of these in
                each prompt, and at any token after it.
            begins: the lowest edited layers of the edit lists to come, if they differ: a list
                begins to cost at the highest of these that is not above its own.

        Raises:
            InputError: if the exact engine does not fit the model, or a position or layer does not
                exist.
        """
        check_supported(model)
        if not positions:
            raise InputError("Name at least one position at which edits may be made.")
        start = torch.stack([prompts.first_token(name) for name in positions]).amin(0)
        return cls.record_from(model, prompts, start, {first_layer, *(begins or ())})

    @classmethod
    def record_from(
        cls,
        model: Model,
        prompts: PromptBatch,
        start: Int[Tensor, " batch"],
        layers: Collection[int],
    ) -> "CleanRun":
        """The same for edits from a token of each prompt on; recomputation can start at any of
        these layers.

        Raises:
            InputError: as `record`.
        """
        n_layers = model.cfg.n_layers
        begins = tuple(sorted(layers))
        if not 0 <= begins[0] <= begins[-1] < n_layers:
            raise InputError(f"Layers {begins} can't be edited: the model has {n_layers} layers.")
        first_token = int(start.min())
        points: dict[str, str | slice | None] = {}
        for layer in range(begins[0], n_layers):
            points |= {hook_point(name, layer): None for name in ("rot_k", "v")}
        for layer in begins:
            later = dict.fromkeys(("resid_pre", "z", "resid_mid"), slice(first_token, None))
            points |= {hook_point(name, layer): tokens for name, tokens in later.items()}
        final = hook_point("resid_post", n_layers - 1)
        with torch.no_grad():
            seen = record(model, prompts, {**points, final: ANSWER_POSITION})
        return cls(
            model=model,
            prompts=prompts,
            first_layer=begins[0],
            start=start,
            begins=begins,
            first_token=first_token,
            final=seen.pop(final),
            points=seen,
        )

    @checked
    def answer_logits(
        self,
        hooks: Sequence[tuple[str, HookFunction]] = (),
        *,
        tokens: Int[Tensor, "batch wanted"] | None = None,
    ) -> Float[Tensor, "batch logits"]:
        """Logits at each prompt's `"last"` token under these edits.

        Gradients flow to what the edits are made of, such as the mask of `MaskHeads`.

        Args:
            hooks: edits at q, k, v, rot_q, attn_scores or z. Edited keys and values have one entry
                for each query head (as within `separate_kv_heads`).
            tokens: only the logits of these tokens, a few for each prompt.

        Raises:
            InputError: if an edit lies before the recorded tokens or layers, at another hook point,
                or is of a kind that this engine does not know.
            NotFiniteError: if activations are NaN or infinite, naming where.
        """
        return self.answer_logits_each([hooks], tokens=tokens)[0]

    @checked
    def answer_logits_each(
        self,
        variants: Sequence[Sequence[tuple[str, HookFunction]]],
        *,
        tokens: Int[Tensor, "batch wanted"] | None = None,
        memory: int | None = None,
    ) -> Float[Tensor, "variant batch logits"]:
        """`answer_logits` of several lists of edits at once: `answer_resid_each`, unembedded."""
        if tokens is not None:
            check_tokens(self.model, tokens, "wanted token of prompt")
        with guarded(self.model):
            resid = self.answer_resid_each(variants, memory=memory)
            wanted = None if tokens is None else tokens.expand(len(resid), -1, -1)
            return unembed(self.model, resid, wanted)

    @checked
    def answer_resid_each(
        self,
        variants: Sequence[Sequence[tuple[str, HookFunction]]],
        *,
        memory: int | None = None,
    ) -> Float[Tensor, "variant batch d_model"]:
        """The final residual stream at each prompt's `"last"` token under several lists of edits,
        as one growing batch: a list costs nothing below its lowest edited layer.

        Args:
            variants: the lists of edits.
            memory: bytes that intermediate results may take; found from the device if left out.

        Raises:
            InputError: as `answer_logits`.
        """
        memory = memory_budget(self.model.cfg.device) if memory is None else memory
        plans = [self._plan(hooks) for hooks in variants]
        # Those that begin at the bottom first: the batch grows as layers are climbed.
        order = sorted(range(len(plans)), key=lambda index: plans[index].begin)
        edited = [index for index in order if plans[index].layers]
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in edited}
        for window in Window.each_length(self.prompts, self.start):

            def compute(chosen: list[int], window: Window = window) -> Tensor:
                some = [plans[index] for index in chosen]
                return located(lambda: assure_finite(self._recompute(window, some)))

            size = rows_within(window.bytes_per_variant(self.model), memory // 2)
            with guarded(self.model):
                for some, final in halving(edited, size, compute):
                    for index, resid in zip(edited[some], final, strict=True):
                        parts[index].append((window.members, resid))
        final = [gathered(parts[i]) if i in parts else self.final for i in range(len(plans))]
        return torch.stack(final) if final else self.final.expand(0, -1, -1)

    def _plan(self, hooks: Sequence[tuple[str, HookFunction]]) -> "Plan":
        layers: dict[int, dict[str, list[HookFunction]]] = {}
        for name, edit in hooks:
            point, layer = point_and_layer(name)
            if point not in EDITABLE:
                raise InputError(
                    f"The exact engine takes no edit at {name}, only at {', '.join(EDITABLE)}; "
                    'use engine="hooks".'
                )
            if layer < self.first_layer:
                raise InputError(
                    f"An edit at {name} lies below layer {self.first_layer}, where the recorded "
                    "run begins."
                )
            layers.setdefault(layer, {}).setdefault(point, []).append(edit)
        lowest = min(layers, default=self.model.cfg.n_layers)
        return Plan(max((b for b in self.begins if b <= lowest), default=lowest), layers)

    @piece(
        SUFFIX,
        alike=lambda self, window, plans: (window.sizes, tuple(plan.sizes for plan in plans)),
    )
    def _recompute(
        self, window: Window, plans: Sequence["Plan"]
    ) -> Float[Tensor, "variant member d_model"]:
        """The final residual stream at the answer's token; plans in order of where they begin."""
        rows = None
        for layer in range(plans[0].begin, self.model.cfg.n_layers):
            device = device_of(self.model, layer)
            rows = None if rows is None else rows.to(device)
            now = sum(plan.begin <= layer for plan in plans)
            here = [plan.layers.get(layer, {}) for plan in plans[:now]]
            rows = self._pass(window, layer, rows, here)
        assert rows is not None
        return rows[:, :, -1]

    @piece(
        alike=lambda self, window, layer, rows, here: (
            window.sizes,
            None if rows is None else (rows.shape, rows.is_contiguous()),
            tuple(map(sizes_of, here)),
            layer == self.model.cfg.n_layers - 1,
        )
    )
    def _pass(
        self,
        window: Window,
        layer: int,
        rows: Float[Tensor, "begun member window d_model"] | None,
        here: Sequence[LayerEdits],
    ) -> Float[Tensor, "variant member query d_model"]:
        """Take the rows through a layer; variants after those that have rows begin here."""
        here = [edits_within(edits, window) for edits in here]
        begun = 0 if rows is None else len(rows)
        last = layer == self.model.cfg.n_layers - 1
        # The keys and values of other tokens still count in the last layer, nothing else.
        touches_queries = any(QUERY_POINTS & set(edits) for edits in here)
        queries = ANSWER_TOKEN if last and not touches_queries else EVERY_TOKEN
        parts = []
        if rows is not None:
            attn_out = self._attention(window, layer, rows, here[:begun], queries)
            parts.append(rows[:, :, queries] + attn_out)
        if len(here) > begun:
            parts.append(self._first_mid(window, layer, here[begun:], queries))
        mid = parts[0] if len(parts) == 1 else torch.cat(parts)
        return add_mlp(self.model, layer, mid[:, :, ANSWER_TOKEN] if last else mid)

    def _first_mid(
        self, window: Window, layer: int, here: Sequence[LayerEdits], queries: slice
    ) -> Float[Tensor, "variant member query d_model"]:
        """`resid_mid` where these edits are the first ones."""
        model = self.model
        if all(set(edits) <= {"z"} for edits in here):
            # No attention to compute: what the edited heads write is all that differs.
            z = self._within_window("z", layer, window)[:, queries]
            z = z.expand(len(here), *z.shape)
            edited = apply("z", here, layer)(z)
            change = head_outputs(model, layer, edited - z, list(range(model.cfg.n_heads)))
            return self._within_window("resid_mid", layer, window)[:, queries] + change
        resid = self._within_window("resid_pre", layer, window)
        resid = resid.expand(len(here), *resid.shape)
        return resid[:, :, queries] + self._attention(window, layer, resid, here, queries)

    def _attention(
        self,
        window: Window,
        layer: int,
        resid_pre: Tensor,
        here: Sequence[LayerEdits],
        queries: slice,
    ) -> Tensor:
        points = {point for edits in here for point in edits}
        return window.attention_output(
            self.model,
            layer,
            resid_pre,
            self._keys_and_values(layer),
            edits={point: apply(point, here, layer) for point in points},
            queries=queries,
        )

    def _clean(self, name: str, layer: int) -> Tensor:
        return self.points[hook_point(name, layer)]

    def _within_window(self, name: str, layer: int, window: Window) -> Tensor:
        return window.clean(self._clean(name, layer), self.first_token)

    def _keys_and_values(self, layer: int) -> KeysAndValues:
        return self._clean("rot_k", layer), self._clean("v", layer)


@checked
def edited_resid_each(
    model: Model,
    prompts: PromptBatch,
    variants: Sequence[Sequence[tuple[str, HookFunction]]],
    *,
    memory: int | None = None,
) -> list[Float[Tensor, "batch d_model"]]:
    """The final residual stream at `"last"` under each list of edits, from one recorded run: each
    list costs the tokens and layers from its own first edit on, which are read off the edits.

    Args:
        model: the model.
        prompts: the prompts.
        variants: the lists of edits; an empty one leaves the run as it is.
        memory: as in `CleanRun.answer_resid_each`.

    Raises:
        InputError: as `CleanRun.record` and `CleanRun.answer_logits`.
    """
    check_supported(model)
    starts = [_start(prompts, hooks) if hooks else None for hooks in variants]
    lowest = {min(point_and_layer(name)[1] for name, _ in hooks) for hooks in variants if hooks}
    there = [start for start in starts if start is not None]
    if not there:
        point = hook_point("resid_post", model.cfg.n_layers - 1)
        return [record(model, prompts, {point: ANSWER_POSITION})[point]] * len(variants)
    run = CleanRun.record_from(model, prompts, torch.stack(there).amin(0), lowest)
    final: list[Tensor] = [run.final] * len(variants)
    # Those that begin at the same tokens go together.
    keys = [None if start is None else tuple(start.tolist()) for start in starts]
    for key in dict.fromkeys(key for key in keys if key is not None):
        some = [index for index, other in enumerate(keys) if other == key]
        start = starts[some[0]]
        assert start is not None
        found = replace(run, start=start).answer_resid_each(
            [variants[index] for index in some], memory=memory
        )
        for index, resid in zip(some, found, strict=True):
            final[index] = resid
    return final


def _start(
    prompts: PromptBatch, hooks: Sequence[tuple[str, HookFunction]]
) -> Int[Tensor, " batch"]:
    """The first token of each prompt that edits change; the one after `"last"` where there is
    none."""
    start = prompts.position(ANSWER_POSITION) + 1
    for _, edit in hooks:
        first = first_tokens(edit)
        if first is None:
            raise unknown_edit(edit)
        start = torch.minimum(start, first.to(start))
    return start
