"""A model with every head ablated but a circuit's, for many circuits over the same prompts.

Ablated heads carry nothing from token to token. So the run in which every head is ablated is common
to all circuits, and a circuit's own heads change only the tokens of their named positions: those
alone are computed for each circuit, and attention only for the heads it keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._pieces import RECORDED, SUFFIX, piece
from tl_entity._typing import checked
from tl_entity.exact.blocks import (
    add_mlp,
    attend,
    check_supported,
    device_of,
    head_outputs,
    project,
    rotate,
    rows_within,
    within_window,
)
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import kv_head
from tl_entity.hooks.run import embed
from tl_entity.hooks.watch import assure_finite, located
from tl_entity.tasks.batches import ANSWER_POSITION, PromptBatch


@dataclass(frozen=True)
class AblatedRun:
    """Prompts run with every head at every token ablated; made by `record`.

    Attributes:
        model: the model.
        prompts: the prompts.
        outputs: what ablated heads put out, by row.
        rows: which of these rows each token takes.
        resid_pre: the residual stream of every token ahead of each layer, in this run, where the
            layer's weights are.
        resid_post: the final residual stream at the answer's token, in this run.
    """

    model: Model
    prompts: PromptBatch
    outputs: Float[Tensor, "layer row head d_head"]
    rows: Int[Tensor, "batch pos"]
    resid_pre: tuple[Float[Tensor, "batch pos d_model"], ...]
    resid_post: Float[Tensor, "batch d_model"]

    @classmethod
    @piece(RECORDED)
    @checked
    @torch.no_grad()
    def record(
        cls,
        model: Model,
        prompts: PromptBatch,
        values: Ablation | Float[Tensor, "layer pos head d_head"],
    ) -> "AblatedRun":
        """Run the prompts with every head ablated; no attention is computed.

        Raises:
            InputError: if the exact engine does not fit the model, or the ablation does not fit the
                model or the prompts.
            NotFiniteError: if weights, values or activations are NaN or infinite, naming where.
        """
        check_supported(model)
        ablation = Ablation.of(values).of_model(model.cfg)
        rows = ablation.rows(prompts)
        with guarded(model):
            return located(lambda: cls._record(model, prompts, ablation.outputs, rows))

    @classmethod
    def _record(
        cls, model: Model, prompts: PromptBatch, outputs: Tensor | None, rows: Tensor
    ) -> "AblatedRun":
        assert outputs is not None
        resid = embed(model, prompts)
        ahead = []
        for layer in range(model.cfg.n_layers):
            resid = resid.to(device_of(model, layer))
            ahead.append(resid)
            resid = add_mlp(model, layer, resid + _written(model, layer, outputs[layer], rows))
        every = torch.arange(len(prompts), device=resid.device)
        last = prompts.position(ANSWER_POSITION).to(resid.device)
        final = assure_finite(resid[every, last])
        return cls(model, prompts, outputs, rows, tuple(ahead), final)

    @checked
    @torch.no_grad()
    def answer_resid_each(
        self,
        circuits: Sequence[Circuit | HeadsAt],
        *,
        removed: Sequence[Circuit | HeadsAt | None] | None = None,
        memory: int | None = None,
    ) -> Float[Tensor, "circuit batch d_model"]:
        """The final residual stream at each prompt's `"last"` token with only a circuit's heads
        left, for each circuit; `tl_entity.exact.blocks.unembed` gives its logits.

        The same numbers, up to float rounding, as `ablate_heads(values, prompts, keep=circuit)`
        gives in a plain run.

        Args:
            circuits: heads kept, by named position.
            removed: for each circuit heads that are ablated all the same, at their tokens, by
                whatever name they are kept there.
            memory: bytes that intermediate results may take; found from the device if left out.

        Raises:
            InputError: if the prompts lack a position.
            NotFiniteError: if activations are NaN or infinite, naming where.
        """
        memory = memory_budget(self.model.cfg.device) if memory is None else memory
        gone = [None] * len(circuits) if removed is None else removed
        kept = [
            _Kept(_there(circuit), _there(heads))
            for circuit, heads in zip(circuits, gone, strict=True)
        ]
        order = sorted(range(len(kept)), key=lambda index: kept[index].lowest)
        order = [index for index in order if kept[index].heads]
        resid = self.resid_post.expand(len(kept), -1, -1).clone()
        names = dict.fromkeys(name for some in kept for name in (*some.heads, *some.removed))
        if order:
            tokens = _Tokens.of(self.prompts, tuple(names))

            def compute(chosen: list[int]) -> Tensor:
                some = [kept[index] for index in chosen]
                return located(lambda: assure_finite(self._recompute(tokens, some)))

            size = rows_within(self._bytes_per_circuit(tokens), memory // 2)
            with guarded(self.model):
                for some, final in halving(order, size, compute):
                    resid[order[some]] = final
        return resid

    @piece(
        SUFFIX,
        alike=lambda self, tokens, kept: (
            tokens.index.shape,
            self.prompts.tokens.shape,
            self.outputs.shape,
            tuple(some.sizes for some in kept),
        ),
    )
    def _recompute(
        self, tokens: "_Tokens", kept: Sequence["_Kept"]
    ) -> Float[Tensor, "circuit batch d_model"]:
        """The final residual stream; circuits in order of their lowest head."""
        model = self.model
        begins = [some.lowest for some in kept]
        top = max(some.highest for some in kept)
        rows = None
        for layer in range(begins[0], model.cfg.n_layers):
            tokens = tokens.to(device_of(model, layer))
            rows = None if rows is None else rows.to(device_of(model, layer))
            here = sum(begin <= layer for begin in begins)
            begun = 0 if rows is None else len(rows)
            if here > begun:
                clean = self.resid_pre[layer][tokens.rows, tokens.index]
                new = clean.expand(here - begun, *clean.shape)
                rows = new if rows is None else torch.cat([rows, new])
            assert rows is not None
            if layer <= top:
                mid = rows + self._written_at(tokens, layer)
                heads = sorted({index for some in kept for index in some.in_layer(layer)})
                if heads:
                    mid = mid + self._kept_heads(tokens, layer, rows, kept[:here], heads)
                # Above the last kept head nothing is read from any token but the answer's.
                rows = mid[:, :, tokens.answer] if layer == top else mid
            else:
                rows = rows + self._written_at(tokens, layer)[:, tokens.answer]
            rows = add_mlp(model, layer, rows)
        assert rows is not None
        return rows[:, :, 0]

    def _kept_heads(
        self,
        tokens: "_Tokens",
        layer: int,
        resid_pre: Float[Tensor, "circuit batch token d_model"],
        kept: Sequence["_Kept"],
        heads: list[int],
    ) -> Float[Tensor, "circuit batch token d_model"]:
        """What the layer's kept heads write more than their ablation values do."""
        model = self.model
        block = model.blocks[layer]
        own_kv = sorted({kv_head(model.cfg, head) for head in heads})
        of_head = [own_kv.index(kv_head(model.cfg, head)) for head in heads]
        # Query heads that stand for their key-value heads, so that none is projected twice.
        reading = [heads[of_head.index(index)] for index in range(len(own_kv))]

        def keys_and_values(resid: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            normalized = block.ln1(resid.flatten(0, -3)).view(resid.shape)
            k, v = (project(model, layer, which, normalized, reading) for which in ("k", "v"))
            return rotate(model, layer, "k", k, positions)[..., of_head, :], v[..., of_head, :]

        normalized = block.ln1(resid_pre.flatten(0, 1)).view(resid_pre.shape)
        q = project(model, layer, "q", normalized, heads)
        every = torch.arange(self.prompts.tokens.shape[1], device=q.device)
        z = attend(
            rotate(model, layer, "q", q, tokens.rotary),
            keys_and_values(self.resid_pre[layer], _rotary(self.prompts)),
            within_window(model, layer, tokens.sees_ablated, tokens.index, every),
            keys_and_values(resid_pre, tokens.rotary),
            within_window(model, layer, tokens.sees_own, tokens.index, tokens.index),
            block.attn.attn_scale,
        )
        where = torch.stack([tokens.where(some, layer, heads) for some in kept])
        ablated = self.outputs[layer].to(q.device)[:, heads][self._rows_at(tokens)]
        return head_outputs(model, layer, (z - ablated) * where[..., None], heads)

    def _written_at(self, tokens: "_Tokens", layer: int) -> Float[Tensor, "batch token d_model"]:
        return _written(self.model, layer, self.outputs[layer], self._rows_at(tokens))

    def _rows_at(self, tokens: "_Tokens") -> Int[Tensor, "batch token"]:
        return self.rows.to(tokens.index.device).gather(1, tokens.index)

    def _bytes_per_circuit(self, tokens: "_Tokens") -> int:
        cfg = self.model.cfg
        batch, length = tokens.index.shape
        keys = self.prompts.tokens.shape[1] + length
        floats = 6 * cfg.d_model + cfg.n_heads * (6 * cfg.d_head + 3 * keys)
        return batch * length * floats * self.resid_post.element_size()


@dataclass(frozen=True)
class _Tokens:
    """The tokens that circuits can change: their named positions, and the answer's.

    Two names can mean the same token in a prompt. It then stands here twice, with the same heads,
    and is read once.

    Attributes:
        names: the named positions.
        index: token index of each, the answer's last.
        rotary: the same tokens counted without padding.
        sees_ablated: the tokens no circuit changes, ahead of each.
        sees_own: which of these tokens each sees.
    """

    names: tuple[str, ...]
    index: Int[Tensor, "batch token"]
    rotary: Int[Tensor, "batch token"]
    sees_ablated: Bool[Tensor, "batch token pos"]
    sees_own: Bool[Tensor, "batch token token"]

    @classmethod
    def of(cls, prompts: PromptBatch, names: tuple[str, ...]) -> "_Tokens":
        names = (*(name for name in names if name != ANSWER_POSITION), ANSWER_POSITION)
        index = torch.stack([prompts.position(name) for name in names], 1)
        tokens = torch.arange(prompts.tokens.shape[1], device=index.device)
        changed = (tokens == index[..., None]).any(1)
        n = len(names)
        earlier = torch.ones(n, n, dtype=torch.bool, device=index.device).tril(-1)
        again = ((index[:, :, None] == index[:, None]) & earlier).any(-1)
        return cls(
            names=names,
            index=index,
            rotary=_rotary(prompts).gather(1, index),
            sees_ablated=(tokens <= index[..., None]) & (prompts.mask & ~changed)[:, None],
            sees_own=(index[:, None] <= index[..., None]) & ~again[:, None],
        )

    def to(self, device: torch.device) -> "_Tokens":
        """The same tokens, their indices on a device."""
        if self.index.device == device:
            return self
        parts = (self.index, self.rotary, self.sees_ablated, self.sees_own)
        return _Tokens(self.names, *(part.to(device) for part in parts))

    @property
    def rows(self) -> Int[Tensor, "batch one"]:
        """Row index that goes with `index`."""
        return torch.arange(len(self.index), device=self.index.device)[:, None]

    @property
    def answer(self) -> slice:
        """The answer's token among these."""
        return slice(-1, None)

    def where(
        self, kept: "_Kept", layer: int, heads: Sequence[int]
    ) -> Bool[Tensor, "batch token head"]:
        """Which of these heads of a layer are kept at which of these tokens."""
        same = self.index[:, :, None] == self.index[:, None]

        def at_tokens(chosen: Mapping[str, Sequence[Head]]) -> Tensor:
            table = torch.zeros(len(self.names), len(heads), dtype=torch.bool)
            for name, some in chosen.items():
                here = [heads.index(h.head) for h in some if h.layer == layer and h.head in heads]
                table[self.names.index(name), here] = True
            return (same[..., None] & table.to(same.device)).any(2)

        return at_tokens(kept.heads) & ~at_tokens(kept.removed)


@dataclass(frozen=True)
class _Kept:
    """The heads that a circuit keeps, and those that are ablated in it all the same, by named
    position."""

    heads: Mapping[str, Sequence[Head]]
    removed: Mapping[str, Sequence[Head]]

    @property
    def lowest(self) -> int:
        """The first layer with a head of it; 0 if there is none."""
        return min((head.layer for some in self.heads.values() for head in some), default=0)

    @property
    def highest(self) -> int:
        """The last layer with a head of it."""
        return max(head.layer for some in self.heads.values() for head in some)

    @property
    def sizes(self) -> tuple[object, ...]:
        """What it costs depends on no more."""
        both = (self.heads, self.removed)
        return tuple(tuple((at, tuple(heads)) for at, heads in some.items()) for some in both)

    def in_layer(self, layer: int) -> set[int]:
        """Its heads in a layer."""
        return {h.head for some in self.heads.values() for h in some if h.layer == layer}


def _rotary(prompts: PromptBatch) -> Int[Tensor, "batch pos"]:
    """Token indices counted without padding."""
    return (prompts.mask.long().cumsum(1) - 1).clamp(min=0)


def _there(circuit: Circuit | HeadsAt | None) -> dict[str, tuple[Head, ...]]:
    return {name: heads for name, heads in heads_by_position(circuit).items() if heads}


def _written(
    model: Model,
    layer: int,
    outputs: Float[Tensor, "row head d_head"],
    rows: Int[Tensor, "*tokens"],
) -> Float[Tensor, "*tokens d_model"]:
    """The attention output at tokens that take these rows of head outputs."""
    every = list(range(model.cfg.n_heads))
    device = device_of(model, layer)
    outputs, rows = outputs.to(device), rows.to(device)
    # The matrix product is done over whichever are fewer.
    if len(outputs) <= rows.numel():
        written = head_outputs(model, layer, outputs, every)[rows]
    else:
        written = head_outputs(model, layer, outputs[rows], every)
    return written + model.blocks[layer].attn.b_O
