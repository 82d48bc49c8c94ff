"""The shape check at every public boundary."""

from beartype import beartype
from jaxtyping import jaxtyped

checked = jaxtyped(typechecker=beartype)
"""Decorator: arguments and results must have the annotated types and tensor shapes.

One size name has one value within a call, across all arguments and the result. The check takes
about 40 microseconds, so it belongs on functions that do work, not on ones in inner loops.
"""
