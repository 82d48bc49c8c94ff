"""The pieces of a transformer block, applied to just the vectors that an edit can change.

Norms, projections and MLPs are the model's own modules, so that a recomputed vector is what the
model itself would have computed. Only attention is written out here, because a full-sequence
attention is what the exact engine avoids.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._model import Model
from tl_entity._pieces import ATTENTION, LOGITS, piece
from tl_entity.errors import InputError
from tl_entity.exact.memory import block_bytes
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import HeadInput, kv_head, n_kv_heads
from tl_entity.hooks.watch import see
from tl_entity.models.architecture import refuse

ROWS_TOGETHER = 512
"""Fewer rows than these at a time would leave a matrix product slow."""


NOT_RECOMPUTED = (
    *("positions", "parallel", "no MLPs", "norm after", "norm of all heads", "scaled queries"),
    *("shared heads apart", "not causal", "capped scores", "capped logits", "sinks"),
    *("dynamic rotary", "clipped", "quantised"),
)
"""Obstacles of `tl_entity.models.architecture` that the exact engine does not allow for."""


def check_supported(model: Model) -> None:
    """Make sure that the exact engine computes what this model computes, as nobody else changes it.

    Raises:
        InputError: saying what it cannot recompute exactly, and that the hooks engine can; or if
            hooks are attached to the model.
        NotFiniteError: if a weight is not finite.
    """
    if not isinstance(model, HookedTransformer):
        raise InputError(
            "The exact engine recomputes a HookedTransformer's layers, and this is a "
            'TransformerBridge. Use engine="hooks", or load it with backend="hooked".'
        )
    # Another thread's run may have set a flag on the model, to take it off again.
    with guarded(model):
        refuse(
            model.cfg,
            NOT_RECOMPUTED,
            'The exact engine does not fit this model: {reason}. Use engine="hooks".',
        )


def device_of(model: Model, layer: int) -> torch.device:
    """Where a layer's weights are: a model's layers can be spread over several devices."""
    return model.blocks[layer].attn.W_O.device


def row_slices(n_rows: int, bytes_per_row: int, budget: int) -> Iterator[slice]:
    """Slices over `n_rows` that keep each slice within `budget` bytes (at least one row)."""
    size = rows_within(bytes_per_row, budget)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def rows_within(bytes_per_row: int, budget: int) -> int:
    """How many rows take at most `budget` bytes; at least one."""
    return max(1, budget // max(1, bytes_per_row))


def mlp_rows_together(cfg: Any) -> int:
    """Rows that go through an MLP at a time: hidden activations that fit the processor's cache."""
    hidden = 4 * (cfg.d_mlp or 4 * cfg.d_model) * (torch.finfo(cfg.dtype).bits // 8)
    return max(ROWS_TOGETHER, block_bytes(cfg.device) // hidden)


def add_mlp(
    model: Model, layer: int, resid: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """`resid_post` of `resid_mid` rows. Where no gradient is wanted, the rows are changed in place
    if their memory allows it."""
    see("resid_mid", layer, resid)
    if torch.is_grad_enabled():
        block = model.blocks[layer]
        post = resid + block.mlp(block.ln2(resid.flatten(0, -2)[None])).view(resid.shape)
        see("resid_post", layer, post)
        return post
    resid = resid.contiguous()
    flat = resid.view(-1, resid.shape[-1])
    for rows in row_slices(len(flat), 1, mlp_rows_together(model.cfg)):
        _add_mlp_in_place(model, layer, flat[rows])
    see("resid_post", layer, resid)
    return resid


@piece(alike=lambda model, layer, mid: mid.shape)
def _add_mlp_in_place(model: Model, layer: int, mid: Float[Tensor, "rows d_model"]) -> None:
    block = model.blocks[layer]
    mid += block.mlp(block.ln2(mid[None]))[0]


@piece(LOGITS)
def unembed(
    model: Model,
    resid: Float[Tensor, "*rows d_model"],
    tokens: Int[Tensor, "*rows wanted"] | None = None,
) -> Float[Tensor, "*rows logits"]:
    """Logits from the final residual stream: of the whole vocabulary, or only of some tokens."""
    normalized = model.ln_final(resid.flatten(0, -2)[None].to(model.unembed.W_U.device))
    if tokens is None:
        return model.unembed(normalized)[0].unflatten(0, resid.shape[:-1])
    w_u, b_u = model.unembed.W_U, model.unembed.b_U
    wanted = tokens.flatten(0, -2).to(w_u.device)
    columns = w_u.T[wanted]  # [rows wanted d_model]
    logits = (columns @ normalized[0, :, :, None]).squeeze(-1) + b_u[wanted]
    return logits.unflatten(0, resid.shape[:-1])


@piece(LOGITS, alike=lambda model, resid: resid.shape)
@torch.no_grad()
def log_normalizer(model: Model, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    """Natural logarithm of the sum of exponentiated logits over the vocabulary, from the final
    residual stream, in float32 at least.

    The vocabulary is taken a block at a time, so that its logits never leave the processor's cache.
    Nothing is recorded for gradients.
    """
    normalized = model.ln_final(resid.flatten(0, -2)[None].to(model.unembed.W_U.device))[0]
    wide = torch.promote_types(normalized.dtype, torch.float32)
    by_token, bias = model.unembed.W_U.T, model.unembed.b_U
    n_rows = 2 * ROWS_TOGETHER
    block = max(1, block_bytes(model.cfg.device) // (n_rows * (torch.finfo(wide).bits // 8)))

    @piece(alike=lambda some: (model.cfg.d_vocab_out, some.shape))
    def of_rows(some: Tensor) -> Tensor:
        parts = []
        for tokens in row_slices(len(by_token), 1, block):
            logits = F.linear(some, by_token[tokens], bias[tokens]).to(wide)
            largest = logits.amax(-1, keepdim=True)
            parts.append(logits.sub_(largest).exp_().sum(-1).log_() + largest[:, 0])
        return torch.stack(parts).logsumexp(0)

    slices = row_slices(len(normalized), 1, n_rows)
    found = [of_rows(normalized[rows]) for rows in slices]
    return torch.cat(found).unflatten(0, resid.shape[:-1])


def head_outputs(
    model: Model, layer: int, z: Float[Tensor, "*rows heads d_head"], heads: list[int]
) -> Float[Tensor, "*rows d_model"]:
    """What some heads together write to the residual stream, without the output bias."""
    see("z", layer, z)
    w_o = model.blocks[layer].attn.W_O
    if len(heads) != len(w_o):
        w_o = w_o[heads]
    return z.flatten(-2) @ w_o.flatten(0, 1)


def project(
    model: Model,
    layer: int,
    which: HeadInput,
    normalized: Float[Tensor, "*rows d_model"],
    heads: list[int] | None = None,
) -> Float[Tensor, "*rows heads d_head"]:
    """Queries, keys or values as they are projected: not normalised yet, before the rotary
    embedding.

    Given `heads`, those of these query heads (keys and values: of the key-value heads they read);
    otherwise all, where keys and values have one entry for each key-value head.
    """
    attn = model.blocks[layer].attn
    shared = "_" if which != "q" and n_kv_heads(model.cfg) != model.cfg.n_heads else ""
    weight = getattr(attn, f"{shared}W_{which.upper()}")
    bias = getattr(attn, f"{shared}b_{which.upper()}")
    if heads is not None:
        index = heads if which == "q" else [kv_head(model.cfg, head) for head in heads]
        weight, bias = weight[index], bias[index]
    # Loaded weights are views of the checkpoint's [head * d_head, d_model] matrices: no copy here.
    matrix = weight.transpose(1, 2).flatten(0, 1)
    vectors = F.linear(normalized, matrix, bias.flatten()).unflatten(-1, weight.shape[::2])
    see(which, layer, vectors)
    return vectors


def rotate(
    model: Model,
    layer: int,
    which: HeadInput,
    vectors: Float[Tensor, "*rows pos head d_head"],
    positions: Int[Tensor, "*rows pos"],
) -> Float[Tensor, "*rows pos head d_head"]:
    """Queries or keys as attention compares them: normalised where the model normalises each head's
    (Qwen3), then after the layer's rotary embedding; `positions` are counted without padding."""
    attn = model.blocks[layer].attn
    dim = model.cfg.rotary_dim
    if model.cfg.use_qk_norm:
        norm = attn.q_norm if which == "q" else attn.k_norm
        assert norm is not None
        vectors = norm(vectors.reshape(-1, vectors.shape[-1])).view(vectors.shape)
    turned, rest = vectors[..., :dim], vectors[..., dim:]
    positions = positions.to(vectors.device)
    cos = attn.rotary_cos.to(vectors.device)[positions][..., None, :]
    sin = attn.rotary_sin.to(vectors.device)[positions][..., None, :]
    turned = turned * cos + attn.rotate_every_two(turned) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def window_of(model: Model, layer: int) -> int | None:
    """How many tokens a token of this layer sees at most, itself among them; None for all."""
    return model.cfg.window_size if model.blocks[layer].attn.attn_type == "local" else None


def within_window(
    model: Model,
    layer: int,
    sees: Bool[Tensor, "*#batch #query key"],
    queries: Int[Tensor, "*#batch query"],
    keys: Int[Tensor, "*#batch key"],
) -> Bool[Tensor, "*#batch query key"]:
    """Which keys a query sees, those left out that lie beyond the layer's sliding window.

    Args:
        model: the model.
        layer: the layer.
        sees: which it would see without a window.
        queries: token index of each query.
        keys: token index of each key.
    """
    window = window_of(model, layer)
    if window is None:
        return sees
    return sees & (keys[..., None, :] > queries[..., :, None] - window)


@piece(ATTENTION)
def attend(
    q: Float[Tensor, "variant batch query head d_head"],
    shared: tuple[Float[Tensor, "batch key kv_head d_head"], Tensor],
    sees_shared: Bool[Tensor, "batch #query key"],
    own: tuple[Float[Tensor, "variant batch own own_kv_head d_head"], Tensor],
    sees_own: Bool[Tensor, "#batch query own"],
    scale: float,
    edit_scores: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> Float[Tensor, "variant batch query head d_head"]:
    """Attention over keys and values that all variants of a prompt share, and each variant's own.

    Scores of the shared keys are one large matrix product for each prompt and key-value head.
    Either part may have fewer heads than the queries; query head h reads head
    h // (n_heads / n_kv_heads).

    Args:
        q: queries, after the rotary embedding.
        shared: keys (after the rotary embedding) and values that don't change.
        sees_shared: which of them each query may see.
        own: keys and values that were recomputed for each variant.
        sees_own: which of them each query may see.
        scale: what scores are divided by.
        edit_scores: changes the masked scores [batch head variant query key], shared keys first.
    """
    (k_shared, v_shared), (k_own, v_own) = shared, own
    n, b, s, h, d = q.shape
    t, n_shared, n_own_keys, n_own = *k_shared.shape[1:3], *k_own.shape[2:4]
    q = q / scale
    # For each prompt and key-value head one matrix of queries: variants, then heads, then tokens.
    q_shared = q.unflatten(3, (n_shared, h // n_shared)).permute(1, 3, 0, 4, 2, 5)
    scores_shared = q_shared.reshape(b, n_shared, n * (h // n_shared) * s, d) @ k_shared.permute(
        0, 2, 3, 1
    )
    q_own = q.unflatten(3, (n_own, h // n_own)).permute(1, 3, 0, 4, 2, 5)
    scores_own = q_own.reshape(b, n_own, n, (h // n_own) * s, d) @ k_own.permute(1, 3, 0, 4, 2)
    scores = torch.cat(
        [
            _by_head(scores_shared.view(b, n_shared, n, h // n_shared, s, t)).masked_fill(
                ~sees_shared[:, None, None], float("-inf")
            ),
            _by_head(scores_own.view(b, n_own, n, h // n_own, s, n_own_keys)).masked_fill(
                ~sees_own[:, None, None], float("-inf")
            ),
        ],
        -1,
    )
    pattern = edit_scores(scores).softmax(-1)
    to_shared, to_own = pattern.split([t, n_own_keys], -1)
    z = to_shared.reshape(b, n_shared, (h // n_shared) * n * s, t) @ v_shared.permute(0, 2, 1, 3)
    to_own = to_own.unflatten(1, (n_own, h // n_own)).transpose(2, 3)
    z_own = to_own.reshape(b, n_own, n, (h // n_own) * s, n_own_keys) @ v_own.permute(1, 3, 0, 2, 4)
    z = z.view(b, h, n, s, d) + _by_head(z_own.view(b, n_own, n, h // n_own, s, d))
    return z.permute(2, 0, 3, 1, 4)


def _by_head(grouped: Tensor) -> Tensor:
    """[batch kv_head variant group query last] as [batch head variant query last]."""
    return grouped.transpose(2, 3).flatten(1, 2)
