"""Named hook points: the one place that spells their names, axes, and head to KV-head mapping."""

import re
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
    PositionEmbeddingsAttentionBridge,
)

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head
from tl_entity.hooks.guard import guarded

HeadInput = Literal["q", "k", "v"]
"""What a head reads, as vectors: query, key, value."""

_POINTS = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "rot_q": "attn.hook_rot_q",
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

    Names: q, k, v, rot_q, rot_k, attn_scores, pattern, z, attn_out, mlp_out, resid_pre, resid_mid,
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
    the vector of one query head changes alone and its siblings keep theirs. No other thread works
    on the model meanwhile.

    Raises:
        InputError: if the model is a TransformerBridge whose attention is not that of a Llama, or
            hooks are attached to the model.
    """
    with ExitStack() as stack:
        stack.enter_context(guarded(model))
        if n_kv_heads(model.cfg) == model.cfg.n_heads:
            pass
        elif isinstance(model, HookedTransformer):
            stack.enter_context(_held(model.cfg, "ungroup_grouped_query_attention", True))
        else:
            for block in model.blocks:
                _separate_in_bridge(block.attn, model.cfg, stack)
        yield


def _separate_in_bridge(attn: Any, cfg: Any, stack: ExitStack) -> None:
    """A bridge repeats shared keys and values after its hooks. Here its projections do it, ahead of
    them, and nothing is left for it to repeat."""
    of_huggingface = attn.original_component
    conversions = [
        getattr(getattr(attn, name).hook_out, "hook_conversion", None) for name in ("k", "v")
    ]
    plain = isinstance(attn, PositionEmbeddingsAttentionBridge)
    if (
        not plain
        # A norm over the keys of all heads together would count the repeated ones.
        or getattr(attn, "_qk_norm_phase", None) == "pre_reshape"
        or not hasattr(of_huggingface, "num_key_value_groups")
        or any(getattr(conversion, "n_heads", None) is None for conversion in conversions)
    ):
        raise InputError(
            "Keys and values that query heads share can't be set apart in this TransformerBridge, "
            'whose attention is not that of a Llama; load the model with backend="hooked".'
        )

    def repeat(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        apart = output.unflatten(-1, (-1, cfg.d_head))
        return apart.repeat_interleave(cfg.n_heads // n_kv_heads(cfg), -2).flatten(-2)

    stack.enter_context(_held(of_huggingface, "num_key_value_groups", 1))
    for projection, conversion in zip((attn.k, attn.v), conversions, strict=True):
        stack.enter_context(_held(conversion, "n_heads", cfg.n_heads))
        stack.callback(projection.original_component.register_forward_hook(repeat).remove)


@contextmanager
def _held(owner: Any, name: str, value: Any) -> Generator[None, None, None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
