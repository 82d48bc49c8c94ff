"""Runs in which every node has a gate, for gradients of the gates and for many circuits at once.

Every token is computed, as a node can be at any; but of the last layer only the answer's token, the
layers below the first gate that is not 1 once for all variants, and attention only for heads whose
gate is not 0. Weights take no gradient. Where the activations that a gradient needs would take too
much memory, each layer's are computed again on the way back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.exact.blocks import (
    add_mlp,
    check_supported,
    device_of,
    head_outputs,
    project,
    rotate,
    rows_within,
    window_of,
    within_window,
)
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.gates import Gates, check_gates_fit
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import kv_head, n_kv_heads
from tl_entity.hooks.run import embed
from tl_entity.hooks.watch import assure_finite, located
from tl_entity.tasks.batches import ANSWER_POSITION, PromptBatch


@dataclass(frozen=True)
class GatedRun:
    """Prompts that are run with gates; made by `prepare`.

    Attributes:
        model: the model.
        prompts: the prompts.
        ablation: what ablated nodes put out, in the model's shape.
        rows: which of its rows each token takes.
        embedded: the residual stream ahead of the first layer.
    """

    model: Model
    prompts: PromptBatch
    ablation: Ablation
    rows: Int[Tensor, "batch pos"]
    embedded: Float[Tensor, "batch pos d_model"]

    @classmethod
    @checked
    @torch.no_grad()
    def prepare(cls, model: Model, prompts: PromptBatch, ablation: Ablation) -> "GatedRun":
        """Embed the prompts and look up what ablated nodes put out.

        Raises:
            InputError: if the exact engine does not fit the model, or the ablation does not fit the
                model or the prompts.
        """
        check_supported(model)
        ablation = ablation.of_model(model.cfg)
        rows = ablation.rows(prompts)
        return cls(model, prompts, ablation, rows, embed(model, prompts))

    @checked
    def answer_resid(
        self, gates: Gates, *, memory: int | None = None
    ) -> Float[Tensor, "batch d_model"]:
        """The final residual stream at each prompt's `"last"` token; gradients reach the gates.

        The same numbers, up to float rounding, as `gate_nodes(gates, ...)` gives in a plain run.

        Args:
            gates: the gates.
            memory: bytes that activations may take; found from the device if left out. A layer's
                are computed again for the gradient where all layers' would take more.

        Raises:
            InputError: if the ablation has no output for a gated node.
            NotFiniteError: if weights or activations are NaN or infinite, naming where.
        """
        check_gates_fit(gates, self.ablation)
        memory = memory_budget(self.model.cfg.device) if memory is None else memory
        tokens = _Tokens.of(self.prompts, gates)
        again = activation_bytes(self.model.cfg, self.prompts.tokens.numel()) > memory

        def compute() -> Tensor:
            resid = self.embedded
            for layer in range(self.model.cfg.n_layers):
                of_heads, of_mlp = _of_layer([gates], layer)
                step: tuple[Any, ...] = (resid, of_heads, of_mlp, tokens, layer)
                if torch.is_grad_enabled() and again:
                    resid = checkpoint(self._layer, *step, use_reentrant=False)
                else:
                    resid = self._layer(*step)
            return assure_finite(resid[:, 0])

        with guarded(self.model):
            return located(compute)

    @checked
    @torch.no_grad()
    def answer_resid_each(
        self, each: Sequence[Gates], *, memory: int | None = None
    ) -> Float[Tensor, "variant batch d_model"]:
        """The same for many gates of the same roles, without gradients.

        Variants go through each layer together, as many as the memory allows.

        Raises:
            InputError: as `answer_resid`.
            NotFiniteError: as `answer_resid`.
        """
        for gates in each:
            check_gates_fit(gates, self.ablation)
        cfg = self.model.cfg
        memory = memory_budget(cfg.device) if memory is None else memory
        begins = [_first_layer(gates) for gates in each]
        order = sorted(range(len(each)), key=lambda index: begins[index])
        found = self.embedded.new_empty(len(each), len(self.prompts), cfg.d_model)
        size = rows_within(self._bytes_per_variant(), memory // 2)

        def compute(chosen: list[int]) -> Tensor:
            some, first = [each[i] for i in chosen], [begins[i] for i in chosen]
            return located(lambda: assure_finite(self._variants(some, first)))

        with guarded(self.model):
            for some, final in halving(order, size, compute):
                found[order[some]] = final.to(found.device)
        return found

    def _variants(
        self, each: Sequence[Gates], begins: Sequence[int]
    ) -> Float[Tensor, "variant batch d_model"]:
        """Variants in order of the first layer with a gate that is not 1."""
        tokens = _Tokens.of(self.prompts, each[0])
        n_layers, batch = self.model.cfg.n_layers, len(self.prompts)
        clean, rows = self.embedded, None
        for layer in range(n_layers):
            here = sum(begin <= layer for begin in begins)
            begun = 0 if rows is None else len(rows) // batch
            if here > begun:
                new = clean.repeat(here - begun, 1, 1)
                rows = new if rows is None else torch.cat([rows, new])
            if rows is not None:
                rows = self._layer(rows, *_of_layer(each[:here], layer), tokens, layer)
            # The run without edits goes on for the variants that have not begun.
            if here < len(each):
                clean = self._layer(clean, *_of_layer(each[-1:], layer), tokens, layer)
        if rows is None:
            rows = clean.repeat(len(each), 1, 1)
        elif len(rows) // batch < len(each):
            rows = torch.cat([rows, clean.repeat(len(each) - len(rows) // batch, 1, 1)])
        return rows[:, 0].unflatten(0, (len(each), batch))

    def _layer(
        self,
        resid: Float[Tensor, "rows pos d_model"],
        of_heads: Float[Tensor, "variant role head"],
        of_mlp: Float[Tensor, "variant role"] | None,
        tokens: "_Tokens",
        layer: int,
    ) -> Float[Tensor, "rows queries d_model"]:
        """The residual stream behind a layer; of the last layer at the answer's token alone."""
        model, cfg = self.model, self.model.cfg
        device = device_of(model, layer)
        tokens, resid = tokens.to(device), resid.to(device)
        at_last = layer == cfg.n_layers - 1
        index = tokens.at_queries(tokens.role_index, at_last)
        rows = tokens.at_queries(self.rows.to(device), at_last)
        heads = list(range(cfg.n_heads))
        if not torch.is_grad_enabled():
            used = (of_heads != 0).flatten(0, 1).any(0).tolist()
            heads = [head for head in heads if used[head]]
        assert self.ablation.outputs is not None
        outputs = self.ablation.outputs[layer].to(resid)
        written = _written_ablated(model, layer, outputs, rows)
        n = len(resid) // len(index)
        mid = tokens.at_queries(resid, at_last) + written.repeat(n, 1, 1)
        if heads:
            z = _attention(model, layer, resid, tokens, heads, at_last)
            ablated = outputs[:, heads][rows].repeat(n, 1, 1, 1)
            gates = _at_tokens(of_heads, index).flatten(0, 1)[..., heads].to(z)
            mid = mid + head_outputs(model, layer, gates[..., None] * (z - ablated), heads)
        if of_mlp is None:
            return add_mlp(model, layer, mid)
        out = add_mlp(model, layer, mid.clone())
        assert self.ablation.mlp_outputs is not None
        ablated = self.ablation.mlp_outputs[layer].to(resid)[rows].repeat(n, 1, 1)
        gates = _at_tokens(of_mlp, index).flatten(0, 1).to(resid)[..., None]
        return mid + ablated + gates * (out - mid - ablated)

    def _bytes_per_variant(self) -> int:
        cfg = self.model.cfg
        batch, length = self.prompts.tokens.shape
        floats = 6 * cfg.d_model + 6 * cfg.n_heads * cfg.d_head
        return batch * length * floats * self.embedded.element_size()


@dataclass(frozen=True)
class _Tokens:
    """What a layer needs to know of the prompts' tokens.

    Attributes:
        role_index: which row of the gates each takes.
        rotary: counted without padding.
        last: the answer's token.
        sees: which tokens each sees; None where each sees all before it.
    """

    role_index: Int[Tensor, "batch pos"]
    rotary: Int[Tensor, "batch pos"]
    last: Int[Tensor, " batch"]
    sees: Bool[Tensor, "batch 1 pos key"] | None

    @classmethod
    def of(cls, prompts: PromptBatch, gates: Gates) -> "_Tokens":
        mask = prompts.mask
        order = torch.arange(mask.shape[1], device=mask.device)
        sees = (order <= order[:, None]) & mask[:, None]
        # Padding sees itself, for a softmax over nothing is no number.
        sees = (sees | (order == order[:, None]))[:, None]
        return cls(
            role_index=gates.role_index(prompts),
            rotary=(mask.long().cumsum(1) - 1).clamp(min=0),
            last=prompts.position(ANSWER_POSITION),
            sees=None if bool(mask.all()) else sees,
        )

    def to(self, device: torch.device) -> "_Tokens":
        if self.rotary.device == device and self.role_index.device == device:
            return self
        moved = {
            name: None if tensor is None else tensor.to(device)
            for name, tensor in vars(self).items()
        }
        return replace(self, **moved)

    def seen_by(
        self, model: Model, layer: int, at_last: bool
    ) -> Bool[Tensor, "batch 1 queries key"] | None:
        """Which tokens the tokens that are computed see in a layer; None where each sees all before
        it."""
        order = torch.arange(self.rotary.shape[1], device=self.rotary.device)
        window = window_of(model, layer)
        far = window is None or window >= len(order)
        if self.sees is None and far and not at_last:
            return None
        queries = self.last[:, None] if at_last else order.expand(len(self.last), -1)
        if self.sees is None:
            sees = (order <= queries[..., None])[:, None]
        else:
            sees = self.at_queries(self.sees[:, 0], at_last)[:, None]
        return within_window(model, layer, sees, queries[:, None], order)

    def at_queries(self, of_tokens: Tensor, at_last: bool) -> Tensor:
        """What `of_tokens` has at the tokens that are computed: all, or the answer's alone. Its
        first axis may hold several variants of the prompts."""
        if not at_last:
            return of_tokens
        n = len(of_tokens) // len(self.last)
        every = torch.arange(len(of_tokens), device=of_tokens.device)
        return of_tokens[every, self.last.repeat(n)][:, None]


def activation_bytes(cfg: Any, n_tokens: int) -> int:
    """What a gradient needs to be kept of so many tokens, in all layers."""
    heads = cfg.d_head * (6 * cfg.n_heads + 3 * n_kv_heads(cfg))
    mlp = (4 if cfg.gated_mlp else 3) * (cfg.d_mlp or 4 * cfg.d_model)
    each = 8 * cfg.d_model + heads + mlp
    return n_tokens * cfg.n_layers * each * (torch.finfo(cfg.dtype).bits // 8)


def _attention(
    model: Model, layer: int, resid: Tensor, tokens: _Tokens, heads: list[int], at_last: bool
) -> Float[Tensor, "rows queries head d_head"]:
    """What these heads put out."""
    block = model.blocks[layer]
    n = len(resid) // len(tokens.last)
    normalized = block.ln1(resid)
    rotary = tokens.rotary.repeat(n, 1)
    # Query heads that stand for their key-value heads, so that none is projected twice.
    own_kv = sorted({kv_head(model.cfg, head) for head in heads})
    of_head = [own_kv.index(kv_head(model.cfg, head)) for head in heads]
    some = None if len(heads) == model.cfg.n_heads else heads
    reading = some and [heads[of_head.index(index)] for index in range(len(own_kv))]
    q = project(model, layer, "q", tokens.at_queries(normalized, at_last), some)
    q = rotate(model, layer, "q", q, tokens.at_queries(rotary, at_last))
    k = rotate(model, layer, "k", project(model, layer, "k", normalized, reading), rotary)
    v = project(model, layer, "v", normalized, reading)
    if len(own_kv) < len(of_head):
        k, v = k[..., of_head, :], v[..., of_head, :]
    q, k, v = (vectors.transpose(1, 2) for vectors in (q, k, v))
    sees = tokens.seen_by(model, layer, at_last)
    z = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if sees is None else sees.repeat(n, 1, 1, 1),
        is_causal=sees is None,
        scale=1 / block.attn.attn_scale,
    )
    return z.transpose(1, 2)


def _of_layer(
    each: Sequence[Gates], layer: int
) -> tuple[Float[Tensor, "variant role head"], Float[Tensor, "variant role"] | None]:
    heads = torch.stack([gates.heads[layer] for gates in each])
    mlps = [gates.mlps[layer] for gates in each if gates.mlps is not None]
    return heads, torch.stack(mlps) if mlps else None


def _at_tokens(
    of_roles: Float[Tensor, "variant role *rest"], index: Int[Tensor, "batch pos"]
) -> Float[Tensor, "variant batch pos *rest"]:
    table = torch.stack([Gates.by_token_row(some) for some in of_roles.to(index.device)])
    return table[:, index]


def _written_ablated(
    model: Model, layer: int, outputs: Tensor, rows: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The attention output with every head ablated."""
    every = list(range(model.cfg.n_heads))
    # The matrix product is done over whichever are fewer.
    if len(outputs) <= rows.numel():
        written = head_outputs(model, layer, outputs, every)[rows]
    else:
        written = head_outputs(model, layer, outputs[rows], every)
    return written + model.blocks[layer].attn.b_O


def _first_layer(gates: Gates) -> int:
    """The first layer with a gate that is not 1; the number of layers if there is none."""
    ones = (gates.heads == 1).flatten(1).all(1)
    if gates.mlps is not None:
        ones &= (gates.mlps == 1).all(1)
    return int(ones.int().cumprod(0).sum())
