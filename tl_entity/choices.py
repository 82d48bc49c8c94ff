"""What can be chosen by name. Needs no torch, so that the command line knows it at once."""

from typing import Literal

AblationKind = Literal["pooled", "resample", "index", "zero"]
"""What ablated outputs are taken from."""

Engine = Literal["exact", "hooks"]
"""How a method runs the model: only what can change, or the whole of it."""

Dtype = Literal["float32", "float64", "float16", "bfloat16"]
"""What weights and activations can be held in."""

MatmulPrecision = Literal["highest", "high", "medium"]
"""Of float32 matrix products, as torch names it."""

SkillKind = Literal["lookup", "arithmetic", "stories"]
"""Kinds of text that an adapter is trained on."""

GIB = 2**30
"""Bytes of a GiB."""
