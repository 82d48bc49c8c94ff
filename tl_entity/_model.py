"""What every method takes as a model."""

from typing import TypeAlias

from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

Model: TypeAlias = HookedTransformer | TransformerBridge
"""A model with TransformerLens's hook points. A TransformerBridge must be in compatibility mode, as
`load_model(..., backend="bridge")` gives it, and only the hooks engine runs it."""
