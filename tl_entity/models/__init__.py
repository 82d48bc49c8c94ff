"""Checkpoints as HookedTransformers: what there is by name, and how it is read and converted."""
