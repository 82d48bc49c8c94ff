"""What every method takes as a model."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeAlias

from tl_entity.errors import InputError
from tl_entity.versions import check_transformer_lens

# Before anything imports from it a name that is not there.
check_transformer_lens()

from transformer_lens import HookedTransformer  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402

Model: TypeAlias = HookedTransformer | TransformerBridge
"""A model with TransformerLens's hook points. A TransformerBridge must be in compatibility mode, as
`load_model(..., backend="bridge")` gives it, and only the hooks engine runs it."""


def check_takes_gradients(model: Model) -> None:
    """Make sure that a gradient can pass the model's weights.

    Raises:
        InputError: if the model was made in inference mode.
    """
    if any(weight.is_inference() for weight in model.parameters()):
        raise InputError(
            "The model was made in torch.inference_mode(), and no gradient passes its weights; "
            "make it outside."
        )


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
