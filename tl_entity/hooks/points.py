"""Named hook points: the one place that spells their names, axes, and head to KV-head mapping."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from transformer_lens import HookedTransformer

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head

HeadInput = Literal["q", "k", "v"]
"""What a head reads, as vectors: query, key, value."""

_POINTS = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "rot_k": "attn.hook_rot_k",
    "attn_scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
}

FINAL_NORMALIZED = "ln_final.hook_normalized"
"""The final norm's output before its weight, the last point ahead of the unembedding."""


def hook_point(name: str, layer: int) -> str:
    """The full name of a hook point in a layer: `hook_point("z", 3)` is `blocks.3.attn.hook_z`.

    Names: q, k, v, rot_k, attn_scores, pattern, z, attn_out, mlp_out, resid_pre, resid_mid,
    resid_post.

    Raises:
        InputError: if there is no such point.
    """
    if name not in _POINTS:
        raise InputError(f"{name!r} is no hook point; there are {', '.join(_POINTS)}.")
    return f"blocks.{layer}.{_POINTS[name]}"


def point_and_layer(full_name: str) -> tuple[str, int]:
    """The inverse of `hook_point`: `point_and_layer("blocks.3.attn.hook_z")` is `("z", 3)`.

    Raises:
        InputError: if it is not the full name of one of its points.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", full_name)
    for name, inner in _POINTS.items():
        if match is not None and match[2] == inner:
            return name, int(match[1])
    raise InputError(f"{full_name!r} is no hook point of a layer with {', '.join(_POINTS)}.")


def n_kv_heads(cfg: Any) -> int:
    """Number of key-value heads of a model with this configuration."""
    return cfg.n_key_value_heads or cfg.n_heads


def kv_head(cfg: Any, head: int) -> int:
    """The key-value head that query head `head` reads (equal to `head` without grouping)."""
    return head // (cfg.n_heads // n_kv_heads(cfg))


@checked
def check_heads(model: Model, heads: Sequence[Head]) -> None:
    """Make sure that the model has these heads.

    Raises:
        InputError: naming a head that it has not.
    """
    for head in heads:
        if not (0 <= head.layer < model.cfg.n_layers and 0 <= head.head < model.cfg.n_heads):
            raise InputError(
                f"The model has no head {head}; it has {model.cfg.n_layers} layers "
                f"of {model.cfg.n_heads} heads."
            )


@contextmanager
def separate_kv_heads(model: Model) -> Generator[None, None, None]:
    """Within this context `hook_k` and `hook_v` have one entry for every query head.

    Under grouped-query attention several query heads share a key and a value vector; edited here,
    the vector of one query head changes alone and its siblings keep theirs.

    Raises:
        InputError: if they are shared in a TransformerBridge, whose hooks come before the sharing.
    """
    shared = n_kv_heads(model.cfg) != model.cfg.n_heads
    if not isinstance(model, HookedTransformer):
        if shared:
            raise InputError(
                f"In this TransformerBridge {model.cfg.n_heads} query heads share "
                f"{n_kv_heads(model.cfg)} keys and values, which its hooks can't edit for one "
                'head alone. Load the model with backend="hooked".'
            )
        yield
        return
    before = model.cfg.ungroup_grouped_query_attention
    model.cfg.ungroup_grouped_query_attention = shared
    try:
        yield
    finally:
        model.cfg.ungroup_grouped_query_attention = before
