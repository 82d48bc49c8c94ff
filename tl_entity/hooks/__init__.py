"""Typed hook functions over named hook points, for one's own `run_with_hooks`."""

from tl_entity.hooks.cross_model import check_same_architecture, patch_from_model
from tl_entity.hooks.edits import (
    KnockOutAttention,
    MaskHeads,
    ReplaceHeads,
    ReplaceWhere,
    ablate_heads,
    freeze_heads,
    knock_out,
    mask_heads,
    patch_heads,
)
from tl_entity.hooks.points import hook_point, kv_head, n_kv_heads, separate_kv_heads
from tl_entity.hooks.run import answer_logits, must_fire, record

__all__ = [
    "KnockOutAttention",
    "MaskHeads",
    "ReplaceHeads",
    "ReplaceWhere",
    "ablate_heads",
    "answer_logits",
    "check_same_architecture",
    "freeze_heads",
    "hook_point",
    "knock_out",
    "kv_head",
    "mask_heads",
    "must_fire",
    "n_kv_heads",
    "patch_from_model",
    "patch_heads",
    "record",
    "separate_kv_heads",
]
