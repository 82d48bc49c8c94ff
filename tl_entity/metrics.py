"""What is read off the logits at the answer position: the one definition of each score."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import PairBatch

MOST_LOG_CHANGE = 64.0
"""The largest rise of a log probability that a relative change tells apart: a factor of 6e27. The
sums of any number of such scores are still float32 numbers."""


@checked
def log_probability(
    logits: Float[Tensor, "*senders batch d_vocab"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, "*senders batch"]:
    """Natural logarithm of the target's probability, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = targets.to(logits.device)[:, None].expand(*logits.shape[:-1], 1)
    return wide.gather(-1, index).squeeze(-1) - wide.logsumexp(-1)


@checked
def divergence(
    of: Float[Tensor, "batch d_vocab"], to: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, " batch"]:
    """Kullback-Leibler divergence of the distribution `to` from `of`, in nats: the mean, by `of`,
    of what it is more surprised by. In float32 at least."""
    wide = torch.promote_types(to.dtype, torch.float32)
    p, q = (logits.to(wide).log_softmax(-1) for logits in (of, to))
    return (p.exp() * (p - q)).sum(-1)


@checked
def relative_probability_change(
    patched: Float[Tensor, "*senders batch"], clean: Float[Tensor, " batch"]
) -> Float[Tensor, "*senders batch"]:
    """(P_patched - P_clean) / P_clean of the target, from log probabilities (paper, §3.1).

    -1 when the edit takes the target away altogether, 0 when it changes nothing. Taken as
    expm1 of the difference, it stays exact where P_clean is tiny. An edit that raises the target's
    log probability by more than `MOST_LOG_CHANGE` counts as if by that much, with a warning: one
    such pair would make a head's mean infinite, and even so decides it alone.
    """
    wide = torch.promote_types(patched.dtype, torch.float32)
    change = patched.to(wide) - clean.to(wide)
    above = int((change > MOST_LOG_CHANGE).sum())
    if above:
        warnings.warn(
            f"{above} of {change.numel()} edits raise the target's log probability by more than "
            f"{MOST_LOG_CHANGE:g} and count as if by {MOST_LOG_CHANGE:g}; such pairs decide a "
            "mean alone: take pairs that the model answers, or metric=LOG_PROBABILITY.",
            stacklevel=2,
        )
    return torch.expm1(change.clamp(max=MOST_LOG_CHANGE))


@checked
def difference(
    patched: Float[Tensor, "*senders batch"], clean: Float[Tensor, " batch"]
) -> Float[Tensor, "*senders batch"]:
    """Patched minus clean value of a metric."""
    return patched - clean


@dataclass(frozen=True)
class Metric:
    """How a run is scored at the answer position, and a patched run against the clean one.

    A metric of one's own is a `Metric` with a function of logits; every engine takes it.

    Attributes:
        name: what it is called in results.
        value: from logits, `[*senders batch logits]`, and the pairs to a value for each run,
            `[*senders batch]`.
        change: from the values of patched runs and of the clean run to scores; below zero where
            the edit hurts.
        tokens: the tokens whose logits `value` needs for each pair, `[batch wanted]`, which it then
            gets in this order; without it, `value` gets the logits of the whole vocabulary, which
            cost far more.
        log_probabilities: `value` gets natural log probabilities of its tokens instead of logits.
            The whole vocabulary is computed then, but never held.
    """

    name: str
    value: Callable[[Tensor, PairBatch], Tensor]
    change: Callable[[Tensor, Tensor], Tensor] = difference
    tokens: Callable[[PairBatch], Tensor] | None = None
    log_probabilities: bool = False

    def of_logits(
        self, logits: Float[Tensor, "*senders batch d_vocab"], pairs: PairBatch
    ) -> Float[Tensor, "*senders batch"]:
        """The value of runs whose logits are known for the whole vocabulary."""
        if self.tokens is None:
            return self.value(logits, pairs)
        wanted = self.tokens(pairs).to(logits.device)
        if self.log_probabilities:
            each = [log_probability(logits, tokens) for tokens in wanted.unbind(-1)]
            return self.value(torch.stack(each, -1), pairs)
        return self.value(logits.gather(-1, wanted.expand(*logits.shape[:-1], -1)), pairs)


def _target_and_foil(pairs: PairBatch) -> Tensor:
    if pairs.foils is None:
        raise InputError(
            "A logit difference needs the token that each target is compared with: "
            "give PairBatch its foils."
        )
    return torch.stack([pairs.targets, pairs.foils], -1)


def _target_minus_foil(logits: Tensor, pairs: PairBatch) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide[..., 0] - wide[..., 1]


def _target_only(pairs: PairBatch) -> Tensor:
    return pairs.targets[:, None]


def _first(of_tokens: Tensor, pairs: PairBatch) -> Tensor:
    return of_tokens.to(torch.promote_types(of_tokens.dtype, torch.float32))[..., 0]


RELATIVE_PROBABILITY = Metric(
    "relative probability",
    _first,
    relative_probability_change,
    tokens=_target_only,
    log_probabilities=True,
)
"""(P_patched - P_clean) / P_clean of the target (paper, §3.1)."""

LOG_PROBABILITY = Metric("log probability", _first, tokens=_target_only, log_probabilities=True)
"""Change of the target's log probability, natural logarithm."""

LOGIT_DIFFERENCE = Metric("logit difference", _target_minus_foil, tokens=_target_and_foil)
"""Change of the target's logit minus its foil's. Two logits a run, not a vocabulary of them."""

TARGET_LOGIT = Metric("target logit", _first, tokens=_target_only)
"""Change of the target's logit."""
