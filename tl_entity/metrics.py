"""What is read off the logits at the answer position: the one definition of each score."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._typing import checked


@checked
def log_probability(
    logits: Float[Tensor, "batch *senders d_vocab"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, "batch *senders"]:
    """Natural logarithm of the target's probability, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = targets.view(-1, *[1] * (logits.ndim - 1)).expand(*logits.shape[:-1], 1)
    return wide.gather(-1, index).squeeze(-1) - wide.logsumexp(-1)


@checked
def relative_probability_change(
    patched: Float[Tensor, "*senders batch"], clean: Float[Tensor, " batch"]
) -> Float[Tensor, "*senders batch"]:
    """(P_patched - P_clean) / P_clean of the target, from log probabilities (paper, §3.1).

    -1 when the edit takes the target away altogether, 0 when it changes nothing. Taken as
    expm1 of the difference, it stays exact where P_clean is tiny.
    """
    return torch.expm1(patched - clean)
