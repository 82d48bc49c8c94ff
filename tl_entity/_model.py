"""What every method takes as a model."""

from typing import TypeAlias

from tl_entity.versions import check_transformer_lens

# Before anything imports from it a name that is not there.
check_transformer_lens()

from transformer_lens import HookedTransformer  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402

Model: TypeAlias = HookedTransformer | TransformerBridge
"""A model with TransformerLens's hook points. A TransformerBridge must be in compatibility mode, as
`load_model(..., backend="bridge")` gives it, and only the hooks engine runs it."""
