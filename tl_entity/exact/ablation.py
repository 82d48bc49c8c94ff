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
)
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.edits import check_ablation_values
from tl_entity.hooks.points import kv_head
from tl_entity.hooks.run import embed
from tl_entity.tasks.batches import ANSWER_POSITION, PromptBatch


@dataclass(frozen=True)
class AblatedRun:
    """Prompts run with every head at every token ablated; made by `record`.

    Attributes:
        model: the model.
        prompts: the prompts.
        values: what ablated heads put out.
        resid_pre: the residual stream of every token ahead of each layer, in this run, where the
            layer's weights are.
        resid_post: the final residual stream at the answer's token, in this run.
    """

    model: Model
    prompts: PromptBatch
    values: Float[Tensor, "layer pos head d_head"]
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
        values: Float[Tensor, "layer pos head d_head"],
    ) -> "AblatedRun":
        """Run the prompts with every head's `hook_z` at its given value; no attention is computed.

        Raises:
            InputError: if the exact engine does not fit the model, the prompts are padded on the
                left, or longer than the values.
        """
        check_supported(model)
        check_ablation_values(values, prompts)
        n_layers = model.cfg.n_layers
        n_pos = prompts.tokens.shape[1]
        resid = embed(model, prompts)
        ahead = []
        for layer in range(n_layers):
            resid = resid.to(device_of(model, layer))
            ahead.append(resid)
            written = _written(model, layer, values[layer, :n_pos])
            resid = add_mlp(model, layer, resid + written)
        rows = torch.arange(len(prompts), device=resid.device)
        last = prompts.position(ANSWER_POSITION).to(resid.device)
        return cls(model, prompts, values, tuple(ahead), resid[rows, last])

    @checked
    @torch.no_grad()
    def answer_resid_each(
        self, circuits: Sequence[Circuit | HeadsAt], *, memory: int | None = None
    ) -> Float[Tensor, "circuit batch d_model"]:
        """The final residual stream at each prompt's `"last"` token with only a circuit's heads
        left, for each circuit; `tl_entity.exact.blocks.unembed` gives its logits.

        The same numbers, up to float rounding, as `ablate_heads(values, prompts, keep=circuit)`
        gives in a plain run.

        Args:
            circuits: heads kept, by named position.
            memory: bytes that intermediate results may take; found from the device if left out.

        Raises:
            InputError: if the prompts lack a position.
        """
        memory = memory_budget(self.model.cfg.device) if memory is None else memory
        kept = [
            {position: heads for position, heads in heads_by_position(circuit).items() if heads}
            for circuit in circuits
        ]
        order = sorted(range(len(kept)), key=lambda index: _lowest(kept[index]))
        order = [index for index in order if kept[index]]
        resid = self.resid_post.expand(len(kept), -1, -1).clone()
        names = tuple(dict.fromkeys(name for heads in kept for name in heads))
        if names:
            tokens = _Tokens.of(self.prompts, names)

            def compute(chosen: list[int]) -> Tensor:
                return self._recompute(tokens, [kept[index] for index in chosen])

            size = rows_within(self._bytes_per_circuit(tokens), memory // 2)
            for some, final in halving(order, size, compute):
                resid[order[some]] = final
        return resid

    @piece(
        SUFFIX,
        alike=lambda self, tokens, kept: (
            tokens.index.shape,
            self.prompts.tokens.shape,
            tuple(tuple((at, tuple(heads)) for at, heads in some.items()) for some in kept),
        ),
    )
    def _recompute(
        self, tokens: "_Tokens", kept: Sequence[Mapping[str, Sequence[Head]]]
    ) -> Float[Tensor, "circuit batch d_model"]:
        """The final residual stream; circuits in order of their lowest head."""
        model = self.model
        begins = [_lowest(heads) for heads in kept]
        top = max(head.layer for heads in kept for some in heads.values() for head in some)
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
                heads = sorted({h.head for some in kept for h in _in_layer(some, layer)})
                if heads:
                    mid = mid + self._kept_heads(tokens, layer, rows, kept[:here], heads)
                # Above the last kept head nothing is read from any token but the answer's.
                rows = mid[:, :, tokens.answer] if layer == top else mid
            else:
                answers = tokens.index[:, tokens.answer]
                rows = rows + _written(model, layer, self.values[layer])[answers]
            rows = add_mlp(model, layer, rows)
        assert rows is not None
        return rows[:, :, 0]

    def _kept_heads(
        self,
        tokens: "_Tokens",
        layer: int,
        resid_pre: Float[Tensor, "circuit batch token d_model"],
        kept: Sequence[Mapping[str, Sequence[Head]]],
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
            return rotate(model, layer, k, positions)[..., of_head, :], v[..., of_head, :]

        normalized = block.ln1(resid_pre.flatten(0, 1)).view(resid_pre.shape)
        q = project(model, layer, "q", normalized, heads)
        everywhere = torch.arange(self.prompts.tokens.shape[1], device=q.device)
        z = attend(
            rotate(model, layer, q, tokens.index),
            keys_and_values(self.resid_pre[layer], everywhere.expand(len(self.prompts), -1)),
            tokens.sees_ablated,
            keys_and_values(resid_pre, tokens.index),
            tokens.sees_own,
            block.attn.attn_scale,
        )
        where = torch.stack([tokens.where(_in_layer_at(some, layer), heads) for some in kept])
        ablated = self.values[layer].to(q.device)[:, heads][tokens.index]
        return head_outputs(model, layer, (z - ablated) * where[..., None], heads)

    def _written_at(self, tokens: "_Tokens", layer: int) -> Float[Tensor, "batch token d_model"]:
        return _written(self.model, layer, self.values[layer])[tokens.index]

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
        sees_ablated: the tokens no circuit changes, ahead of each.
        sees_own: which of these tokens each sees.
    """

    names: tuple[str, ...]
    index: Int[Tensor, "batch token"]
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
            sees_ablated=(tokens <= index[..., None]) & ~changed[:, None],
            sees_own=(index[:, None] <= index[..., None]) & ~again[:, None],
        )

    def to(self, device: torch.device) -> "_Tokens":
        """The same tokens, their indices on a device."""
        if self.index.device == device:
            return self
        parts = (self.index, self.sees_ablated, self.sees_own)
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
        self, kept: Mapping[str, Sequence[Head]], heads: Sequence[int]
    ) -> Bool[Tensor, "batch token head"]:
        """Which heads are kept at which of these tokens."""
        table = torch.zeros(len(self.names), len(heads), dtype=torch.bool)
        for name, some in kept.items():
            table[self.names.index(name), [heads.index(head.head) for head in some]] = True
        same = self.index[:, :, None] == self.index[:, None]
        return (same[..., None] & table.to(same.device)).any(2)


def _written(
    model: Model, layer: int, z: Float[Tensor, "*rows head d_head"]
) -> Float[Tensor, "*rows d_model"]:
    """The attention output of given head outputs."""
    every = list(range(model.cfg.n_heads))
    z = z.to(device_of(model, layer))
    return head_outputs(model, layer, z, every) + model.blocks[layer].attn.b_O


def _lowest(kept: Mapping[str, Sequence[Head]]) -> int:
    return min((head.layer for heads in kept.values() for head in heads), default=0)


def _in_layer(kept: Mapping[str, Sequence[Head]], layer: int) -> list[Head]:
    return [head for heads in kept.values() for head in heads if head.layer == layer]


def _in_layer_at(kept: Mapping[str, Sequence[Head]], layer: int) -> dict[str, list[Head]]:
    return {name: [h for h in heads if h.layer == layer] for name, heads in kept.items()}
