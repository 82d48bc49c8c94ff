"""Edits of activations: objects that are called as hook functions."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError


@checked
@dataclass(frozen=True)
class ReplaceHeads:
    """Give some heads, at one token of each prompt, other vectors.

    Works at every hook point with axes batch, pos, head, d_head: z, q, and k and v, whose head axis
    counts key-value heads unless `separate_kv_heads` is in force.

    Attributes:
        positions: the token edited in each prompt.
        heads: indices on the activation's head axis.
        values: what these heads get.
    """

    positions: Int[Tensor, " batch"]
    heads: Int[Tensor, " heads"]
    values: Float[Tensor, "batch heads d_head"]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        batch, n_heads, d_head = self.values.shape
        _check_shape(activation, hook, batch=batch, d_head=d_head)
        if n_heads and int(self.heads.max()) >= activation.shape[2]:
            raise InputError(
                f"{hook.name} has {activation.shape[2]} heads; head {int(self.heads.max())} "
                "is to be replaced."
            )
        edited = activation.clone()
        rows = torch.arange(batch, device=activation.device)[:, None]
        device = activation.device
        edited[rows, self.positions.to(device)[:, None], self.heads.to(device)] = self.values.to(
            activation
        )
        return edited


@checked
@dataclass(frozen=True)
class ReplaceToken:
    """Give one token of each prompt another vector.

    Works at every hook point with axes batch, pos, d_model: mlp_out, attn_out, the residual stream.

    Attributes:
        positions: the token edited in each prompt.
        values: what it gets.
    """

    positions: Int[Tensor, " batch"]
    values: Float[Tensor, "batch d_model"]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        batch, d_model = self.values.shape
        if activation.ndim != 3 or activation.shape[::2] != (batch, d_model):
            raise InputError(
                f"{hook.name} has shape {tuple(activation.shape)}; the edit is made for "
                f"{batch} prompts and vectors of {d_model}."
            )
        edited = activation.clone()
        rows = torch.arange(batch, device=activation.device)
        edited[rows, self.positions.to(activation.device)] = self.values.to(activation)
        return edited


@checked
@dataclass(frozen=True)
class ReplaceWhere:
    """Give every chosen head at every chosen token another vector.

    Attributes:
        where: the (prompt, token, head) entries replaced; an axis of length one stands for all.
        values: what they get; a batch axis of length one serves every prompt.
    """

    where: Bool[Tensor, "#batch pos #head"]
    values: Float[Tensor, "#batch pos head d_head"]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        _check_shape(
            activation,
            hook,
            pos=self.values.shape[1],
            head=self.values.shape[2],
            d_head=self.values.shape[3],
        )
        for batch in (self.where.shape[0], self.values.shape[0]):
            if batch not in (1, activation.shape[0]):
                raise InputError(
                    f"{hook.name} has {activation.shape[0]} prompts; the edit is made for {batch}."
                )
        where = self.where.to(activation.device)[..., None]
        return torch.where(where, self.values.to(activation), activation)


@checked
@dataclass(frozen=True)
class AblateWhere:
    """Give every chosen head at every chosen token a row of a table.

    Attributes:
        where: the (prompt, token, head) entries replaced; an axis of length one stands for all.
        rows: which row of the table each token takes.
        outputs: the table.
    """

    where: Bool[Tensor, "#batch pos #head"]
    rows: Int[Tensor, "batch pos"]
    outputs: Float[Tensor, "row head d_head"]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        batch, pos = self.rows.shape
        head, d_head = self.outputs.shape[1:]
        _check_shape(activation, hook, batch=batch, pos=pos, head=head, d_head=d_head)
        values = self.outputs.to(activation)[self.rows.to(activation.device)]
        return torch.where(self.where.to(activation.device)[..., None], values, activation)


@checked
@dataclass(frozen=True)
class MaskHeads:
    """Mix some heads' own output with another, by a mask that can be trained.

    A head's vector becomes m * own + (1 - m) * other: at m = 1 nothing changes, at m = 0 it is
    replaced (DCM; Prakash et al. 2024, §4.1). Gradients reach `mask` and the activation.

    Attributes:
        positions: the token edited in each prompt.
        heads: indices on the activation's head axis.
        mask: m for each head, in [0, 1].
        other: the vectors mixed in.
    """

    positions: Int[Tensor, " batch"]
    heads: Int[Tensor, " heads"]
    mask: Float[Tensor, " heads"]
    other: Float[Tensor, "batch heads d_head"]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        batch, _, d_head = self.other.shape
        _check_shape(activation, hook, batch=batch, d_head=d_head)
        device = activation.device
        rows = torch.arange(batch, device=device)[:, None]
        at = (rows, self.positions.to(device)[:, None], self.heads.to(device))
        mask = self.mask.to(activation)[None, :, None]
        mixed = mask * activation[at] + (1 - mask) * self.other.to(activation)
        return activation.index_put(at, mixed)


@checked
@dataclass(frozen=True)
class KnockOutAttention:
    """Take away, before the softmax, what one token of each prompt sees of another.

    Works at `attn_scores`; the pattern of the other tokens is renormalised by the softmax.

    Attributes:
        from_positions: the query token of each prompt.
        to_positions: the key token it can no longer see.
        heads: the heads concerned; None for all.
    """

    from_positions: Int[Tensor, " batch"]
    to_positions: Int[Tensor, " batch"]
    heads: tuple[int, ...] | None = None

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        if activation.ndim != 4 or activation.shape[0] != len(self.from_positions):
            raise InputError(
                f"{hook.name} has shape {tuple(activation.shape)}; knocking out attention needs "
                f"batch, head, query and key axes for {len(self.from_positions)} prompts."
            )
        heads = range(activation.shape[1]) if self.heads is None else self.heads
        for head in heads:
            if not 0 <= head < activation.shape[1]:
                raise InputError(
                    f"{hook.name} has {activation.shape[1]} heads; attention of head {head} is to "
                    "be knocked out."
                )
        device = activation.device
        rows = torch.arange(activation.shape[0], device=device)[:, None]
        edited = activation.clone()
        edited[
            rows,
            torch.tensor(list(heads), device=device),
            self.from_positions.to(device)[:, None],
            self.to_positions.to(device)[:, None],
        ] = float("-inf")
        return edited


def _check_shape(activation: Tensor, hook: Any, **sizes: int) -> None:
    axes = ("batch", "pos", "head", "d_head")
    wrong = activation.ndim != 4 or any(
        activation.shape[axes.index(axis)] != size for axis, size in sizes.items()
    )
    if wrong:
        made_for = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise InputError(
            f"{hook.name} has shape {tuple(activation.shape)}; the edit needs axes "
            f"batch, pos, head, d_head with {made_for}."
        )
