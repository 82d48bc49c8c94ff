"""What every method takes as a model."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeAlias

from tl_entity.versions import check_transformer_lens

# Before anything imports from it a name that is not there.
check_transformer_lens()

from transformer_lens import HookedTransformer  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402

Model: TypeAlias = HookedTransformer | TransformerBridge
"""A model with TransformerLens's hook points. A TransformerBridge must be in compatibility mode, as
`load_model(..., backend="bridge")` gives it, and only the hooks engine runs it."""


@contextmanager
def frozen(model: Model) -> Generator[None, None, None]:
    """Within this context no weight of the model takes a gradient."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trainable:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)
