"""Checkpoints as HookedTransformers: what there is by name, and how it is read and converted."""

from tl_entity.models.versions import check_transformer_lens

# Before anything in this room imports it and fails on a missing name.
check_transformer_lens()
